"""Answers that must match a JSON schema, a regular expression, a list of choices or a grammar, through llguidance.

A `GrammarCompiler` belongs to one tokenizer and makes a `Matcher` for each constrained answer. The matcher says which
tokens may come next and is told which one came. It works on the tokens' bytes, so a character may be cut between
tokens. Special tokens never match, whatever a grammar names, but for those that the constraint permits and for the end
of the answer, once it is complete. A constraint with a trigger leaves the answer alone until that token comes.

A constraint that cannot be kept to the letter is refused: llguidance refuses the JSON-schema keywords it knows and does
not implement, and here those that it would take for mere annotations are. Names that no version of JSON Schema gives a
meaning are annotations. Properties come in the schema's order.

Left out: the space that a SentencePiece tokenizer drops at the beginning of a text counts as part of it here.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Collection, Iterator
from functools import lru_cache
from typing import Any

from llguidance import LLMatcher, LLParserLimits, LLTokenizer, TokenizerWrapper

from porcelet.errors import EngineError, InputError
from porcelet.tokenizer import Tokenizer
from porcelet.types import Constraint

MAX_CONSTRAINT_BYTES = 2**16
MAX_CACHED = 64  # compiled constraints that a compiler keeps
# Between two parts of a JSON document. llguidance has no bound, and some models never stop indenting.
WHITESPACE = r"[\x20\x0A\x0D\x09]{1,64}"
# What llguidance would ignore although older drafts or OpenAPI give it a meaning, and its own way to make it lenient.
REFUSED_KEYWORDS = ("additionalItems", "disallow", "divisibleBy", "extends", "nullable", "x-guidance")
LIMITS = LLParserLimits(verbose_errors=False)
# llguidance's limits do not bound how long it compiles: 20 patterns in one allOf, 528 bytes, took 9 s (2026-11-22). So
# a constraint is tried first in a process that can be stopped.
MAX_COMPILE_SECONDS = 2  # of a processor's time
_TRIAL = """
import resource, sys
resource.setrlimit(resource.RLIMIT_CPU, (int(sys.argv[1]), int(sys.argv[1])))
from llguidance import LLMatcher
LLMatcher.validate_grammar(sys.stdin.buffer.read().decode())
"""


class Matcher:
    """One answer's place in its grammar. While it `waits` for its trigger, any token may come, and there is no mask."""

    def __init__(self, parser: LLMatcher, permitted: int, num_bytes: int, trigger: int | None = None) -> None:
        self._parser = parser
        self._permitted = permitted
        self._num_bytes = num_bytes
        self._trigger = trigger

    @property
    def waits(self) -> bool:
        return self._trigger is not None

    def mask(self) -> bytes:
        """The tokens that may come next: bit t % 8, from the low end, of byte t // 8 is token t's.

        Raises:
            EngineError: the grammar grew past the parser's limits, or permits nothing but special tokens.
        """
        bits = int.from_bytes(self._parser.compute_bitmask(), "little") & self._permitted
        self._require_sound()
        if not bits:
            raise EngineError("the constraint lets no token follow but special ones; allow some text instead")
        return bits.to_bytes(self._num_bytes, "little")

    def push(self, token: int) -> None:
        """Take the answer's next token, one that `mask` permits.

        Raises:
            EngineError: the token does not match, or the grammar grew past the parser's limits.
        """
        if self._trigger not in (None, token):
            return
        self._trigger = None
        self._parser.consume_token(token)
        self._require_sound()

    @property
    def finished(self) -> bool:
        """Whether the answer is complete and nothing but its end may follow."""
        return self._parser.is_stopped() and not self._parser.is_error()

    def fork(self) -> Matcher:
        """A matcher at the same place that goes its own way."""
        return Matcher(self._parser.deep_copy(), self._permitted, self._num_bytes, self._trigger)

    def _require_sound(self) -> None:
        if self._parser.is_error():
            raise EngineError(f"the constraint's parser gave up: {_reason(self._parser.get_error())}")


