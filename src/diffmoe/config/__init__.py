"""Every setting of the program, once: frozen dataclasses whose field docstrings are the command line's help.

Layers, each over the one before (`settings`): the defaults of the dataclasses, the preset (`configs/presets.yaml`), the
dataset's recipe (`configs/<dataset>.yaml`, `recipes`), the user's own YAML (`--config`), the flags.

Nothing here imports anything heavy, so that `diffmoe --help` answers at once.
"""

from diffmoe.config.data import EMBEDDED_DATASETS, HUB_DATASETS, DataConfig, dataset_name, set_names
from diffmoe.config.errors import MAX_SEED, UserError, expanded, nearest
from diffmoe.config.model import END_ID, START_ID, VOCAB_SIZE, ModelConfig
from diffmoe.config.output import GenerationConfig, VisualizationConfig
from diffmoe.config.training import RunConfig, TrainingConfig

__all__ = [
    "EMBEDDED_DATASETS",
    "END_ID",
    "HUB_DATASETS",
    "MAX_SEED",
    "START_ID",
    "VOCAB_SIZE",
    "DataConfig",
    "GenerationConfig",
    "ModelConfig",
    "RunConfig",
    "TrainingConfig",
    "UserError",
    "VisualizationConfig",
    "dataset_name",
    "expanded",
    "nearest",
    "set_names",
]
