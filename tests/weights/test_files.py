"""Model files as a stream: GGUF and safetensors, whole and damaged."""

from __future__ import annotations

import json
from pathlib import Path

import numpy
import pytest
import torch
from gguf import GGMLQuantizationType
from gguf.quants import dequantize
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from porcelet.config import ModelConfig
from porcelet.errors import CapacityError, ModelError
from porcelet.weights import files, gguf, quantize
from porcelet.weights.gguf import GGUFTensor
from tests.weights import tiny_gguf

CONFIG = ModelConfig(
    architecture="llama",
    vocab_size=16,
    hidden_size=8,
    intermediate_size=8,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=4,
    max_position_embeddings=32,
)
WEIGHTS = {f"tensor.{i}": torch.arange(12.0).view(3, 4) + i for i in range(4)}


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """A folder of two shards with their index."""
    index = {}
    for number in range(2):
        shard = {name: tensor for name, tensor in WEIGHTS.items() if int(name[-1]) % 2 == number}
        save_file(shard, tmp_path / f"part-{number}.safetensors")
        index |= dict.fromkeys(shard, f"part-{number}.safetensors")
    write_index(tmp_path, index)
    return tmp_path


def write_index(folder: Path, weight_map: object) -> None:
    (folder / files.INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


@pytest.mark.parametrize("type_name", ["F16", "Q4_1", "Q8_0"])
def test_gguf_streams_hf_names_and_rows(tmp_path: Path, type_name: str) -> None:
    """A GGUF's tensors are the library's values, under Hugging Face names, q and k rows in Hugging Face order."""
    stored = tiny_gguf.write(tmp_path / "tiny.gguf", type_name)
    streamed = dict(files.tensors(tmp_path / "tiny.gguf"))
    assert len(streamed) == len(stored)
    for name, raw in stored.items():
        found = streamed[gguf.hf_name(name, "file")]
        expected = dequantize(raw, GGMLQuantizationType[type_name if len(tiny_gguf.shapes()[name]) > 1 else "F32"])
        heads = {"attn_q": tiny_gguf.HEADS, "attn_k": tiny_gguf.KV_HEADS}.get(name.split(".")[-2])
        if heads:
            expected = expected.reshape(heads, -1, 2, expected.shape[1]).swapaxes(1, 2).reshape(expected.shape)
        values = quantize.dequantize(found) if isinstance(found, GGUFTensor) else found.float()
        assert torch.equal(values, torch.from_numpy(numpy.ascontiguousarray(expected)))


def test_gguf_config_knows_a_tied_head(tmp_path: Path) -> None:
    """The head is tied exactly when the file has no output.weight."""
    tiny_gguf.write(tmp_path / "tied.gguf")
    tiny_gguf.write(tmp_path / "free.gguf", extra={"output.weight": (tiny_gguf.VOCABULARY, tiny_gguf.WIDTH)})
    assert files.config(tmp_path / "tied.gguf").tie_word_embeddings
    assert not files.config(tmp_path / "free.gguf").tie_word_embeddings
    assert "lm_head.weight" in dict(files.tensors(tmp_path / "free.gguf"))


@pytest.mark.parametrize(
    ("extra", "message"),
    [({"rope_freqs.weight": (8,)}, "rope_freqs"), ({"blk.1.attn_q.weight": (12, 32)}, r"\[12, 32\].*4 heads")],
)
def test_gguf_tensors_that_do_not_fit_are_named(
    tmp_path: Path, extra: dict[str, tuple[int, ...]], message: str
) -> None:
    """A tensor outside the table, or one whose rows are no heads, is a ModelError."""
    tiny_gguf.write(tmp_path / "tiny.gguf", extra=extra)
    with pytest.raises(ModelError, match=message):
        list(files.tensors(tmp_path / "tiny.gguf"))


def test_saved_is_read_back(tmp_path: Path) -> None:
    """save, then config and tensors: equal bit for bit, in every stored type, and nothing else lies in the folder."""
    weights = {**WEIGHTS, "half": torch.randn(3, 5).bfloat16(), "turned": torch.randn(4, 6).t()}
    files.save(tmp_path / "model", CONFIG, weights)
    read = dict(files.tensors(tmp_path / "model"))
    assert files.config(tmp_path / "model") == CONFIG
    assert read.keys() == weights.keys()
    assert all(torch.equal(read[name], tensor) and read[name].dtype == tensor.dtype for name, tensor in weights.items())
    assert sorted(path.name for path in (tmp_path / "model").iterdir()) == ["config.json", "model.safetensors"]


def test_a_failed_save_leaves_the_old_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """When the disk fills up, the error says so, the old files stand and no half-written one is left."""
    files.save(tmp_path, CONFIG, WEIGHTS)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def full(tensors: object, path: Path, metadata: object) -> None:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files, "save_file", full)
    with pytest.raises(CapacityError, match="disk is full"):
        files.save(tmp_path, CONFIG, {"other": torch.ones(3)})
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_shards_give_every_tensor_once(sharded: Path) -> None:
    """The stream of a sharded folder is the whole model."""
    streamed = list(files.tensors(sharded))
    assert len(streamed) == len(WEIGHTS)
    assert all(torch.equal(dict(streamed)[name], tensor) for name, tensor in WEIGHTS.items())


