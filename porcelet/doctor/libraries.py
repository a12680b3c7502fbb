"""What porcelet needs of other packages: whether it is installed, new enough, and loads.

Reads what the installed packages say of themselves, and loads those with native code in a process of its own: one that
was built for another processor would end this one.
"""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, requires, version

from porcelet.doctor.finding import Finding

NATIVE = ("numpy", "safetensors", "tokenizers", "msgspec", "llguidance")  # torch takes seconds, and has its own finding
EXTRAS = ("train", "plan", "gpu", "track", "eval")  # those for users
SECONDS = 60
AGAIN = "pip install --force-reinstall --no-deps"


def dependencies() -> Finding:
    """Whether each package that porcelet asks for is there, in a version that it can use."""
    code = "libraries"
    try:
        wanted = _asked_for("")
    except PackageNotFoundError:
        return Finding(code, "note", "porcelet is not installed, so nothing says what it needs", "pip install -e .")
    amiss = {wish: reason for wish in wanted if (reason := _amiss(wish))}
    if amiss:
        wishes = " ".join(f"'{wish}'" for wish in amiss)
        return Finding(code, "problem", ", ".join(amiss.values()), f"pip install {wishes}")
    return Finding(code, "ok", f"all {len(wanted)} that porcelet asks for are there, in versions that it can use")


def native_parts() -> Finding:
    """Whether those with native code load on this processor and with this system's libraries."""
    code = "native_parts"
    program = f"for name in {NATIVE}: print(name, flush=True); __import__(name)"
    try:
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=SECONDS)
    except subprocess.TimeoutExpired:
        cause = f"{', '.join(NATIVE)} do not load within {SECONDS} s"
        return Finding(code, "problem", cause, "see what keeps the machine busy, or install on a faster disk")
    if done.returncode == 0:
        return Finding(code, "ok", f"{', '.join(NATIVE)} load")
    culprit = (done.stdout.split() or ["python"])[-1]
    reason = (done.stderr.strip().splitlines() or [""])[-1]
    if done.returncode < 0:
        reason = f"{signal.Signals(-done.returncode).name}: built for another processor, or damaged"
    return Finding(code, "problem", f"{culprit} does not load: {reason}", f"{AGAIN} {culprit}")


def extras() -> Iterator[Finding]:
    """For each optional set of packages that is there in part, what it lacks."""
    whole, part = [], {}
    for extra in EXTRAS:
        try:
            wanted = _asked_for(extra)
        except PackageNotFoundError:
            return
        lacking = [wish for wish in wanted if _amiss(wish)]
        if not lacking:
            whole.append(extra)
        elif len(lacking) < len(wanted):
            part[extra] = lacking
    for extra, lacking in part.items():
        cause = f"of the optional set {extra!r} a part is there; {', '.join(lacking)} would be needed to use it"
        yield Finding("extras", "note", cause, f"pip install 'porcelet[{extra}]'")
    if not part:
        yield Finding("extras", "ok", f"optional sets that are whole: {', '.join(whole) or 'none'}")


def not_importable(problem: ImportError) -> Finding:
    """What is left to say where porcelet itself cannot be imported."""
    cause = f"porcelet cannot be imported, so nothing else was looked at: {problem}"
    return Finding("imports", "problem", cause, f"do what `libraries` and `native_parts` say, or {AGAIN} porcelet")


def _asked_for(extra: str) -> list[str]:
    """The requirements of an extra, or of porcelet itself for "", without their markers."""
    from packaging.requirements import Requirement

    all_of_them = [Requirement(text) for text in requires("porcelet") or ()]
    ours = [one for one in all_of_them if ("extra ==" in str(one.marker)) == bool(extra)]
    chosen = [one for one in ours if one.marker is None or one.marker.evaluate({"extra": extra})]
    return [str(one).partition(";")[0].strip() for one in chosen]


def _amiss(wish: str) -> str:
    """What is wrong with a required package, or nothing."""
    from packaging.requirements import Requirement

    wanted = Requirement(wish)
    try:
        found = version(wanted.name)
    except PackageNotFoundError:
        return f"{wanted.name} is not installed"
    return "" if wanted.specifier.contains(found, prereleases=True) else f"{wanted.name} is {found}, not {wish}"
