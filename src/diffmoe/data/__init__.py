"""Data as tensors: pictures found, decoded and split (`sources`), batched (`batches`), texts tokenized (`text`).

What a later set reuses: `tables` and `folders` read rows, `pictures` decodes them, `cache` keeps them.
"""

from diffmoe.data.augmentation import Augmentation
from diffmoe.data.batches import Batch, Batches, normalize
from diffmoe.data.captions import (
    CaptionBatch,
    CaptionBatches,
    CaptionDataset,
    CaptionSplit,
    CaptionTokens,
    caption_tokens,
    used_tokens,
)
from diffmoe.data.descriptions import class_descriptions
from diffmoe.data.pictures import LazyImages, read_picture
from diffmoe.data.sources import ImageDataset, check_dataset, load_captions, load_dataset
from diffmoe.data.splits import Split
from diffmoe.data.text import END_ID, START_ID, VOCAB_SIZE, detokenize, tokenize

__all__ = [
    "END_ID",
    "START_ID",
    "VOCAB_SIZE",
    "Augmentation",
    "Batch",
    "Batches",
    "CaptionBatch",
    "CaptionBatches",
    "CaptionDataset",
    "CaptionSplit",
    "CaptionTokens",
    "ImageDataset",
    "LazyImages",
    "Split",
    "caption_tokens",
    "check_dataset",
    "class_descriptions",
    "detokenize",
    "load_captions",
    "load_dataset",
    "normalize",
    "read_picture",
    "tokenize",
    "used_tokens",
]
