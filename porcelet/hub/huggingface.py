"""Models from the Hugging Face hub, or from its cache on this machine.

`hf:owner/name[@revision][:file.gguf]`. What the library's cache (HF_HUB_CACHE, HF_HOME) holds of the revision is
linked into the store, not fetched and not copied; if it holds all, nothing is asked of the network. A hard link where
the cache is on the store's disk; else a symbolic one, which is said, as clearing the cache then breaks the model.
The rest is fetched at the commit that the revision names, and compared with the hub's SHA-256 where it gives one.
"""

from __future__ import annotations

import logging
import os
import re
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx2
from huggingface_hub import constants, get_token, snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

from porcelet.errors import InputError, ModelError
from porcelet.hub import gather
from porcelet.hub.download import HTTP_PROBLEMS, Remote, Report, check_response, download, http_client, unreachable
from porcelet.hub.gather import CONFIG, INDEX, TOKENIZER, WEIGHTS, Gathered, Offer
from porcelet.hub.store import sha256_of
from porcelet.types import Progress

FORM = re.compile(r"hf:([\w.-]+/[\w.-]+)(?:@([\w./-]+))?(?::([^:]+\.gguf))?", re.ASCII)
SHA256 = re.compile(r"[0-9a-f]{64}")

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Repository:
    """A repository at a revision: a branch, a tag or a commit. `file` is the GGUF file asked for, if one is."""

    id: str
    revision: str
    file: str

    @property
    def source(self) -> str:
        revision = "" if self.revision == "main" else f"@{self.revision}"
        return f"hf:{self.id}{revision}" + (f":{self.file}" if self.file else "")


@dataclass(frozen=True)
class Listing:
    """What a repository holds at one commit: sizes and, where the hub gives them, SHA-256 by file name."""

    commit: str
    files: dict[str, tuple[int | None, str]]


def is_offline() -> bool:
    """Whether HF_HUB_OFFLINE forbids to ask the hub."""
    return bool(constants.HF_HUB_OFFLINE)


def endpoint() -> str:
    """The hub's address: HF_ENDPOINT, or the public one."""
    return str(constants.ENDPOINT)


def check_reachable() -> str:
    """The hub's address, once it has answered anything.

    Raises:
        ModelError: it cannot be reached.
        InputError: the HTTP settings of the environment cannot be used.
    """
    with http_client() as client:
        try:
            client.head(constants.ENDPOINT)
        except HTTP_PROBLEMS as problem:
            raise unreachable(constants.ENDPOINT, problem) from problem
    return constants.ENDPOINT


def parse(source: str) -> Repository:
    """Raises InputError for what is not `hf:owner/name[@revision][:file.gguf]`."""
    match = FORM.fullmatch(source)
    if match is None or ".." in source:
        raise InputError(f"{source!r} is not a model of the hub; the form is hf:owner/name[@revision][:file.gguf]")
    return Repository(match[1], match[2] or "main", match[3] or "")


def fetch(repository: Repository, folder: Path, progress: Progress) -> Gathered:
    """Gather a repository's model in `folder`.

    Raises:
        InputError: several GGUF files to choose from.
        ModelError: offline or not reachable, no such repository or file, no access, damaged bytes.
        CapacityError: not enough disk.
    """
    with http_client() as client:
        listing = _cached_listing(repository) or _ask_hub(client, repository)
        gguf = gather.choose_gguf(listing.files, repository.file, repository.source)
        look = partial(_offer, client, repository, listing)
        if gguf:
            sha256 = gather.gather_gguf(look(gguf), gguf, folder, repository.source, progress)
        else:
            extras = [name for name in listing.files if gather.is_extra(name)]
            sha256 = gather.gather_folder(look, extras, folder, repository.source, progress)
    return Gathered(folder=folder, sha256=sha256, revision=listing.commit)


def _cached_listing(repository: Repository) -> Listing | None:
    """The model as the cache holds it, if it holds all of it; asks no network."""
    try:
        snapshot = Path(
            snapshot_download(
                repository.id,
                revision=repository.revision,
                local_files_only=True,
                allow_patterns=[repository.file] if repository.file else [CONFIG, INDEX, TOKENIZER],
            )
        )
    except LocalEntryNotFoundError:
        return None
    except HFValidationError as problem:
        reason = " ".join(str(problem).split())
        raise InputError(f"{repository.source} cannot be a model of the hub: {reason}; use hf:owner/name") from problem
    names = [str(path.relative_to(snapshot)) for path in snapshot.rglob("*") if path.is_file()]
    if not _is_complete(snapshot, set(names), repository.file):
        return None
    return Listing(snapshot.name, {name: (None, "") for name in names})


