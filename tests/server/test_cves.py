"""What has gone wrong in servers of this kind, by class of fault: one test or more for each, so that none comes back.

Where another file tests a class from within, the test here is the shortest one that fails when its protection is gone.
"""

from __future__ import annotations

import ast
import asyncio
import hmac
import inspect
import json
import logging
import os
import pickle
import random
import re
import socket
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from porcelet import hub
from porcelet.config import EngineConfig, ModelEntry, ServeConfig
from porcelet.engine.codec import open_codec
from porcelet.engine.engine import Engine
from porcelet.engine.grammar import GrammarCompiler
from porcelet.errors import InputError, ModelError
from porcelet.models.transformer import build, initialize
from porcelet.server.app import create_app
from porcelet.server.conversations.jobs import Jobs
from porcelet.server.gate import guard, keys, login
from porcelet.server.generation.models import Models
from porcelet.types import Constraint, SamplingParams
from porcelet.weights import gguf
from porcelet.weights.header import read_config
from porcelet.weights.shards import read_header
from tests.models.variants import LLAMA
from tests.server.conftest import Server, start_server
from tests.server.doors import House, bearer, in_house, listening, routes
from tests.tiny_model import save_tiny_model

PACKAGE = Path(keys.__file__).parents[2]
ASK: dict[str, Any] = {"model": "tiny", "messages": [{"role": "user", "content": "x"}], "max_tokens": 1}


def files(*parts: str) -> list[Path]:
    """The package's source files, or those of some of its parts."""
    found = [file for part in parts or ("",) for file in (PACKAGE / part).rglob("*.py")]
    assert found
    return found


def names(file: Path) -> Iterator[str]:
    """Everything that a file imports, calls or reaches through a dot, as dotted names."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or ""
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call | ast.Attribute):
            yield ast.unparse(node.func if isinstance(node, ast.Call) else node)


def users_of(pattern: str, *parts: str) -> set[str]:
    """Files in which a name matches from its beginning to a dot or its end."""
    forbidden = re.compile(rf"(?:{pattern})(?:\.|$)")
    return {str(file.relative_to(PACKAGE)) for file in files(*parts) if any(map(forbidden.match, names(file)))}


# ---- pickle and torch.load on a socket or a file --------------------------------------------------------------------


def test_nothing_is_unpickled() -> None:
    """No part of the package imports or calls anything that turns bytes into objects or code."""
    picklers = r"_?c?[pP]ickle|dill|cloudpickle|joblib|marshal|shelve|jsonpickle|yaml|multiprocessing|pandas"
    loaders = r"torch\.(load|hub|package|jit|distributed\.(checkpoint|rpc)|multiprocessing)|np\.load|numpy\.load"
    assert users_of(f"{picklers}|{loaders}") == set()
    assert users_of(r"eval|exec|compile|__import__|builtins|runpy|code") == set()
    assert users_of("json") and users_of(r"torch\.empty")  # the search finds what is there


def test_a_pickle_in_a_message_or_a_weight_file_is_refused(tmp_path: Path, server: Server) -> None:
    """Bytes that would run code if they were unpickled are an error wherever bytes come in."""
    trap = pickle.dumps(Trap(tmp_path / "sprung"))
    (tmp_path / "model.safetensors").write_bytes(trap)
    for read in (read_header, gguf.read):
        with pytest.raises(ModelError):
            read(tmp_path / "model.safetensors")
    answer = httpx.post(f"{server.url}/v1/chat/completions", content=trap, headers={"Content-Type": "application/json"})
    assert answer.status_code == 400
    assert not (tmp_path / "sprung").exists()
    pickle.loads(trap)
    assert (tmp_path / "sprung").exists()  # it was a real one


class Trap:
    """Unpickled, it makes a file."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.file),)


# ---- model files as code --------------------------------------------------------------------------------------------


