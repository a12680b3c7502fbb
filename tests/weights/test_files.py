"""Checkpoints on disk: GGUF and safetensors, whole and damaged."""

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
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from porcelet.config import ModelConfig, write_hf
from porcelet.errors import CapacityError, ModelError
from porcelet.weights import files, gguf, quantize
from porcelet.weights.files import Source
from porcelet.weights.gguf import GGUFTensor
from porcelet.weights.header import read_config
from porcelet.weights.shards import read_header
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
    (tmp_path / "config.json").write_text(json.dumps(write_hf(CONFIG)))
    write_index(tmp_path, index)
    return tmp_path


def read_all(path: Path) -> dict[str, Source]:
    """Every tensor of a checkpoint; a GGUF's blocks are copied out, as the view ends with the block."""
    found: dict[str, Source] = {}
    for stored in files.open_checkpoint(path).tensors:
        with stored.open() as tensor:
            assert tuple(tensor.shape) == stored.shape and stored.name not in found
            found[stored.name] = quantize.dequantize(tensor) if isinstance(tensor, GGUFTensor) else tensor
    return found


def write_index(folder: Path, weight_map: object) -> None:
    (folder / files.INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


@pytest.mark.parametrize("type_name", ["F16", "Q4_1", "Q8_0"])
def test_gguf_streams_hf_names_and_rows(tmp_path: Path, type_name: str) -> None:
    """A GGUF's tensors are the library's values, under Hugging Face names, q and k rows in Hugging Face order."""
    stored = tiny_gguf.write(tmp_path / "tiny.gguf", type_name)
    streamed = read_all(tmp_path / "tiny.gguf")
    assert len(streamed) == len(stored)
    for name, raw in stored.items():
        found = streamed[gguf.hf_name(name, "llama", "file")]
        expected = dequantize(raw, GGMLQuantizationType[type_name if len(tiny_gguf.shapes()[name]) > 1 else "F32"])
        heads = {"attn_q": tiny_gguf.HEADS, "attn_k": tiny_gguf.KV_HEADS}.get(name.split(".")[-2])
        if heads:
            expected = expected.reshape(heads, -1, 2, expected.shape[1]).swapaxes(1, 2).reshape(expected.shape)
        assert isinstance(found, torch.Tensor)
        assert torch.equal(found.float(), torch.from_numpy(numpy.ascontiguousarray(expected)))


def test_gguf_config_knows_a_tied_head(tmp_path: Path) -> None:
    """The head is tied exactly when the file has no output.weight."""
    tiny_gguf.write(tmp_path / "tied.gguf")
    tiny_gguf.write(tmp_path / "free.gguf", extra={"output.weight": (tiny_gguf.VOCABULARY, tiny_gguf.WIDTH)})
    assert read_config(tmp_path / "tied.gguf").tie_word_embeddings
    assert not read_config(tmp_path / "free.gguf").tie_word_embeddings
    assert "lm_head.weight" in read_all(tmp_path / "free.gguf")


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"rope_freqs.weight": (8,)}, "rope_freqs.*Llama 3's rule"),
        ({"blk.1.attn_q.weight": (12, 32)}, r"\[12, 32\].*4 heads"),
    ],
)
def test_gguf_tensors_that_do_not_fit_are_named(
    tmp_path: Path, extra: dict[str, tuple[int, ...]], message: str
) -> None:
    """A tensor outside the table, or one whose rows are no heads, is a ModelError."""
    tiny_gguf.write(tmp_path / "tiny.gguf", extra=extra)
    with pytest.raises(ModelError, match=message):
        read_all(tmp_path / "tiny.gguf")


