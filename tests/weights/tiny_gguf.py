"""A whole llama model of a few thousand parameters as a GGUF file, written by the `gguf` library."""

from __future__ import annotations

from pathlib import Path

import numpy
from gguf import GGMLQuantizationType, GGUFWriter, TokenType
from gguf.quants import quantize

WIDTH, HEADS, KV_HEADS, INNER, VOCABULARY = 64, 4, 2, 96, 40
SPECIAL = ["<|im_start|>", "<|im_end|>"]
TEMPLATE = "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"


def shapes() -> dict[str, tuple[int, ...]]:
    """GGUF names of the one-layer model, with shapes in torch's order."""
    return {
        "token_embd.weight": (VOCABULARY, WIDTH),
        "output_norm.weight": (WIDTH,),
        "blk.0.attn_norm.weight": (WIDTH,),
        "blk.0.attn_q.weight": (WIDTH, WIDTH),
        "blk.0.attn_k.weight": (WIDTH // HEADS * KV_HEADS, WIDTH),
        "blk.0.attn_v.weight": (WIDTH // HEADS * KV_HEADS, WIDTH),
        "blk.0.attn_output.weight": (WIDTH, WIDTH),
        "blk.0.ffn_norm.weight": (WIDTH,),
        "blk.0.ffn_gate.weight": (INNER, WIDTH),
        "blk.0.ffn_up.weight": (INNER, WIDTH),
        "blk.0.ffn_down.weight": (WIDTH, INNER),
    }


def write(
    path: Path, type_name: str = "Q4_1", extra: dict[str, tuple[int, ...]] | None = None
) -> dict[str, numpy.ndarray]:
    """Write the model; vectors stay F32, matrices get `type_name`. Returns the bytes stored for each tensor."""
    writer = GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_context_length(128)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_array("general.languages", ["en"])
    _write_tokenizer(writer)
    random = numpy.random.default_rng(0)
    stored = {}
    for name, shape in (shapes() | (extra or {})).items():
        kind = GGMLQuantizationType[type_name if len(shape) > 1 else "F32"]
        stored[name] = quantize(random.standard_normal(shape, numpy.float32), kind)
        writer.add_tensor(name, stored[name], raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return stored


def _write_tokenizer(writer: GGUFWriter) -> None:
    letters = [chr(code) for code in range(ord("a"), ord("a") + VOCABULARY - len(SPECIAL) - 4)]
    tokens = [*SPECIAL, *letters, "Ċ", "Ġ", "ab", "abc"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([TokenType.CONTROL] * len(SPECIAL) + [TokenType.NORMAL] * (len(tokens) - len(SPECIAL)))
    writer.add_token_merges(["a b", "ab c"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_add_bos_token(False)
    writer.add_chat_template(TEMPLATE)
