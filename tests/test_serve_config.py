"""The server's file: what it says, what stands where it says nothing, and what it may not say."""

from __future__ import annotations

from pathlib import Path

import pytest

from porcelet.config import Alias, read_serve_config
from porcelet.errors import InputError

MODELS = '[models.small]\nsource = "a.gguf"\nthreads = 1\n[models.large]\nsource = "b"\n'


def test_what_it_says(tmp_path: Path) -> None:
    """Models, aliases, efforts and limits are the file's; a model's own engine settings win over the command line's."""
    text = MODELS + '[aliases.fast]\nmodel = "small"\nthinking = false\n[efforts]\nlow = 7\n[server]\nmax_waiting = 3\n'
    file = tmp_path / "serve.toml"
    file.write_text(text)
    config = read_serve_config(file, {"threads": "2", "weights": "float32"})
    assert [(name, entry.source, entry.engine.threads) for name, entry in config.models.items()] == [
        ("small", "a.gguf", 1),
        ("large", "b", 2),
    ]
    assert {entry.engine.weights for entry in config.models.values()} == {"float32"}
    assert config.aliases == {"fast": Alias("small", thinking=False)}
    assert (config.efforts.budget("low"), config.efforts.budget("max"), config.server.max_waiting) == (7, None, 3)


def test_deepseeks_names_stand_for_the_first_model(tmp_path: Path) -> None:
    """Without a table of aliases there are three, without, with and as asked; a model's own name is left to it."""
    file = tmp_path / "serve.toml"
    file.write_text(MODELS + '[models.deepseek-flash]\nsource = "c"\n')
    assert read_serve_config(file, {}).aliases == {
        "deepseek-chat": Alias("small", thinking=False),
        "deepseek-reasoner": Alias("small", thinking=True),
    }


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("", "names no model"),
        ("[models", "is not TOML"),
        ("models = 3", "models is 3"),
        ("[models.a]\nweights = 'int8'", "source is None"),
        ("[models.a]\nsource = 'x'\nthread = 1", "did you mean 'threads'"),
        (MODELS + "[aliases.fast]\nmodel = 'other'", "served: small, large"),
        (MODELS + "[aliases.small]\nmodel = 'large'", "rename one of them"),
        (MODELS + "[aliases.fast]\nmodel = 'small'\nthinking = 'no'", "true or false"),
        (MODELS + "[aliases.fast]\nmodel = 'small'\nthink = true", "unknown key 'think'"),
        (MODELS + "[efforts]\nlow = -1", "0 (no limit) or more"),
        (MODELS + "[server]\nmax_waiting = 0", "at least 1"),
        (MODELS + "[server]\nkeep_alive = 0", "positive"),
        (MODELS + "[limits]\nx = 1", "unknown table [limits]"),
    ],
)
def test_what_it_may_not_say(tmp_path: Path, text: str, named: str) -> None:
    """Each mistake is named, with what would be right."""
    file = tmp_path / "serve.toml"
    file.write_text(text)
    with pytest.raises(InputError) as problem:
        read_serve_config(file, {})
    assert named in str(problem.value)
