"""The chat API, against a real server whose model says what it is told."""

from __future__ import annotations

import json
import os
import re
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from porcelet.server.conversations.history import messages_of
from porcelet.server.conversations.question import FILE_TEMPLATE
from porcelet.server.store import Database
from tests.server.conftest import CONTEXT, THE_ANSWER, Interrupted, Server, start_server

Json = dict[str, Any]


class Chat:
    """One conversation as a page sees it."""

    def __init__(self, client: httpx.Client, title: str = "") -> None:
        self.client = client
        self.id: str = client.post("/conversations", json={"title": title}).json()["id"]

    def post(self, content: str = "Hi", parent: str | None = None, **fields: Any) -> httpx.Response:
        body = {"parent": parent, "content": content, "model": "tiny", "effort": "off", **fields}
        return self.client.post(f"/conversations/{self.id}/messages", json=body)

    def ask(self, content: str = "Hi", parent: str | None = None, **fields: Any) -> Json:
        """The answer to a new question, at its end."""
        response = self.post(content, parent, **fields)
        assert response.status_code == 201, response.text
        return ended(self.client, response.json()["assistant"]["stream"])

    def begin(self) -> Json:
        """An answer that goes on until it is stopped, once it has begun."""
        answer: Json = self.post("Think", effort=None).json()["assistant"]
        with self.client.stream("GET", f"/streams/{answer['stream']}") as response:
            next(event for event in events_of(response) if event[1]["type"] == "reasoning")
        return answer

    def stop(self, answer: Json) -> Json:
        assert self.client.post(f"/streams/{answer['id']}/stop").status_code == 204
        return next(message for message in self.tree() if message["id"] == answer["id"])

    def facts(self) -> Json:
        return self.client.get(f"/conversations/{self.id}").json()["conversation"]

    def tree(self) -> list[Json]:
        return self.client.get(f"/conversations/{self.id}").json()["messages"]


def events_of(response: httpx.Response) -> Iterator[tuple[int, Json]]:
    """A stream's events with their numbers."""
    assert response.status_code == 200
    assert response.headers["content-type"].startswith("text/event-stream")
    number = 0
    for line in response.iter_lines():
        if line.startswith("id: "):
            number = int(line[4:])
        elif line.startswith("data: "):
            yield number, json.loads(line[6:])


def read(client: httpx.Client, stream: str, headers: dict[str, str] | None = None, **query: int) -> list[Any]:
    with client.stream("GET", f"/streams/{stream}", params=query, headers=headers) as response:
        return list(events_of(response))


def ended(client: httpx.Client, stream: str) -> Json:
    _, last = read(client, stream)[-1]
    assert last["type"] == "ended"
    return last["message"]


@pytest.fixture
def client(chat_server: Server) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=f"{chat_server.url}/api", timeout=20) as client:
        yield client


@pytest.fixture
def chat(client: httpx.Client) -> Chat:
    return Chat(client)


def test_session(client: httpx.Client) -> None:
    """The page learns who asks, which models there are, what each holds and whether it thinks."""
    session = client.get("/session").json()
    assert session["user"] == {"name": "local"} and session["login"] is False
    assert session["default_model"] == "tiny"
    (model,) = session["models"]
    facts = {"name": "tiny", "context": CONTEXT, "thinking": "always", "examples": []}
    assert model == facts | {"loading": None, "failure": None}


