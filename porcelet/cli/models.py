"""`porcelet pull`, `list`, `show`, `rm`, `verify`: the model store.

With --json a command prints one JSON value on standard output and nothing else; an error is then one JSON object,
{"error": {"kind", "message", "exit_code"}}, on standard error. Imports no torch.
"""

from __future__ import annotations

import json
import logging
import re
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from porcelet.cli.progress import progress_bar
from porcelet.errors import PorceletError

if TYPE_CHECKING:
    from porcelet.config import ModelConfig
    from porcelet.hub import StoredModel

DEFAULT = "smollm2-135m-instruct"
SHOWN_CONTEXT = 4096
Name = Annotated[str, typer.Argument(help="A model's name in the store.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON; an error is JSON on standard error.")]

logger = logging.getLogger(__name__)


def pull(
    source: Annotated[
        str, typer.Argument(help="A known name, hf:owner/name[@revision][:file.gguf], an https URL, or ./folder.")
    ] = DEFAULT,
    name: Annotated[str | None, typer.Option(help="What the store calls it; else the last part of the source.")] = None,
    as_json: Json = False,
) -> None:
    """Fetch a model into the store, whole and checked. An interrupted pull goes on where it broke off.

    hf:owner/name uses what the Hugging Face cache holds (HF_HOME, HF_HUB_CACHE) without network; HF_ENDPOINT, HF_TOKEN
    and HF_HUB_OFFLINE are honoured.

    An https URL names one .gguf file, with #sha256=... if known, or a folder of a repository's files; file.sha256
    beside a file is compared with it.

    A proxy comes from HTTPS_PROXY and NO_PROXY, a private certificate authority from SSL_CERT_FILE.
    """
    from porcelet import hub

    with _errors(as_json):
        path = fetch(source, name)
        model = _stored_at(path)
        assert model is not None
        kept = "comes with the package: nothing to fetch, it " if model.name in hub.PACKAGED else ""
        _print_json(_entry(model)) if as_json else print(f"{model.name} {kept}is at {path}")


def list_(as_json: Json = False) -> None:
    """List the models in the store, and those that come with the package."""
    from porcelet import hub

    with _errors(as_json):
        models = hub.list_models()
        if as_json:
            _print_json([_entry(model) for model in models])
            return
        for model in models:
            print(f"{model.name}  {model.size / 1e6:.1f} MB{_with_experts(model)}  {model.source}  {model.path}")


def show(
    model: Annotated[str, typer.Argument(help="A name in the store, a GGUF file or a model folder.")] = DEFAULT,
    context: Annotated[
        int | None, typer.Option(min=1, help="Tokens the cache shall hold; else 4096 or the model's maximum.")
    ] = None,
    as_json: Json = False,
) -> None:
    """What a model is: architecture, exact counts, and the memory it takes at a context."""
    from porcelet import hub

    with _errors(as_json):
        facts = describe(hub.resolve(model), context)
        if as_json:
            _print_json(facts)
            return
        for label, value in _lines(facts):
            print(f"{label:<12}  {value}")


def rm(name: Name, as_json: Json = False) -> None:
    """Remove a model from the store, its experts that were kept on disk, and what an interrupted pull of it left."""
    from porcelet import hub
    from porcelet.weights import records

    with _errors(as_json):
        path = hub.remove(name)
        files = records.remove(hub.experts(), path) if path else []
        if as_json:
            _print_json({"removed": name, "expert_files": [str(file) for file in files]})
        else:
            print(f"{name} removed" + (", and its experts on disk" if files else ""))


def verify(name: Name = DEFAULT, as_json: Json = False) -> None:
    """Compare every file of a stored model with its SHA-256, and its experts on disk with their checksums."""
    from porcelet import hub
    from porcelet.weights import records

    with _errors(as_json):
        model = hub.verify(name)
        experts = {file: records.verify(file) for file in records.found(hub.experts(), model.path)}
        if as_json:
            _print_json(_entry(model))
            return
        for file in model.files:
            print(f"{file.sha256}  {file.name}")
        for path, count in experts.items():
            print(f"{count} experts  {path}")
        print(f"{name} is intact")


