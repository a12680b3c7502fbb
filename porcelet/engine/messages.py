"""What the server's process and the engine's process say to each other.

    to the engine     Submit, Abort
    from the engine   Loading (often), Ready (once), then Outputs and Refused; Failed before it dies

A frame is 4 bytes of length (big-endian) and a msgpack body; msgspec checks every field on the way in. Nothing is
unpickled, and a frame that is too long, cut short or not one of these messages ends the connection with an
`EngineError`.
"""

from __future__ import annotations

from typing import BinaryIO, TypeVar

import msgspec

from porcelet.config import ModelConfig
from porcelet.errors import CapacityError, EngineError, InputError, ModelError, PorceletError
from porcelet.types import Output, Request

HEADER_BYTES = 4
MAX_FRAME_BYTES = 1 << 26
MAX_IN_FLIGHT = 1024  # requests of one client; both ends see to it


class Submit(msgspec.Struct, frozen=True, tag=True):
    """Queue a request."""

    request: Request


class Abort(msgspec.Struct, frozen=True, tag=True):
    """Stop a request; ids that are not in flight are ignored."""

    request_id: str


class Loading(msgspec.Struct, frozen=True, tag=True):
    """How many of the model's bytes are loaded."""

    done: int
    total: int


class Ready(msgspec.Struct, frozen=True, tag=True):
    """The model is loaded. `max_length` is the most tokens that prompt and answer may have together; `predicted_bytes`
    is the most memory that the process will take, as forecast before it loaded. What follows is what it computes with:
    threads, instruction set and version of torch."""

    model: ModelConfig
    weights: str
    max_length: int
    predicted_bytes: int = 0
    threads: int = 0
    instructions: str = ""
    torch: str = ""
    device: str = "cpu"


class Outputs(msgspec.Struct, frozen=True, tag=True):
    """What one step gave, and the engine's gauges after it."""

    outputs: list[Output]
    stats: dict[str, int | float]


class Refused(msgspec.Struct, frozen=True, tag=True):
    """A request that cannot be served; `kind` is the error class's."""

    request_id: str
    kind: str
    message: str


class Failed(msgspec.Struct, frozen=True, tag=True):
    """The engine's last words: it could not start, or a step failed."""

    kind: str
    message: str


ToEngine = Submit | Abort
FromEngine = Loading | Ready | Outputs | Refused | Failed
Message = TypeVar("Message")

to_engine: msgspec.msgpack.Decoder[ToEngine] = msgspec.msgpack.Decoder(ToEngine)
from_engine: msgspec.msgpack.Decoder[FromEngine] = msgspec.msgpack.Decoder(FromEngine)
_encoder = msgspec.msgpack.Encoder()
_errors = {error.kind: error for error in (InputError, ModelError, CapacityError, EngineError)}


def pack(message: ToEngine | FromEngine) -> bytes:
    """A whole frame.

    Raises:
        CapacityError: the message is too long for one.
    """
    body = _encoder.encode(message)
    if len(body) > MAX_FRAME_BYTES:
        raise CapacityError(
            f"a message of {len(body)} bytes is too long; at most {MAX_FRAME_BYTES}: ask for less at once"
        )
    return len(body).to_bytes(HEADER_BYTES, "big") + body


def body_length(header: bytes) -> int:
    """The length a header announces.

    Raises:
        EngineError: it is beyond the limit, so the peer does not speak this protocol.
    """
    length = int.from_bytes(header, "big")
    if length > MAX_FRAME_BYTES:
        raise EngineError(f"a frame of {length} bytes arrived; at most {MAX_FRAME_BYTES} are allowed")
    return length


def unpack(decoder: msgspec.msgpack.Decoder[Message], body: bytes) -> Message:
    """Decode and check a frame's body.

    Raises:
        EngineError: it is none of the decoder's messages.
    """
    try:
        return decoder.decode(body)
    except (msgspec.MsgspecError, PorceletError) as problem:  # the second: a field that its own class refuses
        raise EngineError(f"a malformed frame arrived: {problem}") from problem


def read_body(stream: BinaryIO) -> bytes | None:
    """The next frame's body from a blocking stream; None at a clean end.

    Raises:
        EngineError: the stream ends within a frame, or the frame is too long.
    """
    header = stream.read(HEADER_BYTES)
    if not header:
        return None
    length = body_length(header) if len(header) == HEADER_BYTES else -1
    body = stream.read(max(length, 0))
    if len(body) != length:
        raise EngineError("the connection ended within a frame")
    return body


def error_of(kind: str, message: str) -> PorceletError:
    """The exception that a Refused or a Failed describes."""
    return _errors.get(kind, EngineError)(message)