def _is_complete(snapshot: Path, names: set[str], file: str) -> bool:
    if file:
        return file in names
    if not {CONFIG, TOKENIZER} <= names:
        return False
    if INDEX not in names:
        return WEIGHTS in names
    index = gather.read_json(snapshot / INDEX, str(snapshot / INDEX))
    return names.issuperset(gather.shard_names(index, str(snapshot / INDEX)))


def _ask_hub(client: httpx2.Client, repository: Repository) -> Listing:
    """The commit and the files of a revision, from the hub."""
    if constants.HF_HUB_OFFLINE:
        raise ModelError(
            f"{repository.source} is not whole in the cache {constants.HF_HUB_CACHE}, and HF_HUB_OFFLINE forbids to "
            "fetch it; unset that, or pull a mirror or a folder"
        )
    url = f"{constants.ENDPOINT}/api/models/{repository.id}/revision/{quote(repository.revision, safe='')}"
    try:
        response = client.get(url, params={"blobs": "true"}, headers=_headers())
    except HTTP_PROBLEMS as problem:
        raise unreachable(url, problem) from problem
    _check_access(response, repository)
    try:
        answer = response.json()
        files = {entry["rfilename"]: _size_and_hash(entry) for entry in answer["siblings"] if _is_plain(entry)}
        return Listing(_commit(answer["sha"]), files)
    except (ValueError, KeyError, TypeError, AttributeError) as problem:
        raise ModelError(f"{url} answers with something else than a repository; check HF_ENDPOINT") from problem


def _commit(sha: str) -> str:
    if not re.fullmatch(r"[0-9a-f]{40,64}", sha):
        raise ValueError("no commit")
    return sha


def _is_plain(entry: dict[str, Any]) -> bool:
    """Whether a file's name is a path that stays below its folder."""
    return not {"", ".", ".."}.intersection(entry["rfilename"].split("/"))


def _size_and_hash(entry: dict[str, Any]) -> tuple[int | None, str]:
    size, sha256 = entry.get("size"), (entry.get("lfs") or {}).get("sha256", "")
    if not (size is None or (isinstance(size, int) and size >= 0)) or not re.fullmatch(r"|[0-9a-f]{64}", sha256):
        raise ValueError("no size or no SHA-256")
    return size, sha256


def _offer(client: httpx2.Client, repository: Repository, listing: Listing, name: str) -> Offer | None:
    """A file of the listing: linked from the cache where it lies there, else fetched."""
    if name not in listing.files:
        return None
    size, sha256 = listing.files[name]
    cached = try_to_load_from_cache(repository.id, name, revision=listing.commit)
    if isinstance(cached, str):
        blob = Path(cached).resolve()
        return Offer(
            size=blob.stat().st_size, disk=0, obtain=lambda target, report: _link(blob, target, sha256, report)
        )
    remote = Remote(
        url=f"{constants.ENDPOINT}/{repository.id}/resolve/{listing.commit}/{quote(name)}",
        size=size,
        version=sha256 or listing.commit,
        sha256=sha256,
        headers=_headers(),
    )
    return Offer(size=size, disk=size or 0, obtain=lambda target, report: download(client, remote, target, report))


def _link(blob: Path, target: Path, sha256: str, report: Report) -> str:
    """Link a file of the cache into the store; the cache names large files by their SHA-256."""
    expected = sha256 or (blob.name if SHA256.fullmatch(blob.name) else "")
    found = sha256_of(blob)
    if expected not in ("", found):
        raise ModelError(f"{blob} has SHA-256 {found}, not {expected}; delete it and pull again")
    target.unlink(missing_ok=True)
    try:
        os.link(blob, target)
    except OSError as problem:  # another disk, or another owner
        target.symlink_to(blob)
        logger.info("%s points to %s (%s); clearing that cache breaks the model", target.name, blob, problem.strerror)
    report(blob.stat().st_size)
    return found


def _check_access(response: httpx2.Response, repository: Repository) -> None:
    """The hub answers 401 for what does not exist and what may not be seen alike; a header tells more."""
    code = response.headers.get("X-Error-Code", "")
    if code == "GatedRepo":
        raise ModelError(
            f"{repository.source} is gated; accept its terms on {constants.ENDPOINT}/{repository.id}, then set HF_TOKEN"
        )
    if code == "RevisionNotFound":
        raise ModelError(f"hf:{repository.id} has no revision {repository.revision!r}; name a branch, tag or commit")
    if code == "RepoNotFound" or response.status_code in (401, 404):
        raise ModelError(
            f"hf:{repository.id} does not exist or is private; check the name, or set HF_TOKEN to a token for it"
        )
    check_response(response)


def _headers() -> dict[str, str]:
    """The token alone: the library's own headers would tell the hub about this machine."""
    if constants.HF_HUB_DISABLE_IMPLICIT_TOKEN:
        return {}
    token = get_token()
    return {"Authorization": f"Bearer {token}"} if token else {}
