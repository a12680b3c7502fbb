"""An answer in the Responses dialect, as it grows: one output item after the other, and the events that tell of them.

The order of the events is that of DeepSeek's own stream in this dialect.
"""

from __future__ import annotations

import base64
import binascii
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from porcelet.chat import Content, Reasoning, ToolCallArguments, ToolCallStart
from porcelet.chat import Event as Part
from porcelet.chat.calls import CALLS, END_CALLS, END_TAG, TAG
from porcelet.errors import PorceletError
from porcelet.server.dialects.replies import LogprobEntry, logprob_entry
from porcelet.server.generation.events import Ended, Event, Piece, Started, TokenLogprob, Usage, call_id

MARK = "porcelet:"  # begins our own encrypted_content


@dataclass
class Reply:
    """One response as it grows. `asked` is what it repeats of the request."""

    id: str
    created: int
    asked: dict[str, Any]
    seals: bool  # reasoning comes in encrypted_content, too
    output: list[dict[str, Any]] = field(default_factory=list)
    status: str = "in_progress"
    usage: dict[str, Any] | None = None
    error: dict[str, str] | None = None
    _num_events: int = 0
    _open: bool = False  # the last item goes on
    _logprobs: list[LogprobEntry] = field(default_factory=list)  # of text that is held back
    _in_calls: bool = False

    def encode(self, event: Event) -> Iterator[dict[str, Any]]:
        match event:
            case Started():
                yield self._event("created", response=self.whole())
                yield self._event("in_progress", response=self.whole())
            case Piece():
                self._logprobs += self._of_text(event.logprobs)
                for part in event.parts:
                    yield from self._part(part)
            case Ended(_, reason):
                self.status = "incomplete" if reason == "length" else "completed"
                yield from self._close(self.status)
            case Usage():
                self.usage = _usage(event)
                yield self._event(self.status, response=self.whole())

    def fail(self, problem: PorceletError) -> Iterator[dict[str, Any]]:
        if not self._num_events:
            yield from self.encode(Started(0, 0))
        self.status, self.error = "failed", {"code": problem.code or "server_error", "message": str(problem)}
        yield self._event("failed", response=self.whole())

    def whole(self) -> dict[str, Any]:
        incomplete = {"reason": "max_output_tokens"} if self.status == "incomplete" else None
        return {
            "id": self.id,
            "object": "response",
            "created_at": self.created,
            "completed_at": int(time.time()) if self.status == "completed" else None,
            "status": self.status,
            "error": self.error,
            "incomplete_details": incomplete,
            "output": [dict(item) for item in self.output],
            "usage": self.usage,
        } | self.asked

    def _part(self, part: Part) -> Iterator[dict[str, Any]]:
        match part:
            case Reasoning(text):
                yield from self._grow("reasoning")
                self._content["text"] += text
                yield self._item_event("reasoning_text.delta", content_index=0, delta=text)
            case Content(text):
                yield from self._grow("message")
                self._content["text"] += text
                logprobs, self._logprobs = self._logprobs, []
                self._content["logprobs"] += logprobs
                yield self._item_event("output_text.delta", content_index=0, delta=text, logprobs=logprobs)
            case ToolCallStart(index, name):
                yield from self._close("completed")
                yield from self._add("function_call", "fc", call_id=call_id(index), name=name, arguments="")
            case ToolCallArguments(_, text):
                self._item["arguments"] += text
                yield self._item_event("function_call_arguments.delta", delta=text)

    def _of_text(self, entries: Sequence[TokenLogprob]) -> Iterator[LogprobEntry]:
        """The log-probabilities of what is neither reasoning nor a call."""
        for entry in entries:
            self._in_calls = self._in_calls or entry.text in (CALLS.encode(), TAG.encode())
            if not (self._in_calls or entry.reasoning):
                yield logprob_entry(entry)
            self._in_calls = self._in_calls and entry.text not in (END_CALLS.encode(), END_TAG.encode())

    def _grow(self, kind: str) -> Iterator[dict[str, Any]]:
        """The item of this type that is open, or a new one with its one part."""
        if self._open and self._item["type"] == kind:
            return
        yield from self._close("completed")
        if kind == "reasoning":
            part: dict[str, Any] = {"type": "reasoning_text", "text": ""}
            yield from self._add(kind, "rs", summary=[], content=[])
        else:
            part = {"type": "output_text", "annotations": [], "logprobs": [], "text": ""}
            yield from self._add(kind, "msg", role="assistant", phase="final_answer", content=[])
        self._item["content"] = [part]
        yield self._item_event("content_part.added", content_index=0, part=dict(part))

    def _add(self, kind: str, prefix: str, **fields: Any) -> Iterator[dict[str, Any]]:
        id = f"{prefix}_{self.id.removeprefix('resp_')}_{len(self.output)}"
        self.output.append({"type": kind, "id": id, "status": "in_progress"} | fields)
        self._open = True
        yield self._event("output_item.added", output_index=self._index, item=dict(self._item))

    def _close(self, status: str) -> Iterator[dict[str, Any]]:
        if not self._open:
            return
        self._open = False
        if self._item["type"] == "reasoning":
            yield self._item_event("reasoning_text.done", content_index=0, text=self._content["text"])
            if self.seals:
                self._item["encrypted_content"] = sealed(self._content["text"])
        elif self._item["type"] == "message":
            self._content["logprobs"] += self._logprobs
            self._logprobs = []
            text, logprobs = self._content["text"], self._content["logprobs"]
            yield self._item_event("output_text.done", content_index=0, text=text, logprobs=logprobs)
        else:
            yield self._item_event("function_call_arguments.done", arguments=self._item["arguments"])
        if "content" in self._item:
            yield self._item_event("content_part.done", content_index=0, part=self._content)
        self._item["status"] = status
        yield self._event("output_item.done", output_index=self._index, item=self._item)

    @property
    def _index(self) -> int:
        return len(self.output) - 1

    @property
    def _item(self) -> dict[str, Any]:
        return self.output[-1]

    @property
    def _content(self) -> dict[str, Any]:
        content: dict[str, Any] = self._item["content"][0]
        return content

    def _item_event(self, name: str, **fields: Any) -> dict[str, Any]:
        return self._event(name, item_id=self._item["id"], output_index=self._index, **fields)

    def _event(self, name: str, **fields: Any) -> dict[str, Any]:
        self._num_events += 1
        return {"type": f"response.{name}", "sequence_number": self._num_events - 1} | fields


def _usage(usage: Usage) -> dict[str, Any]:
    return {
        "input_tokens": usage.num_prompt_tokens,
        "input_tokens_details": {"cached_tokens": usage.num_cached_tokens},
        "output_tokens": usage.num_generated,
        "output_tokens_details": {"reasoning_tokens": usage.num_reasoning},
        "total_tokens": usage.num_prompt_tokens + usage.num_generated,
    }


def sealed(text: str) -> str:
    return MARK + base64.b64encode(text.encode()).decode()


def unsealed(text: str) -> str:
    """The reasoning that a client hands back; empty if it is not ours."""
    if not text.startswith(MARK):
        return ""
    try:
        return base64.b64decode(text.removeprefix(MARK), validate=True).decode()
    except (binascii.Error, UnicodeDecodeError):
        return ""
