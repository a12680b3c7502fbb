"""The model of step 0: a new one by the recipe's [model] table, or one from a folder; with its tokenizer."""

from __future__ import annotations

import dataclasses
import difflib
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from porcelet.config import ModelConfig, RopeScaling, TrainConfig, read_hf
from porcelet.errors import InputError, ModelError
from porcelet.models.transformer import Transformer, build, initialize
from porcelet.train import numerics
from porcelet.train.rendering import EOS, Renderer, make_tokenizer
from porcelet.weights.load import load

TEXT_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "special_tokens_map.json")
MSCALES = {"deepseek_v3": 1.0, "deepseek_v2": 0.707}  # others scale by YaRN's own 0.1 ln s + 1, which needs no field


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
    if not config.model and config.context_extension != 1.0:
        raise InputError("context_extension continues a model: give model=FOLDER, or a new one rope_scaling")
    if not config.model:
        make_tokenizer(output)
        return numerics.apply(initialize(build(_model_config(model_fields, output)), config.seed), config.dtype)
    folder = Path(config.model)
    if not folder.is_dir():
        raise ModelError(f"model {folder} is not a folder; training starts from one in Hugging Face form")
    for name in TEXT_FILES:
        if (folder / name).exists():
            shutil.copyfile(folder / name, output / name)
    return numerics.apply(extend_context(load(folder), config.context_extension), config.dtype)


def extend_context(model: Transformer, factor: float) -> Transformer:
    """The same weights for a context `factor` times as long, by YaRN (Peng et al. 2023) as DeepSeek applies it.

    Frequencies that turn less than once in the old context are divided by the factor, those that turn more than 32
    times stay (alpha 1, beta 32), and attention is sharpened: sqrt(t) = 0.1 ln s + 1 in V3 (report, section 4.3),
    0.0707 ln s + 1 in V2 (paper, section 3.1.4).
    """
    shape = model.config
    if factor == 1.0:
        return model
    if shape.rope_scaling is not None:
        kind, old = shape.rope_scaling.kind, shape.rope_scaling.factor
        raise InputError(f"context_extension is {factor}, but the model is extended already ({kind} by {old})")
    scaling = RopeScaling(
        kind="yarn",
        factor=factor,
        original_max_position_embeddings=shape.max_position_embeddings,
        mscale=MSCALES.get(shape.architecture),
        mscale_all_dim=MSCALES.get(shape.architecture),
    )
    longer = dataclasses.replace(
        shape, rope_scaling=scaling, max_position_embeddings=round(factor * shape.max_position_embeddings)
    )
    extended = build(longer, "meta")
    extended.load_state_dict(model.state_dict(), assign=True)
    return extended


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
    return read_hf(values | {"bos_token_id": 0, "eos_token_id": tokenizer.token_id(EOS)}, "[model]")