def test_a_missing_shard_is_named_before_anything_is_streamed(sharded: Path) -> None:
    """The last shard's absence is noticed at the first tensor."""
    (sharded / "part-1.safetensors").unlink()
    with pytest.raises(ModelError, match="part-1"):
        next(files.tensors(sharded))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tensor.9": "part-0.safetensors"}, "part-0.* lacks tensor 'tensor.9'"),
        ({"tensor.0": "part-1.safetensors"}, "part-1.* lacks tensor 'tensor.0'|part-0.* holds tensor 'tensor.0'"),
        ({"tensor.0": "../part-0.safetensors"}, "not a file name"),
        ({"tensor.0": 7}, "not a file name"),
    ],
)
def test_an_index_that_lies_is_named(sharded: Path, change: dict[str, object], message: str) -> None:
    """Index and shards must agree on every tensor, and shards lie in the folder."""
    weight_map = json.loads((sharded / files.INDEX).read_text())["weight_map"]
    write_index(sharded, weight_map | change)
    with pytest.raises(ModelError, match=message):
        list(files.tensors(sharded))


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {"a": []}}', "[" * 100_000])
def test_a_broken_index_is_one_error(sharded: Path, text: str) -> None:
    """An index that is no index is a ModelError with its path."""
    (sharded / files.INDEX).write_text(text)
    with pytest.raises(ModelError, match="index"):
        list(files.tensors(sharded))


def test_an_empty_folder_says_what_belongs_there(tmp_path: Path) -> None:
    """Without weights, and without a config, the message names the file to add."""
    with pytest.raises(ModelError, match=r"model\.safetensors"):
        list(files.tensors(tmp_path))
    with pytest.raises(ModelError, match=r"config\.json"):
        files.config(tmp_path)


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_damaged_safetensors_never_crash(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    """Flipped header bytes or a cut end: tensors of honest size, or one ModelError that names the file."""
    folder = tmp_path_factory.getbasetemp() / "damaged"
    folder.mkdir(exist_ok=True)
    save_file(WEIGHTS, folder / files.WEIGHTS)
    content = bytearray((folder / files.WEIGHTS).read_bytes())
    for position in data.draw(st.lists(st.integers(0, 300), min_size=1, max_size=3)):
        content[position] = data.draw(st.integers(0, 255))
    if data.draw(st.booleans()):
        del content[data.draw(st.integers(0, len(content))) :]
    (folder / files.WEIGHTS).write_bytes(content)
    try:
        total = sum(tensor.nbytes for _, tensor in files.tensors(folder))
    except ModelError as problem:
        assert str(folder / files.WEIGHTS) in str(problem)
    else:
        assert total <= len(content)
