"""The port to listen on, and the way to the model hub."""

from __future__ import annotations

import errno
import os
import re
import socket
from pathlib import Path

from porcelet.doctor.finding import Finding, told
from porcelet.doctor.machine import ROOT, told_by
from porcelet.doctor.proxy import address
from porcelet.errors import PorceletError
from porcelet.hub.huggingface import check_reachable, endpoint, is_offline

PORT = 8000  # of `porcelet serve`
SECONDS = 5.0
NO_LOOPBACK = "bring the loopback interface up (ip link set lo up), or look at the sandbox that porcelet runs in"
LISTENS = "0A"  # a socket's state in /proc/net/tcp


def port() -> Finding:
    """Whether `porcelet serve` could listen where it does by itself."""
    try:
        socket.create_server(("127.0.0.1", PORT)).close()
    except OSError as problem:
        if problem.errno == errno.EADDRINUSE:
            by = taker(PORT)
            cause = f"port {PORT} on 127.0.0.1 is taken, by {by or 'a running server perhaps'}"
            return Finding("port", "note", cause, "start another one with `porcelet serve --port`")
        cause = f"nothing can listen on 127.0.0.1 port {PORT}: {problem.strerror}"
        return Finding("port", "problem", cause, NO_LOOPBACK)
    return Finding("port", "ok", f"{PORT} on 127.0.0.1 is free")


def hub_access(ask: bool) -> Finding:
    """Whether models could be fetched; it is tried only if `ask`."""
    if is_offline():
        return Finding("network", "ok", "HF_HUB_OFFLINE is set: models come from the store and the hub's cache alone")
    if not ask:
        return Finding("network", "ok", "not asked for; `porcelet doctor --network` tries the model hub")
    if amiss := _through_proxy():
        return amiss
    try:
        return Finding("network", "ok", f"{check_reachable()} answers")
    except PorceletError as problem:
        return told("network", "problem", problem)


def taker(port: int, root: Path = ROOT) -> str:
    """The program that listens on a port, and its process; empty where the system or its rights do not tell."""
    inodes = set()
    for file in (root / "proc/net/tcp", root / "proc/net/tcp6"):
        for fields in (line.split() for line in told_by(file).splitlines()[1:]):
            if fields[1].endswith(f":{port:04X}") and fields[3] == LISTENS:
                inodes.add(f"socket:[{fields[9]}]")
    for process in sorted((root / "proc").glob("[0-9]*")):
        if inodes and _holds(process, inodes):
            words = told_by(process / "cmdline").split("\0")
            ours = any(re.search(r"(^|/)porcelet$", word) for word in words[:3])
            return f"{'porcelet' if ours else told_by(process / 'comm').strip()} (process {process.name})"
    return ""


def _holds(process: Path, inodes: set[str]) -> bool:
    try:
        return any(os.readlink(file) in inodes for file in (process / "fd").iterdir())
    except OSError:  # another user's, or gone
        return False


def _through_proxy() -> Finding | None:
    """What is wrong with the first hop, if a proxy is one."""
    proxy = address(endpoint())
    if proxy is None:
        return None
    try:
        socket.create_connection(proxy, timeout=SECONDS).close()
    except OSError as problem:
        cause = f"the proxy {proxy[0]}:{proxy[1]} does not answer: {problem.strerror or problem}"
        return Finding("network", "problem", cause, "check HTTPS_PROXY with whoever runs the proxy, or unset it")
    return None
