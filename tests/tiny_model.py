"""A whole model folder in a few kilobytes: random weights, a byte-level tokenizer, a chat template."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from porcelet.config import ModelConfig
from porcelet.models.transformer import build, initialize
from porcelet.weights.load import save

TEMPLATE = (
    "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SPECIAL = ["<|system|>", "<|user|>", "<|assistant|>", "<|end|>"]


def save_tiny_model(folder: Path) -> Path:
    """A llama of one layer over bytes. It answers with noise, cut characters among it.

    Its end token has the score 0: never the best, so greedy answers go on, and sometimes drawn at a high temperature.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({character: i for i, character in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(SPECIAL)
    end = len(alphabet) + SPECIAL.index("<|end|>")
    config = ModelConfig(
        architecture="llama",
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        max_position_embeddings=100_000,
        eos_token_ids=(end,),
        initializer_range=0.5,
    )
    folder.mkdir(parents=True, exist_ok=True)
    model = initialize(build(config), seed=0)
    with torch.no_grad():
        model.get_parameter("lm_head.weight")[end] = 0
    save(model, folder)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": TEMPLATE, "eos_token": "<|end|>"}))
    return folder
