"""The configs: what a model is (model.py; hf.py and gguf.py read it), what a user may change (settings.py), what a
server is told (serving.py) and what a training run is (training.py)."""

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
    override,
    parse_memory,
    parse_settings,
)
from porcelet.config.training import (
    DRAWING,
    DataConfig,
    EvaluateConfig,
    LogConfig,
    LoraConfig,
    OptimizerConfig,
    PolicyConfig,
    RewardConfig,
    TaskConfig,
    TrainConfig,
)

__all__ = [
    "ARCHITECTURES",
    "DRAWING",
    "PAGE_SIZE",
    "REPLAYED_TOKENS",
    "Alias",
    "DataConfig",
    "Efforts",
    "EngineConfig",
    "EvaluateConfig",
    "LogConfig",
    "LoraConfig",
    "ModelConfig",
    "ModelEntry",
    "OptimizerConfig",
    "PolicyConfig",
    "RewardConfig",
    "RopeScaling",
    "ServeConfig",
    "ServerConfig",
    "TaskConfig",
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
