"""Constrained answers: whatever is drawn under the masks matches, and what cannot be kept is refused."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from porcelet.engine.codec import open_tokenizer
from porcelet.engine.grammar import MAX_CONSTRAINT_BYTES, GrammarCompiler
from porcelet.errors import EngineError, InputError
from porcelet.tokenizer import Tokenizer
from porcelet.types import Constraint
from tests.tiny_model import save_tiny_model

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["größe", "🙂", 'a"b']}, "maxItems": 3},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}
CHOICES = ("yes", "no", "nobody", "größer 🙂", 'say "no"\n', "a/b\\c", "北京")
REGEXES = (r"[a-c]{2,5}é?", r"(?i)abc/\d{1,3}", r"[^\x00-\x7f]{1,4}", r"^a|b$", "日本(語)?")


class Walk:
    """A model that writes at random: one tokenizer and the matchers of its answers."""

    def __init__(self, tokenizer: Tokenizer, end: int) -> None:
        self.tokenizer, self.end = tokenizer, end
        self.compiler = GrammarCompiler(tokenizer, [end])

    def allowed(self, mask: bytes) -> list[int]:
        return np.flatnonzero(np.unpackbits(np.frombuffer(mask, np.uint8), bitorder="little")).tolist()

    def text(self, constraint: Constraint, seed: int, max_tokens: int = 400) -> str:
        """A complete answer; it ends where it may, more readily the longer it is."""
        draw, matcher, tokens = random.Random(seed), self.compiler.compile(constraint), list[int]()
        while not matcher.finished:
            allowed = self.allowed(matcher.mask())
            if self.end in allowed and draw.random() < len(tokens) / 20:
                break
            assert len(tokens) < max_tokens
            choice = draw.choice([t for t in allowed if t != self.end] or allowed)
            if choice == self.end:
                break
            tokens.append(choice)
            matcher.push(choice)
        assert self.end in self.allowed(matcher.mask())
        return b"".join(map(self.tokenizer.token_bytes, tokens)).decode()


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Walk:
    tokenizer = open_tokenizer(save_tiny_model(tmp_path_factory.mktemp("model")))
    end = tokenizer.token_id("<|end|>")
    assert end is not None
    return Walk(tokenizer, end)


@pytest.fixture(scope="module")
def real(default_model: Path) -> Walk:
    tokenizer = open_tokenizer(default_model)
    end = tokenizer.token_id("<|im_end|>")
    assert end is not None
    return Walk(tokenizer, end)


@pytest.fixture(scope="module", params=["tiny", "real"])
def walk(request: pytest.FixtureRequest) -> Walk:
    return request.getfixturevalue(request.param)


@pytest.mark.parametrize("regex", REGEXES)
def test_a_regex_matches_whole(walk: Walk, regex: str) -> None:
    """Every random answer matches the expression from end to end; characters are cut into bytes on the way."""
    for seed in range(10):
        assert re.fullmatch(regex, walk.text(Constraint("regex", regex), seed))


def test_choices_are_the_only_answers(walk: Walk) -> None:
    """Each answer is one of the choices, and each choice can come, one that begins another included."""
    texts = {walk.text(Constraint("choice", CHOICES), seed) for seed in range(120)}
    assert texts == set(CHOICES)


def test_json_follows_its_schema(walk: Walk) -> None:
    """Every random answer is JSON with the schema's keys and values."""
    for seed in range(15):
        person = json.loads(walk.text(Constraint("json_schema", json.dumps(PERSON)), seed, max_tokens=5000))
        assert list(person) == ["name", "age", "tags"] and len(person["name"]) <= 12
        assert 0 <= person["age"] <= 150 and len(person["tags"]) <= 3
        assert set(person["tags"]) <= {"größe", "🙂", 'a"b'}


def test_a_lark_grammar_nests(walk: Walk) -> None:
    """A grammar beyond regular expressions: brackets close in order."""
    grammar = 'start: pair\npair: "(" pair? ")" | "[" pair? "]"'
    for seed in range(10):
        text = walk.text(Constraint("lark", grammar), seed)
        while text:
            shorter = text.replace("()", "").replace("[]", "")
            assert len(shorter) < len(text)
            text = shorter


def test_the_end_comes_only_when_complete(walk: Walk) -> None:
    """No token but the end after a complete answer, no end before, no other special token ever."""
    matcher = walk.compiler.compile(Constraint("choice", ("ab",)))
    assert walk.end not in walk.allowed(matcher.mask()) and not matcher.finished
    for token in walk.tokenizer.encode("ab"):
        matcher.push(token)
    assert matcher.finished and walk.allowed(matcher.mask()) == [walk.end]
    anything = walk.allowed(walk.compiler.compile(Constraint("regex", "(?s).*")).mask())
    assert set(walk.tokenizer.special_tokens.values()) & set(anything) == {walk.end}
    assert max(anything) < walk.tokenizer.vocab_size


