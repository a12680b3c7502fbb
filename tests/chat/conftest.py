"""A small byte-level tokenizer with every special token that a chat format uses, and `transformers`' from its file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Library

from porcelet.chat import builtin
from porcelet.tokenizer import Tokenizer

SPECIAL = list(
    dict.fromkeys(
        [
            *(builtin.IM_START, builtin.IM_END, builtin.BOS, builtin.EOS, builtin.USER, builtin.ASSISTANT),
            *(builtin.THINK, builtin.END_THINK, builtin.CALLS, builtin.END_CALLS, builtin.CALL, builtin.SEP),
            *(builtin.END_CALL, builtin.OUTPUTS, builtin.END_OUTPUTS, builtin.OUTPUT, builtin.END_OUTPUT),
        ]
    )
)


def write_tokenizer(path: Path, special: list[str]) -> None:
    """Its merges join spaces and line breaks: what goes wrong at seams would show."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("Ċ", "Ċ"), ("Ġ", "Ġ"), ("Ġ", "a"), ("ĊĊ", "ĊĊ"), ("e", "r"), (":", "Ġ"), ("<", "|")]
    vocabulary = [*letters, *("".join(merge) for merge in merges)]
    library = Library(models.BPE({token: id for id, token in enumerate(vocabulary)}, merges))
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    library.add_tokens([AddedToken(text, normalized=False) for text in special])
    library.save(str(path / "tokenizer.json"))


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("chat")
    write_tokenizer(path, SPECIAL)
    return path


@pytest.fixture(scope="session")
def tokenizer(folder: Path) -> Tokenizer:
    return Tokenizer.from_folder(folder)


@pytest.fixture(scope="session")
def reference(folder: Path) -> Any:
    """`transformers`' tokenizer from the same file."""
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))
