"""Text in, text out: tokenizer, chat format and engine of one model together, for the command line and for scripts.

    model = porcelet.load()
    print(model.chat("What is the capital of France?"))

The server does the same over two processes, so it does not use this file.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass

from porcelet import hub
from porcelet.chat import ChatFormat
from porcelet.config import EngineConfig
from porcelet.engine.codec import open_codec
from porcelet.engine.engine import Engine
from porcelet.tokenizer import StreamDecoder, Tokenizer
from porcelet.types import Output, Progress, SamplingParams
from porcelet.weights.load import no_progress

Message = dict[str, str]


@dataclass(frozen=True)
class TextModel:
    """An engine with its tokenizer and chat format."""

    engine: Engine
    tokenizer: Tokenizer
    format: ChatFormat

    def chat(self, messages: str | Sequence[Message], params: SamplingParams = SamplingParams()) -> str:
        """The whole answer to a message or a conversation of {"role", "content"}."""
        return "".join(text for text, _ in self.stream(messages, params))

    def stream(
        self, messages: str | Sequence[Message], params: SamplingParams = SamplingParams()
    ) -> Generator[tuple[str, Output], None, None]:
        """(text, output) a step; a text may be empty while a character is incomplete."""
        conversation = [{"role": "user", "content": messages}] if isinstance(messages, str) else list(messages)
        decoder = StreamDecoder(self.tokenizer)
        for output in self.engine.stream(self.format.render(conversation, self.tokenizer).tokens, params):
            text = decoder.push(output.tokens)
            yield (text + decoder.flush(output.tail) if output.finish_reason else text), output


def load(
    name: str = hub.DEFAULT_MODEL, config: EngineConfig = EngineConfig(), progress: Progress = no_progress
) -> TextModel:
    """Open a model by its name in the store, a GGUF file or a Hugging Face folder; `progress` hears of the bytes
    loaded.

    Raises:
        ModelError: unknown name, or files that are missing, damaged or not supported.
    """
    path = hub.resolve(name)
    engine = Engine.load(path, config, progress)
    return TextModel(engine, *open_codec(path))
