"""What the README shows is what happens: its commands are run, in order, and their output is compared.

A line of "..." or a "..." within a line stands for anything, as in doctest. Only standard output is compared.
"""

from __future__ import annotations

import doctest
import os
import re
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = re.findall(
    r"^\$ (.*)\n((?:(?!\$ |```).*\n)*)", "".join(re.findall(r"```console\n(.*?)```", README, re.S)), re.M
)
PROGRAMS = re.findall(r"```python\n(.*?)```", README, re.S)
BIN = Path(sys.executable).parent

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A place to run in that has the checkout's recipes and collects the runs."""
    made = tmp_path_factory.mktemp("readme")
    (made / "recipes").symlink_to(ROOT / "recipes")
    return made


@pytest.fixture
def server(folder: Path) -> Iterator[None]:
    environment = os.environ | {"XDG_DATA_HOME": str(folder)}  # where the server keeps its database
    process = subprocess.Popen([BIN / "porcelet", "serve"], cwd=folder, env=environment)
    try:
        for _ in range(300):
            assert process.poll() is None, "the server ended; is port 8000 taken?"
            try:
                urllib.request.urlopen("http://127.0.0.1:8000/healthz", timeout=1)
                break
            except OSError:
                time.sleep(0.1)
        yield
    finally:
        process.terminate()
        process.wait(20)


def test_commands_print_what_the_readme_shows(folder: Path, default_model: Path) -> None:
    """Every command of a console block succeeds and prints the lines below it."""
    assert len(COMMANDS) >= 5
    checker = doctest.OutputChecker()
    for command, expected in COMMANDS:
        environment = {"PATH": f"{BIN}:/usr/bin:/bin", "HOME": str(Path.home()), "XDG_DATA_HOME": str(folder)}
        done = subprocess.run(
            command, shell=True, cwd=folder, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, f"{command}\n{done.stderr}"
        matches = checker.check_output(expected, done.stdout, doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
        assert matches, f"{command} printed\n{done.stdout}"


@pytest.mark.usefixtures("server")
@pytest.mark.parametrize("program", PROGRAMS, ids=lambda program: program.splitlines()[0])
def test_programs_answer(program: str, folder: Path, default_model: Path) -> None:
    """Every Python block runs, beside `porcelet serve`, and knows the capital of France."""
    done = subprocess.run([sys.executable, "-c", program], cwd=folder, capture_output=True, text=True, check=True)
    assert "Paris" in done.stdout
