"""The configs: what a model is (model.py; hf.py and gguf.py read it), what a user may change (settings.py), and what a
server is told (serving.py)."""

from porcelet.config.gguf import read_gguf
from porcelet.config.hf import read_file, read_hf, write_hf
from porcelet.config.model import ARCHITECTURES, ModelConfig, RopeScaling
from porcelet.config.serving import (
    Alias,
    Efforts,
    ModelEntry,
    ServeConfig,
    ServerConfig,
    preset_aliases,
    read_serve_config,
)
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
    "Alias",
    "Efforts",
    "EngineConfig",
    "ModelConfig",
    "ModelEntry",
    "RopeScaling",
    "ServeConfig",
    "ServerConfig",
    "TrainConfig",
    "override",
    "parse_memory",
    "parse_settings",
    "preset_aliases",
    "read_file",
    "read_gguf",
    "read_hf",
    "read_serve_config",
    "write_hf",
]
