"""The engine's process and the client at the other end of its socket, for real."""

from __future__ import annotations

import asyncio
import dataclasses
import io
import queue
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import AsyncGenerator, Callable, Coroutine
from contextlib import aclosing
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import msgspec
import pytest
import torch
from safetensors.torch import load_file, save_file

from porcelet.config import EngineConfig
from porcelet.engine.client import EngineClient, _Inbox
from porcelet.engine.codec import open_codec
from porcelet.engine.engine import Engine
from porcelet.engine.messages import (
    MAX_FRAME_BYTES,
    Abort,
    Loading,
    Outputs,
    Submit,
    body_length,
    from_engine,
    pack,
    read_body,
    to_engine,
    unpack,
)
from porcelet.engine.worker import _Desk, _last_words, _send_outputs, _serve
from porcelet.errors import EngineError, InputError, ModelError
from porcelet.types import Constraint, Output, Request, SamplingParams, join_outputs
from tests.tiny_model import save_tiny_model

CONFIG = EngineConfig(threads=1)
ENDLESS = SamplingParams(max_tokens=10_000, temperature=0, ignore_eos=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


def with_client(folder: Path, body: Callable[[EngineClient], Coroutine[Any, Any, None]]) -> None:
    async def main() -> None:
        client = EngineClient.start(folder, CONFIG)
        try:
            await client.ready()
            await asyncio.wait_for(body(client), 20)
        finally:
            client.close()

    asyncio.run(main())


async def collect(client: EngineClient, request: Request) -> list[Output]:
    return [output async for output in client.submit(request)]


def test_the_parent_hears_of_the_load(folder: Path) -> None:
    """While the model loads, its process tells how many bytes of it are there."""
    seen: list[tuple[int, int]] = []

    async def main() -> None:
        client = EngineClient.start(folder, CONFIG)
        try:
            await client.ready(lambda done, total: seen.append((done, total)))
        finally:
            client.close()

    asyncio.run(main())
    assert seen and all(0 < done <= total for done, total in seen)


def test_same_tokens_as_in_process(folder: Path) -> None:
    """Requests that run together in the other process get the tokens that the library gives here."""
    prompts = [(1, 2, 3), (4, 5), (6,) * 100]
    params = SamplingParams(max_tokens=40, temperature=1.0, seed=7, presence_penalty=0.5, logprobs=2)
    engine = Engine.load(folder, CONFIG)
    text = b"".join(map(open_codec(folder)[0].token_bytes, engine.generate(prompts[:1], params)[0].tokens))
    (stop, *_) = re.findall("[a-zA-Z0-9]", text.decode("ascii", "ignore"))
    params = dataclasses.replace(params, stop=(stop,))
    expected = engine.generate(prompts, params)
    assert expected[0].stop == stop

    async def body(client: EngineClient) -> None:
        requests = [Request(id=str(i), prompt=prompt, params=params) for i, prompt in enumerate(prompts)]
        answers = await asyncio.gather(*(collect(client, request) for request in requests))
        for outputs, whole in zip(answers, expected, strict=True):
            assert [output.finish_reason for output in outputs[:-1]] == [None] * (len(outputs) - 1)
            joined = join_outputs(outputs)
            assert (joined.tokens, joined.stop, joined.tail) == (whole.tokens, whole.stop, whole.tail)
            assert joined.raw_logprobs == pytest.approx(whole.raw_logprobs, abs=1e-4)
            assert len(joined.top_logprobs) == len(joined.tokens) == len(joined.logprobs)

    with_client(folder, body)


def test_samples_arrive_under_their_index(folder: Path) -> None:
    """A request with n samples ends when the last of them has, each with the tokens that the library gives here."""
    params = SamplingParams(max_tokens=30, temperature=1.0, seed=7, n=3)
    expected = Engine.load(folder, CONFIG).generate([(1, 2, 3)], params)

    async def body(client: EngineClient) -> None:
        outputs = await collect(client, Request(id="a", prompt=(1, 2, 3), params=params))
        for index, whole in enumerate(expected):
            joined = join_outputs([output for output in outputs if output.index == index])
            assert (joined.tokens, joined.finish_reason) == (whole.tokens, whole.finish_reason)
        assert len({whole.tokens for whole in expected}) == 3

    with_client(folder, body)


def test_refusal_abort_and_death(folder: Path) -> None:
    """A refusal is the engine's own error; a closed iterator frees the engine; death reaches every request at once."""

    async def body(client: EngineClient) -> None:
        with pytest.raises(InputError, match="empty"):
            await collect(client, Request(id="empty", prompt=(), params=ENDLESS))

        async with aclosing(client.submit(Request(id="left", prompt=(1,), params=ENDLESS))) as outputs:
            await anext(outputs)
            assert client.stats["num_running"] == 1
        started = time.monotonic()
        while client.stats["num_running"]:
            await asyncio.sleep(0.001)
        assert time.monotonic() - started < 1

        streams = [client.submit(Request(id=f"dies-{i}", prompt=(i + 1,), params=ENDLESS)) for i in range(3)]
        for stream in streams:
            await anext(stream)
        client.process.send_signal(signal.SIGINT)  # Ctrl-C reaches the whole terminal; only the parent acts on it
        await asyncio.sleep(0.05)
        assert client.alive
        client.process.kill()
        for stream in streams:
            with pytest.raises(EngineError, match="killed by signal 9"):
                while True:
                    await anext(stream)
        assert not client.alive
        with pytest.raises(EngineError, match="killed by signal 9"):
            await collect(client, Request(id="late", prompt=(1,), params=ENDLESS))

    with_client(folder, body)


def test_a_death_found_by_writing_reaches_everybody(folder: Path) -> None:
    """A process that is gone before its end was read: the write that fails ends every request as the end would."""

    async def body(client: EngineClient) -> None:
        streams = [client.submit(Request(id=str(i), prompt=(1,), params=ENDLESS)) for i in range(3)]
        for stream in streams:
            await anext(stream)
        client.process.kill()
        time.sleep(0.05)  # a busy loop: it writes before it reads
        late = collect(client, Request(id="late", prompt=(1,), params=ENDLESS))
        waiting = [drain(stream) for stream in streams]
        problems = await asyncio.wait_for(asyncio.gather(late, *waiting, return_exceptions=True), 1)
        assert ["signal 9" in str(problem) for problem in problems] == [True] * 4

    with_client(folder, body)


def test_a_death_is_noticed_though_all_threads_are_busy(folder: Path) -> None:
    """Whatever fills the event loop's threads, the failure shows at once, and requests end with its reason."""
    done = threading.Event()

    async def body(client: EngineClient) -> None:
        stream = client.submit(Request(id="a", prompt=(1,), params=ENDLESS))
        await anext(stream)
        busy = [asyncio.ensure_future(asyncio.to_thread(done.wait, 20)) for _ in range(100)]
        try:
            client.process.kill()
            with pytest.raises(EngineError, match="signal 9"):
                await asyncio.wait_for(drain(stream), 2)
            assert not client.alive
        finally:
            done.set()
            await asyncio.gather(*busy)

    with_client(folder, body)


def test_what_arrives_is_heard_though_nobody_reads(folder: Path) -> None:
    """Every token that the engine gave is told of by the time its request is closed, taken or not."""
    heard: list[int] = []

    async def body(client: EngineClient) -> None:
        params = dataclasses.replace(ENDLESS, max_tokens=50)
        request = Request(id="a", prompt=(1,), params=params)
        async with aclosing(client.submit(request, lambda output: heard.append(output.num_generated))) as outputs:
            await anext(outputs)
            while heard[-1] < 50:
                await asyncio.sleep(0.01)

    with_client(folder, body)
    assert heard == list(range(1, 51))


async def drain(stream: AsyncGenerator[Output, None]) -> None:
    async for _ in stream:
        pass


def test_a_process_that_hangs_up_and_goes_on_is_killed(folder: Path) -> None:
    """The reason says so, and blames no lack of memory for a signal that we sent."""

    async def body(client: EngineClient) -> None:
        client.process.send_signal(signal.SIGSTOP)
        client._connection.shutdown(socket.SHUT_RD)
        assert str(await client.ended()) == "the engine process hung up, but did not end, so it was killed"

    with_client(folder, body)


def test_constraints_are_compiled_beside_the_steps(folder: Path) -> None:
    """A stream goes on while a constraint is compiled; one that cannot be kept is refused, one that nobody waits for
    any more leaves nothing behind."""

    def constrained(name: str, pattern: str) -> Request:
        params = SamplingParams(max_tokens=20, constraint=Constraint("regex", pattern))
        return Request(id=name, prompt=(1,), params=params)

    async def body(client: EngineClient) -> None:
        tokenizer, _ = open_codec(folder)
        async with aclosing(client.submit(Request(id="stream", prompt=(1,), params=ENDLESS))) as stream:
            await anext(stream)
            async with aclosing(client.submit(constrained("left", "[a-z]{9}x"))) as left:
                waiting = asyncio.create_task(anext(left))
                await anext(stream)
                waiting.cancel()
                await asyncio.wait([waiting])
            with pytest.raises(InputError, match="regular expression cannot be used"):
                await collect(client, constrained("bad", "("))
            (output,) = [join_outputs(await collect(client, constrained("good", "[0-9]{5}")))]
            assert re.fullmatch("[0-9]{5}", tokenizer.decode(output.tokens))
            await anext(stream)
            assert client.stats["num_running"] == 1 and client.stats["num_waiting"] == 0

    with_client(folder, body)


def test_only_what_is_wanted_is_compiled_and_tenants_take_turns() -> None:
    """A tenant's many constraints keep another's one waiting for one of them alone; aborted ones are not compiled."""
    compiled: list[str] = []
    may_go_on, began = threading.Event(), threading.Event()

    class Slow:
        """An engine whose compiler waits to be told."""

        scheduler = SimpleNamespace(waiting=())

        def prepare(self, request: Request) -> None:
            began.set()
            assert may_go_on.wait(20)
            compiled.append(request.id)

        def abort(self, request_id: str) -> None:
            pass

    desk = _Desk(cast(Any, Slow()), queue.SimpleQueue())
    params = SamplingParams(max_tokens=1, constraint=Constraint("regex", "a"))
    for number in range(100):
        desk.handle(Submit(Request(id=f"many-{number}", prompt=(1,), params=params, tenant="many")))
    assert began.wait(20)
    desk.handle(Submit(Request(id="one", prompt=(1,), params=params, tenant="one")))
    for number in range(2, 99):
        desk.handle(Abort(f"many-{number}"))
    may_go_on.set()
    desk._thread.shutdown(wait=True)
    assert compiled == ["many-0", "many-1", "one", "many-99"]


def test_a_failed_request_leaves_the_engine_alive(folder: Path, tmp_path: Path) -> None:
    """Logits that are NaN are that request's own error, told by name; the process serves the next one."""
    damaged = shutil.copytree(folder, tmp_path / "damaged")
    weights = load_file(damaged / "model.safetensors")
    weights["model.embed_tokens.weight"][7] = torch.nan
    save_file(weights, damaged / "model.safetensors")
    params = SamplingParams(max_tokens=5)

    async def body(client: EngineClient) -> None:
        with pytest.raises(EngineError, match="'bad'.* not finite"):
            await collect(client, Request(id="bad", prompt=(7,), params=params))
        assert (await collect(client, Request(id="good", prompt=(1,), params=params)))[-1].num_generated == 5

    with_client(damaged, body)


def test_startup_error_is_the_workers_own(tmp_path: Path) -> None:
    """What keeps the worker from starting is raised here as the same class, in one line."""

    async def main() -> None:
        client = EngineClient.start(tmp_path / "missing", CONFIG)
        with pytest.raises(ModelError, match="missing") as caught:
            await client.ready()
        assert "\n" not in str(caught.value)
        client.close()
        assert client.process.returncode == ModelError.exit_code

    asyncio.run(main())


def worker(folder: Path) -> tuple[subprocess.Popen[bytes], socket.socket]:
    ours, theirs = socket.socketpair()
    command = [
        sys.executable,
        "-P",
        "-m",
        "porcelet.engine.worker",
        "--fd",
        str(theirs.fileno()),
        "--model",
        str(folder),
    ]
    with theirs:
        return subprocess.Popen(command, pass_fds=[theirs.fileno()]), ours


def test_hanging_up_ends_the_worker_while_it_loads(folder: Path) -> None:
    """A worker whose parent is gone does not outlive it, not even by the time that loading takes."""
    process, ours = worker(folder)
    ours.close()
    assert process.wait(20) == 0


def test_malformed_frame_ends_the_worker(folder: Path) -> None:
    """A frame that is no message ends the worker with the protocol error's exit code, after saying so."""
    process, ours = worker(folder)
    with ours, ours.makefile("rb") as stream:
        while isinstance(unpack(from_engine, read_body(stream) or b""), Loading):
            continue
        ours.sendall((5).to_bytes(4, "big") + b"hello")
        assert b"malformed frame" in (read_body(stream) or b"")
    assert process.wait(20) == EngineError.exit_code


@pytest.mark.parametrize("message", [Submit(Request(id="a", prompt=(1, 2), params=ENDLESS)), Abort("é")])
def test_frames_round_trip(message: Submit | Abort) -> None:
    """What is packed is read back, frame by frame, until the clean end."""
    stream = io.BytesIO(pack(message) * 2)
    assert [unpack(to_engine, read_body(stream) or b"") for _ in range(2)] == [message, message]
    assert read_body(stream) is None


@pytest.mark.parametrize("cut", [1, 3, 4, 10])
def test_cut_frame_is_an_error(cut: int) -> None:
    """A stream that ends within a frame is not a clean end."""
    with pytest.raises(EngineError, match="within a frame"):
        read_body(io.BytesIO(pack(Abort("some request"))[:cut]))


def test_bad_fields_and_long_frames_are_errors() -> None:
    """A frame with a field of the wrong type or out of its range, or of an absurd length, is refused."""
    good = pack(Submit(Request(id="a", prompt=(1,), params=SamplingParams(max_tokens=100))))[4:]
    out_of_range = good.replace(b"max_tokens\x64", b"max_tokens\x00")
    assert unpack(to_engine, good)
    assert len(out_of_range) == len(good)
    wrong_type = msgspec.msgpack.encode({"type": "Abort", "request_id": 1})
    unknown = msgspec.msgpack.encode({"type": "Shutdown"})
    for body in (b"", good[:-1], out_of_range, wrong_type, unknown):
        with pytest.raises(EngineError, match="malformed"):
            unpack(to_engine, body)
    with pytest.raises(EngineError, match="at most"):
        body_length((MAX_FRAME_BYTES + 1).to_bytes(4, "big"))


def test_slow_reader_gets_everything_in_larger_outputs() -> None:
    """Outputs that nobody took yet are joined sample by sample: nothing is lost, the order stays, the ends are kept."""

    async def main() -> None:
        inbox = _Inbox(2)
        for i in range(5):
            inbox.put(Output(request_id="a", index=i % 2, tokens=(i,), logprobs=(-float(i),), num_generated=i + 1))
        inbox.put(Output(request_id="a", tokens=(), logprobs=(-9.0,), finish_reason="stop", num_generated=6))
        even, odd = await inbox.take()
        assert (even.index, even.tokens, even.logprobs) == (0, (0, 2, 4), (0.0, -2.0, -4.0, -9.0))
        assert (even.finish_reason, even.num_generated) == ("stop", 6)
        assert (odd.index, odd.tokens, odd.finish_reason) == (1, (1, 3), None)
        assert not inbox.finished
        inbox.put(Output(request_id="a", index=1, tokens=(), logprobs=(), finish_reason="length"))
        assert not inbox.finished
        (end,) = await inbox.take()
        assert end.index == 1 and inbox.finished

    asyncio.run(main())


def test_a_failure_comes_after_what_arrived() -> None:
    """What the engine gave before it died is delivered first, then the failure, to whoever asks."""

    async def main() -> None:
        inbox = _Inbox(1)
        inbox.put(Output(request_id="a", tokens=(1,), logprobs=(0.0,)))
        inbox.fail(EngineError("dead"))
        assert [output.tokens for output in await inbox.take()] == [(1,)]
        assert not inbox.finished
        with pytest.raises(EngineError, match="dead"):
            await inbox.take()
        assert inbox.finished

    asyncio.run(main())


def test_pages_that_are_lost_end_the_engine(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """An idle engine whose pages are not all back dies with a message that owns up, after the answer was given."""
    engine = Engine.load(folder, CONFIG)
    engine.submit(Request(id="a", prompt=(1, 2), params=SamplingParams(max_tokens=2, ignore_eos=True)))
    engine.scheduler.pool.extend([], 1)  # a page that nobody will give back
    ours, theirs = socket.socketpair()
    with ours, theirs, ours.makefile("rb") as stream:
        with pytest.raises(AssertionError) as caught:
            _serve(engine, theirs, queue.SimpleQueue())
        outputs = [unpack(from_engine, read_body(stream) or b"") for _ in range(2)]
    assert isinstance(outputs[-1], Outputs) and outputs[-1].outputs[-1].finish_reason == "length"
    words = _last_words(caught.value, folder)
    assert "pages" in words.message and "porcelet's mistake" in words.message and "\n" not in words.message
    assert "check_idle" in capfd.readouterr().err


def test_outputs_too_long_for_a_frame(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They go one a frame; one that is too long alone ends its request, which the engine then drops."""
    engine = Engine.load(folder, CONFIG)
    engine.submit(Request(id="long", prompt=(1, 2), params=ENDLESS))
    engine.step()
    long, short = (Output(request_id=name, tokens=(1,) * size, logprobs=()) for name, size in (("long", 900), ("b", 1)))
    monkeypatch.setattr("porcelet.engine.messages.MAX_FRAME_BYTES", 900)
    ours, theirs = socket.socketpair()
    with ours, theirs, ours.makefile("rb") as stream:
        _send_outputs(engine, theirs, [long, short])
        first, second = (unpack(from_engine, read_body(stream) or b"") for _ in range(2))
    assert isinstance(first, Outputs) and isinstance(second, Outputs)
    assert [(o.request_id, o.finish_reason) for o in first.outputs] == [("long", "error")]
    assert "too long" in (first.outputs[0].error or "") and second.outputs == [short]
    engine.step()
    assert not engine.has_work


def test_client_imports_no_torch() -> None:
    """The server's process can use the client without paying for torch."""
    check = "import sys, porcelet.engine.client; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", check]).returncode == 0