def test_an_answer_with_thinking(chat: Chat) -> None:
    """A low effort limits the reasoning; reasoning and answer, counts and times arrive in the stream and are kept, and
    any number of readers, from the beginning or the middle on, early or late, see the same numbered events."""
    answer = chat.post("Why?\nTell me.", effort="low").json()["assistant"]
    assert answer["status"] == "running" and answer["content"] == ""
    events = read(chat.client, answer["stream"])
    numbers = [number for number, _ in events]
    assert numbers == list(range(1, len(events) + 1))
    assert events[0][1] == {"type": "started", "prompt_tokens": events[0][1]["prompt_tokens"], "cached_tokens": 0}
    parts = {
        kind: "".join(event["text"] for _, event in events if event["type"] == kind)
        for kind in ("reasoning", "content")
    }
    message = events[-1][1]["message"]
    assert message["content"] == parts["content"] == THE_ANSWER
    assert message["reasoning"] == parts["reasoning"] and message["reasoning"].startswith("hm so hm so")
    assert message["status"] == "done" and message["error"] is None and message["stream"] is None
    assert message["usage"]["reasoning_tokens"] >= 1024
    assert message["usage"]["completion_tokens"] == message["usage"]["reasoning_tokens"] + 7
    assert all(seconds >= 0 for seconds in message["seconds"].values()) and message["seconds"]["thinking"] > 0
    assert read(chat.client, answer["stream"]) == events
    third = len(events) // 3
    assert read(chat.client, answer["stream"], after=third) == events[third:]
    assert read(chat.client, answer["stream"], {"Last-Event-ID": f"{2 * third}"}, after=third) == events[2 * third :]
    assert read(chat.client, answer["stream"], after=len(events)) == []
    beyond = chat.client.get(f"/streams/{answer['stream']}", params={"after": len(events) + 1})
    assert beyond.status_code == 400 and beyond.json()["error"]["param"] == "after"
    question, kept = chat.tree()
    assert kept == message
    assert (question["content"], question["parent"], kept["parent"]) == ("Why?\nTell me.", None, question["id"])
    assert (chat.facts()["title"], chat.facts()["leaf"]) == ("Why?", kept["id"])


def test_an_answer_goes_on_without_readers(chat: Chat) -> None:
    """A reader that leaves changes nothing: the text in the database grows while nobody reads."""
    answer = chat.begin()
    lengths = set()
    deadline = time.monotonic() + 20
    while len(lengths) < 3:
        assert time.monotonic() < deadline
        lengths.add(len(chat.tree()[1]["reasoning"]))
        time.sleep(0.1)
    stopped = chat.stop(answer)
    assert len(stopped["reasoning"]) > max(lengths)


def test_stop_keeps_what_came(chat: Chat) -> None:
    """A stopped answer is in the conversation when the stop is answered, the engine is idle within a moment, and the
    stream ends for who still reads it; to stop it again changes nothing."""
    answer = chat.begin()
    stopped = chat.stop(answer)
    assert stopped["status"] == "stopped" and stopped["reasoning"].startswith("hm so hm") and stopped["content"] == ""
    assert stopped["usage"]["completion_tokens"] == stopped["usage"]["reasoning_tokens"] > 0
    assert ended(chat.client, answer["id"]) == stopped == chat.stop(answer)
    health = httpx.URL(chat.client.base_url).copy_with(path="/healthz")
    deadline = time.monotonic() + 5
    while httpx.get(health).json()["models"]["tiny"]["num_running"]:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_branches(chat: Chat) -> None:
    """A regenerated answer is a sibling, an edited question a branch; each is asked with its own path alone, without
    the reasoning of before; the leaf follows, and can be set back."""
    first = chat.ask("one")
    again = chat.client.post(f"/messages/{first['id']}/regenerate", json={"model": "tiny", "effort": "off"}).json()
    sibling = ended(chat.client, again["assistant"]["stream"])
    assert (sibling["parent"], sibling["content"]) == (first["parent"], THE_ANSWER)
    assert sibling["usage"]["prompt_tokens"] == first["usage"]["prompt_tokens"]
    second = chat.ask("a second question", sibling["id"])
    edited = chat.ask("edited", sibling["id"])
    difference = len("a second question") - len("edited")
    assert second["usage"]["prompt_tokens"] - edited["usage"]["prompt_tokens"] == difference
    tree = {message["id"]: message for message in chat.tree()}
    assert [message["content"] for message in tree.values()] == [
        "one", THE_ANSWER, THE_ANSWER, "a second question", THE_ANSWER, "edited", THE_ANSWER,
    ]  # fmt: skip
    assert tree[second["parent"]]["parent"] == tree[edited["parent"]]["parent"] == sibling["id"]
    assert chat.facts()["leaf"] == edited["id"]
    assert chat.client.patch(f"/conversations/{chat.id}", json={"leaf": first["id"]}).json()["leaf"] == first["id"]


