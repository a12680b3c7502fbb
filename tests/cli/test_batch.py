"""`porcelet generate --batch`: nothing is lost and nothing repeated, whatever ends the run."""

from __future__ import annotations

import errno
import json
import os
import pty
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from porcelet.cli.batch import Answer, answer_jobs, run_batch
from porcelet.cli.chat import beside
from porcelet.cli.jobs import Job, check_jobs, read_jobs
from porcelet.cli.results import Result, open_results
from porcelet.config import EngineConfig
from porcelet.engine.text import TextModel, load
from porcelet.errors import CapacityError, InputError, PorceletError
from porcelet.types import Output, SamplingParams
from tests.tiny_model import save_tiny_model

GREEDY = SamplingParams(max_tokens=20, temperature=0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def model(folder: Path) -> TextModel:
    return load(str(folder), EngineConfig(threads=1, max_sequences=4, cache_tokens=1024))


def write_lines(path: Path, lines: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def command(folder: Path, source: Path, target: Path) -> list[str]:
    words = ["generate", "--batch", str(source), "--output", str(target), "--model", str(folder), "--set", "threads=1"]
    return [sys.executable, "-m", "porcelet", *words, "--set", "max_sequences=4"]


def by_id(path: Path) -> dict[str, dict[str, Any]]:
    lines = read_lines(path)
    found = {line["id"]: line for line in lines}
    assert len(found) == len(lines), "an id is there twice"
    return found


def test_killed_runs_add_up_to_an_uninterrupted_one(folder: Path, model: TextModel, tmp_path: Path) -> None:
    """kill -9 in the middle, and a line that was cut: the two runs together give the lines of a single one."""
    lengths = [10 + 7 * i % 90 for i in range(120)]
    requests = [{"id": f"r{i}", "prompt": f"{i}?", "max_tokens": length} for i, length in enumerate(lengths)]
    source = write_lines(tmp_path / "in.jsonl", requests)
    run_batch(source, tmp_path / "whole.jsonl", GREEDY, lambda: model)
    target = tmp_path / "killed.jsonl"
    process = subprocess.Popen(command(folder, source, target), stderr=subprocess.PIPE)
    while not target.exists() or target.read_bytes().count(b"\n") < 20:
        assert process.poll() is None
        time.sleep(0.002)
    process.kill()
    assert process.communicate()[1] == b"", "no bar where there is no terminal"
    assert process.returncode == -signal.SIGKILL and 20 <= len(by_id(target)) < len(requests)
    with target.open("ab") as file:
        file.write(b'{"id":"r1')
    done = subprocess.run(command(folder, source, target), capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "" and done.stderr == f"[120 requests, 0 failed: {target}]\n"
    assert by_id(target) == by_id(tmp_path / "whole.jsonl")


def test_every_request_gets_what_it_would_get_alone(model: TextModel, tmp_path: Path) -> None:
    """Both forms of lines: the text is that of `TextModel.chat`, options fill in what a line leaves out."""
    conversation = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"}]
    parts = [{"role": "developer", "content": [{"type": "text", "text": "Be "}, {"type": "text", "text": "brief."}]}]
    body = {"model": "any", "messages": parts + conversation[1:], "max_completion_tokens": 7, "stop": "\n"}
    lines = [
        {"prompt": "Hello"},
        {"id": "b", "messages": conversation, "max_tokens": 7, "temperature": 1, "seed": 5, "top_k": 40},
        {"id": "n", "prompt": "Hello", "temperature": 1, "seed": 5, "n": 2},
        {"custom_id": "c", "method": "POST", "url": "/v1/chat/completions", "body": body},
    ]
    run_batch(write_lines(tmp_path / "in.jsonl", lines), tmp_path / "out.jsonl", GREEDY, lambda: model)
    found = by_id(tmp_path / "out.jsonl")
    sampled = SamplingParams(max_tokens=7, temperature=1, seed=5, top_k=40)
    stopped = SamplingParams(max_tokens=7, temperature=0, stop=("\n",))
    assert found["line-1"]["text"] == model.chat("Hello", GREEDY)
    assert found["b"]["text"] == model.chat(conversation, sampled)
    assert found["c"]["text"] == model.chat(conversation, stopped)
    assert found["b"]["usage"]["completion_tokens"] == 7 and found["b"]["finish_reason"] == "length"
    assert len(set(found["n"]["text"])) == 2 and found["n"]["finish_reason"] == ["length", "length"]
    assert all(line["error"] is None for line in found.values())


def test_a_failed_request_is_a_line_and_an_exit_code(model: TextModel, tmp_path: Path) -> None:
    """A request that does not fit fails alone, before and after a resume; the model is not loaded for nothing."""
    lines = [{"id": "long", "prompt": "x" * 2000}, {"id": "short", "prompt": "x"}]
    source, target = write_lines(tmp_path / "in.jsonl", lines), tmp_path / "out.jsonl"
    with pytest.raises(PorceletError, match="1 of 2 requests failed"):
        run_batch(source, target, GREEDY, lambda: model)
    found = by_id(target)
    assert "at most" in found["long"]["error"] and found["long"]["text"] is None
    assert found["short"]["error"] is None and found["short"]["text"]

    def never() -> TextModel:
        raise AssertionError("nothing is left to do")

    with pytest.raises(PorceletError, match="1 of 2 requests failed"):
        run_batch(source, target, GREEDY, never)


def test_samples_are_one_line(model: TextModel) -> None:
    """A request with n samples is done when the last has ended; its texts are in their order, its usage is their sum.
    One that fails is the request's failure."""
    outputs = [
        Output(request_id="a", index=1, tokens=(66,), logprobs=(), num_prompt_tokens=3, num_generated=1),
        Output(request_id="a", index=0, tokens=(65,), logprobs=(), num_prompt_tokens=3, num_generated=1),
        Output(request_id="a", index=1, tokens=(67,), logprobs=(), num_generated=2, finish_reason="stop"),
    ]
    last = Output(request_id="a", tokens=(), logprobs=(), num_prompt_tokens=3, num_generated=1, finish_reason="length")
    answer = Answer("a", 2)
    assert [answer.add(output, model.tokenizer) for output in outputs] == [None] * 3
    result = answer.add(last, model.tokenizer)
    texts = [model.tokenizer.decode([65]), model.tokenizer.decode([66, 67])]
    assert result and (result.text, result.finish_reason) == (texts, ["length", "stop"])
    assert result.usage == {"prompt_tokens": 3, "completion_tokens": 3, "total_tokens": 6}
    failed = Output(request_id="a", tokens=(), logprobs=(), finish_reason="error", error="not finite")
    assert Answer("a", 2).add(failed, model.tokenizer) == Result(id="a", error="not finite")


def test_all_requests_may_fail(model: TextModel, tmp_path: Path) -> None:
    """More refused requests in a row than the engine takes at once do not end the job early."""
    lines = [{"prompt": "x" * 2000}] * 20 + [{"prompt": "x"}]
    with pytest.raises(PorceletError, match="20 of 21 requests failed"):
        run_batch(write_lines(tmp_path / "in.jsonl", lines), tmp_path / "out.jsonl", GREEDY, lambda: model)
    assert len(by_id(tmp_path / "out.jsonl")) == 21


def test_the_file_is_read_as_it_is_run(model: TextModel, tmp_path: Path) -> None:
    """At no time are more than a few requests beyond those that run taken from the file."""
    num_read = 0

    def jobs() -> Any:
        nonlocal num_read
        for i in range(40):
            num_read += 1
            yield Job(str(i), [{"role": "user", "content": str(i)}], GREEDY)

    with open_results(tmp_path / "out.jsonl") as results:
        ahead = []
        answer_jobs(model, jobs(), results, lambda num_done, num_tokens: ahead.append(num_read - num_done))
        assert len(results.done) == 40
    assert max(ahead) == 8


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "in.jsonl:2: "),
        ("[]", "in.jsonl:2: "),
        ('{"id": "a"}', "in.jsonl:2: give either prompt or messages"),
        ('{"prompt": "x", "messages": []}', "in.jsonl:2: give either prompt or messages"),
        ('{"messages": []}', "in.jsonl:2: messages is empty"),
        ('{"messages": [{"role": "cook", "content": "x"}]}', r"in.jsonl:2: messages\[0\].role is 'cook'"),
        ('{"prompt": "x", "max_tokens": 0}', "in.jsonl:2: max_tokens is 0"),
        ('{"prompt": "x", "max_tokens": "9"}', r"in.jsonl:2: .*max_tokens"),
        ('{"prompt": "x", "tempratur": 1}', "in.jsonl:2: .*tempratur"),
        ('{"prompt": "x", "id": 5}', r"in.jsonl:2: .*\$.id"),
        (r'{"prompt": "\ud800"}', "in.jsonl:2: "),
        ('{"prompt": "x", "id": "first"}', "in.jsonl:2: id 'first' is that of line 1, too"),
        ('{"custom_id": "a", "url": "/v1/embeddings", "body": {"prompt": "x"}}', "in.jsonl:2: POST /v1/embeddings"),
        ('{"custom_id": "a", "body": {"id": "b", "prompt": "x"}}', "in.jsonl:2: .*id"),
    ],
)
def test_mistakes_are_told_before_anything_runs(tmp_path: Path, line: str, message: str) -> None:
    """A bad line is named with its number; no output file is made, no model loaded."""
    source = tmp_path / "in.jsonl"
    source.write_text(f'{{"id": "first", "prompt": "x"}}\n{line}\n')
    with pytest.raises(InputError, match=message) as caught:
        run_batch(source, tmp_path / "out.jsonl", GREEDY, lambda: pytest.fail("loaded"))
    assert "\n" not in str(caught.value) and not (tmp_path / "out.jsonl").exists()


