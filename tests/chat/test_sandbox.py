"""A template is a program from outside: it can loop, eat memory, attack, and its process can die; none of it hurts."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from porcelet.chat import sandbox
from porcelet.chat.sandbox import MAX_CHARACTERS, Sandbox
from porcelet.errors import EngineError, InputError, ModelError

ENDLESS = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"


def pid_of(box: Sandbox) -> int:
    assert box._link is not None
    return box._link.process.pid


def gone(pid: int) -> bool:
    """No such process, or one that waits to be reaped."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return True


def wait_until_gone(pid: int, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not gone(pid):
        assert time.monotonic() < deadline, f"process {pid} is still there"
        time.sleep(0.01)


def test_one_process_serves_many_renderings() -> None:
    """It starts with the first one and ends with its owner."""
    box = Sandbox("{{ x }}")
    assert box._link is None
    assert [box.render({"x": text}) for text in ("a", "é" * 100_000, "\ud800")] == ["a", "é" * 100_000, "\ud800"]
    pid = pid_of(box)
    assert not gone(pid)
    del box
    assert gone(pid)


def test_an_endless_template_is_stopped_after_two_seconds() -> None:
    """Its process is killed; the next rendering gets another."""
    box = Sandbox("{% if x %}" + ENDLESS + "{% endif %}ok")
    assert box.render({"x": False}) == "ok"
    pid, start = pid_of(box), time.monotonic()
    with pytest.raises(ModelError, match="2 s"):
        box.render({"x": True})
    assert 1.9 < time.monotonic() - start < 4 and gone(pid)
    assert box.render({"x": False}) == "ok"


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{{ 'a' * 10**9 }}", "MemoryError"),
        ("{{ 'a'.ljust(10**9) }}", "MemoryError"),
        ("{{ [0] * 10**9 }}", "MemoryError"),
        ("{{ range(10**9) | list }}", "OverflowError"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "SecurityError"),
        ("{{ '{0.__class__.__mro__}'.format(1) }}", "SecurityError"),
        ("{{ raise_exception.__globals__.os }}", "SecurityError"),
        ("{{ self.__init__ }}{{ cycler.__init__.__globals__.os.getcwd() }}", "SecurityError|UndefinedError"),
        ("{% include '/etc/passwd' %}", "fails"),
        ("{% import 'os' as os %}", "fails"),
        ("{% set _ = x.append(1) %}", "SecurityError"),
        ("{% if %}", "parsed"),
        ("{{ " + "(" * 5000 + ")" * 5000 + " }}", "parsed"),
        ("{{ 1 / 0 }}", "division"),
        ("{{ x.nothing.at_all }}", "Undefined"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "Recursion"),
    ],
)
def test_attacks_and_mistakes_are_one_error(source: str, message: str) -> None:
    """The sandbox lets none reach Python, and the same process goes on."""
    box = Sandbox(source)
    for _ in range(2):
        with pytest.raises(ModelError, match=message):
            box.render({"x": []})


def test_a_long_output_is_refused() -> None:
    """More than 1 MiB of text is an error, 1 MiB is not; so it is with the source and the question."""
    box = Sandbox("{% for i in range(n) %}{{ 'a' * 1024 }}{% endfor %}")
    assert len(box.render({"n": 1024})) == MAX_CHARACTERS
    for n in (1025, 90_000):
        with pytest.raises(InputError, match="1 MiB"):
            box.render({"n": n})
    with pytest.raises(InputError, match="1 MiB"):
        box.render({"n": 1, "x": "é" * (3 << 20)})
    with pytest.raises(ModelError, match="1 MiB"):
        Sandbox("a" * (MAX_CHARACTERS + 1))


def test_a_killed_process_is_replaced() -> None:
    """Somebody else's kill, while it is idle, is not noticed."""
    box = Sandbox("{{ x }}")
    assert box.render({"x": 1}) == "1"
    pid = pid_of(box)
    os.kill(pid, signal.SIGKILL)
    assert box.render({"x": 2}) == "2" and pid_of(box) != pid


def test_a_process_that_always_dies_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """One successor, not an endless row of them; one that does not even start is named."""
    monkeypatch.setattr(sandbox, "MAX_MEMORY", 1 << 20)
    with pytest.raises(ModelError, match="twice"):
        Sandbox("a").render({"x": "a" * (8 << 20)})
    monkeypatch.setattr(sandbox, "MAX_MEMORY", "nothing")
    with pytest.raises(EngineError, match="does not start"):
        Sandbox("a").render({})


def test_threads_take_turns() -> None:
    """Each gets its own answer."""
    box = Sandbox("{{ x }}")
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(lambda x: box.render({"x": x}), range(200))) == [str(x) for x in range(200)]


@pytest.mark.parametrize("template", ["idle", ENDLESS], ids=["idle", "busy"])
def test_the_process_dies_with_its_parent(template: str) -> None:
    """Idle it sees the socket close, busy its own timer ends it."""
    program = (
        "import sys; from porcelet.chat.sandbox import Sandbox\n"
        "box = Sandbox('{% if busy %}' + sys.argv[1] + '{% endif %}'); box.render({})\n"
        "print(box._link.process.pid, flush=True)\n"
        "box.render({'busy': True}); input()"
    )
    command = [sys.executable, "-c", program, template]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        time.sleep(0.3)
        assert not gone(pid)
        parent.kill()
    wait_until_gone(pid, 4)


def test_the_usual_helpers_are_there() -> None:
    """tojson without HTML escapes and with its arguments, strftime_now, loop controls, and the generation tag."""
    source = (
        "{{ '<é>' | tojson }}{{ [1] | tojson(indent=1, ensure_ascii=False) }}{{ strftime_now('%%') }}"
        "{% for x in [1, 2] %}{% break %}{% endfor %}{% generation %}{{ 'a' }}{% endgeneration %}"
    )
    assert Sandbox(source).render({}) == '"<é>"[\n 1\n]%a'


def test_a_refusal_is_the_conversations_fault() -> None:
    """raise_exception is an InputError with the template's words."""
    with pytest.raises(InputError, match="roles must alternate"):
        Sandbox("{{ raise_exception('roles must alternate') }}").render({})
