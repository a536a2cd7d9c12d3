"""What a model costs: parameters, FLOPs, time and memory, by part; throughput beside the dense model's."""