def test_many_mistakes_are_counted(tmp_path: Path) -> None:
    """The first few bad lines are told, the others counted."""
    source = write_lines(tmp_path / "in.jsonl", [{}] * 9)
    with pytest.raises(InputError, match=r"in.jsonl:1: .*in.jsonl:5: .*; and 4 more") as caught:
        check_jobs(source, GREEDY)
    assert "in.jsonl:6" not in str(caught.value)


@pytest.mark.parametrize("kind", ["missing", "folder", "pipe"])
def test_only_a_file_can_be_read_twice(tmp_path: Path, kind: str) -> None:
    """What is not there is said to be missing; what is no regular file is refused instead of read halfway."""
    path = tmp_path / "in.jsonl"
    if kind == "folder":
        path.mkdir()
    if kind == "pipe":
        os.mkfifo(path)
    reason = "there is no file .*in.jsonl" if kind == "missing" else "no file that can be read twice"
    with pytest.raises(InputError, match=reason):
        check_jobs(path, GREEDY)


def test_empty_lines_count_but_ask_nothing(tmp_path: Path) -> None:
    """An id made from a line's number is that of an editor."""
    source = tmp_path / "in.jsonl"
    source.write_text('\n{"prompt": "x"}\n  \n{"prompt": "y"}')
    assert [job.id for job in read_jobs(source, GREEDY)] == ["line-2", "line-4"]


