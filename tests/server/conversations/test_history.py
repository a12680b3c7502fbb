"""Conversations as the database keeps them: trees, searches, and whose they are."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest
from sqlalchemy import Connection, event

from porcelet.errors import PorceletError
from porcelet.server.conversations import attachments, export, history
from porcelet.server.conversations.attachments import File
from porcelet.server.conversations.search import excerpt, fold
from porcelet.server.errors import FieldError, NotFoundError
from porcelet.server.store import Database

ME, YOU = "me", "you"


@pytest.fixture
def database(tmp_path: Path) -> Iterator[Database]:
    opened = Database.open(f"sqlite:///{tmp_path / 'chat.db'}")
    yield opened
    opened.close()


def talk(connection: Connection, question: str, answer: str = "", owner: str = ME) -> str:
    """A conversation of one exchange."""
    conversation = history.add_conversation(connection, owner, "")
    exchange(connection, conversation.id, None, question, answer, owner)
    return conversation.id


def exchange(
    connection: Connection, id: str, parent: str | None, question: str, answer: str, owner: str = ME, files: Any = ()
) -> history.Message:
    _, running = history.add_exchange(connection, owner, id, parent, question, files, "tiny")
    done = replace(running, content=answer, status="done", stream=None)
    history.save_answer(connection, done)
    return done


def add_file(connection: Connection, id: str, owner: str = ME, created: float = 2e9) -> None:
    attachments.add_file(connection, owner, File(id, f"{id}.txt", "text", f"text of {id}", 3, None, created))


def found(connection: Connection, query: str) -> list[str]:
    entries, _ = history.list_conversations(connection, ME, query)
    return [conversation.title for conversation, _ in entries]


def test_a_tree_keeps_every_branch(database: Database) -> None:
    """An edited question is a sibling of the first, a second answer one of the first answer; a path follows parents,
    and the leaf is the newest answer."""

    def work(connection: Connection) -> None:
        id = talk(connection, "one", "1")
        first = history.messages_of(connection, ME, id)[1]
        second = exchange(connection, id, first.id, "two", "2")
        edited = exchange(connection, id, first.id, "two, edited", "2!")
        again = history.add_answer(connection, ME, edited.id, "other")
        tree = history.messages_of(connection, ME, id)
        assert [message.content for message in tree] == ["one", "1", "two", "2", "two, edited", "2!", ""]
        assert again.parent == edited.parent and again.status == "running" and again.stream == again.id
        path = [message.content for message in history.path_to(tree, second.id)]
        assert path == ["one", "1", "two", "2"]
        assert history.find_conversation(connection, ME, id).leaf == again.id
        with pytest.raises(FieldError, match="still being written"):
            history.add_exchange(connection, ME, id, again.id, "three", [], "tiny")
        with pytest.raises(FieldError, match="no answer"):
            history.add_exchange(connection, ME, id, tree[0].id, "three", [], "tiny")

    database.run_now(work)


def test_nothing_is_written_by_half(database: Database) -> None:
    """An exchange that names a file which is not there leaves no question and no title behind."""
    id = database.run_now(lambda connection: history.add_conversation(connection, ME, "")).id
    with pytest.raises(FieldError, match="upload it"):
        database.run_now(lambda c: history.add_exchange(c, ME, id, None, "read this", ["nowhere"], "tiny"))
    assert database.run_now(lambda c: history.messages_of(c, ME, id)) == []
    assert database.run_now(lambda c: history.find_conversation(c, ME, id)).title == ""


def test_owners_never_meet(database: Database) -> None:
    """What one owner has is, for every function, not there for another."""

    def work(connection: Connection) -> None:
        id = talk(connection, "secret words", "secret answer")
        question, answer = history.messages_of(connection, ME, id)
        add_file(connection, "f")
        refused: list[Callable[[], Any]] = [
            lambda: history.find_conversation(connection, YOU, id),
            lambda: history.messages_of(connection, YOU, id),
            lambda: history.change_conversation(connection, YOU, id, {"title": "mine"}),
            lambda: history.drop_conversation(connection, YOU, id),
            lambda: history.add_exchange(connection, YOU, id, None, "x", [], "tiny"),
            lambda: history.find_answer(connection, YOU, answer.id),
            lambda: history.add_answer(connection, YOU, answer.id, "tiny"),
            lambda: attachments.find_file(connection, YOU, "f"),
            lambda: export.whole(connection, YOU, id),
        ]
        for attempt in refused:
            with pytest.raises(NotFoundError):
                attempt()
        own = talk(connection, "mine", owner=YOU)
        stolen: list[Callable[[], Any]] = [
            lambda: history.add_exchange(connection, YOU, own, None, "x", ["f"], "tiny"),
            lambda: history.add_exchange(connection, YOU, own, answer.id, "x", [], "tiny"),
            lambda: history.change_conversation(connection, YOU, own, {"leaf": answer.id}),
        ]
        for attempt in stolen:
            with pytest.raises(FieldError):
                attempt()
        assert history.list_conversations(connection, YOU, "secret") == ([], None)
        everything = export.everything(connection, YOU)
        assert [entry["conversation"].id for entry in everything["conversations"]] == [own]
        assert everything["files"] == []
        history.drop_conversations(connection, YOU)
        assert history.messages_of(connection, ME, id) == [question, answer]
        assert attachments.find_file(connection, ME, "f").text == "text of f"

    database.run_now(work)


@pytest.mark.parametrize(
    ("query", "hits"),
    [
        ("", ["Crème brûlée", "北京有什么好吃的？", "Straße", "100 % sure_thing"]),
        ("creme BRULEE", ["Crème brûlée"]),
        ("CRÈME", ["Crème brûlée"]),
        ("烤鸭", ["北京有什么好吃的？"]),
        ("好吃 推荐", ["北京有什么好吃的？"]),
        ("好吃 creme", []),
        ("москва", ["Straße"]),
        ("МОСКВА strasse", ["Straße"]),
        ("0 %", ["100 % sure_thing"]),
        ("sure_t", ["100 % sure_thing"]),
        ("suret", []),
        ("sure%thing", []),
    ],
)
def test_search(database: Database, query: str, hits: list[str]) -> None:
    """Every word of a query must occur in a title or a message, case and accents ignored, in any script; SQL's own
    signs are letters like others."""

    def work(connection: Connection) -> None:
        talk(connection, "100 % sure_thing", "yes")
        talk(connection, "Straße", "Где находится Москва?")
        talk(connection, "北京有什么好吃的？", "推荐烤鸭。")
        talk(connection, "Crème brûlée", "Sugar and cream")
        assert found(connection, query) == hits

    database.run_now(work)


def test_excerpt(database: Database) -> None:
    """A hit in a message comes with one line around it, cut where it was found in spite of letters that fold to more
    or fewer; one in the title alone with none."""
    text = "ß" * 50 + " e\u0301 " + "\n" * 3 + "needle " + "x" * 200
    assert excerpt(text, "needle") == "…" + "ß" * 33 + " e\u0301 needle " + "x" * 113 + "…"
    assert excerpt("Straße", fold("STRASSE")) == "Straße"

    def work(connection: Connection) -> None:
        talk(connection, "title", "the answer has ÉTÉ in it")
        ((_, line),), _ = history.list_conversations(connection, ME, "été")
        assert line == "the answer has ÉTÉ in it"
        id = history.add_conversation(connection, ME, "Only a title").id
        ((conversation, line),), _ = history.list_conversations(connection, ME, "only")
        assert conversation.id == id and line is None

    database.run_now(work)


def test_pages(database: Database) -> None:
    """Pages of any size give every conversation once: pinned ones first, then the latest; a made-up cursor is
    refused."""

    def work(connection: Connection) -> None:
        ids = [talk(connection, f"number {number}") for number in range(7)]
        for id in (ids[2], ids[5]):
            history.change_conversation(connection, ME, id, {"pinned": True})
        order = [ids[5], ids[2], ids[6], ids[4], ids[3], ids[1], ids[0]]
        for limit in (1, 2, 3, 7, 50):
            cursor, seen = None, []
            while True:
                page, cursor = history.list_conversations(connection, ME, "number", cursor, limit)
                seen += [conversation.id for conversation, _ in page]
                if cursor is None:
                    break
                assert len(page) == limit
            assert seen == order
        for cursor in ("", "x:1:y", "1:x:y"):
            with pytest.raises(FieldError, match="next"):
                history.list_conversations(connection, ME, "", cursor)

    database.run_now(work)


@pytest.mark.parametrize(
    ("content", "title"),
    [
        ("Hello", "Hello"),
        ("\n\n  First line \nsecond", "First line"),
        ("word " * 20, "word word word word word word word word word word word word…"),
        ("字" * 100, "字" * 60 + "…"),
        (" \n ", ""),
    ],
)
def test_titles(content: str, title: str) -> None:
    """A title is the first line, cut at a word if there is one."""
    assert history.title_of(content) == title


def test_files_go_with_their_last_message(database: Database) -> None:
    """A file stays while a message has it, goes with the last one, and goes after a day if none ever took it."""

    def is_there(connection: Connection, id: str) -> bool:
        try:
            return attachments.find_file(connection, ME, id).id == id
        except PorceletError:
            return False

    def work(connection: Connection) -> None:
        add_file(connection, "old", created=1.0)
        assert is_there(connection, "old")
        add_file(connection, "shared")
        assert not is_there(connection, "old")
        first = history.add_conversation(connection, ME, "")
        exchange(connection, first.id, None, "", "1", files=["shared"])
        second = talk(connection, "again")
        exchange(connection, second, None, "again", "1", files=["shared"])
        assert history.find_conversation(connection, ME, first.id).title == "shared.txt"
        question = history.messages_of(connection, ME, first.id)[0]
        assert question.attachments == (attachments.Attachment("shared", "shared.txt", 3),)
        history.drop_conversation(connection, ME, first.id)
        assert is_there(connection, "shared")
        history.drop_conversation(connection, ME, second)
        assert not is_there(connection, "shared")

    database.run_now(work)


def test_exports(database: Database) -> None:
    """Markdown is the path to the leaf with the reasoning folded away; JSON has every branch and the files' texts."""

    def work(connection: Connection) -> None:
        id = history.add_conversation(connection, ME, "My\ntitle").id
        add_file(connection, "f")
        exchange(connection, id, None, "lost branch", "lost")
        last = exchange(connection, id, None, "kept", "The answer", files=["f"])
        history.save_answer(connection, replace(last, reasoning="because", status="stopped"))
        conversation = history.find_conversation(connection, ME, id)
        text = export.markdown(conversation, history.messages_of(connection, ME, id))
        details = "<details>\n<summary>Reasoning</summary>\n\nbecause\n\n</details>"
        assert text == f"# My title\n\n## You\n\n*f.txt*\n\nkept\n\n## tiny\n\n{details}\n\nThe answer\n\n*(stopped)*\n"
        french = export.markdown(conversation, history.messages_of(connection, ME, id), "fr")
        assert "## Vous\n" in french and "<summary>Raisonnement</summary>" in french and "*(arrêtée)*" in french
        whole = export.whole(connection, ME, id)
        assert [message.content for message in whole["messages"]] == ["lost branch", "lost", "kept", "The answer"]
        assert [file.text for file in whole["files"]] == ["text of f"]

    database.run_now(work)


