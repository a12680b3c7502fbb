"""What was found, packed for whoever helps: one ZIP file of texts, without what is private (redaction.py).

    findings.json     every finding
    versions.json     porcelet, Python, the system, and the packages that porcelet uses
    machine.json      the processor and the memory
    environment.json  the variables that matter; of a token, that there is one
    config.json       the server's TOML file, if it was given
    server.log        the end of its log, if it was given (logs.py)
    redactions.json   how much was taken out of which kind

No conversation, no prompt and no key is in any of it.
"""

from __future__ import annotations

import json
import os
import platform
import re
import tempfile
import tomllib
import zipfile
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

from porcelet import __version__
from porcelet.doctor.environment import VARIABLES
from porcelet.doctor.finding import Finding
from porcelet.doctor.logs import tail
from porcelet.doctor.machine import ROOT, told_by
from porcelet.doctor.proxy import NAMES, with_scheme
from porcelet.doctor.redaction import Redactor
from porcelet.errors import CapacityError, InputError

SHOWN = (  # beside VARIABLES, of the environment
    *(spelt for name in (*NAMES, "NO_PROXY") for spelt in (name, name.lower())),
    *("SSL_CERT_FILE", "SSL_CERT_DIR", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"),
    *("HF_HOME", "HF_HUB_CACHE", "HF_ENDPOINT", "HF_HUB_OFFLINE", "XDG_CACHE_HOME", "XDG_DATA_HOME", "TMPDIR"),
    *("LANG", "LC_ALL", "PYTHONUTF8", "PYTHONIOENCODING", "PYTHONPATH", "LD_PRELOAD", "LD_LIBRARY_PATH"),
)
REDACTIONS = "redactions.json"
PROXIES = {spelt for name in NAMES for spelt in (name, name.lower())}
ONLY_WHETHER = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")
PROCESSOR = ("vendor_id", "cpu family", "model", "model name", "stepping", "microcode", "cpu MHz", "cache size")
FLAGS = re.compile(r"(?:avx|amx|fma|f16c|sse4|vnni|bf16|hypervisor)\w*")
MEMORY = ("MemTotal", "MemAvailable", "SwapTotal", "SwapFree", "CommitLimit", "Committed_AS", "HugePages_Total")


def check_free(file: Path) -> None:
    """See, before anything is looked at, that a bundle can be written there.

    Raises:
        InputError: something is there already, or its folder is not.
    """
    if os.path.lexists(file):
        raise InputError(f"{file} is there already; give --bundle another name")
    if not file.absolute().parent.is_dir():
        raise InputError(f"{file.absolute().parent} is no folder; make it, or give --bundle a file elsewhere")


def contents(
    findings: Sequence[Finding], log: Path | None = None, config: Path | None = None, redactor: Redactor | None = None
) -> dict[str, str]:
    """The bundle's texts by name, redacted.

    Raises:
        InputError: the log or the configuration cannot be read.
    """
    redactor = redactor or Redactor.of_this_machine()
    trees: dict[str, object] = {
        "versions.json": versions(),
        "machine.json": machine(),
        "environment.json": environment(os.environ),
    }
    if config is not None:
        trees["config.json"] = _configuration(config)
    texts = {"findings.json": _json([_finding(one, redactor) for one in findings])}
    texts |= {name: _json(redactor.tree(tree)) for name, tree in trees.items()}
    left_out = 0
    if log is not None:
        lines, left_out = tail(log)
        texts["server.log"] = "".join(f"{redactor.text(line)}\n" for line in lines)
    texts[REDACTIONS] = _json({"taken_out": dict(redactor.counts), "lines_of_the_log_left_out": left_out})
    return texts


def write(file: Path, texts: Mapping[str, str]) -> int:
    """Write a bundle that nobody else may read, whole or not at all; its size in bytes.

    Raises:
        InputError: something is there already, or its folder is not.
        CapacityError: it cannot be written.
    """
    check_free(file)
    try:
        with tempfile.TemporaryDirectory(prefix=".bundle-", dir=file.absolute().parent) as aside:
            unfinished = Path(aside) / "bundle.zip"
            with (
                open(os.open(unfinished, os.O_CREAT | os.O_WRONLY, 0o600), "wb") as opened,
                zipfile.ZipFile(opened, "w", zipfile.ZIP_DEFLATED) as bundle,
            ):
                for name, text in texts.items():
                    bundle.writestr(name, text)
            os.close(os.open(file, os.O_CREAT | os.O_EXCL, 0o600))  # so that nothing made meanwhile is replaced
            os.replace(unfinished, file)
    except FileExistsError as problem:
        raise InputError(f"{file} is there already; give --bundle another name") from problem
    except OSError as problem:
        raise CapacityError(f"{file} cannot be written: {problem.strerror}; give --bundle another folder") from problem
    return file.stat().st_size


def versions() -> dict[str, str]:
    """porcelet, Python, the system, and each package that porcelet asks for or could use, if it is there."""
    found = {"porcelet": __version__, "python": platform.python_version(), "system": platform.platform()}
    try:
        names = {re.split(r"[^\w.-]", wish, maxsplit=1)[0] for wish in requires("porcelet") or ()}
    except PackageNotFoundError:
        return found
    for name in sorted(names):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def machine(root: Path = ROOT) -> dict[str, object]:
    """The first processor as /proc/cpuinfo has it, how many there are, and the memory."""
    lines = [line.partition(":") for line in told_by(root / "proc/cpuinfo").splitlines()]
    fields = [(key.strip(), value.strip()) for key, _, value in lines]
    first = dict(reversed(fields))
    memory = (line.partition(":") for line in told_by(root / "proc/meminfo").splitlines())
    return {
        "processor": {name: first[name] for name in PROCESSOR if name in first},
        "flags": [flag for flag in first.get("flags", "").split() if FLAGS.fullmatch(flag)],
        "cores": sum(key == "processor" for key, _ in fields),
        "memory": {key: value.strip() for key, _, value in memory if key in MEMORY},
    }


def environment(variables: Mapping[str, str]) -> dict[str, str]:
    """The variables that matter, by name."""
    shown = {name: variables[name] for name in (*VARIABLES, *SHOWN) if name in variables}
    for name in PROXIES & shown.keys():
        shown[name] = with_scheme(shown[name])  # or a password in it would not be known for one
    return shown | {f"whether {name} is set": "yes" if variables.get(name) else "no" for name in ONLY_WHETHER}


def _configuration(file: Path) -> dict[str, object]:
    try:
        return tomllib.loads(file.read_text(encoding="utf-8"))
    except OSError as problem:
        raise InputError(f"{file} cannot be read: {problem.strerror}; --config takes the server's file") from problem
    except ValueError as problem:
        raise InputError(f"{file} is not TOML: {problem}; --config takes the server's file") from problem


def _finding(finding: Finding, redactor: Redactor) -> dict[str, str]:
    """Redacted where it is free text: a code that is somebody's name stays a code."""
    texts = {"cause": redactor.text(finding.cause), "remedy": redactor.text(finding.remedy)}
    return {"code": finding.code, "state": finding.state} | texts


def _json(tree: object) -> str:
    return json.dumps(tree, indent=2, ensure_ascii=False) + "\n"
