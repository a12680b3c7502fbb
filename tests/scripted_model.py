"""A real model folder that says a given script: a Markov chain over tokens, written as a llama's weights.

Each token's row of the head points at the embedding of the token before it, and the layer between adds nothing, so the
real engine, sampler and tokenizer say the script whatever was asked. A piece of a script may occur only once in it.
After the last piece comes the end of the text.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from porcelet.chat import builtin
from porcelet.config import ModelConfig
from porcelet.models.transformer import build, initialize
from porcelet.weights.load import save

DEEPSEEK = [
    builtin.BOS,
    builtin.EOS,
    builtin.USER,
    builtin.ASSISTANT,
    builtin.THINK,
    builtin.END_THINK,
    builtin.CALLS,
    builtin.END_CALLS,
    builtin.CALL,
    builtin.SEP,
    builtin.END_CALL,
    builtin.OUTPUTS,
    builtin.END_OUTPUTS,
    builtin.OUTPUT,
    builtin.END_OUTPUT,
    "<｜fim▁begin｜>",
    "<｜fim▁hole｜>",
    "<｜fim▁end｜>",
]
SHARPNESS = 60.0  # of the head: the next piece has all of the probability but about e^-50


def save_scripted_model(folder: Path, scripts: Sequence[Sequence[str]], template: str | None = None) -> Path:
    """Write the folder. A script begins with the piece that comes before it: the last one of a prompt.

    Without a `template` the chat format is R1's, whose prompts end with "<think>\\n", so a script begins with "\\n".
    With one it is the template's: V3's, say, where it begins with "<｜Assistant｜>". Pieces that are special tokens of
    DeepSeek's are those, others become tokens of their own; any text can be asked. Scripts may be loops:
    ("a", "b", "a") never ends.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces = [piece for piece in dict.fromkeys(piece for script in scripts for piece in script)]
    ordinary = [piece for piece in pieces if piece not in DEEPSEEK]
    written = [_byte_level(piece) for piece in ordinary]
    vocabulary = {token: id for id, token in enumerate(dict.fromkeys([*alphabet, *written]))}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in DEEPSEEK])
    ids = {piece: vocabulary[token] for piece, token in zip(ordinary, written, strict=True)}
    ids |= {token: tokenizer.token_to_id(token) for token in DEEPSEEK}
    _save_chain(folder, tokenizer.get_vocab_size(), _successors(scripts, ids), ids[builtin.EOS])
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"eos_token": builtin.EOS, "bos_token": builtin.BOS} | ({"chat_template": template} if template else {})
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def _byte_level(text: str) -> str:
    """A text in the alphabet of byte-level vocabularies."""
    return "".join(
        token for token, _ in pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str(text)
    )


def _successors(scripts: Sequence[Sequence[str]], ids: dict[str, int]) -> dict[int, int]:
    chain: dict[int, int] = {}
    for script in scripts:
        for piece, following in pairwise([*script, builtin.EOS] if script[-1] not in script[:-1] else script):
            assert chain.setdefault(ids[piece], ids[following]) == ids[following], f"{piece!r} has two successors"
    return chain


def _save_chain(folder: Path, vocab_size: int, successors: dict[int, int], end: int) -> None:
    hidden_size = -(-vocab_size // 32) * 32  # room for embeddings at right angles: no token looks a bit like another
    config = ModelConfig(
        architecture="llama",
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        max_position_embeddings=100_000,
        eos_token_ids=(end,),
    )
    folder.mkdir(parents=True, exist_ok=True)
    model = initialize(build(config), seed=0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "o_proj" in name or "down_proj" in name:
                parameter.zero_()
        embedding = model.get_parameter("model.embed_tokens.weight")
        embedding.copy_(torch.eye(vocab_size, hidden_size))
        head = torch.zeros_like(embedding)
        for token, following in successors.items():
            head[following] += embedding[token]  # several tokens may be followed by the same one
        model.get_parameter("lm_head.weight").copy_(head * SHARPNESS / hidden_size**0.5)
    save(model, folder)
