"""The three configs: what a model is (model.py; hf.py and gguf.py read it), what a user may change (settings.py)."""

from porcelet.config.gguf import read_gguf
from porcelet.config.hf import read_file, read_hf, write_hf
from porcelet.config.model import ARCHITECTURES, ModelConfig, RopeScaling
from porcelet.config.settings import (
    PAGE_SIZE,
    REPLAYED_TOKENS,
    EngineConfig,
    TrainConfig,
    override,
    parse_memory,
    parse_settings,
)

__all__ = [
    "ARCHITECTURES",
    "PAGE_SIZE",
    "REPLAYED_TOKENS",
    "EngineConfig",
    "ModelConfig",
    "RopeScaling",
    "TrainConfig",
    "override",
    "parse_memory",
    "parse_settings",
    "read_file",
    "read_gguf",
    "read_hf",
    "write_hf",
]
