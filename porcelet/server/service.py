"""One served model as every dialect sees it: a conversation in, pieces of text out.

Text lives on this side of the engine: the chat format turns a conversation into tokens, a stream decoder turns tokens
into whole characters. Tokens that only complete part of a character yield an empty piece.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from uuid import uuid4

from porcelet.chat import ChatFormat
from porcelet.engine.messages import Ready
from porcelet.engine.supervisor import Supervisor
from porcelet.tokenizer import StreamDecoder, Tokenizer
from porcelet.types import Output, Request, SamplingParams

Message = dict[str, str]
Pieces = AsyncGenerator[tuple[str, Output], None]


@dataclass(frozen=True)
class Service:
    """A loaded model with its name, its tokenizer and its chat format. `created` is in Unix seconds."""

    name: str
    created: int
    engine: Supervisor
    facts: Ready
    tokenizer: Tokenizer
    format: ChatFormat

    async def answer(self, messages: Sequence[Message], params: SamplingParams) -> Pieces:
        """(text, output) a step and sample; the last output of each of `params.n` samples has a finish reason. Close it
        (`aclosing`) to stop the engine's work.

        Raises:
            PorceletError: the conversation or the request cannot be served, or the engine failed.
        """
        # A long conversation takes a while to tokenize; the other streams go on meanwhile.
        prompt = await asyncio.to_thread(self.format.render, messages, self.tokenizer)
        request = Request(id=uuid4().hex, prompt=tuple(prompt.tokens), params=params)
        decoders = [StreamDecoder(self.tokenizer) for _ in range(params.n)]
        async with aclosing(self.engine.submit(request)) as outputs:
            async for output in outputs:
                decoder = decoders[output.index]
                text = decoder.push(output.tokens)
                yield (text + decoder.flush(output.tail) if output.finish_reason else text), output
