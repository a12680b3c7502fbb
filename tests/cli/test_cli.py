"""The command line as a user meets it: real processes, exit codes, one line an error."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest

from porcelet.errors import CapacityError, InputError, ModelError
from tests.tiny_model import save_tiny_model


def porcelet(*arguments: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "porcelet", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, input=stdin, timeout=60)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("model")
    save_tiny_model(folder)
    return str(folder)


def test_help_answers_at_once() -> None:
    """`porcelet --help` takes less than 0.3 s, the best of five, and imports neither torch nor rich."""
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        shown = porcelet("--help")
        seconds.append(time.perf_counter() - start)
        assert shown.returncode == 0 and "serve" in shown.stdout
    assert min(seconds) < 0.3
    loaded = "import porcelet.cli, sys; print({'torch', 'rich', 'fastapi'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", loaded], capture_output=True, text=True).stdout == "set()\n"


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("pull", "nothing"), ModelError.exit_code, "known: smollm2-135m-instruct"),
        (("generate", "hi", "--model", "/nowhere"), ModelError.exit_code, "'/nowhere' is neither"),
        (("generate", "hi", "--temperature", "-1"), InputError.exit_code, "temperature is -1.0"),
        (("generate", "hi", "--set", "thread=1"), InputError.exit_code, "did you mean 'threads'"),
        (("train", "nowhere.toml"), InputError.exit_code, "nowhere.toml cannot be read"),
        (
            ("serve", "--certificate", "x.pem", "--port", "0"),
            InputError.exit_code,
            "both --certificate and --private-key",
        ),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else None,
)
def test_mistakes_get_one_line(arguments: tuple[str, ...], code: int, message: str) -> None:
    """A likely mistake ends with its exit code and one line on standard error."""
    done = porcelet(*arguments)
    assert done.returncode == code and done.stdout == ""
    assert message in done.stderr and done.stderr.count("\n") == 1


def test_a_taken_port_is_named(model: str) -> None:
    """`serve` on a port in use says so before it loads anything."""
    import socket

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        done = porcelet("serve", "--model", model, "--port", port)
    assert done.returncode == CapacityError.exit_code and f"port {port}" in done.stderr


def test_generate_repeats_itself(model: str) -> None:
    """Greedy answers are the same twice; the speed goes to standard error alone."""
    first, second = (porcelet("generate", "hello", "--model", model, "--max-tokens", "8") for _ in range(2))
    assert first.returncode == 0, first.stderr
    assert first.stdout == second.stdout and "[8 tokens" in first.stderr and "[8 tokens" not in first.stdout


def test_chat_remembers_and_leaves(model: str) -> None:
    """A conversation of two turns, a new one, and the end of input."""
    typed = "hello\nagain\n/new\nhello\n"
    done = porcelet("chat", "--model", model, "--max-tokens", "4", "--temperature", "0", stdin=typed)
    assert done.returncode == 0, done.stderr
    answers = done.stdout.split("> ")[1:]
    assert len(answers) == 5 and answers[0] == answers[3]
