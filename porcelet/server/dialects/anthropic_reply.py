"""An answer in Anthropic's dialect, as it grows: one content block after the other, and the events that tell of them.

The order of the events is that of DeepSeek's own stream in this dialect.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from pydantic_core import from_json

from porcelet.chat import Content, Reasoning, ToolCallArguments, ToolCallStart
from porcelet.chat import Event as Part
from porcelet.errors import PorceletError
from porcelet.server.errors import anthropic_form, fault_of
from porcelet.server.generation.events import Ended, Event, Piece, Started, Usage, call_id

STOP_REASONS = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"}


@dataclass
class Reply:
    """One message as it grows."""

    id: str
    model: str
    content: list[dict[str, Any]] = field(default_factory=list)
    stop_reason: str | None = None
    stop_sequence: str | None = None
    usage: dict[str, Any] = field(default_factory=dict)
    _open: str = ""  # the type of the block that goes on
    _arguments: str = ""

    def encode(self, event: Event) -> Iterator[dict[str, Any]]:
        match event:
            case Started(num_prompt_tokens, num_cached_tokens):
                self.usage = _usage(Usage(num_prompt_tokens, num_cached_tokens, 0, 0))
                yield {"type": "message_start", "message": self.whole()}
            case Piece():
                for part in event.parts:
                    yield from self._part(part)
            case Ended(_, reason, stop):
                yield from self._close()
                cut = reason == "stop" and stop is not None
                self.stop_reason = "stop_sequence" if cut else STOP_REASONS[reason]
                self.stop_sequence = stop if cut else None
            case Usage():
                self.usage = _usage(event)
                yield {"type": "message_delta", "delta": self._end(), "usage": self.usage}
                yield {"type": "message_stop"}

    def fail(self, problem: PorceletError) -> Iterator[dict[str, Any]]:
        yield anthropic_form(fault_of(problem))

    def whole(self) -> dict[str, Any]:
        content = [dict(block) for block in self.content]
        message = {"id": self.id, "type": "message", "role": "assistant", "model": self.model, "content": content}
        return message | self._end() | {"usage": self.usage}

    def _end(self) -> dict[str, Any]:
        return {"stop_reason": self.stop_reason, "stop_sequence": self.stop_sequence}

    def _part(self, part: Part) -> Iterator[dict[str, Any]]:
        match part:
            case Reasoning(text):
                yield from self._grow("thinking", {"thinking": "", "signature": ""})
                self.content[-1]["thinking"] += text
                yield self._delta("thinking_delta", "thinking", text)
            case Content(text):
                yield from self._grow("text", {"text": ""})
                self.content[-1]["text"] += text
                yield self._delta("text_delta", "text", text)
            case ToolCallStart(index, name):
                yield from self._close()
                yield from self._grow("tool_use", {"id": call_id(index), "name": name, "input": {}})
            case ToolCallArguments(_, text):
                self._arguments += text
                yield self._delta("input_json_delta", "partial_json", text)

    def _grow(self, kind: str, fields: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """The block of this type that is open, or a new one."""
        if self._open == kind:
            return
        yield from self._close()
        self.content.append({"type": kind} | fields)
        self._open = kind
        yield {"type": "content_block_start", "index": self._index, "content_block": dict(self.content[-1])}
        if self._index == 0:
            yield {"type": "ping"}

    def _close(self) -> Iterator[dict[str, Any]]:
        if not self._open:
            return
        if self._open == "thinking":
            self.content[-1]["signature"] = self.id
            yield self._delta("signature_delta", "signature", self.id)
        elif self._open == "tool_use":
            self.content[-1]["input"] = _input(self._arguments)
            self._arguments = ""
        self._open = ""
        yield {"type": "content_block_stop", "index": self._index}

    @property
    def _index(self) -> int:
        return len(self.content) - 1

    def _delta(self, kind: str, name: str, text: str) -> dict[str, Any]:
        return {"type": "content_block_delta", "index": self._index, "delta": {"type": kind, name: text}}


def _input(arguments: str) -> dict[str, Any]:
    """A call's arguments as an object, as far as they came; what is none is kept as text under "malformed"."""
    try:
        values = from_json(arguments, allow_partial=True) if arguments.strip() else {}
    except ValueError:
        values = None
    return values if isinstance(values, dict) else {"malformed": arguments}


def _usage(usage: Usage) -> dict[str, Any]:
    return {
        "input_tokens": usage.num_missed_tokens,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": usage.num_cached_tokens,
        "output_tokens": usage.num_generated,
        "output_tokens_details": {"thinking_tokens": usage.num_reasoning},
        "service_tier": "standard",
    }