def fetch(source: str, name: str | None = None) -> Path:
    """Pull a model with a progress bar on standard error; nothing is shown where it is there already."""
    from porcelet import hub
    from porcelet.weights.header import read_config

    logging.getLogger("httpx2").setLevel(logging.WARNING)  # it logs every request
    label = source.rpartition("/")[2].partition("#")[0] or source
    try:
        with progress_bar(f"fetching {label}") as progress:
            return hub.pull(source, progress, name=name, check=read_config)
    except KeyboardInterrupt:
        logger.info("interrupted; the same pull goes on from here, `porcelet rm` drops what was fetched")
        raise


def describe(path: Path, context: int | None = None) -> dict[str, Any]:
    """The facts of `show`. Sizes are bytes; memory is that of the main model, without its MTP layer.

    Raises:
        ModelError: the files cannot be read, or the architecture is not supported.
    """
    from porcelet.weights.header import read_config

    config, stored = read_config(path), _stored_at(path)
    tokens = context or min(config.max_position_embeddings, SHOWN_CONTEXT)
    sizes = _file_sizes(path, stored)
    weights = sum(size for name, size in sizes.items() if name.endswith((".safetensors", ".gguf")))
    return {
        "name": stored.name if stored else path.name,
        "path": str(path),
        "source": stored.source if stored else "",
        "revision": stored.revision if stored else "",
        "license": _license(path),
        **_counts(config, tokens),
        "stored_types": _stored_types(path),
        "files": sizes,
        "size": sum(sizes.values()),
        "memory": {
            "context": tokens,
            "weights_float32": 4 * config.num_parameters(),
            "weights_int8": config.packed_bytes(8),
            "weights_int4": config.packed_bytes(4),
            "weights_as_stored": weights,
            "cache_32bit": 4 * tokens * config.cache_values_per_token(),
            "cache_16bit": 2 * tokens * config.cache_values_per_token(),
        },
    }


# ---- facts ----------------------------------------------------------------------------------------------------------


def _counts(config: ModelConfig, tokens: int) -> dict[str, Any]:
    return {
        "architecture": config.architecture,
        "parameters": config.num_parameters(),
        "parameters_with_mtp": config.num_parameters(mtp=True),
        "active_parameters": config.num_active_parameters(),
        "layers": config.num_hidden_layers,
        "heads": config.num_attention_heads,
        "kv_heads": config.num_key_value_heads,
        "hidden_size": config.hidden_size,
        "vocabulary": config.vocab_size,
        "max_context": config.max_position_embeddings,
        "flops_per_token": config.flops_per_token(tokens),
        "cache_bytes_per_token_32bit": 4 * config.cache_values_per_token(),
        "cache_bytes_per_token_16bit": 2 * config.cache_values_per_token(),
    }


