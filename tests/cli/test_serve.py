"""Which models `porcelet serve` serves, and whose the settings of the command line are."""

from __future__ import annotations

from pathlib import Path

from porcelet import hub
from porcelet.cli.serve import _config
from porcelet.config import EngineConfig


def test_two_models_unless_told_otherwise() -> None:
    """The default model comes first and takes the settings; a memory meant for it is not also the little one's."""
    config = _config([], None, ["cache_memory=0.5", "threads=2"])
    assert list(config.models) == [hub.DEFAULT_MODEL, hub.R1_MINI]
    assert config.models[hub.DEFAULT_MODEL].engine == EngineConfig(cache_memory="0.5", threads=2)
    assert config.models[hub.R1_MINI].engine == EngineConfig(threads=1)
    assert {alias.model for alias in config.aliases.values()} == {hub.DEFAULT_MODEL}


def test_only_what_was_named(tmp_path: Path) -> None:
    """With --model or --config nothing is added, and the little one, named, takes the settings like any other."""
    assert list(_config([hub.DEFAULT_MODEL], None, []).models) == [hub.DEFAULT_MODEL]
    little = _config([hub.R1_MINI], None, ["threads=2"])
    assert {name: entry.engine.threads for name, entry in little.models.items()} == {hub.R1_MINI: 2}
    file = tmp_path / "serve.toml"
    file.write_text(f'[models.small]\nsource = "{hub.R1_MINI}"\n')
    assert list(_config([], file, []).models) == ["small"]
