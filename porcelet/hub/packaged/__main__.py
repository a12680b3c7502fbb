"""Make a model of the package: `python -m porcelet.hub.packaged RUN`, with RUN the output folder of a training run.

The run's files replace those in the model's folder and manifest.json notes their hashes; the card stays, it is written
by hand. Weights are stored as float16, half of a run's float32: no weight of a trained model is near its bounds, and
what rounding takes is far below what sampling adds. The chat template leaves out all turns before the last question: a
model that was trained on single questions solves none after another one.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

from porcelet.errors import ModelError
from porcelet.hub import packaged, store
from porcelet.hub.gather import CONFIG, TOKENIZER, WEIGHTS

MAX_BYTES = 8_000_000
TEXT = "tokenizer_config.json"
LOOP = "for message in messages %}"
LAST = (
    '{%- set last = namespace(at=0) %}{%- for message in messages %}{%- if message.role == "user" %}'
    "{%- set last.at = loop.index0 %}{%- endif %}{%- endfor %}"
)


def pack(run: Path, folder: Path) -> None:
    """Put the model of `run` into `folder`, where its card lies.

    Raises:
        ModelError: `run` holds no finished model, or one that is too large or does not fit float16.
    """
    names = (CONFIG, WEIGHTS, TOKENIZER, TEXT)
    for name in names:
        if not (run / name).is_file():
            raise ModelError(f"{run} has no {name}; give the output folder of a finished run")
    config, text = (json.loads((run / name).read_text(encoding="utf-8")) for name in (CONFIG, TEXT))
    if LOOP not in text.get("chat_template", ""):
        raise ModelError(f"{run / TEXT}: its chat_template has no {LOOP!r}; train with chat_format R1")
    text["chat_template"] = LAST + text["chat_template"].replace(LOOP, LOOP.replace("messages", "messages[last.at:]"))
    _write_json(folder / CONFIG, config | {"torch_dtype": "float16"})
    _write_json(folder / TEXT, text)
    _write_weights(run / WEIGHTS, folder / WEIGHTS)
    shutil.copyfile(run / TOKENIZER, folder / TOKENIZER)
    hashes = {name: store.sha256_of(folder / name) for name in sorted((*names, packaged.CARD))}
    store.finish(folder, packaged.SOURCE, "", hashes)


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _write_weights(source: Path, target: Path) -> None:
    with np.errstate(over="ignore"):
        tensors = {name: tensor.astype(np.float16) for name, tensor in load_file(source).items()}
    if spoilt := [name for name, tensor in tensors.items() if not np.isfinite(tensor).all()]:
        raise ModelError(f"{source}: {spoilt[0]} has values beyond float16's; train it anew")
    if (size := sum(tensor.nbytes for tensor in tensors.values())) > MAX_BYTES:
        raise ModelError(f"{source} takes {size} bytes as float16; at most {MAX_BYTES} are shipped")
    save_file(tensors, target, metadata={"format": "pt"})
    target.chmod(0o644)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m porcelet.hub.packaged", description=__doc__)
    parser.add_argument("run", type=Path, help="The output folder of a training run.")
    pack(parser.parse_args().run, packaged.folder_of(packaged.R1_MINI))
