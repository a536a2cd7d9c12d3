"""What a model costs: parameters, FLOPs, time and memory, by part; throughput beside the dense model's."""

from diffmoe.profiling.parameters import count_parameters as count_parameters