def test_masks_are_exact(tiny: Walk) -> None:
    """Over bytes: exactly those that can continue, within a character too."""
    matcher = tiny.compiler.compile(Constraint("choice", ("é", "ê", "z")))
    ids = {tiny.tokenizer.token_bytes(id): id for id in range(256)}
    assert tiny.allowed(matcher.mask()) == sorted((ids[b"z"], ids[b"\xc3"]))
    matcher.push(ids[b"\xc3"])
    assert tiny.allowed(matcher.mask()) == sorted((ids[b"\xa9"], ids[b"\xaa"]))


def test_a_fork_goes_its_own_way(walk: Walk) -> None:
    """Neither forks nor answers to the same constraint see each other's tokens."""
    constraint = Constraint("choice", ("ab", "ac"))
    matcher, other = walk.compiler.compile(constraint), walk.compiler.compile(constraint)
    first = matcher.mask()
    (a,), (b,) = walk.tokenizer.encode("a"), walk.tokenizer.encode("b")
    matcher.push(a)
    second, fork = matcher.mask(), matcher.fork()
    fork.push(b)
    assert fork.finished and not matcher.finished
    assert (matcher.mask(), other.mask()) == (second, first) and first != second


@pytest.mark.parametrize(
    ("schema", "named"),
    [
        ({"type": "array", "uniqueItems": True}, "uniqueItems"),
        ({"not": {"type": "string"}}, "not"),
        ({"properties": {"a": {"items": [{"if": {}, "then": {}}]}}}, "if"),
        ({"type": "object", "propertyNames": {"pattern": "a"}}, "propertyNames"),
        ({"type": "string", "format": "no-such-format"}, "no-such-format"),
        ({"properties": {"a": {"anyOf": [{"type": "array", "additionalItems": False}]}}}, "additionalItems"),
        ({"$defs": {"nullable": {"nullable": True}}}, "nullable"),
        ({"x-guidance": {"lenient": True}, "not": {}}, "x-guidance"),
        ({"type": "number", "minimum": 5, "maximum": 3}, "minimum"),
        ({"$ref": "http://localhost/other.json"}, "localhost"),
        ({"type": "wat"}, "wat"),
        ([], "object"),
    ],
    ids=str,
)
def test_what_a_schema_cannot_have_is_refused_by_name(tiny: Walk, schema: Any, named: str) -> None:
    """Keywords that would not be kept are an error that names them, wherever in the schema they are."""
    with pytest.raises(InputError, match=named):
        tiny.compiler.compile(Constraint("json_schema", json.dumps(schema)))


def test_names_and_annotations_are_no_keywords(tiny: Walk) -> None:
    """A property may be called like a refused keyword, and what schemas say for people is let through."""
    schema = {"title": "t", "description": "d", "properties": {"nullable": {"const": 1}}, "required": ["nullable"]}
    text = tiny.text(Constraint("json_schema", json.dumps(schema | {"additionalProperties": False})), 0)
    assert json.loads(text) == {"nullable": 1} or not isinstance(json.loads(text), dict)


@pytest.mark.parametrize(
    ("constraint", "message"),
    [
        (Constraint("json_schema", "{nope"), "not JSON"),
        (Constraint("json_schema", "true"), "must be an object"),
        (Constraint("json_schema", '{"items":' * 10_000 + "{}" + "}" * 10_000), "100,002 bytes; at most 65,536"),
        (Constraint("json_schema", '{"items":' * 6_000 + "{}" + "}" * 6_000), "JSON schema"),
        (Constraint("json_schema", '{"$ref": "#"}'), "JSON schema cannot be used"),
        (Constraint("regex", "(a"), "unclosed group"),
        (Constraint("regex", "(?=a)b"), "look-around"),
        (Constraint("regex", "(" * 3000 + "a" + ")" * 3000), "regular expression cannot be used"),
        (Constraint("regex", "a" * (MAX_CONSTRAINT_BYTES + 1)), "65,537 bytes; at most 65,536"),
        (Constraint("choice", ("a", "\ud800")), "surrogate"),
        (Constraint("lark", "start: missing"), "missing"),
        (Constraint("lark", "start: " + "(" * 5000 + '"a"' + ")" * 5000), "nested"),
    ],
    ids=lambda x: str(x)[:60],
)
def test_what_cannot_be_compiled_is_refused(tiny: Walk, constraint: Constraint, message: str) -> None:
    """Whatever is wrong with a constraint is the request's error, in one short line."""
    with pytest.raises(InputError, match=message) as raised:
        tiny.compiler.compile(constraint)
    assert "\n" not in str(raised.value) and len(str(raised.value)) < 400


def test_compiling_is_stopped(tiny: Walk) -> None:
    """A small constraint that would take llguidance very long is refused after its time."""
    schema = {"allOf": [{"pattern": f"x{i}.*y{i}"} for i in range(60)]}
    with pytest.raises(InputError, match="takes more than 2 s to compile"):
        tiny.compiler.compile(Constraint("json_schema", json.dumps(schema)))


