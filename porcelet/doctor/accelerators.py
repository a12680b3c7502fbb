"""Cards that could compute: whether they, their drivers and their devices are there.

porcelet needs none, so a card is a note at most. NVIDIA's compute with device=cuda, which `gpu` looks at; what is said
of the others' drivers is for other programs.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from porcelet.doctor.finding import Finding
from porcelet.doctor.machine import ROOT, told_by

CODE = "accelerator"
USED = "device=cuda computes on it if `gpu` finds nothing amiss"
UNUSED = "porcelet computes on the processor: it has no kernels for these cards"


@dataclass(frozen=True)
class Maker:
    """Who makes cards: its PCI vendor, the classes of device that compute, and what its driver leaves on a machine."""

    name: str
    vendor: str
    classes: tuple[str, ...]
    driver: str
    devices: str
    builds: str  # what torch's version says if it was built for these cards
    use: str = UNUSED  # what porcelet does with one


MAKERS = (
    Maker("NVIDIA", "0x10de", ("0x0300", "0x0302"), "proc/driver/nvidia/version", "nvidia[0-9]*", r"\+cu\d", USED),
    Maker("AMD", "0x1002", ("0x0380", "0x1200"), "sys/module/amdgpu", "kfd", r"\+rocm"),
    Maker("Ascend", "0x19e5", ("0x1200",), "sys/module/drv_davinci_intf_host", "davinci[0-9]*", r"\+npu"),
)


def accelerators(root: Path = ROOT) -> Iterator[Finding]:
    """A finding for each maker whose cards or driver are here; one if there are none."""
    found = [finding for maker in MAKERS if (finding := _look_for(maker, root))]
    yield from found or [Finding(CODE, "ok", "no card that computes was found; porcelet needs none")]


def _look_for(maker: Maker, root: Path) -> Finding | None:
    cards, driver = _cards(maker, root), (root / maker.driver).exists()
    devices = sorted(file for file in (root / "dev").glob(maker.devices))
    if not cards and not devices:
        return None
    here = f"{len(cards or devices)} {maker.name} card{'' if len(cards or devices) == 1 else 's'}{_named(cards)}"
    if not driver and not devices:
        return Finding(CODE, "note", f"{here}, and no driver: no program can use it; {maker.use}", _install(maker))
    if not devices:
        cause = f"{here} and a driver, but no /dev/{maker.devices}: a container that was not given them; {maker.use}"
        return Finding(CODE, "note", cause, "start the container with its cards (docker run --gpus all)")
    refused = [str(file) for file in devices if not os.access(file, os.R_OK | os.W_OK)]
    if refused:
        cause = f"{here}; this user may not open {', '.join(refused)}; {maker.use}"
        return Finding(CODE, "note", cause, "join the group that owns it (see ls -l /dev; often render or video)")
    cause = f"{here}, driver {_driver_version(maker, root)}, {_torch_build(maker)}; {maker.use}"
    return Finding(CODE, "note", cause, "nothing needs to be done")


def _cards(maker: Maker, root: Path) -> list[str]:
    """The PCI ids of its cards, as vendor:device."""
    folders = sorted((root / "sys/bus/pci/devices").glob("*"))
    facts = [[told_by(folder / name).strip() for name in ("vendor", "class", "device")] for folder in folders]
    return [
        f"{vendor}:{device}".replace("0x", "")
        for vendor, kind, device in facts
        if vendor == maker.vendor and kind.startswith(maker.classes)
    ]


def _named(cards: list[str]) -> str:
    return f" (PCI {', '.join(dict.fromkeys(cards))})" if cards else ""


def _install(maker: Maker) -> str:
    return f"install {maker.name}'s driver if a program wants the card"


def _driver_version(maker: Maker, root: Path) -> str:
    for file in (root / maker.driver, root / maker.driver / "version"):
        if found := re.search(r"\d+\.\d+(\.\d+)*", told_by(file)):
            return found[0]
    return "of an unknown version"


def _torch_build(maker: Maker) -> str:
    """Whether torch could use the card; asked of its metadata, as importing it takes seconds."""
    try:
        build = version("torch")
    except PackageNotFoundError:
        return "no torch"
    local = re.search(r"\+\w+", build)
    if local is None:
        return f"torch {build}"
    fits = re.search(maker.builds, build)
    return f"torch {build}" if fits else f"torch {build}, which is not built for it"
