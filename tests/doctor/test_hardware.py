"""The machine, its cards and its limits: each finding on a machine laid out in a folder, or with a real limit."""

from __future__ import annotations

import os
import resource
from collections.abc import Iterator
from pathlib import Path

import pytest

from porcelet.doctor import accelerators, hardware, limits
from tests.doctor.machine import lay_out

CPUINFO = "processor\t: 0\nmodel name\t: A fast one\n\nprocessor\t: 1\nmodel name\t: A fast one\n"
MEMINFO = "MemTotal: 8000000 kB\nMemAvailable: 6000000 kB\nCommitLimit: 4000000 kB\nCommitted_AS: 3000000 kB\n"
H200 = {"vendor": "0x10de\n", "device": "0x2335\n", "class": "0x030200\n"}


def pci(slot: str, facts: dict[str, str]) -> dict[str, str]:
    return {f"sys/bus/pci/devices/0000:{slot}/{name}": text for name, text in facts.items()}


@pytest.fixture
def restored() -> Iterator[None]:
    """The limits of this process as they were, after the test."""
    kinds = (resource.RLIMIT_NOFILE, resource.RLIMIT_AS)
    before = {kind: resource.getrlimit(kind) for kind in kinds}
    yield
    for kind, limit in before.items():
        resource.setrlimit(kind, limit)


def test_hardware(tmp_path: Path) -> None:
    """The processor's name and the memory are named; a machine that tells neither is no error."""
    root = lay_out(tmp_path / "told", {"proc/cpuinfo": CPUINFO, "proc/meminfo": MEMINFO})
    assert hardware.hardware(root).cause.startswith("A fast one, ") and "8.2 GB" in hardware.hardware(root).cause
    assert hardware.hardware(tmp_path / "silent").state == "ok"
    assert "memory unknown" in hardware.hardware(tmp_path / "silent").cause


@pytest.mark.parametrize(("stolen", "state"), [(1, "ok"), (20, "note")])
def test_a_host_that_takes_time(tmp_path: Path, stolen: int, state: str) -> None:
    """Up to a twentieth of the time goes unnoticed; more is a note. What guests take is in user time already."""
    root = lay_out(tmp_path, {"proc/stat": f"cpu  {50 - stolen} 0 20 25 5 0 0 {stolen} 900 0\ncpu0 1 2 3\n"})
    found = hardware.steal(root)
    assert (found.state, bool(found.remedy)) == (state, state == "note") and f"{stolen}.0%" in found.cause


def test_no_card(tmp_path: Path) -> None:
    """A screen's controller of a maker of servers is no card that computes."""
    screen = {"vendor": "0x19e5\n", "device": "0x1711\n", "class": "0x030000\n"}
    [found] = accelerators.accelerators(lay_out(tmp_path, pci("01:00.0", screen)))
    assert found.state == "ok" and found.cause.startswith("no card")


def test_a_card_without_driver(tmp_path: Path) -> None:
    """The card is named by its PCI ids, and what it would take to use it."""
    root = lay_out(tmp_path, pci("01:00.0", H200) | pci("02:00.0", H200))
    [found] = accelerators.accelerators(root)
    assert found.state == "note" and "2 NVIDIA cards (PCI 10de:2335), and no driver" in found.cause
    assert accelerators.USED in found.cause and "install NVIDIA's driver" in found.remedy


def test_a_container_without_its_card(tmp_path: Path) -> None:
    """Card and driver without a device: the container was started without it."""
    version = {"proc/driver/nvidia/version": "NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54.15  Tue\n"}
    [found] = accelerators.accelerators(lay_out(tmp_path, pci("01:00.0", H200) | version))
    assert "no /dev/nvidia" in found.cause and "--gpus" in found.remedy


def test_a_card_that_may_not_be_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The device is named, and that a group owns it."""
    root = lay_out(tmp_path, {"dev/nvidia0": "", "dev/nvidiactl": "", "proc/driver/nvidia/version": "550.54.15\n"})
    monkeypatch.setattr(os, "access", lambda file, mode: False)  # root may open everything
    [found] = accelerators.accelerators(root)
    assert "may not open" in found.cause and "dev/nvidia0" in found.cause and "nvidiactl" not in found.cause
    assert "group" in found.remedy


@pytest.mark.parametrize(
    ("build", "said"), [("2.13.0+cpu", "which is not built for it"), ("2.13.0+cu130", "torch 2.13.0+cu130;")]
)
def test_a_card_that_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, build: str, said: str) -> None:
    """Driver, its version and torch's build are named; so is how porcelet uses it."""
    monkeypatch.setattr(accelerators, "version", lambda package: build)
    driver = {"dev/nvidia0": "", "proc/driver/nvidia/version": "NVRM version: Kernel Module  550.54.15  Tue\n"}
    [found] = accelerators.accelerators(lay_out(tmp_path, pci("01:00.0", H200) | driver))
    assert "driver 550.54.15" in found.cause and said in found.cause and accelerators.USED in found.cause