def test_export_has_its_words_in_every_language() -> None:
    """Each language has every word that the export takes, for every role and every end of an answer."""
    used = {"conversation", "reasoning", "user", "assistant", "length", "stopped", "error", "interrupted"}
    assert set(export.WORDS) == set(get_args(export.Language))
    for words in export.WORDS.values():
        assert set(words) == used and all(words.values())


def test_conversations_that_were_never_used_go(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty conversation without a title goes when its owner begins another a day later; one with a message, a
    title or a pin stays, and so does another owner's."""

    def work(connection: Connection) -> None:
        used = talk(connection, "said")
        titled = history.add_conversation(connection, ME, "A plan").id
        pinned = history.add_conversation(connection, ME, "").id
        history.change_conversation(connection, ME, pinned, {"pinned": True})
        theirs = history.add_conversation(connection, YOU, "").id
        unused = history.add_conversation(connection, ME, "").id
        history.add_conversation(connection, ME, "")
        assert history.find_conversation(connection, ME, unused).title == ""
        now = time.time()
        monkeypatch.setattr(history.time, "time", lambda: now + history.UNUSED_SECONDS + 1)
        new = history.add_conversation(connection, ME, "").id
        assert {entry.id for entry in history.every_conversation(connection, ME)} == {used, titled, pinned, new}
        assert history.find_conversation(connection, YOU, theirs).id == theirs

    database.run_now(work)


def test_opening_a_conversation_reads_no_files(database: Database) -> None:
    """The messages come with their files' names and sizes; their texts stay where they are."""

    def work(connection: Connection) -> None:
        id = history.add_conversation(connection, ME, "").id
        add_file(connection, "f")
        queries: list[str] = []
        event.listen(connection, "before_cursor_execute", lambda c, cursor, query, *rest: queries.append(query))
        exchange(connection, id, None, "read this", "1", files=["f"])
        assert history.messages_of(connection, ME, id)[0].attachments[0].name == "f.txt"
        assert queries and not any("files.text" in query for query in queries)

    database.run_now(work)