def _lines(facts: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """The facts as a person reads them."""
    memory = facts["memory"]
    active, total, mtp = facts["active_parameters"], facts["parameters"], facts["parameters_with_mtp"]
    yield "model", f"{facts['name']}  {facts['path']}"
    if facts["source"]:
        yield "source", f"{facts['source']} {facts['revision']}".rstrip()
    if facts["license"]:
        yield "license", facts["license"]
    yield "architecture", f"{facts['architecture']}, {facts['layers']} layers, width {facts['hidden_size']}"
    yield "heads", f"{facts['heads']}, {facts['kv_heads']} of keys and values"
    yield "parameters", f"{_count(total)} ({total:,}), active {_count(active)} ({active:,})"
    if mtp > total:
        yield "with MTP", f"{_count(mtp)} ({mtp:,})"
    yield "vocabulary", f"{facts['vocabulary']:,}"
    yield "context", f"up to {facts['max_context']:,} tokens"
    yield "stored as", ", ".join(f"{name} ({count})" for name, count in facts["stored_types"].items())
    yield "on disk", f"{_bytes(facts['size'])} in {len(facts['files'])} files"
    yield "computing", f"{_count(facts['flops_per_token'])} operations a token at {memory['context']:,} tokens"
    yield (
        "cache",
        (
            f"{facts['cache_bytes_per_token_32bit']:,} bytes a token in 32 bits, "
            f"{facts['cache_bytes_per_token_16bit']:,} in 16"
        ),
    )
    yield (
        "memory",
        (
            f"weights {_bytes(memory['weights_float32'])} as float32, {_bytes(memory['weights_int8'])} as int8, "
            f"{_bytes(memory['weights_int4'])} as int4, "
            f"{_bytes(memory['weights_as_stored'])} as stored"
        ),
    )
    yield (
        "",
        (
            f"+ cache for {memory['context']:,} tokens {_bytes(memory['cache_32bit'])} in 32 bits, "
            f"{_bytes(memory['cache_16bit'])} in 16"
        ),
    )


def _file_sizes(path: Path, stored: StoredModel | None) -> dict[str, int]:
    if stored:
        return {file.name: file.size for file in stored.files}
    files = [path] if path.is_file() else sorted(entry for entry in path.iterdir() if entry.is_file())
    return {file.name: file.stat().st_size for file in files}


def _stored_types(path: Path) -> dict[str, int]:
    """How many tensors each storage type has."""
    if path.is_file():
        from porcelet.weights import gguf

        return dict(Counter(tensor.type.name for tensor in gguf.read(path).tensors.values()).most_common())
    from porcelet.weights.shards import read_header

    entries = (entry for file in sorted(path.glob("*.safetensors")) for entry in read_header(file).values())
    return dict(Counter(entry.dtype for entry in entries).most_common())


def _license(path: Path) -> str:
    """As the model card or the GGUF's metadata name it, else the first line of LICENSE; "" where nothing says."""
    if path.is_file():
        from porcelet.weights import gguf

        if named := gguf.read(path).metadata.get("general.license"):
            return str(named)
    folder = path if path.is_dir() else path.parent
    if (folder / "README.md").is_file():
        card = (folder / "README.md").read_text(encoding="utf-8", errors="replace")
        if found := re.search(r"\A---\n(?:.*\n)*?license:[ \t]*(\S+)", card.partition("\n---\n")[0]):
            return found[1]
    if (folder / "LICENSE").is_file():
        lines = (folder / "LICENSE").read_text(encoding="utf-8", errors="replace").splitlines()
        return next((line.strip() for line in lines if line.strip()), "")
    return ""


def _stored_at(path: Path) -> StoredModel | None:
    from porcelet import hub

    return next((model for model in hub.list_models() if model.path == path), None)


# ---- printing -------------------------------------------------------------------------------------------------------


def _entry(model: StoredModel) -> dict[str, Any]:
    return {
        "name": model.name,
        "path": str(model.path),
        "source": model.source,
        "revision": model.revision,
        "size": model.size,
        "files": {file.name: {"size": file.size, "sha256": file.sha256} for file in model.files},
        "expert_files": _expert_files(model),
    }


def _expert_files(model: StoredModel) -> dict[str, int]:
    """The bytes of each file of the model's experts."""
    from porcelet import hub
    from porcelet.weights import records

    return {str(file): file.stat().st_size for file in records.found(hub.experts(), model.path)}


def _with_experts(model: StoredModel) -> str:
    num_bytes = sum(_expert_files(model).values())
    return f" (and {num_bytes / 1e6:.1f} MB of experts on disk)" if num_bytes else ""


def _print_json(value: object) -> None:
    print(json.dumps(value, indent=2, ensure_ascii=False))


def _count(number: int) -> str:
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.2f} {unit}"
    return str(number)


def _bytes(number: int) -> str:
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if number >= size:
            return f"{number / size:.2f} {unit}"
    return f"{number / 1e3:.1f} kB"


@contextmanager
def _errors(as_json: bool) -> Iterator[None]:
    """With --json an error is JSON too; without, `main` prints its one line."""
    try:
        yield
    except PorceletError as problem:
        if not as_json:
            raise
        error = {"kind": problem.kind, "message": str(problem), "exit_code": problem.exit_code}
        print(json.dumps({"error": error}, ensure_ascii=False), file=sys.stderr)
        raise typer.Exit(problem.exit_code) from problem