class GrammarCompiler:
    """Makes matchers for one tokenizer. Takes about a second for 100,000 tokens, so make it once.

    A constraint that is new takes some tenths of a second, most of it without the interpreter's lock.

    `end_tokens` are the model's end-of-sequence ids, those that end a complete answer.
    """

    def __init__(self, tokenizer: Tokenizer, end_tokens: Collection[int]) -> None:
        assert end_tokens and all(0 <= token < tokenizer.vocab_size for token in end_tokens)
        vocabulary = TokenizerWrapper(_Vocabulary(tokenizer, min(end_tokens)))
        self._tokenizer = LLTokenizer(vocabulary, eos_token=sorted(end_tokens))
        self._num_bytes = -(-tokenizer.vocab_size // 8)
        forbidden = set(tokenizer.special_tokens.values()) - set(end_tokens)
        self._permitted = (1 << tokenizer.vocab_size) - 1 - sum(1 << token for token in forbidden)
        self._compiled = lru_cache(MAX_CACHED)(self._build)

    def compile(self, constraint: Constraint) -> Matcher:
        """A matcher at the beginning of an answer.

        Raises:
            InputError: the constraint is no schema, regular expression or grammar, is too large or too complex, or
                needs what llguidance does not support.
        """
        return self._compiled(constraint).fork()

    def _build(self, constraint: Constraint) -> Matcher:
        _require_size(constraint)
        grammars = [*_grammars(constraint)]
        _require_quick(json.dumps({"grammars": grammars}), _title(constraint))
        for (title, part), grammar in zip(constraint.parts, grammars[1:], strict=True):
            self._require_usable(self._parser([grammar]), _titled(title, f"the {_title(part)}"))
        parser = self._parser(grammars)
        self._require_usable(parser, f"the {_title(constraint)}")
        permitted = self._permitted | sum(1 << token for token in constraint.special)
        matcher = Matcher(parser, permitted, self._num_bytes, constraint.trigger)
        try:
            matcher.mask()
        except EngineError as problem:
            raise InputError(f"the {_title(constraint)} cannot be used: {problem}") from problem
        return matcher

    def _parser(self, grammars: list[Any]) -> LLMatcher:
        return LLMatcher(self._tokenizer, json.dumps({"grammars": grammars}), log_level=0, limits=LIMITS)

    def _require_usable(self, parser: LLMatcher, name: str) -> None:
        if not parser.is_error():
            parser.compute_bitmask()  # some grammars fail only here
        if parser.is_error():
            raise InputError(f"{name} cannot be used: {_reason(parser.get_error())}")


class _Vocabulary:
    """The tokenizer as llguidance's wrapper wants it."""

    def __init__(self, tokenizer: Tokenizer, end_token: int) -> None:
        self.eos_token_id = end_token
        self.bos_token_id = None
        self.tokens = [tokenizer.token_bytes(id) for id in range(tokenizer.vocab_size)]
        self.special_token_ids = list(tokenizer.special_tokens.values())
        self._encode = tokenizer.encode

    def __call__(self, text: bytes) -> list[int]:
        return self._encode(text.decode())


def _grammars(constraint: Constraint) -> Iterator[dict[str, Any]]:
    """The constraint and its parts in llguidance's own notation."""
    yield _grammar(constraint)
    for index, (title, part) in enumerate(constraint.parts):
        try:
            yield _grammar(part) | {"name": f"part_{index}"}
        except InputError as problem:
            raise InputError(_titled(title, str(problem))) from problem


def _grammar(constraint: Constraint) -> dict[str, Any]:
    value = constraint.value
    texts = (value,) if isinstance(value, str) else value
    if constraint.kind == "json_schema":
        _require_supported(_parsed(texts[0]))
        written = LLMatcher.grammar_from_json_schema(texts[0], defaults={"whitespace_pattern": WHITESPACE})
    elif constraint.kind == "lark":
        return {"lark_grammar": texts[0]}
    else:
        # As one regular expression, since llguidance takes at most 2,000 alternatives side by side in a grammar.
        regex = texts[0] if constraint.kind == "regex" else "|".join(map(_literal, texts))
        written = LLMatcher.grammar_from_regex(regex)
    (grammar,) = json.loads(written)["grammars"]
    return dict(grammar)


def _title(constraint: Constraint) -> str:
    if any(title for title, _ in constraint.parts):
        return "grammar of the tools and their parameters"
    if constraint.parts:
        return _title(constraint.parts[0][1])
    return {"json_schema": "JSON schema", "regex": "regular expression", "lark": "Lark grammar"}.get(
        constraint.kind, constraint.kind
    )


def _titled(title: str, text: str) -> str:
    return f"{title}: {text}" if title else text


def _require_size(constraint: Constraint) -> None:
    values = [constraint.value, *(part.value for _, part in constraint.parts)]
    try:
        size = sum(len(text.encode()) for value in values for text in ((value,) if isinstance(value, str) else value))
    except UnicodeEncodeError as problem:
        title = _title(constraint)
        raise InputError(f"the {title} holds half of a surrogate pair, which no text contains") from problem
    if size > MAX_CONSTRAINT_BYTES:
        raise InputError(f"the {_title(constraint)} has {size:,} bytes; at most {MAX_CONSTRAINT_BYTES:,} are allowed")


def _require_quick(grammar: str, title: str) -> None:
    command = [sys.executable, "-I", "-c", _TRIAL, str(MAX_COMPILE_SECONDS)]
    trial = subprocess.run(command, input=grammar.encode(), capture_output=True)
    if trial.returncode < 0:  # a signal: its time is over, or the compiler broke down
        raise InputError(f"the {title} takes more than {MAX_COMPILE_SECONDS} s to compile; make it simpler")
    if trial.returncode:
        raise EngineError(f"the {title} could not be tried: {trial.stderr.decode(errors='replace')[-300:]!r}")


def _literal(text: str) -> str:
    return "".join(c if c.isascii() and c.isalnum() else f"\\x{{{ord(c):x}}}" for c in text)


def _parsed(schema: str) -> dict[str, Any]:
    try:
        value = json.loads(schema)
    except (ValueError, RecursionError) as problem:
        raise InputError(f"the JSON schema is not JSON: {problem}") from problem
    if not isinstance(value, dict):
        raise InputError(f"the JSON schema is {schema[:80]!r}; it must be an object")
    return value


_NAMED_SCHEMAS = ("properties", "patternProperties", "$defs", "definitions")
_SCHEMAS = ("items", "prefixItems", "additionalProperties", "anyOf", "allOf", "oneOf")


def _require_supported(schema: dict[str, Any]) -> None:
    pending: list[Any] = [schema]
    while pending:
        part = pending.pop()
        if isinstance(part, list):
            pending += part
        elif isinstance(part, dict):
            if refused := [keyword for keyword in REFUSED_KEYWORDS if keyword in part]:
                raise InputError(f"the JSON schema's keyword {refused[0]!r} is not supported; say it in draft 2020-12")
            pending += [part[name] for name in _SCHEMAS if name in part]
            named = [part[name] for name in _NAMED_SCHEMAS if isinstance(part.get(name), dict)]
            pending += [schema for schemas in named for schema in schemas.values()]


def _reason(message: str) -> str:
    """llguidance's message in one line, without the dump of its state."""
    line = " ".join(message.split("\n<", 1)[0].split())
    return line if len(line) <= 300 else f"{line[:150]} … {line[-150:]}"