@pytest.mark.parametrize("size", range(1, 60, 7))
def test_a_cut_line_is_removed(tmp_path: Path, size: int) -> None:
    """Wherever a kill cut the last line, the lines before it stay and the next one follows them."""
    path = tmp_path / "out.jsonl"
    with open_results(path) as results:
        results.append(Result(id="a", text="é\n"))
        whole = path.read_bytes()
        results.append(Result(id="b", text="cut off"))
    os.truncate(path, len(whole) + size)
    with open_results(path) as results:
        assert results.done == {"a"} and path.read_bytes() == whole
        results.append(Result(id="b"))
    assert [line["id"] for line in read_lines(path)] == ["a", "b"]


@pytest.mark.parametrize("content", ['{"id": "a", "prompt": "x"}\n', "notes\n", "notes", '{"id":"a"}\n{"id":"a"}\n'])
def test_a_file_of_something_else_is_left_alone(tmp_path: Path, content: str) -> None:
    """An output file that holds anything but results, such as the input, is refused and not changed."""
    path = tmp_path / "out.jsonl"
    path.write_text(content)
    with pytest.raises(InputError, match=r"out.jsonl:\d "), open_results(path):
        pass
    assert path.read_text() == content


@pytest.mark.parametrize("content", ['{"id":"a","prompt":"x"}', '{"id":"a","n":[1]}', '{"id":7}'])
def test_a_line_of_something_else_is_never_cut(tmp_path: Path, content: str) -> None:
    """One whole line without its newline is no half-written result, and stays."""
    path = tmp_path / "out.jsonl"
    path.write_text(content)
    with pytest.raises(InputError, match="out.jsonl:1 is no result"), open_results(path):
        pass
    assert path.read_text() == content


def test_the_requests_are_no_place_for_the_answers(tmp_path: Path) -> None:
    """The input under any of its names is refused as the output, and not changed."""
    source = tmp_path / "in.jsonl"
    source.write_text('{"id":"a","prompt":"x"}')
    (tmp_path / "link.jsonl").symlink_to(source)
    for name in ("in.jsonl", "link.jsonl"):
        with pytest.raises(InputError, match="file of requests"):
            run_batch(source, tmp_path / name, GREEDY, lambda: pytest.fail("loaded"))
    assert source.read_text() == '{"id":"a","prompt":"x"}'