def test_a_repeated_question_is_asked_once(chat: Chat) -> None:
    """Who sends a message or a regeneration with the same id again, at once or after its end, gets what the first
    made, and nothing is asked twice; an id of another message, conversation or text is a conflict."""
    first = chat.post("once", id="question-1" + chat.id)
    pair, answer = first.json(), first.json()["assistant"]
    repeated = chat.post("once", id="question-1" + chat.id)
    assert (first.status_code, repeated.status_code) == (201, 200)
    assert [repeated.json()[role]["id"] for role in ("user", "assistant")] == [pair["user"]["id"], answer["id"]]
    end = ended(chat.client, answer["stream"])
    assert chat.post("once", id=pair["user"]["id"]).json() == {"user": pair["user"], "assistant": end}
    url, choice = f"/messages/{answer['id']}/regenerate", {"model": "tiny", "effort": "off", "id": f"again_{chat.id}"}
    again, repeated = chat.client.post(url, json=choice), chat.client.post(url, json=choice)
    assert (again.status_code, repeated.status_code) == (201, 200)
    assert again.json()["assistant"]["id"] == repeated.json()["assistant"]["id"] == choice["id"]
    ended(chat.client, choice["id"])
    assert len(chat.tree()) == 3
    conflicts = [
        chat.post("another text", id=pair["user"]["id"]),
        chat.post("once", id=answer["id"]),
        Chat(chat.client).post("once", id=pair["user"]["id"]),
        chat.client.post(url, json=choice | {"id": answer["id"]}),
        chat.client.post(url, json=choice | {"id": pair["user"]["id"]}),
    ]
    assert [(response.status_code, response.json()["error"]["code"]) for response in conflicts] == [
        (409, "id_taken")
    ] * 5
    assert len(chat.tree()) == 3


def test_files_come_in_front_of_the_question(chat: Chat) -> None:
    """An attached file's text is part of its question, now and in the turns that follow."""
    uploaded = chat.client.post("/files", params={"name": "a.txt"}, content=b"secret").json()
    plain, with_file = chat.ask("what?"), chat.ask("what?", attachments=[uploaded["id"]])
    added = len(FILE_TEMPLATE.format(name="a.txt", text="secret"))
    assert with_file["usage"]["prompt_tokens"] - plain["usage"]["prompt_tokens"] == added
    after = [chat.ask("and?", answer["id"])["usage"]["prompt_tokens"] for answer in (plain, with_file)]
    assert after[1] - after[0] == added
    question = next(message for message in chat.tree() if message["id"] == with_file["parent"])
    assert question["attachments"] == [{"id": uploaded["id"], "name": "a.txt", "tokens": 6}]
    unknown = chat.post("what?", attachments=["nowhere"])
    assert (unknown.status_code, unknown.json()["error"]["param"]) == (400, "attachments")


def test_too_long_stores_nothing(chat: Chat) -> None:
    """A conversation that the context does not hold is refused by its own code, and leaves no trace."""
    response = chat.post("x" * (CONTEXT + 4000))
    assert (response.status_code, response.json()["error"]["code"]) == (400, "context_length_exceeded")
    assert str(CONTEXT) in response.json()["error"]["message"]
    assert chat.tree() == [] and chat.facts()["title"] == ""


