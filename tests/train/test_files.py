from __future__ import annotations

import errno
from pathlib import Path

import pytest

from porcelet.errors import CapacityError, InputError
from porcelet.train.files import write_durably, writing


def test_file_appears_whole_and_alone(tmp_path: Path) -> None:
    """Its folder is made, what it replaces is gone, and nothing unfinished stays."""
    path = tmp_path / "deep" / "file.jsonl"
    write_durably(path, "old and long")
    write_durably(path, "new")
    assert path.read_text() == "new" and list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize(
    ("number", "kind", "named"),
    [
        (errno.ENOSPC, CapacityError, "No space left on device"),
        (errno.EROFS, CapacityError, "Read-only file system"),
        (errno.EACCES, InputError, "Permission denied"),
    ],
)
def test_what_goes_wrong_on_the_disk_is_one_line(number: int, kind: type[Exception], named: str) -> None:
    """The place, the reason and the remedy, as an error with its exit code."""
    with pytest.raises(kind, match=f"runs/x cannot be written: {named}; .*resume"), writing(Path("runs/x")):
        raise OSError(number, named)


def test_folder_that_is_a_file_is_named(tmp_path: Path) -> None:
    """A real one: the output's place is taken by a file."""
    (tmp_path / "taken").write_text("")
    with pytest.raises(CapacityError, match="taken/file cannot be written"):
        write_durably(tmp_path / "taken" / "file", "text")