def test_a_model_folder_runs_no_code(tmp_path: Path) -> None:
    """auto_map, a module beside the weights and a template that reaches for Python: none of them runs."""
    folder = save_tiny_model(tmp_path / "tiny")
    config = json.loads((folder / "config.json").read_text())
    auto_map = {"AutoModelForCausalLM": "evil.Evil", "AutoConfig": "evil.Evil", "AutoTokenizer": "evil.Evil"}
    (folder / "config.json").write_text(json.dumps(config | {"auto_map": auto_map, "trust_remote_code": True}))
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'sprung')!r}, 'w')\nEvil = 1\n")
    reach = "{{ cycler.__init__.__globals__.os.mkdir('" + str(tmp_path / "sprung") + "') }}"
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"chat_template": reach, "auto_map": auto_map}))
    read_config(folder)
    tokenizer, chat_format = open_codec(folder)
    with pytest.raises(ModelError, match="SecurityError|UndefinedError"):
        chat_format.render([{"role": "user", "content": "x"}], tokenizer)
    assert not (tmp_path / "sprung").exists()
    # Of our own modules, from a table, and of optional packages, whose names stand in our code.
    assert users_of(r"importlib\.import_module") == {"__init__.py", "extras.py"}


# ---- malformed headers ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"GGUF" + b"\xff" * 60,
        b"GGUF" + (3).to_bytes(4, "little") + (2**62).to_bytes(8, "little") * 2,
        (2**63).to_bytes(8, "little") + b"{}",
        b"\x50\0\0\0\0\0\0\0" + b'{"a":{"dtype":"F32","shape":[4294967296,4294967296],"data_offsets":[0,16]}}    ',
    ],
)
def test_lying_headers_are_errors(tmp_path: Path, content: bytes) -> None:
    """Counts and sizes beyond the file, or beyond 64 bits, are one error each (tests/weights has hundreds of them)."""
    path = tmp_path / "model.gguf"
    path.write_bytes(content)
    for read in (gguf.read, read_header):
        with pytest.raises(ModelError, match=r"model\.gguf"):
            read(path)


# ---- request fields -------------------------------------------------------------------------------------------------


FIELDS = [
    *("model", "messages", "prompt", "input", "system", "suffix", "tools", "tool_choice", "user", "metadata", "seed"),
    *("max_tokens", "max_completion_tokens", "max_output_tokens", "temperature", "top_p", "top_k", "min_p", "n"),
    *("presence_penalty", "frequency_penalty", "repetition_penalty", "logit_bias", "logprobs", "top_logprobs"),
    *("prompt_logprobs", "echo", "stop", "stop_sequences", "stream", "stream_options", "response_format", "best_of"),
    *("reasoning_effort", "reasoning", "thinking", "n_discard", "chat_template_kwargs", "prompt_embeds"),
]
VALUES = (
    "null",
    "-1",
    "0",
    str(2**31),
    str(2**63),
    "NaN",
    "1e999",
    '""',
    '"\\ud800"',
    "[[[[[[[[]]]]]]]]",
    '{"a": [null]}',
)
SHORT = {"max_tokens": 1}
BODIES: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": ASK,
    "/v1/completions": {"model": "tiny", "prompt": "x"} | SHORT,
    "/v1/responses": {"model": "tiny", "input": "x", "max_output_tokens": 1},
    "/v1/messages": ASK,
}


@pytest.mark.parametrize("path", BODIES)
def test_no_field_breaks_the_server(server: Server, path: str) -> None:
    """Every field of every dialect with every unlikely value is answered or refused, and the next request is served."""
    assert len(server.workers()) == 1
    with httpx.Client(base_url=server.url, timeout=30, headers={"Content-Type": "application/json"}) as client:
        for field in FIELDS:
            for value in VALUES:
                if field.startswith("max_") and value == "null":
                    continue  # that asks for a long answer
                body = json.dumps(BODIES[path] | {field: "@"}).replace('"@"', value)
                answer = client.post(path, content=body)
                assert answer.status_code in (200, 400, 404, 422), (body, answer.text[:300])
        assert client.post("/v1/chat/completions", json=ASK).status_code == 200
    assert len(server.workers()) == 1


# ---- regular expressions, grammars, schemas -------------------------------------------------------------------------


