"""What fits into memory is known before it is read."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from torch import Tensor

from porcelet.errors import CapacityError
from porcelet.models.transformer import build, initialize
from porcelet.weights.load import quantized
from porcelet.weights.memory import available_memory, check_fits, total_memory, weight_bytes
from tests.models.variants import LLAMA, V3


def test_available_memory_is_part_of_all() -> None:
    """What can be had is more than nothing and no more than there is."""
    assert 0 < available_memory() <= total_memory()


def test_a_model_that_is_too_large_names_what_would_fit() -> None:
    """A model beyond all memory is refused in one line; one that would fit as int8 is told so."""
    check_fits(LLAMA, "float32", "small")
    width = 16384
    huge = replace(LLAMA, hidden_size=width, intermediate_size=width, num_attention_heads=128, head_dim=128)
    layer = weight_bytes(replace(huge, num_hidden_layers=2), "float32") - weight_bytes(
        replace(huge, num_hidden_layers=1), "float32"
    )
    fits_as_int8 = replace(huge, num_hidden_layers=math.ceil(1.5 * available_memory() / layer))
    with pytest.raises(CapacityError, match=r"big takes .* GB as float32, .* available; load it with weights=int8"):
        check_fits(fits_as_int8, "float32", "big")
    check_fits(huge, "stored", "big", available_memory() // 2)  # what a file stores decides
    with pytest.raises(CapacityError, match=r"big takes .* GB as stored"):
        check_fits(huge, "stored", "big", available_memory())
    too_large = replace(huge, num_hidden_layers=math.ceil(20 * available_memory() / layer))
    with pytest.raises(CapacityError, match="free some memory, or take a smaller model"):
        check_fits(too_large, "float32", "bigger")


def test_a_packed_mla_model_takes_what_is_counted() -> None:
    """Both parts of kv_b_proj, and not the whole beside them."""
    sizes = {"q_lora_rank": 32, "kv_lora_rank": 64, "qk_nope_head_dim": 32, "v_head_dim": 32, "vocab_size": 96}
    config = replace(V3, num_nextn_predict_layers=0, **sizes)
    model = quantized(initialize(build(config), seed=1))
    tables = [table for module in model.modules() for table in (module._parameters, module._buffers, module.__dict__)]
    held = [getattr(weight, "packed", weight) for table in tables for weight in table.values()]
    tensors = {tensor for tensor in held if isinstance(tensor, Tensor)}
    assert sum(tensor.untyped_storage().nbytes() for tensor in tensors) == config.packed_bytes(8)