@pytest.mark.parametrize(
    ("fields", "status", "param"),
    [
        ({"content": " \n "}, 400, "content"),
        ({"content": "a\0b"}, 400, "content"),
        ({"content": 5}, 400, "content"),
        ({"content": "x" * 500_001}, 422, "content"),
        ({"effort": "huge"}, 400, "effort"),
        ({"parent": "nowhere"}, 400, "parent"),
        ({"attachments": ["x"] * 21}, 422, "attachments"),
        ({"temperature": 1}, 400, "temperature"),
        ({"id": "short"}, 400, "id"),
        ({"id": "x" * 65}, 400, "id"),
        ({"id": "with space"}, 400, "id"),
        ({"id": "new-line\n"}, 400, "id"),
    ],
)
def test_messages_that_are_refused(chat: Chat, fields: Json, status: int, param: str) -> None:
    """A field that is unknown or cannot be used is named, and nothing is stored."""
    body = {"parent": None, "content": "x", "model": "tiny", "effort": "off"} | fields
    response = chat.client.post(f"/conversations/{chat.id}/messages", json=body)
    assert (response.status_code, response.json()["error"]["param"]) == (status, param)
    assert chat.tree() == []


def test_half_characters_are_refused(client: httpx.Client) -> None:
    """JSON can spell a lone surrogate, which no database keeps."""
    headers = {"Content-Type": "application/json"}
    response = client.post("/conversations", content=b'{"title": "\\ud800"}', headers=headers)
    assert (response.status_code, response.json()["error"]["param"]) == (400, "title")


def test_unknown_things(chat: Chat) -> None:
    """What is not there is a 404 with a code that the page knows."""
    model = chat.post(model="gpt")
    assert (model.status_code, model.json()["error"]["code"]) == (404, "model_not_found")
    for method, path in (
        ("GET", "/conversations/x"),
        ("DELETE", "/conversations/x"),
        ("GET", "/conversations/x/export"),
        ("GET", "/streams/x"),
        ("POST", "/streams/x/stop"),
    ):
        response = chat.client.request(method, path)
        assert (response.status_code, response.json()["error"]["code"]) == (404, "not_found"), path


def test_a_caller_has_a_few_answers_at_a_time(chat: Chat) -> None:
    """The fifth answer under way is a 429; a place is free again as soon as one is stopped."""
    answers = [chat.begin() for _ in range(4)]
    refused = chat.post()
    assert (refused.status_code, refused.json()["error"]["code"]) == (429, "rate_limit_exceeded")
    assert int(refused.headers["Retry-After"]) > 0
    chat.stop(answers[0])
    assert chat.ask()["content"] == THE_ANSWER
    for answer in answers[1:]:
        chat.stop(answer)


def test_list_search_rename_delete(client: httpx.Client) -> None:
    """Conversations are listed with what was found in them, renamed, pinned and deleted; one under way is stopped by
    that."""
    chats = [Chat(client, f"Ärger number {number}") for number in range(3)]
    client.patch(f"/conversations/{chats[0].id}", json={"pinned": True, "title": "ARGER zero"})

    def listed(**query: Any) -> Json:
        return client.get("/conversations", params=query).json()

    order = [chats[0].id, chats[2].id, chats[1].id]
    page = listed(q="arger", limit=2)
    rest = listed(q="arger", limit=2, cursor=page["next"])
    assert [entry["id"] for entry in page["conversations"] + rest["conversations"]] == order
    assert rest["next"] is None and rest["conversations"][0]["excerpt"] is None
    chats[1].ask("wo ist der Bahnhof?")
    (hit,) = listed(q="BAHNHOF arger")["conversations"]
    assert (hit["id"], hit["excerpt"]) == (chats[1].id, "wo ist der Bahnhof?")
    answer = chats[2].begin()
    assert client.delete(f"/conversations/{chats[2].id}").status_code == 204
    assert client.get(f"/streams/{answer['id']}").status_code == 404
    assert client.get(f"/conversations/{chats[2].id}").status_code == 404
    assert [entry["id"] for entry in listed(q="arger")["conversations"]] == order[:1] + order[2:]


