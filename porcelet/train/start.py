"""The model of step 0 with its tokenizer: a new one by the recipe's [model] table, or one from the store, a folder or a
GGUF file."""

from __future__ import annotations

import dataclasses
import difflib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from porcelet import hub
from porcelet.config import LoraConfig, ModelConfig, RopeScaling, TrainConfig, read_hf
from porcelet.engine.codec import open_codec
from porcelet.errors import InputError
from porcelet.memory.fit import check_training
from porcelet.memory.tensors import Inventory, counted, read_inventory
from porcelet.models.transformer import Transformer, build, initialize
from porcelet.train import checkpoint, numerics
from porcelet.train.corpus.store import open_store, sentence_ends
from porcelet.train.lora import add_adapters
from porcelet.train.rendering import Renderer, make_tokenizer
from porcelet.weights.files import copy_text_files
from porcelet.weights.load import load

MSCALES = {"deepseek_v3": 1.0, "deepseek_v2": 0.707}  # others scale by YaRN's own 0.1 ln s + 1, which needs no field


def start_model(config: TrainConfig, model_fields: Mapping[str, Any], output: Path) -> Transformer:
    """The model of step 0, with adapters if the recipe has some; its tokenizer and chat format go to `output`."""
    if bool(config.model) == bool(model_fields):
        raise InputError("a recipe needs either model=FOLDER to start from or a [model] table, and not both")
    if config.model and Path(config.model).resolve() == output.resolve():
        raise InputError(f"output {config.output} is the model to start from; choose another output")
    if not config.model and config.context_extension != 1.0:
        raise InputError("context_extension continues a model: give model=FOLDER, or a new one rope_scaling")
    if config.dtype != "float32" and os.environ.get("PORCELET_KERNELS") == "reference":
        raise InputError(f"dtype is {config.dtype!r}, and PORCELET_KERNELS=reference computes in float32; unset one")
    _refuse_idle(config)
    claim(output)
    if not config.model:
        if config.data.corpus:
            copy_text_files(open_store(Path(config.data.corpus[0])).path, output)
        else:
            make_tokenizer(output, config.chat_format, config.digits)
        shape = _model_config(model_fields, output)
        _check_memory(config, counted(shape))
        return numerics.apply(initialize(build(shape), config.seed), config.dtype)
    path = hub.resolve(config.model)
    _check_memory(config, read_inventory(path))
    write_text_files(path, output)
    model = numerics.apply(extend_context(load(path), config.context_extension), config.dtype)
    if config.lora.rank:
        add_adapters(model, config.lora, config.seed)
    return model


def _check_memory(config: TrainConfig, model: Inventory) -> None:
    """Refuse a run that cannot fit into this machine's memory. What a GPU has is not looked at."""
    if config.device == "cpu":
        teacher = config.policy.teacher
        check_training(config, model, read_inventory(hub.resolve(teacher)) if teacher else None)


def _refuse_idle(config: TrainConfig) -> None:
    """Settings that would do nothing, or too late."""
    if not config.lora.rank and config.lora != LoraConfig():
        raise InputError("[lora] says how to adapt, but its rank is 0, which trains the whole model; give a rank")
    if not config.model and config.data.corpus and (config.chat_format, config.digits) != ("V3", 1):
        raise InputError(
            f"chat_format is {config.chat_format!r} and digits {config.digits}, but a corpus brings its own tokenizer; "
            "leave them out"
        )
    if config.data.held_out and not Path(config.data.held_out).exists():
        raise InputError(f"[data] held_out is {config.data.held_out!r}, which is not there")


def claim(output: Path) -> None:
    """Make a run's folder and mark it as one by its sessions.jsonl, before anything in it is written or cleared.

    Raises:
        InputError: it cannot be made, or holds files that are no run's.
    """
    mark = output / "sessions.jsonl"
    try:
        output.mkdir(parents=True, exist_ok=True)
        found = min((path.name for path in output.iterdir()), default="")
        if found and not mark.exists() and not checkpoint.newest(output):
            raise InputError(f"output {output} holds files that are no run's, such as {found}; choose another output")
        mark.touch()
    except OSError as problem:
        raise InputError(f"output {output} cannot be made: {problem.strerror}; choose another") from problem


def write_text_files(path: Path, output: Path) -> None:
    """Tokenizer and chat format of the model to start from, in Hugging Face form even where that is a GGUF file."""
    if path.is_dir():
        copy_text_files(path, output)
        return
    tokenizer, chat = open_codec(path)
    (output / "tokenizer.json").write_text(tokenizer.to_json(), encoding="utf-8")
    if chat.template:
        settings = {"bos_token": chat.bos or None, "eos_token": chat.eos or None, "chat_template": chat.template}
        text = json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", **settings}, ensure_ascii=False, indent=2)
        (output / "tokenizer_config.json").write_text(text, encoding="utf-8")


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
    bos, eos = sentence_ends(folder)
    return read_hf(values | {"bos_token_id": bos, "eos_token_id": eos}, "[model]")
