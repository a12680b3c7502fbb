"""hardware.toml: every number says where it is from; one's own file adds and overrides; what cannot be is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from porcelet.errors import InputError
from porcelet.plan.figure import Number, weakest
from porcelet.plan.hardware import NUMBERS, devices, find_device, parse_fleet, read_devices

GIVEN = '{ value = 1e12, label = "measured", source = "our own bench" }'


def numbers() -> list[tuple[str, Number]]:
    found = []
    for device in devices().values():
        found += [(f"{device.name} {name}", getattr(device, name)) for name in NUMBERS]
        found += [(f"{device.name} {name}", rate) for name, rate in device.rates.items()]
    return found


@pytest.mark.parametrize(("name", "number"), numbers(), ids=lambda one: one if isinstance(one, str) else "")
def test_every_number_has_a_source_and_a_date(name: str, number: Number) -> None:
    """And lies in its own range; a published one is no round guess of ours."""
    assert number.source and number.date[:2] == "20", name
    low, high = number.range
    assert 0 < low <= number.value <= high
    if number.label == "assumed":
        assert "data sheet" not in number.source or "no data sheet" in number.source or "memory" in number.source


@pytest.mark.parametrize("spelling", ["RTX 4090", "rtx4090", "4090", "rtx-4090"])
def test_devices_are_found_however_they_are_spelt(spelling: str) -> None:
    """Case, blanks and hyphens do not matter."""
    assert find_device(spelling).name == "RTX 4090"


@pytest.mark.parametrize(
    ("text", "count", "name"), [("8xH20", 8, "H20"), ("16 x h800", 16, "H800"), ("H200", 1, "H200")]
)
def test_fleets(text: str, count: int, name: str) -> None:
    """A count and a device; without a count, one."""
    fleet = parse_fleet(text)
    assert (fleet.count, fleet.device.name) == (count, name)
    assert parse_fleet("2x Xeon 6454S").count == 1  # a name of its own


def test_what_is_not_known_names_what_is() -> None:
    """A device that there is none of, and a fleet that is too large."""
    with pytest.raises(InputError, match="near: H200"):
        find_device("H2000")
    with pytest.raises(InputError, match="0 devices"):
        parse_fleet("0xH20")


def test_own_devices_add_and_override(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file in the store's folder: a card of one's own by what differs from another, and a better number for one."""
    monkeypatch.setenv("PORCELET_HOME", str(tmp_path))
    lines = ['["Our H20"]', 'base = "H20"', f"bandwidth = {GIVEN}", '["H100"]', 'base = "H100"', "int8 = false"]
    (tmp_path / "hardware.toml").write_text("\n".join(lines))
    ours = find_device("our h20")
    assert ours.bandwidth.value == 1e12 and ours.memory == find_device("H20").memory
    assert "int8" not in find_device("H100").rates


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("x = 1", "a table such as"),
        ("[X", "not TOML"),
        ('["X"]\nbandwith = 1', "did you mean 'bandwidth'"),
        ('["X"]\nbase = "Y"', "base is 'Y'"),
        ('["X"]\nkind = "gpu"', "has no rate"),
        (f'["X"]\nkind = "gpu"\nbf16 = {GIVEN}', "has no memory"),
        ('["X"]\nbase = "H20"\nkind = "tpu"', "kind is 'tpu'"),
        ('["X"]\nbase = "H20"\nper_node = 0', "per_node is 0"),
        ('["X"]\nbase = "H20"\nmemory = 96e9', "was expected"),
        ('["X"]\nbase = "H20"\nmemory = { value = 1, label = "rumour", source = "x" }', "label is 'rumour'"),
        ('["X"]\nbase = "H20"\nmemory = { value = -1, label = "measured", source = "x" }', "no positive number"),
        ('["X"]\nbase = "H20"\nmemory = { value = 2, label = "measured", source = "x", low = 3 }', "outside its range"),
    ],
)
def test_what_cannot_be_is_refused(text: str, told: str, tmp_path: Path) -> None:
    """The refusal names file, device and key."""
    file = tmp_path / "own.toml"
    file.write_text(text)
    with pytest.raises(InputError, match=told) as refused:
        read_devices(file, devices())
    assert "own.toml" in str(refused.value)


def test_the_weakest_label_wins() -> None:
    """What is computed is derived at best, and assumed if anything in it is."""
    assert weakest(["measured", "published"]) == "derived"
    assert weakest(["measured", "assumed"]) == "assumed"
