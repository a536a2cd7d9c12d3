"""Data as tensors: pictures found, decoded and split (`sources`), batched (`batches`), texts tokenized (`text`)."""
