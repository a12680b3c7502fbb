"""Which form a model's conversations take, and rendering in it.

A model's own template wins, unless it behaves as one of DeepSeek's published ones: then the built-in form takes over,
which writes plain conversations the same and tool calls without the template's mistakes. Without a template the special
tokens tell: base models of V2 and V3 share their vocabulary with the chat models and are taken for those.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from porcelet.chat import builtin
from porcelet.chat.builtin import BuiltIn
from porcelet.chat.calls import TAG, TAGGED, CallForm, spelled_out
from porcelet.chat.messages import Conversation, Message, Turn, check
from porcelet.chat.pieces import Piece, Rendered, mask_of, tokens_of
from porcelet.chat.sandbox import Sandbox
from porcelet.chat.template import Template
from porcelet.errors import InputError, ModelError
from porcelet.tokenizer import Tokenizer

V2_BOS = 100000  # V2's vocabulary, the only one that begins there
# An earlier answer with reasoning tells R1 from V3; no generation prompt, for that is where versions differ.
_HISTORY = Conversation(
    (
        Turn("system", "Be brief."),
        Turn("user", "One?"),
        Turn("assistant", "so</think>Two."),
        Turn("user", "Three?"),
        Turn("assistant", "Four."),
    ),
    prompt=False,
)
_OURS = {builtin.V3_TEMPLATE: builtin.V3, builtin.R1_TEMPLATE: builtin.R1}  # no need to try them
_SYSTEM = "Be brief."
_QUESTION = Conversation((Turn("user", "One?"),))


@dataclass(frozen=True)
class ChatFormat:
    """A built-in form, or the source of a model's template with the texts of its tokens, "" where there is none."""

    form: BuiltIn | None = None
    template: str = ""
    bos: str = ""
    eos: str = ""

    @classmethod
    def from_gguf(cls, metadata: Mapping[str, Any], source: str = "GGUF") -> ChatFormat:
        """Read `tokenizer.chat_template` and the two tokens from GGUF metadata; else go by the special tokens.

        Raises:
            ModelError: neither tells the form, or a token id lies outside the vocabulary.
        """
        bos, eos = (_gguf_token(metadata, name, source) for name in ("bos", "eos"))
        template = metadata.get("tokenizer.chat_template")
        if isinstance(template, str) and template.strip():
            return cls(None, template, bos, eos)
        tokens = metadata.get("tokenizer.ggml.tokens", [])
        return cls(_by_tokens({token: id for id, token in enumerate(tokens)}, source))

    @classmethod
    def from_folder(cls, path: Path) -> ChatFormat:
        """Read `chat_template.jinja` or `tokenizer_config.json`; else go by the special tokens of `tokenizer.json`.

        Raises:
            ModelError: none of the three tells the form, or a file is damaged.
        """
        config = _read_json(path / "tokenizer_config.json")
        template = _folder_template(path, config)
        if template is not None:
            return cls(None, template, _token_text(config.get("bos_token")), _token_text(config.get("eos_token")))
        added = _read_json(path / "tokenizer.json").get("added_tokens", [])
        return cls(_by_tokens({token.get("content"): token.get("id") for token in added}, str(path)))

    def render(
        self,
        messages: Sequence[Message],
        tokenizer: Tokenizer,
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        thinking: bool | None = None,
    ) -> Rendered:
        """A conversation's tokens. Special tokens come from the form alone, never from a content.

        `messages` and `tools` as `messages.py` describes them. A last answer with `prefix` is left open, to be
        continued. `thinking` None is the model's own habit: R1 does, V3.1 does not.

        Raises:
            InputError: messages that are malformed, or that the form cannot write.
            ModelError: a template that does not work, or a tokenizer that lacks one of the form's special tokens.
        """
        conversation = check(messages, tools, thinking, add_generation_prompt)
        writer = self._writer(tokenizer)
        if conversation.uses_tools and not self._knows_tools(tokenizer):
            takes_system = isinstance(writer, BuiltIn) or self._takes_system
            conversation = spelled_out(conversation, takes_system)
        pieces = writer.pieces(conversation, tokenizer)

        def mask() -> list[bool]:
            marked = writer.marked(conversation, tokenizer) if isinstance(writer, Template) else pieces
            return mask_of(marked, tokenizer)

        return Rendered(tokens_of(pieces, tokenizer), _last_mark(pieces, tokenizer), mask)

    def thinking(self, tokenizer: Tokenizer) -> Literal["never", "always", "choice"]:
        """Whether answers begin with reasoning, or whether `render`'s `thinking` decides."""
        writer = self._writer(tokenizer)
        if isinstance(writer, Template):
            return "choice" if self._has_choice else "always" if builtin.END_THINK in self.template else "never"
        return "choice" if writer.thinking is None else "always" if writer.thinking else "never"

    def opening(self, tokenizer: Tokenizer) -> str:
        """What opens the reasoning where a prompt leaves that to the model."""
        return builtin.THINK if self._writer(tokenizer) is builtin.V3_1 else builtin.THINK + "\n"

    def calls(self, tokenizer: Tokenizer) -> CallForm:
        """How answers call tools."""
        writer = self._writer(tokenizer)
        return writer.calls if isinstance(writer, BuiltIn) and self._knows_tools(tokenizer) else TAGGED

    def _knows_tools(self, tokenizer: Tokenizer) -> bool:
        """Whether the form itself writes tools, and calls in a way that we read."""
        writer = self._writer(tokenizer)
        if isinstance(writer, BuiltIn):
            return writer.calls is not TAGGED and writer.calls.is_known(tokenizer)
        return all(name in self.template for name in (TAG, "tools", "tool_calls"))

    @cached_property
    def _takes_system(self) -> bool:
        """Whether the template writes a system message."""
        try:
            return _SYSTEM in self._template.text(Conversation((Turn("system", _SYSTEM), Turn("user", "One?"))))
        except InputError:
            return False

    @cached_property
    def _has_choice(self) -> bool:
        """Whether the template writes another prompt where thinking is asked for."""
        if "thinking" not in self.template:
            return False
        try:
            texts = {self._template.text(replace(_QUESTION, thinking=thinking)) for thinking in (False, True)}
        except (InputError, ModelError):  # no conversation can be written with it, which is told then
            return False
        return len(texts) == 2

    def _writer(self, tokenizer: Tokenizer) -> BuiltIn | Template:
        form = self.form or self._recognised
        if form and (self.form or all(tokenizer.token_id(text) is not None for text in form.tokens)):
            return form
        return self._template

    @cached_property
    def _template(self) -> Template:
        return Template(self.template, self.bos, self.eos, Sandbox(self.template))

    @cached_property
    def _recognised(self) -> BuiltIn | None:
        """The built-in form that the template is; its process is needed no more then."""
        if self.template in _OURS and (self.bos, self.eos) == (builtin.BOS, builtin.EOS):
            return _OURS[self.template]
        found = _behaves_as(self._template) if builtin.USER in self.template else None
        if found:
            self._template.sandbox.close()
        return found


