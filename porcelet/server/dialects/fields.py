"""What the dialects' requests have in common: how strictly a body is read, and the fields that say how to draw.

A field that we do not know, or whose value we could not honour, is refused by name: an answer that silently ignored
half of the request would be worse than none. A null counts as absent. What OpenAPI says follows from the same classes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, TypeVar

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    ValidationInfo,
    WithJsonSchema,
    model_validator,
)
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, PydanticCustomError
from pydantic_core.core_schema import with_info_after_validator_function

from porcelet.server.errors import FieldError
from porcelet.types import MAX_BIASES, MAX_SAMPLES, MAX_STOPS, MAX_TOP_LOGPROBS, SamplingParams

NULL = {"type": "null"}
MAX_ENTRIES = 10_000  # of a list: messages, their parts, tools
MAX_FIELDS = 256  # of an object whose fields are known
MAX_METADATA = 256

# A list of a request. Its first bad entry is refused: an error for each of a million would take the server's time.
Item = TypeVar("Item")
Entries = Annotated[list[Item], Field(max_length=MAX_ENTRIES, fail_fast=True)]


def wrong(message: str) -> PydanticCustomError:
    """A value that cannot be used: 400."""
    return PydanticCustomError("wrong", "{message}", {"message": message})


def out_of_range(message: str) -> PydanticCustomError:
    """A value of the right type outside of its range: 422."""
    return PydanticCustomError("out_of_range", "{message}", {"message": message})


class Fields(BaseModel):
    """One object of a request. Types are taken as they are."""

    model_config = ConfigDict(strict=True, extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def _drop_nulls(cls, values: object) -> object:
        if not isinstance(values, dict):
            return values
        if len(values) > MAX_FIELDS:
            raise wrong(f"it has {len(values)} fields; at most {MAX_FIELDS} are known")
        return {key: value for key, value in values.items() if value is not None}

    @classmethod
    def __get_pydantic_json_schema__(cls, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        written = handler(schema)
        found = handler.resolve_ref_schema(written)
        required = found.get("required", [])
        for name, field in found.get("properties", {}).items():
            if name not in required and NULL not in field.get("anyOf", []):
                outer = {key: field.pop(key) for key in ("title", "description", "default") if key in field}
                found["properties"][name] = {"anyOf": [field, NULL], **outer}
        found["additionalProperties"] = NULL
        return written


@dataclass(frozen=True)
class Within:
    """A number's range, both ends included but for `above`, which is not."""

    low: float
    high: float
    above: bool = False

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return with_info_after_validator_function(self._check, handler(source))

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        return handler(schema) | {"exclusiveMinimum" if self.above else "minimum": self.low, "maximum": self.high}

    def _check(self, value: float, info: ValidationInfo) -> float:
        # Written so that NaN is refused, too.
        if (self.low < value if self.above else self.low <= value) and value <= self.high:
            return value
        name, opening = info.field_name, "(" if self.above else "["
        raise out_of_range(f"Invalid {name} value, the valid range of {name} is {opening}{self.low}, {self.high}]")


def _joined(content: object) -> object:
    """A list of text parts as one text."""
    if not isinstance(content, list):
        return content
    if len(content) > MAX_ENTRIES:
        raise out_of_range(f"a content has {len(content)} parts; at most {MAX_ENTRIES} are allowed")
    for part in content:
        if not (isinstance(part, dict) and part.keys() == {"type", "text"} and part["type"] == "text"):
            raise wrong("only parts of the form {'type': 'text', 'text': '...'} are supported")
    return "".join(_text(part["text"]) for part in content)


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise wrong("the text of a part must be a string")
    return value


_TEXT = {"type": "string"}
_PARTS = {
    "type": "array",
    "items": {
        "type": "object",
        "properties": {"type": {"const": "text"}, "text": _TEXT},
        "required": ["type", "text"],
        "additionalProperties": False,
    },
}
Content = Annotated[str, BeforeValidator(_joined), WithJsonSchema({"anyOf": [_TEXT, _PARTS]})]


def at_most(most: int) -> BeforeValidator:
    """The bound of an object with any keys, looked at before its values."""

    def check(values: object) -> object:
        if isinstance(values, dict) and len(values) > most:
            raise out_of_range(f"an object has {len(values)} fields; at most {most} are allowed")
        return values

    return BeforeValidator(check)


def _one_or_several(stop: object) -> object:
    if isinstance(stop, list) and len(stop) > MAX_STOPS:
        raise out_of_range(f"Stop string array too long: {len(stop)}")
    return [stop] if isinstance(stop, str) else stop


_STOPS = {"type": "array", "items": {"type": "string", "minLength": 1}, "maxItems": MAX_STOPS}
Stops = Annotated[
    list[str],
    BeforeValidator(_one_or_several),
    WithJsonSchema({"anyOf": [{"type": "string", "minLength": 1}, _STOPS]}),
]
TokenCount = Annotated[int, Within(1, 2**31 - 1)]
TopLogprobs = Annotated[int, Within(0, MAX_TOP_LOGPROBS)]


class StreamOptions(Fields):
    """OpenAI's `include_usage`. `include_obfuscation` pads chunks on its side; ours are never padded."""

    include_usage: bool = False
    include_obfuscation: bool = False


class Harmless(Fields):
    """Fields that change nothing in the answer: what providers keep accounts and caches by."""

    user: str | None = None
    user_id: str | None = None
    metadata: dict[str, Any] | None = None
    store: bool | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None


class Sampling(Harmless):
    """How to draw, and whether to stream. `top_k`, `min_p`, `repetition_penalty`, `stop_token_ids` and `ignore_eos`,
    which benchmarks use, are ours, under the names that other servers gave them."""

    model: str
    temperature: Annotated[float, Within(0, 2)] = 1.0
    top_p: Annotated[float, Within(0, 1.0, above=True)] = 1.0
    top_k: Annotated[int, Within(0, 2**31 - 1)] = 0
    min_p: Annotated[float, Within(0, 1)] = 0.0
    presence_penalty: Annotated[float, Within(-2, 2)] = 0.0
    frequency_penalty: Annotated[float, Within(-2, 2)] = 0.0
    repetition_penalty: Annotated[float, Within(0.01, 100)] = 1.0
    logit_bias: Annotated[dict[str, Annotated[float, Within(-100, 100)]], at_most(MAX_BIASES)] = {}
    n: Annotated[int, Within(1, MAX_SAMPLES)] = 1
    stop: Stops = []
    stop_token_ids: Annotated[
        list[Annotated[int, Within(0, 2**31 - 1)]], Field(max_length=MAX_BIASES, fail_fast=True)
    ] = []
    ignore_eos: bool = False
    seed: Annotated[int, Within(0, 2**63 - 1)] | None = None
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()

    def params(self, max_tokens: int, logprobs: int | None, prompt_logprobs: int | None = None) -> SamplingParams:
        """How to draw.

        Raises:
            InputError: two fields contradict each other, or one is too long.
        """
        return SamplingParams(
            max_tokens=max_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            min_p=self.min_p,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            repetition_penalty=self.repetition_penalty,
            logit_bias=tuple((_token_id(key), bias) for key, bias in self.logit_bias.items()),
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs,
            stop=tuple(self.stop),
            stop_token_ids=tuple(self.stop_token_ids),
            ignore_eos=self.ignore_eos,
            seed=self.seed,
            n=self.n,
        )


def _token_id(key: str) -> int:
    if not (key.isascii() and key.isdigit() and len(key) < 10):
        raise FieldError("logit_bias", f"logit_bias names {key[:80]!r}, which is no token id")
    return int(key)