def test_many_choices_are_compiled(real: Walk) -> None:
    """Thousands of choices up to the size limit work, from the first token to the last."""
    choices = tuple(f"choice {i} {i * 7919 % 1000}" for i in range(3500))
    matcher = real.compiler.compile(Constraint("choice", choices))
    for token in real.tokenizer.encode(choices[1234]):
        assert token in real.allowed(matcher.mask())
        matcher.push(token)
    assert real.end in real.allowed(matcher.mask())


def test_a_token_that_does_not_match_ends_the_request(tiny: Walk) -> None:
    """The matcher says so at once, and again ever after; the constraint can be used anew."""
    constraint = Constraint("choice", ("ab",))
    matcher = tiny.compiler.compile(constraint)
    (z,) = tiny.tokenizer.encode("z")
    with pytest.raises(EngineError, match="does not|doesn't"):
        matcher.push(z)
    with pytest.raises(EngineError):
        matcher.mask()
    assert not matcher.finished
    assert tiny.compiler.compile(constraint).mask()


def test_a_grammar_of_special_tokens_lets_nothing_follow(tiny: Walk) -> None:
    """A grammar may name special tokens, but they never come: the request ends with an error instead."""
    matcher = tiny.compiler.compile(Constraint("lark", 'start: "a" <|user|>'))
    matcher.push(*tiny.tokenizer.encode("a"))
    with pytest.raises(EngineError, match="special"):
        matcher.mask()


def test_a_grammar_that_outgrows_its_parser_ends_the_request(tiny: Walk) -> None:
    """The parser's limits are reached in some answer, not in every one: an error of that request, and soon."""
    alternatives = " | ".join(f'"x{i}"' for i in range(2100))
    matcher = tiny.compiler.compile(Constraint("lark", f'start: "q" | "p" ({alternatives})'))
    fork = matcher.fork()
    fork.push(*tiny.tokenizer.encode("q"))
    assert fork.finished
    with pytest.raises(EngineError, match="2101 items"):
        for character in "px":
            matcher.push(*tiny.tokenizer.encode(character))
            matcher.mask()


def test_parts_and_permitted_special_tokens(tiny: Walk) -> None:
    """A grammar of parts of every kind, with the special tokens that it may use and no others."""
    user, system = (tiny.tokenizer.token_id(text) for text in ("<|user|>", "<|system|>"))
    assert user is not None and system is not None
    kinds = [Constraint("json_schema", '{"const": 1}'), Constraint("regex", "a/b{2}"), Constraint("choice", ("x", "y"))]
    parts = tuple(("title", part) for part in [*kinds, Constraint("lark", 'start: "z" other\nother: "!"')])
    grammar = f"start: <[{user}]> (@part_0 | @part_1 | @part_2 | @part_3) <[{system}]>"
    matcher = tiny.compiler.compile(Constraint("lark", grammar, parts, (user,)))
    assert tiny.allowed(matcher.mask()) == [user]
    matcher.push(user)
    for text in ("1", "a/bb", "x", "y", "z!"):
        fork = matcher.fork()
        for token in tiny.tokenizer.encode(text):
            assert token in tiny.allowed(fork.mask())
            fork.push(token)
        with pytest.raises(EngineError, match="special"):
            fork.mask()
    with pytest.raises(InputError, match="^title: the JSON schema.*wat"):
        tiny.compiler.compile(Constraint("lark", grammar, (("title", Constraint("json_schema", '{"type": "wat"}')),)))


def test_a_matcher_waits_for_its_trigger(tiny: Walk) -> None:
    """Whatever comes before it; each fork waits for its own."""
    trigger = tiny.tokenizer.token_id("<|user|>")
    assert trigger is not None
    matcher = tiny.compiler.compile(Constraint("lark", f'start: <[{trigger}]> "a"', (), (trigger,), trigger))
    fork = matcher.fork()
    for token in (1, 2, trigger):
        assert matcher.waits and not matcher.finished
        matcher.push(token)
    (a,) = tiny.tokenizer.encode("a")
    assert not matcher.waits and fork.waits and tiny.allowed(matcher.mask()) == [a]
    assert not matcher.fork().waits


@pytest.mark.parametrize(
    "fields",
    [
        {"kind": "regex", "value": "a", "special": (1,)},
        {"kind": "lark", "value": "a", "trigger": 3},
        {"kind": "lark", "value": "a", "parts": (("t", Constraint("lark", "a", (), (1,))),)},
    ],
)
def test_a_constraint_that_contradicts_itself_is_refused(fields: dict[str, Any]) -> None:
    """Special tokens are a Lark grammar's, the trigger is one of them, and parts have none."""
    with pytest.raises(InputError, match="special tokens"):
        Constraint(**fields)
