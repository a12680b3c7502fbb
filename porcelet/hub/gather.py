"""Which files make a model, whatever they come from, and bringing them together in the order that fails early.

A source offers files by name. `config.json` comes first: an architecture we do not know is refused before a gigabyte
is fetched. Then the index of the weights names the shards; only now the sizes are known and compared with the disk.
Files that could run code (.py) or that must be unpickled (.bin, .pth, .pickle) are never asked for.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath

from porcelet.config import read_hf
from porcelet.errors import InputError, ModelError
from porcelet.hub.download import Report
from porcelet.hub.store import need_space
from porcelet.types import Progress

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
TOKENIZER = "tokenizer.json"
EXTRAS = ("generation_config.json", TOKENIZER, "tokenizer_config.json", "chat_template.jinja", "LICENSE*", "README.md")
MAX_JSON = 1 << 26  # V3's index has 91,000 entries in 9 MB


@dataclass(frozen=True, kw_only=True)
class Offer:
    """A file that a source has. `obtain` puts it at a path and returns its SHA-256; `disk` is what that takes."""

    size: int | None
    disk: int
    obtain: Callable[[Path, Report], str]


@dataclass(frozen=True, kw_only=True)
class Gathered:
    """A finished model: the folder that holds it, each file's SHA-256, and the source's revision if it has one."""

    folder: Path
    sha256: dict[str, str]
    revision: str = ""


Look = Callable[[str], Offer | None]


def gather_gguf(offer: Offer | None, name: str, folder: Path, source: str, progress: Progress) -> dict[str, str]:
    """Bring one GGUF file into `folder`; its SHA-256 by name.

    Raises:
        ModelError: there is none, or it is something else.
        CapacityError: not enough disk.
    """
    if offer is None:
        raise ModelError(f"{source} does not exist; check the address")
    name = PurePosixPath(name).name
    sha256 = obtain_all({name: offer}, folder, progress)
    with (folder / name).open("rb") as file:
        if file.read(4) == b"GGUF":
            return sha256
    (folder / name).unlink()
    raise ModelError(f"{source} is not a GGUF file: it does not begin with 'GGUF'")


def gather_folder(look: Look, extras: Iterable[str], folder: Path, source: str, progress: Progress) -> dict[str, str]:
    """Bring a model of safetensors into `folder`; each file's SHA-256. `extras` are the names to try besides.

    Raises:
        ModelError: a file is missing, or the architecture is not supported.
        CapacityError: not enough disk.
    """
    sha256 = {CONFIG: _obtain_json(look(CONFIG), CONFIG, folder, source)}
    read_hf(read_json(folder / CONFIG, f"{source}: {CONFIG}"), f"{source}: {CONFIG}")
    if (index := look(INDEX)) is not None:
        sha256[INDEX] = _obtain_json(index, INDEX, folder, source)
        shards = shard_names(read_json(folder / INDEX, f"{source}: {INDEX}"), f"{source}: {INDEX}")
    else:
        shards = [WEIGHTS]
    found = {name: look(name) for name in (*shards, *extras)}
    for name in shards:
        if found[name] is None:
            raise ModelError(f"{source} has no {name}; a model needs {CONFIG} and {WEIGHTS} or {INDEX} with its shards")
    offers = {name: offer for name, offer in found.items() if offer is not None}
    return sha256 | obtain_all(offers, folder, progress)


def obtain_all(offers: Mapping[str, Offer], folder: Path, progress: Progress) -> dict[str, str]:
    """Obtain files of known offers, with one progress over all of them."""
    present = sum(path.stat().st_size for path in folder.iterdir() if path.name.removesuffix(".part") in offers)
    need_space(max(0, sum(offer.disk for offer in offers.values()) - present))
    total = sum(offer.size or 0 for offer in offers.values())
    done, sha256 = 0, {}
    for name, offer in offers.items():
        sha256[name] = offer.obtain(folder / name, _after(done, total, progress))
        done += (folder / name).stat().st_size
    progress(done, max(done, total))
    return sha256


def _after(done: int, total: int, progress: Progress) -> Report:
    return lambda num_bytes: progress(done + num_bytes, total)


def is_extra(name: str) -> bool:
    """A file besides config and weights that we read, at the top of its source."""
    return "/" not in name and any(fnmatchcase(name, pattern) for pattern in EXTRAS)


def choose_gguf(names: Iterable[str], wanted: str, source: str) -> str:
    """The GGUF file meant by `wanted`, or the only one there is; "" where the source holds safetensors.

    Raises:
        InputError: several to choose from, or none of the wanted name.
        ModelError: neither safetensors nor GGUF.
    """
    ggufs = sorted(name for name in names if name.endswith(".gguf"))
    if wanted:
        if wanted not in ggufs:
            raise InputError(f"{source} has no {wanted}; its GGUF files: {', '.join(ggufs) or 'none'}")
        return wanted
    if any(name.endswith(".safetensors") and "/" not in name for name in names):
        return ""
    if len(ggufs) > 1:
        example = source + (":" if source.startswith("hf:") else "/") + ggufs[0]
        raise InputError(f"{source} holds several GGUF files; name one, as in {example}: {', '.join(ggufs)}")
    if not ggufs:
        raise ModelError(f"{source} holds neither *.safetensors nor *.gguf; other weights are not read")
    return ggufs[0]


def shard_names(index: dict[str, object], source: str) -> list[str]:
    """The shards that an index names. A shard is a file beside it, never a path that leads elsewhere."""
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelError(f"{source} has no weight_map; it is not an index of safetensors shards")
    shards = sorted({str(name) for name in weight_map.values()})
    for name in shards:
        if PurePosixPath(name).name != name or not name.endswith(".safetensors"):
            raise ModelError(f"{source} names the shard {name!r}, which is not a safetensors file beside it")
    return shards


def _obtain_json(offer: Offer | None, name: str, folder: Path, source: str) -> str:
    if offer is None:
        raise ModelError(f"{source} has no {name}; a model needs {CONFIG} and {WEIGHTS} or {INDEX} with its shards")
    if (offer.size or 0) > MAX_JSON:
        raise ModelError(f"{source}: {name} has {offer.size} bytes; at most {MAX_JSON} are read")
    need_space(offer.disk)
    return offer.obtain(folder / name, lambda num_bytes: None)


def read_json(path: Path, source: str) -> dict[str, object]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as problem:
        raise ModelError(f"{source} is not valid JSON: {problem}") from problem
    if not isinstance(values, dict):
        raise ModelError(f"{source} holds a {type(values).__name__}; a JSON object was expected")
    return values
