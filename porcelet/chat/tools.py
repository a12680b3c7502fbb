"""Tools: which of them an answer may call, and what its text must then look like."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class ToolChoice:
    """Whether an answer calls tools: never, if the model likes to, or in any case; and if `name` is given, which."""

    mode: Literal["none", "auto", "required"]
    name: str | None = None


NONE, AUTO, REQUIRED = ToolChoice("none"), ToolChoice("auto"), ToolChoice("required")
