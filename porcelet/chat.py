"""A conversation to token ids, by the model's own Jinja template.

A template writes special tokens as text, and a message may hold the same text: "<|im_end|>" from a user must stay ten
characters, or anybody could end their turn and speak as the system. So before the template runs, every character that
begins or ends a special token is swapped, in the contents only, for a stand-in: one unused private character each. No
special token can then lie in, begin in or end in a content; the template's own are found in what it wrote. Then the
stand-ins are swapped back in the ordinary text between special tokens, which is encoded in one piece. So ordinary text
gives exactly the tokens of the plain way, white space at the seams included, and filters such as `trim` act on it as
usual. All that a template sees differently is those few characters: a test like `'</think>' in content` fails.

Left out, until their issues: a child process with time limits for templates (a hostile model file can loop here), tool
calls, splitting a stream into reasoning and answer, the V3.1 form.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache
from itertools import chain
from pathlib import Path
from typing import Any

from jinja2 import Template, TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from porcelet.errors import InputError, ModelError
from porcelet.tokenizer import Tokenizer

ROLES = ("system", "user", "assistant", "tool")
V3_MARKERS = {"<｜User｜>", "<｜Assistant｜>", "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"}
# DeepSeek-V3's chat form: system parts first, joined by an empty line; every answer is closed by eos.
V3_TEMPLATE = """\
{{- bos_token }}
{{- messages | selectattr("role", "equalto", "system") | map(attribute="content") | join("\\n\\n") }}
{%- for message in messages %}
    {%- if message.role == "user" %}{{- "<｜User｜>" + message.content }}{% endif %}
    {%- if message.role == "assistant" %}{{- "<｜Assistant｜>" + message.content + eos_token }}{% endif %}
    {%- if message.role == "tool" %}{{- raise_exception("tool messages are not supported yet") }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- "<｜Assistant｜>" }}{% endif %}"""

Message = Mapping[str, str]


@dataclass(frozen=True)
class ChatFormat:
    """How a model wants a conversation written; `bos` and `eos` are those tokens' texts, "" where there is none."""

    template: str
    bos: str = ""
    eos: str = ""

    @classmethod
    def from_gguf(cls, metadata: Mapping[str, Any], source: str = "GGUF") -> ChatFormat:
        """Read `tokenizer.chat_template` and the two tokens from GGUF metadata.

        Raises:
            ModelError: there is no template, or a token id lies outside the vocabulary.
        """
        template = metadata.get("tokenizer.chat_template")
        if not isinstance(template, str):
            raise ModelError(
                f"{source} has no chat template; a base model cannot be chatted with yet, take an instruct model"
            )
        return cls(template, _gguf_token(metadata, "bos", source), _gguf_token(metadata, "eos", source))

    @classmethod
    def from_folder(cls, path: Path) -> ChatFormat:
        """Read `chat_template.jinja` or `tokenizer_config.json`; else recognise a V3 tokenizer by its special tokens.

        Raises:
            ModelError: none of the three gives a template, or a file is damaged.
        """
        config = _read_json(path / "tokenizer_config.json")
        bos, eos = (_token_text(config.get(name)) for name in ("bos_token", "eos_token"))
        template = _folder_template(path, config)
        if template is not None:
            return cls(template, bos, eos)
        added = _read_json(path / "tokenizer.json").get("added_tokens", [])
        if V3_MARKERS.issubset(token.get("content") for token in added):
            return cls(V3_TEMPLATE, "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>")
        raise ModelError(f"{path} has no chat template; add chat_template.jinja, or take an instruct model")

    def render(
        self, messages: Sequence[Message], tokenizer: Tokenizer, *, add_generation_prompt: bool = True
    ) -> list[int]:
        """Token ids of a conversation. Special tokens come from the template alone, never from a content.

        Raises:
            InputError: messages that are malformed or that the template refuses.
            ModelError: a template that does not work.
        """
        _validate(messages)
        stand_ins = _stand_ins(self.template, messages, tokenizer)
        masked = [{**message, "content": message["content"].translate(stand_ins)} for message in messages]
        text = self._fill(masked, add_generation_prompt)
        originals = {ord(stand_in): character for character, stand_in in stand_ins.items()}
        parts = tokenizer.split(text)
        return list(
            chain.from_iterable(
                [part] if isinstance(part, int) else tokenizer.encode(part.translate(originals)) for part in parts
            )
        )

    def _fill(self, messages: list[dict[str, str]], add_generation_prompt: bool) -> str:
        template = _compile(self.template)
        names = {"messages": messages, "tools": None, "documents": None, "bos_token": self.bos, "eos_token": self.eos}
        try:
            return template.render(**names, add_generation_prompt=add_generation_prompt)
        except _Refused as refusal:
            raise InputError(f"messages: the model's chat template refuses them: {refusal}") from refusal
        except Exception as problem:  # a template is a program from outside: it can fail in any way
            raise ModelError(
                f"the model's chat template fails: {problem}; give the folder a working chat_template.jinja"
            ) from problem