def test_constraints_cannot_hold_the_engine_up(model_folder: Path) -> None:
    """A regex that would make a backtracking matcher try for ever is matched in linear time; schemas too large or too
    deep are refused, and so is one that takes too long to compile."""
    tokenizer, _ = open_codec(model_folder)
    end = tokenizer.token_id("<|end|>")
    assert end is not None
    compiler = GrammarCompiler(tokenizer, [end])
    start = time.monotonic()
    matcher = compiler.compile(Constraint("regex", "(a+)+b"))
    (token,) = tokenizer.encode("a")
    for _ in range(2000):
        matcher.mask()
        matcher.push(token)
    assert time.monotonic() - start < 10
    slow = {"allOf": [{"pattern": f"x{i}.*y{i}"} for i in range(60)]}
    for schema in ('{"items":' * 6000 + "{}" + "}" * 6000, "{" + " " * (1 << 20) + "}", json.dumps(slow)):
        with pytest.raises(InputError):
            compiler.compile(Constraint("json_schema", schema))


def test_no_backtracking_over_foreign_text() -> None:
    """No pattern of the server's or the chat formats' repeats what repeats: that is what takes exponential time."""
    patterns = [
        node.value
        for file in files("server", "chat")
        for call in ast.walk(ast.parse(file.read_text()))
        if isinstance(call, ast.Call) and ast.unparse(call.func).startswith("re.")
        for node in ast.walk(call)
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    ]
    nested = re.compile(r"\([^()]*[+*][^()]*\)[+*]")
    assert patterns and nested.search("(a+)+")
    assert [pattern for pattern in patterns if nested.search(pattern)] == []


# ---- template arguments ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("field", ["chat_template", "chat_template_kwargs", "add_generation_prompt", "tokenize"])
def test_a_request_cannot_reach_the_template(server: Server, field: str) -> None:
    """Neither a template nor arguments for it, such as those that make it tokenize, are taken from a request."""
    for value in ({"tokenize": True, "chat_template": "{{ 1 }}"}, "{{ 1 }}", True):
        answer = httpx.post(f"{server.url}/v1/chat/completions", json=ASK | {field: value})
        assert answer.status_code == 400 and field in answer.json()["error"]["message"]


def test_a_long_prompt_does_not_hold_others_up(server: Server) -> None:
    """While megabytes are rendered and tokenized for one request, the next one is answered."""

    async def main() -> float:
        async with httpx.AsyncClient(base_url=server.url, timeout=60) as client:
            messages = [{"role": "user", "content": "wörld " * 500_000}]
            long = asyncio.create_task(client.post("/v1/chat/completions", json=ASK | {"messages": messages}))
            slowest = 0.0
            while not long.done():
                start = time.monotonic()
                assert (await client.get("/v1/models")).status_code == 200
                slowest = max(slowest, time.monotonic() - start)
                await asyncio.sleep(0.02)
            assert (await long).status_code == 400
            return slowest

    assert asyncio.run(main()) < 2


# ---- the HTTP layer -------------------------------------------------------------------------------------------------


def test_huge_headers_and_forged_hosts(server: Server) -> None:
    """A header of a megabyte is refused in little memory, and a Host that holds an open path opens nothing (test_guard
    has every spelling)."""
    try:
        huge = httpx.get(f"{server.url}/v1/models", headers={"x": "y" * (1 << 20)}).status_code
    except httpx.TransportError:  # we closed while it was still sending
        huge = 431
    assert huge == 431
    for host in ("127.0.0.1/healthz?", "localhost/static/"):
        assert httpx.get(f"{server.url}/v1/models", headers={"Host": host}).status_code == 403
    assert "host" not in inspect.getsource(guard.Guard._visitor)  # who gets in is decided on the path alone


# ---- timing of the comparison ---------------------------------------------------------------------------------------