@pytest.mark.parametrize(
    ("vendor", "kind", "device", "maker"),
    [("0x1002", "0x120000", "kfd", "AMD"), ("0x19e5", "0x120000", "davinci0", "Ascend")],
)
def test_cards_of_others(tmp_path: Path, vendor: str, kind: str, device: str, maker: str) -> None:
    """AMD's and Huawei's cards are told of as well."""
    facts = {"vendor": f"{vendor}\n", "device": "0x1234\n", "class": f"{kind}\n"}
    [found] = accelerators.accelerators(lay_out(tmp_path, pci("01:00.0", facts) | {f"dev/{device}": ""}))
    assert f"1 {maker} card" in found.cause and "not built for it" in found.cause


def test_few_open_files(restored: None) -> None:
    """A real limit below what a busy server needs, and the command that lifts it."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, most))
    found = limits.open_files()
    assert found.state == "note" and found.cause.startswith("256 files") and found.remedy.startswith("ulimit -n 1024")
    resource.setrlimit(resource.RLIMIT_NOFILE, (2048, most))
    assert limits.open_files().state == "ok"


def test_few_addresses(tmp_path: Path, restored: None) -> None:
    """A batch job's limit of addresses below the machine's memory is a note."""
    assert limits.address_space().state == "ok"
    resource.setrlimit(resource.RLIMIT_AS, (1 << 40, resource.getrlimit(resource.RLIMIT_AS)[1]))
    assert limits.address_space(lay_out(tmp_path / "small", {"proc/meminfo": MEMINFO})).state == "ok"
    big = lay_out(tmp_path / "big", {"proc/meminfo": "MemTotal: 4000000000 kB\n"})
    assert limits.address_space(big).state == "note" and "ulimit -v" in limits.address_space(big).remedy


@pytest.mark.parametrize(("mode", "state"), [("0", "ok"), ("1", "ok"), ("2", "note")])
def test_strict_overcommit(tmp_path: Path, mode: str, state: str) -> None:
    """1 GB of promises are left where 6 GB of memory are: only a strict system refuses."""
    root = lay_out(tmp_path, {"proc/meminfo": MEMINFO, "proc/sys/vm/overcommit_memory": f"{mode}\n"})
    assert limits.overcommit(root).state == state
    assert state == "ok" or "1.0 GB are left" in limits.overcommit(root).cause


GROUP = "proc/self/cgroup"
TOP = "sys/fs/cgroup"
GROUPS = {
    "none": {GROUP: "0::/\n", f"{TOP}/memory.max": "max\n"},
    "a container": {GROUP: "0::/\n", f"{TOP}/memory.max": "2000000000\n"},
    "a service": {GROUP: "0::/system.slice/p.service\n", f"{TOP}/system.slice/memory.max": "2000000000\n"},
    "version 1": {GROUP: "4:memory:/job\n", f"{TOP}/memory/job/memory.limit_in_bytes": "2000000000\n"},
    "unlimited": {GROUP: "4:memory:/\n", f"{TOP}/memory/memory.limit_in_bytes": f"{2**63 - 4096}\n"},
}


@pytest.mark.parametrize(
    ("group", "state"),
    [("none", "ok"), ("a container", "ok"), ("a service", "note"), ("version 1", "note"), ("unlimited", "ok")],
)
def test_a_limit_of_memory_that_is_not_seen(tmp_path: Path, group: str, state: str) -> None:
    """A container's limit is kept to; a service's and version 1's are not seen, which is a note."""
    found = limits.memory_limit(lay_out(tmp_path, {"proc/meminfo": MEMINFO} | GROUPS[group]))
    assert found.state == state and ("2.0 GB of 8.2 GB" in found.cause) == (group not in ("none", "unlimited"))


@pytest.mark.parametrize(
    "files",
    [
        {GROUP: "0::/a/b\n", f"{TOP}/a/cpu.max": "150000 100000\n", f"{TOP}/a/b/cpu.max": "max 100000\n"},
        {
            GROUP: "3:cpu,cpuacct:/\n",
            f"{TOP}/cpu/cpu.cfs_quota_us": "150000\n",
            f"{TOP}/cpu/cpu.cfs_period_us": "100000\n",
        },
    ],
)
def test_a_limit_of_time(tmp_path: Path, files: dict[str, str]) -> None:
    """The smallest share of the groups above this process counts, in either version."""
    root = lay_out(tmp_path, files)
    found = limits.cpu_limit(4.0, root)
    assert found.state == "note" and "1.5 cores" in found.cause and "OMP_NUM_THREADS=1," in found.remedy
    assert limits.cpu_limit(1.0, root).state == "ok"