def _behaves_as(template: Template) -> BuiltIn | None:
    """The built-in form whose text for a plain conversation is the template's."""
    try:
        history, question = template.text(_HISTORY), template.text(_QUESTION)
    except (InputError, ModelError):  # it refuses a plain conversation or fails on it, so it is none of ours
        return None
    for form in (builtin.V3, builtin.R1, builtin.V3_1):
        prompts = [form.text(_QUESTION)]
        if form is builtin.R1:
            # The first R1 and R1-0528 leave this to the model; DeepSeek-R1's README advises to write it.
            prompts.append(prompts[0].removesuffix(builtin.THINK + "\n"))
        if history == form.text(_HISTORY) and question in prompts:
            return form
    return None


def _last_mark(pieces: Sequence[Piece], tokenizer: Tokenizer) -> str | None:
    last = next((piece.content for piece in reversed(pieces) if isinstance(piece.content, int)), None)
    return None if last is None else tokenizer.token_bytes(last).decode()


# ---- where a form comes from ----------------------------------------------------------------------------------------


def _by_tokens(ids: Mapping[str, int], source: str) -> BuiltIn:
    """The form of a model without a template, by the special tokens of its vocabulary."""
    for form in (builtin.R1, builtin.V3, builtin.CHATML):
        if all(token in ids for token in form.tokens):
            return form
    if ids.get(builtin.BOS) == V2_BOS:
        return builtin.V2
    raise ModelError(
        f"{source} has no chat template, and no special tokens that tell its form; a base model cannot be chatted "
        "with: take an instruct model, or add a chat_template.jinja to its folder"
    )


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
        named = [entry for entry in template if isinstance(entry, dict)]
        template = {entry.get("name"): entry.get("template") for entry in named}.get("default")
    return template if isinstance(template, str) and template.strip() else None


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