def test_every_key_takes_the_same_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Right, wrong, unknown, revoked and malformed keys are each compared exactly once, in constant time, by hash."""
    compared = []
    monkeypatch.setattr(hmac, "compare_digest", lambda a, b: compared.append((a, b)) or a == b)

    async def visit(house: House) -> None:
        key, secret = house.key()
        for given in (secret, secret[:-1] + "!", f"sk-porcelet-{'0' * 10}-{'x' * 43}", "", "é\ud800"):
            compared.clear()
            assert bool(await house.gate.keys.find(given)) == (given == secret)
            assert [(len(a), len(b)) for a, b in compared] == [(32, 32)]

    in_house(tmp_path, visit)
    for module in (keys, login, guard):
        for node in ast.walk(ast.parse(inspect.getsource(module))):
            if isinstance(node, ast.Compare) and any(isinstance(op, ast.Eq | ast.NotEq) for op in node.ops):
                compared_here = ast.unparse(node)
                assert not re.search("secret|hash|cookie|given", compared_here) or "_logins.c.hash" in compared_here


# ---- unprotected routes ---------------------------------------------------------------------------------------------


def test_no_route_is_forgotten(tmp_path: Path) -> None:
    """Deny by default: what is open is listed in one place, and every other route of the application answers 401."""
    assert {"/healthz", "/readyz", "/login"} == guard.OPEN_PATHS and guard.OPEN_FOLDER == "/static/"

    async def visit(house: House) -> None:
        for method, path in routes(house):
            if path not in guard.OPEN_PATHS and not path.startswith(guard.OPEN_FOLDER):
                assert (await house.client.request(method, path)).status_code == 401, path

    in_house(tmp_path, visit)


# ---- requests in the server's name, media, telemetry, updates -------------------------------------------------------


WATCHED = textwrap.dedent("""
    import sys

    def watch(event, arguments):
        if event in ("socket.getaddrinfo", "socket.gethostbyname", "socket.sendto", "pickle.find_class", "os.system"):
            print("WATCHED", event, arguments, file=sys.stderr, flush=True)
        if event == "socket.connect" and isinstance(arguments[1], tuple):
            print("WATCHED", event, arguments[1], file=sys.stderr, flush=True)

    sys.addaudithook(watch)
    from porcelet.cli import main
    main()