def test_saved_is_read_back(tmp_path: Path) -> None:
    """save, then config and tensors: equal bit for bit, in every stored type, and nothing else lies in the folder."""
    weights = {**WEIGHTS, "half": torch.randn(3, 5).bfloat16(), "turned": torch.randn(4, 6).t()}
    files.save(tmp_path / "model", CONFIG, weights.items())
    read = read_all(tmp_path / "model")
    assert read_config(tmp_path / "model") == CONFIG
    assert read.keys() == weights.keys()
    assert all(torch.equal(read[name], tensor) and read[name].dtype == tensor.dtype for name, tensor in weights.items())
    assert sorted(path.name for path in (tmp_path / "model").iterdir()) == ["config.json", "model.safetensors"]


def test_a_failed_save_leaves_the_old_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """When the disk fills up, the error says so, the old files stand and no half-written one is left."""
    files.save(tmp_path, CONFIG, WEIGHTS.items())
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def full(tensors: object, path: Path, metadata: object) -> None:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files, "save_file", full)
    with pytest.raises(CapacityError, match="disk is full"):
        files.save(tmp_path, CONFIG, {"other": torch.ones(3)}.items())
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_shards_give_every_tensor_once(sharded: Path) -> None:
    """The stream of a sharded folder is the whole model."""
    streamed = read_all(sharded)
    assert streamed.keys() == WEIGHTS.keys()
    assert all(torch.equal(streamed[name], tensor) for name, tensor in WEIGHTS.items())


def test_a_large_model_is_saved_in_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Shards of bounded size with an index that reads back whole; whichever is saved last replaces what was there."""
    files.save(tmp_path, CONFIG, {"one": torch.ones(3)}.items())
    monkeypatch.setattr(files, "MAX_SHARD_BYTES", 100)  # two tensors of 48 bytes
    files.save(tmp_path, CONFIG, WEIGHTS.items())
    assert {path.name for path in tmp_path.glob("*.safetensors")} == {
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
    }
    read = read_all(tmp_path)
    assert all(torch.equal(read[name], tensor) for name, tensor in WEIGHTS.items())
    files.save(tmp_path, CONFIG, {"one": torch.ones(3)}.items())
    assert read_all(tmp_path).keys() == {"one"}


def test_a_missing_shard_is_named_before_anything_is_streamed(sharded: Path) -> None:
    """The last shard's absence is noticed at the first tensor."""
    (sharded / "part-1.safetensors").unlink()
    with pytest.raises(ModelError, match="part-1"):
        files.open_checkpoint(sharded)


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
        read_all(sharded)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {"a": []}}', "[" * 100_000])
def test_a_broken_index_is_one_error(sharded: Path, text: str) -> None:
    """An index that is no index is a ModelError with its path."""
    (sharded / files.INDEX).write_text(text)
    with pytest.raises(ModelError, match="index"):
        read_all(sharded)


def test_an_empty_folder_says_what_belongs_there(tmp_path: Path) -> None:
    """Without weights, and without a config, the message names the file to add."""
    for read in (read_all, read_config):
        with pytest.raises(ModelError, match=r"config\.json"):
            read(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(write_hf(CONFIG)))
    with pytest.raises(ModelError, match=r"model\.safetensors"):
        read_all(tmp_path)


# ---- safetensors, whatever the bytes --------------------------------------------------------------------------------


def header(entries: object, data: bytes = b"") -> bytes:
    text = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    return len(text).to_bytes(8, "little") + text + data


def row(shape: list[int], begin: int, end: int, dtype: str = "F32") -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


