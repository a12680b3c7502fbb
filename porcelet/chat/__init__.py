"""Conversations to tokens and the mask of what to train on; a model's text back into its parts. Imports no torch."""

from porcelet.chat.builtin import R1_TEMPLATE, V3_TEMPLATE
from porcelet.chat.format import ChatFormat
from porcelet.chat.messages import Message
from porcelet.chat.pieces import Rendered
from porcelet.chat.split import Content, Event, Reasoning, Splitter, ToolCallArguments, ToolCallStart

__all__ = [
    "R1_TEMPLATE",
    "V3_TEMPLATE",
    "ChatFormat",
    "Content",
    "Event",
    "Message",
    "Reasoning",
    "Rendered",
    "Splitter",
    "ToolCallArguments",
    "ToolCallStart",
]