""")


def test_the_server_calls_nobody(model_folder: Path, tmp_path: Path) -> None:
    """From its start to its end, through answers, refusals and requests that name addresses, the HTTP process opens no
    connection, resolves no name and unpickles nothing: no telemetry, no look for updates, no fetched URL."""
    running = start_server(model_folder, tmp_path / "stderr", "-c", WATCHED)
    with httpx.Client(base_url=running.url, timeout=30) as client:
        assert client.post("/v1/chat/completions", json=ASK).status_code == 200
        for url in (
            "http://127.0.0.1:9/x",
            "http://169.254.169.254/",
            "http://evil.example\\@127.0.0.1/",
            "file:///etc/passwd",
        ):
            for part in ({"type": "image_url", "image_url": {"url": url}}, {"type": "input_file", "file_url": url}):
                messages = [{"role": "user", "content": [part]}]
                assert client.post("/v1/chat/completions", json=ASK | {"messages": messages}).status_code == 400
        for path in ("/", "/login", "/healthz", "/metrics", "/v1/models", "/v1/usage"):
            client.get(path)
    running.process.terminate()
    assert running.process.wait(20) == 0
    told = [line for line in running.log.read_text().splitlines() if line.startswith("WATCHED")]
    assert [
        line for line in told if "getaddrinfo ('127.0.0.1'" not in line
    ] == []  # uvicorn's and ours for the listener


def test_the_serving_half_cannot_fetch() -> None:
    """Neither the server nor the engine nor the chat formats import anything that speaks to other machines."""
    clients = r"httpx2?|requests$|requests\.(api|sessions)|aiohttp|urllib\.request|urllib3|http\.client|ftplib|smtplib"
    clients += "|huggingface_hub"
    assert users_of(clients, "server", "engine", "chat") == set()
    assert users_of(clients, "hub")  # that one may, on the command line
    assert users_of(r"porcelet\.hub", "server", "chat") == set()


def test_no_media_is_decoded(server: Server) -> None:
    """No decoder of pictures, sound or video is imported anywhere; a request that holds some is refused."""
    assert users_of(r"PIL|cv2|imageio|torchvision|torchaudio|soundfile|librosa|decord|av|ffmpeg|imghdr|wave") == set()
    for part in (
        {"type": "image_url", "image_url": {"url": "data:image/png;base64,iVBORw0KGgo="}},
        {"type": "input_audio", "input_audio": {"data": "AAAA", "format": "wav"}},
        {"type": "prompt_embeds", "prompt_embeds": "gASVAAAA"},
    ):
        messages = [{"role": "user", "content": [part]}]
        assert httpx.post(f"{server.url}/v1/chat/completions", json=ASK | {"messages": messages}).status_code == 400


def test_nothing_updates_itself() -> None:
    """No part installs anything: pip is used by the model store alone, and only to download wheels."""
    installing = {file.name for file in files() if re.search(r'"(-m", "pip|pip)"', file.read_text())}
    assert installing == {"wheel.py"}
    source = (PACKAGE / "hub" / "wheel.py").read_text()
    assert '"download"' in source and '"install"' not in source and '":all:"' in source


# ---- leaks through errors and logs ----------------------------------------------------------------------------------


def test_errors_tell_nothing_of_the_inside(tmp_path: Path) -> None:
    """An exception of ours reaches the client as one fixed text; refusals hold no path and no address."""

    class Broken(Models):
        async def find(self, name: str) -> Any:
            raise RuntimeError("inside: /secret/path 0x7f0000")

    async def visit(house: House) -> None:
        _, secret = house.key()
        broken = Broken(ServeConfig(models={"tiny": ModelEntry("tiny")}), [])
        transport = httpx.ASGITransport(
            create_app(broken, house.database, house.gate, Jobs(house.database)), raise_app_exceptions=False
        )
        async with httpx.AsyncClient(transport=transport, base_url="http://chat.example") as client:
            client.headers.update(bearer(secret) | {"Content-Type": "application/json"})
            answer = await client.post("/v1/chat/completions", json=ASK)
            assert answer.status_code == 500
            assert answer.json()["error"]["message"] == "the server made a mistake; its log says more"
            for sent in (b"{", b"[]", b'{"model": 5}', b"\xff", b'{"a": "\\ud800"}', b"[" * 70):
                refused = await client.post("/v1/chat/completions", content=sent)
                assert refused.status_code == 400
                assert not re.search(r"Traceback|File \"|-packages|0x[0-9a-f]{6}|pydantic|starlette", refused.text)

    in_house(tmp_path, visit)


def test_no_secret_is_ever_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """With every logger at its most talkative, keys, wrong keys, cookies and prompts appear in no log line; and no file
    of the database holds a key or a cookie."""
    caplog.set_level(1)
    talkative = ("sqlalchemy.engine", "sqlalchemy.pool", "uvicorn", "uvicorn.error", "uvicorn.access", "asyncio")
    levels = {name: logging.getLogger(name).level for name in talkative}
    secrets: list[str] = []

    async def visit(house: House) -> None:
        _, secret = house.key()
        async with listening(house.app) as (host, port):
            for name in talkative:
                logging.getLogger(name).setLevel(1)
            async with httpx.AsyncClient(base_url=f"http://{host}:{port}") as client:
                answer = await client.post("/login", json={"key": secret})
                cookie = answer.cookies["porcelet_login"]
                wrong = secret[:-20] + "wrongwrongwrongwrong"
                await client.post("/login", json={"key": wrong})
                await client.post("/login", json={"key": [wrong]})
                for headers in (bearer(secret), {"x-api-key": secret}, bearer(wrong), {}):
                    await client.get("/v1/usage", headers=headers)
                    await client.post("/v1/chat/completions", json={"prompt": "a private matter"}, headers=headers)
                await client.post("/logout")
            secrets.extend([secret[-30:], "wrongwrongwrong", cookie, "private matter"])

    try:
        in_house(tmp_path, visit)
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
    # httpx and httpcore are the test's own client, in this very process.
    records = [record for record in caplog.records if not record.name.startswith("http")]
    lines = "\n".join(f"{record.name} {record.getMessage()} {record.args} {record.exc_info}" for record in records)
    stored = b"".join(file.read_bytes() for file in tmp_path.iterdir())
    assert "sqlalchemy.engine" in lines and "/v1/usage" in lines
    for secret in secrets:
        assert secret not in lines and secret.encode() not in stored


# ---- side channels of the prefix cache ------------------------------------------------------------------------------


def test_tenants_share_no_prefix(guarded: tuple[Server, dict[str, str]]) -> None:
    """A prompt that one key has just sent is cached for that key and computed anew for another: whether somebody asked
    the same cannot be measured."""
    server, made = guarded
    ask = ASK | {"messages": [{"role": "user", "content": f"{time.time()} confidential " * 20}]}

    def cached(name: str) -> int:
        """Tokens found in the cache for one more request."""
        before = total(name)
        answer = httpx.post(f"{server.url}/v1/chat/completions", json=ask, headers=bearer(made[name]), timeout=20)
        assert answer.status_code == 200
        deadline = time.monotonic() + 5
        while (after := total(name))[0] == before[0]:
            assert time.monotonic() < deadline
        return after[1] - before[1]

    def total(name: str) -> tuple[int, int]:
        days = httpx.get(f"{server.url}/v1/usage", headers=bearer(made[name])).json()["data"]
        return sum(day["requests"] for day in days), sum(day["cached_tokens"] for day in days)

    assert cached("free") == 0
    assert cached("free") >= 128
    assert cached("neighbour") == 0
    assert cached("neighbour") >= 128


# ---- network exposure -----------------------------------------------------------------------------------------------


def test_one_listening_socket_on_loopback(server: Server) -> None:
    """Unless told otherwise the server listens on 127.0.0.1; the engine's process listens on nothing."""
    own = {os.readlink(link) for link in Path(f"/proc/{server.process.pid}/fd").iterdir() if link.is_symlink()}
    engine = {os.readlink(link) for pid in server.workers() for link in Path(f"/proc/{pid}/fd").iterdir()}
    listening_at = {}
    for table in ("tcp", "tcp6", "udp", "udp6"):
        for line in Path(f"/proc/{server.process.pid}/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] in ("0A", "07"):  # listening, or a datagram socket that is open to all
                listening_at[f"socket:[{fields[9]}]"] = fields[1]
    port = int(server.url.rpartition(":")[2])
    assert [listening_at[link] for link in own & listening_at.keys()] == [f"{socket.htonl(0x7F000001):08X}:{port:04X}"]
    assert not engine & listening_at.keys()


# ---- paths of files -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "path", ["../app.py", "%2e%2e/app.py", "..%2fapp.py", "//etc/passwd", "..\\app.py", "%00", "."]
)
def test_paths_stay_in_their_folder(server: Server, path: str) -> None:
    """No spelling leads out of the page's folder, and no name out of the model store."""
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=10) as connection:
        connection.sendall(f"GET /static/{path} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n".encode())
        answer = b"".join(iter(lambda: connection.recv(65536), b""))
    assert re.match(rb"HTTP/1.1 (404|400|405)", answer), answer[:200]
    assert b"root:" not in answer and b"def create_app" not in answer
    with pytest.raises(InputError, match="name"):
        hub.remove(path)


# ---- guesses in the cache -------------------------------------------------------------------------------------------


def test_rejected_guesses_never_enter_the_cache() -> None:
    """What an engine that guesses has cached of an answer is what another one computes: the continuation is the same,
    though most of it is found in the cache."""
    model = initialize(build(LLAMA), seed=5).eval()
    guessing, plain = Engine(model, EngineConfig(speculation="lookup")), Engine(model, EngineConfig(speculation="off"))
    params = SamplingParams(max_tokens=200, temperature=0.8, seed=7, ignore_eos=True)
    prompt = [random.Random(1).randrange(97) for _ in range(20)] * 3
    answer = list(guessing.stream(prompt, params))
    drafted, accepted = (sum(getattr(o, name) for o in answer) for name in ("num_drafted", "num_accepted"))
    assert drafted > accepted
    longer = prompt + [token for output in answer for token in output.tokens]
    ((found,), (computed,)) = (engine.generate([longer], params) for engine in (guessing, plain))
    assert found.num_cached_tokens >= 192 and computed.num_cached_tokens == 0
    assert found.tokens == computed.tokens