LIES = {
    "empty": (b"", "header of 0 bytes"),
    "cut in the length": (b"\x08\0\0", "does not fit into a file of 3"),
    "length past the end": ((10**6).to_bytes(8, "little") + b"{}", "header of 1000000 bytes"),
    "huge length": ((2**63).to_bytes(8, "little") + b"{}", str(2**63)),
    "no JSON": (header(b"{]"), "not JSON"),
    "a list": (header([]), "not an object"),
    "deep JSON": (header(b"[" * 200_000), "header"),
    "not UTF-8": (header(b'{"\xff": 1}'), "not JSON"),
    "no description": (header({"a": [1]}), "'a' is not described"),
    "negative shape": (header({"a": row([-4], 0, 16)}, bytes(16)), r"'a' has the shape \[-4\]"),
    "shape times shape": (header({"a": row([2**40, 2**40], 0, 16)}, bytes(16)), f"takes {2**82}"),
    "shape beyond 64 bits": (header({"a": row([2**70], 0, 16)}, bytes(16)), str(2**70)),
    "a fraction": (header({"a": row([1.5], 0, 6)}, bytes(6)), "1.5"),
    "true for 1": (header({"a": row([True], 0, 4)}, bytes(4)), "True"),
    "negative offset": (header({"a": row([4], -16, 0)}, bytes(16)), "-16"),
    "backwards": (header({"a": row([4], 16, 0)}, bytes(16)), "'a' has -16 bytes"),
    "past the end": (header({"a": row([8], 0, 32)}, bytes(16)), "'a' ends at byte"),
    "far past the end": (header({"a": row([2**40], 0, 2**42)}, bytes(16)), "'a' ends at byte 43980465"),
    "overlap": (header({"a": row([4], 0, 16), "b": row([4], 8, 24)}, bytes(24)), "'b' begins at byte 8 and overlaps"),
    "gap": (header({"a": row([1], 0, 4), "b": row([1], 8, 12)}, bytes(12)), "'b' begins at byte 8 and leaves a gap"),
    "rest": (header({"a": row([1], 0, 4)}, bytes(8)), "the file at"),
    "cut data": (header({"a": row([4], 0, 16)}, bytes(15)), "'a' ends at byte"),
    "unknown type": (header({"a": row([4], 0, 16, "F31")}, bytes(16)), "'F31'"),
    "metadata": (header({"__metadata__": {"a": 1}}), "__metadata__"),
}


@pytest.mark.parametrize(("content", "message"), LIES.values(), ids=LIES)
def test_a_lying_header_is_one_error(tmp_path: Path, content: bytes, message: str) -> None:
    """What a header gets wrong is named with the file, the tensor and the number; the library refuses it as well."""
    path = tmp_path / files.WEIGHTS
    path.write_bytes(content)
    with pytest.raises(ModelError, match=message) as raised:
        read_header(path)
    assert str(path) in str(raised.value) and len(str(raised.value)) < 500
    with pytest.raises((SafetensorError, OSError, ValueError)):
        safe_open(path, framework="pt")


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_damaged_safetensors_are_judged_as_the_library_judges_them(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """Flipped bytes and cut ends: the library's tensors bit for bit, or one ModelError where it refuses too."""
    folder = tmp_path_factory.getbasetemp() / "damaged"
    folder.mkdir(exist_ok=True)
    path = folder / files.WEIGHTS
    save_file(WEIGHTS, path)
    (folder / "config.json").write_text(json.dumps(write_hf(CONFIG)))
    content = bytearray(path.read_bytes())
    for position in data.draw(st.lists(st.integers(0, 300), min_size=0, max_size=3)):
        content[position] = data.draw(st.integers(0, 255) | st.sampled_from(b'0123456789[]{}",:'))
    if data.draw(st.booleans()):
        del content[data.draw(st.integers(0, len(content))) :]
    path.write_bytes(content)
    try:
        with safe_open(path, framework="pt") as library:
            expected = {name: library.get_tensor(name) for name in library.keys()}  # noqa: SIM118  no mapping
    except (SafetensorError, OSError, ValueError, KeyError, AttributeError):
        expected = None
    try:
        found = read_all(folder)
    except ModelError as problem:
        assert str(path) in str(problem)
        # Integer and boolean tensors are the library's, but no model's weights.
        assert expected is None or any(not tensor.dtype.is_floating_point for tensor in expected.values())
    else:
        assert expected is not None and found.keys() == expected.keys()
        for name, tensor in found.items():
            assert isinstance(tensor, torch.Tensor) and tensor.dtype == expected[name].dtype
            assert tensor.numpy(force=True).tobytes() == expected[name].numpy(force=True).tobytes()
