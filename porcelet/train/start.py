"""The model of step 0: a new one by the recipe's [model] table, or one from a folder; with its tokenizer."""

from __future__ import annotations

import dataclasses
import difflib
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from porcelet.config import ModelConfig, TrainConfig, read_hf
from porcelet.errors import InputError, ModelError
from porcelet.models.transformer import Transformer, build, initialize
from porcelet.train.corpus.store import TOKENIZER_FILES, open_store, sentence_ends
from porcelet.train.rendering import Renderer, make_tokenizer
from porcelet.weights.load import load


def start_model(config: TrainConfig, model_fields: Mapping[str, Any], output: Path) -> Transformer:
    """The model of step 0; its tokenizer and chat format go to `output`."""
    if bool(config.model) == bool(model_fields):
        raise InputError("a recipe needs either model=FOLDER to start from or a [model] table, and not both")
    if config.model and Path(config.model).resolve() == output.resolve():
        raise InputError(f"output {config.output} is the model to start from; choose another output")
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as problem:
        raise InputError(f"output {config.output} cannot be made: {problem.strerror}; choose another") from problem
    if not config.model:
        if config.data.corpus:
            _copy_tokenizer(open_store(Path(config.data.corpus[0])).path, output)
        else:
            make_tokenizer(output)
        return initialize(build(_model_config(model_fields, output)), config.seed)
    folder = Path(config.model)
    if not folder.is_dir():
        raise ModelError(f"model {folder} is not a folder; training starts from one in Hugging Face form")
    _copy_tokenizer(folder, output)
    return load(folder)


def _copy_tokenizer(folder: Path, output: Path) -> None:
    for name in TOKENIZER_FILES:
        if (folder / name).exists():
            shutil.copyfile(folder / name, output / name)


def _model_config(fields: Mapping[str, Any], folder: Path) -> ModelConfig:
    """The [model] table, completed by what follows from the tokenizer."""
    known = [field.name for field in dataclasses.fields(ModelConfig)] + ["model_type"]
    strange = [name for name in fields if name not in known]
    if strange:
        near = difflib.get_close_matches(strange[0], known, n=1)
        raise InputError(f"[model]: unknown key {strange[0]!r}" + (f"; did you mean {near[0]!r}?" if near else ""))
    tokenizer = Renderer(folder).tokenizer
    values = {"vocab_size": tokenizer.vocab_size, **fields}
    if values["vocab_size"] < tokenizer.vocab_size:
        raise InputError(f"[model] vocab_size is {values['vocab_size']}; the tokenizer needs {tokenizer.vocab_size}")
    bos, eos = sentence_ends(folder)
    return read_hf(values | {"bos_token_id": bos, "eos_token_id": eos}, "[model]")