# ---- messages -------------------------------------------------------------------------------------------------------


def _validate(messages: Sequence[Message]) -> None:
    if not messages:
        raise InputError("messages is empty; give at least one, such as {'role': 'user', 'content': '...'}")
    for index, message in enumerate(messages):
        if not isinstance(message, Mapping) or set(message) != {"role", "content"}:
            raise InputError(f"messages[{index}] must have exactly the fields role and content")
        if message["role"] not in ROLES:
            raise InputError(f"messages[{index}].role is {message['role']!r}; it must be one of {', '.join(ROLES)}")
        if not isinstance(message["content"], str):
            raise InputError(f"messages[{index}].content is a {type(message['content']).__name__}; it must be a string")


def _stand_ins(template: str, messages: Sequence[Message], tokenizer: Tokenizer) -> dict[int, str]:
    """A private character, used nowhere else, for each one that begins or ends a special token."""
    ends = sorted({character for token in tokenizer.special_tokens for character in (token[0], token[-1])})
    used = set(template).union(*(message["content"] for message in messages), *tokenizer.special_tokens)
    unused = (chr(code) for code in range(0xF0000, 0x110000) if chr(code) not in used)
    stand_ins = {ord(character): stand_in for character, stand_in in zip(ends, unused, strict=False)}
    if len(stand_ins) < len(ends):
        raise InputError("messages hold nearly every private character of Unicode (from U+F0000); remove some")
    return stand_ins


# ---- templates ------------------------------------------------------------------------------------------------------


class _Refused(TemplateError):
    """A template called `raise_exception`: it does not take this conversation."""


def _refuse(message: str) -> None:
    raise _Refused(message)


def _to_json(value: Any, indent: int | None = None) -> str:
    return json.dumps(
        value, ensure_ascii=False, indent=indent
    )  # Jinja's own escapes for HTML, which no model was trained on


@lru_cache(maxsize=16)
def _compile(template: str) -> Template:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _refuse
    environment.globals["strftime_now"] = lambda format: datetime.now().strftime(format)
    try:
        return environment.from_string(template)
    except (TemplateError, RecursionError) as problem:
        raise ModelError(
            f"the model's chat template cannot be parsed: {problem}; give the folder a working chat_template.jinja"
        ) from problem


def _gguf_token(metadata: Mapping[str, Any], name: str, source: str) -> str:
    id, tokens = metadata.get(f"tokenizer.ggml.{name}_token_id"), metadata.get("tokenizer.ggml.tokens", [])
    if id is None:
        return ""
    if not isinstance(id, int) or not 0 <= id < len(tokens):
        raise ModelError(f"{source}: tokenizer.ggml.{name}_token_id is {id!r}, outside the {len(tokens)} tokens")
    return str(tokens[id])


def _token_text(token: Any) -> str:
    """`tokenizer_config.json` writes a token as its text, as {"content": text}, or as null."""
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else ""


def _folder_template(path: Path, config: Mapping[str, Any]) -> str | None:
    try:
        return (path / "chat_template.jinja").read_text(encoding="utf-8")
    except FileNotFoundError:
        template = config.get("chat_template")
    except (OSError, UnicodeDecodeError) as problem:
        raise ModelError(f"{path / 'chat_template.jinja'} cannot be read: {problem}") from problem
    if isinstance(template, list):  # several templates: [{"name": ..., "template": ...}]
        template = {entry.get("name"): entry.get("template") for entry in template}.get("default")
    return template if isinstance(template, str) else None


def _read_json(path: Path) -> dict[str, Any]:
    """A JSON object; empty where there is no such file."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as problem:
        raise ModelError(f"{path} is not valid JSON: {problem}") from problem
    if not isinstance(values, dict):
        raise ModelError(f"{path} holds a {type(values).__name__}; a JSON object was expected")
    return values