def test_deleting_ends_what_was_asked(chat: Chat) -> None:
    """A deletion on the heels of a question leaves no answer under way; who reads it hears of its end."""
    for _ in range(5):
        doomed = Chat(chat.client)
        answer = doomed.begin()
        with ThreadPoolExecutor() as others:
            reader = others.submit(ended, chat.client, answer["id"])
            asked = others.submit(doomed.post, "and?")
            assert chat.client.delete(f"/conversations/{doomed.id}").status_code == 204
            assert asked.result().status_code in (201, 404)
            assert reader.result()["status"] == "stopped"
        gone = chat.client.get(f"/streams/{answer['id']}")
        assert (gone.status_code, gone.json()["error"]["code"]) == (404, "not_found")
    running = [chat.begin() for _ in range(4)]  # every place is free again
    for answer in running:
        chat.stop(answer)


def test_exports(chat: Chat) -> None:
    """Markdown and JSON are downloads with a name in any script; everything is one more."""
    chat.client.patch(f"/conversations/{chat.id}", json={"title": 'Über "北京"'})
    chat.ask("Where?")
    url = f"/conversations/{chat.id}/export"
    text = chat.client.get(url)
    assert text.text == f'# Über "北京"\n\n## You\n\nWhere?\n\n## tiny\n\n{THE_ANSWER}\n'
    assert text.headers["content-disposition"].endswith("filename*=UTF-8''%C3%9Cber%20%22%E5%8C%97%E4%BA%AC%22.md")
    whole = chat.client.get(url, params={"format": "json"}).json()
    assert whole["conversation"]["id"] == chat.id and whole["messages"] == chat.tree()
    everything = chat.client.get("/export").json()
    assert chat.id in [entry["conversation"]["id"] for entry in everything["conversations"]]


def test_what_a_killed_server_left(client: httpx.Client, chat_home: tuple[Path, Interrupted]) -> None:
    """After kill -9, the answer under way is there as far as it was saved, marked as interrupted, and the conversation
    goes on from there."""
    left = chat_home[1]
    question, answer = client.get(f"/conversations/{left.conversation}").json()["messages"]
    assert (answer["id"], answer["status"], answer["stream"]) == (left.answer, "interrupted", None)
    assert answer["reasoning"].startswith("hm so hm")
    assert client.get(f"/streams/{left.answer}").status_code == 404
    again = client.post(f"/messages/{left.answer}/regenerate", json={"model": "tiny", "effort": "off"})
    assert ended(client, again.json()["assistant"]["stream"])["content"] == THE_ANSWER


def test_ends_of_engine_and_server(chat_model: Path, tmp_path: Path) -> None:
    """When the engine dies, an answer ends with an error and what came; when the server is told to end, with what
    came, interrupted, and all is in the database. Deleting everything leaves nothing."""
    running = start_server(chat_model, tmp_path / "stderr")
    with httpx.Client(base_url=f"{running.url}/api", timeout=20) as client:
        chat = Chat(client)
        answer = chat.begin()
        os.kill(*running.workers(), signal.SIGKILL)
        failed = ended(client, answer["id"])
        assert failed["status"] == "error" and failed["reasoning"].startswith("hm so hm")
        assert failed["error"]["code"] == "engine_unavailable" and "signal 9" in failed["error"]["message"]
        assert chat.tree()[1] == failed
        assert client.delete("/conversations").status_code == 204
        assert client.get("/conversations").json() == {"conversations": [], "next": None}
        while httpx.get(f"{running.url}/healthz").status_code == 503:
            time.sleep(0.05)
        chat = Chat(client)
        answer = chat.begin()
    running.process.terminate()
    while httpx.get(f"{running.url}/readyz").status_code == 200:
        time.sleep(0.05)
    running.process.terminate()  # a second time: the answer would go on for as long as a drain lets it
    assert running.process.wait(20) == 0
    assert not re.search("Traceback", running.log.read_text())
    database = Database.open(f"sqlite:///{tmp_path / 'porcelet.db'}")
    kept = database.run_now(lambda connection: messages_of(connection, "local", chat.id))[1]
    database.close()
    assert (kept.id, kept.status) == (answer["id"], "interrupted") and kept.reasoning.startswith("hm so hm")
    assert kept.usage and kept.usage["completion_tokens"] > 0