def test_a_result_without_its_newline_gets_it(tmp_path: Path) -> None:
    """A kill before the very last byte, and zeros that a power cut left: the answer counts, the next has its line."""
    path = tmp_path / "out.jsonl"
    path.write_bytes(b'{"id":"a"}\n{"id":"b"}\0\0\0')
    with open_results(path) as results:
        assert results.done == {"a", "b"}
        results.append(Result(id="c"))
    assert [line["id"] for line in read_lines(path)] == ["a", "b", "c"]
    path.write_bytes(b'{"id":"a"}\n' + b"\0" * 5000)
    with open_results(path) as results:
        assert results.done == {"a"}
    assert path.read_bytes() == b'{"id":"a"}\n'


def test_only_a_regular_file_is_written() -> None:
    """A device is refused in our own words."""
    with pytest.raises(InputError, match="/dev/null is no regular file"), open_results(Path(os.devnull)):
        pass


def test_answers_reach_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Due syncs happen while nothing is appended, and one at the end of a run that fails; a new file's folder is
    synced first; a disk that fails is our own error."""
    synced: list[int] = []
    sync, now = os.fsync, time.monotonic
    monkeypatch.setattr(os, "fsync", lambda descriptor: (synced.append(os.fstat(descriptor).st_ino), sync(descriptor)))
    path = tmp_path / "out.jsonl"
    with pytest.raises(KeyboardInterrupt), open_results(path) as results:
        assert synced == [tmp_path.stat().st_ino]
        results.append(Result(id="a"))
        results.sync_if_due()
        assert len(synced) == 1
        monkeypatch.setattr(time, "monotonic", lambda: now() + 2)
        results.sync_if_due()
        results.sync_if_due()
        assert synced[1:] == [path.stat().st_ino]
        raise KeyboardInterrupt
    assert synced[1:] == [path.stat().st_ino] * 2

    def fail(descriptor: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(CapacityError, match="out.jsonl cannot be written: Input/output error"), open_results(path):
        pass


def test_every_file_of_requests_has_its_own_answers() -> None:
    """Only .jsonl is replaced: what else follows a dot belongs to the name."""
    names = {"a.jsonl": "a.out.jsonl", "run.1": "run.1.out.jsonl", "run.2": "run.2.out.jsonl"}
    assert {name: beside(Path("x") / name).name for name in names} == names


def test_results_of_another_file_are_refused(tmp_path: Path) -> None:
    """An output file with an id that the input does not have belongs to another batch."""
    source = write_lines(tmp_path / "in.jsonl", [{"prompt": "x"}])
    write_lines(tmp_path / "out.jsonl", [{"id": "other"}])
    with pytest.raises(InputError, match="'other'"):
        run_batch(source, tmp_path / "out.jsonl", GREEDY, lambda: pytest.fail("loaded"))


def test_two_runs_on_one_output_are_refused(folder: Path, tmp_path: Path) -> None:
    """The second run ends at once, with one line; the lock is gone with its owner."""
    source, target = write_lines(tmp_path / "in.jsonl", [{"prompt": "x"}]), tmp_path / "out.jsonl"
    with open_results(target):
        done = subprocess.run(command(folder, source, target), capture_output=True, text=True, timeout=60)
    assert done.returncode == InputError.exit_code and "written by another run" in done.stderr
    assert done.stderr.count("\n") == 1
    with open_results(target) as results:
        assert results.done == set()


def test_the_bar_is_for_terminals(folder: Path, tmp_path: Path) -> None:
    """On a terminal the progress shows requests done and tokens a second."""
    source = write_lines(tmp_path / "in.jsonl", [{"prompt": "x"}] * 3)
    ours, theirs = pty.openpty()
    with subprocess.Popen(command(folder, source, tmp_path / "out.jsonl"), stderr=theirs) as process:
        os.close(theirs)
        shown = b""
        while chunk := read_terminal(ours):
            shown += chunk
        assert process.wait(60) == 0
    os.close(ours)
    assert b"3/3" in shown and b"tokens/s" in shown


def read_terminal(descriptor: int) -> bytes:
    """What there is; nothing at its end, which a terminal tells by an error."""
    try:
        return os.read(descriptor, 1 << 16)
    except OSError:
        return b""
