"""The GGUF reader against the `gguf` library, and against files that lie."""

from __future__ import annotations

import re
import struct
import subprocess
import sys
import time
from pathlib import Path

import gguf as library
import numpy
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from porcelet.errors import ModelError
from porcelet.weights import gguf
from tests.weights import tiny_gguf


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    tiny_gguf.write(path)
    return path


@pytest.mark.parametrize("type_name", ["F32", "F16", "BF16", "Q4_0", "Q4_1", "Q8_0"])
def test_reads_what_the_library_wrote(tmp_path: Path, type_name: str) -> None:
    """Names, types, shapes and bytes of every tensor are those that were stored."""
    stored = tiny_gguf.write(tmp_path / "tiny.gguf", type_name)
    read = gguf.read(tmp_path / "tiny.gguf")
    assert list(read.tensors) == list(stored)
    for name, tensor in read.tensors.items():
        assert tensor.shape == tiny_gguf.shapes()[name]
        assert tensor.type.name == (type_name if len(tensor.shape) > 1 else "F32")
        assert bytes(tensor.data) == stored[name].tobytes()


def test_metadata_has_python_values(tmp_path: Path) -> None:
    """Every value type of the format comes back as it was written."""
    writer = library.GGUFWriter(tmp_path / "values.gguf", "llama")
    numbers = {"uint8": 200, "int8": -3, "uint16": 60000, "int16": -300, "uint32": 2**32 - 1, "int32": -(2**31)}
    numbers |= {"uint64": 2**64 - 1, "int64": -(2**63), "float32": 0.5, "float64": 0.1}
    for kind, value in numbers.items():
        getattr(writer, f"add_{kind}")(f"x.{kind}", value)
    values = {
        "x.bool": True,
        "x.string": "é你🎉",
        "x.strings": ["", "a", "é"],
        "x.bools": [True, False],
        "x.ints": [1, -2],
    }
    writer.add_bool("x.bool", True)
    writer.add_string("x.string", values["x.string"])
    for key in ("x.strings", "x.bools", "x.ints"):
        writer.add_array(key, values[key])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    read = gguf.read(tmp_path / "values.gguf").metadata
    assert {kind: read[f"x.{kind}"] for kind in numbers} == numbers
    assert {key: list(read[key]) if isinstance(read[key], tuple) else read[key] for key in values} == values


def test_needs_no_torch(tiny: Path) -> None:
    """The HTTP process can read metadata without torch."""
    code = "import sys; from pathlib import Path; from porcelet.weights import gguf; "
    code += f"gguf.read(Path({str(tiny)!r})); assert not {{'torch', 'numpy'}} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_large_vocabulary_is_read_in_milliseconds(tmp_path: Path) -> None:
    """100,000 strings take less than 0.5 s of one core (0.05 s on a quiet one)."""
    strings = b"".join(struct.pack("<Q", 6) + b"%06d" % i for i in range(100_000))
    (tmp_path / "big.gguf").write_bytes(header(0, 1) + pair("t", 9, struct.pack("<IQ", 8, 100_000) + strings))
    start = time.process_time()
    assert gguf.read(tmp_path / "big.gguf").metadata["t"][99_999] == "099999"
    assert time.process_time() - start < 0.5


def test_hf_names_cover_a_llama_model() -> None:
    """Every tensor of a llama model gets a name of its own; RoPE factors and unknown names are refused."""
    names = {gguf.hf_name(name, "file") for name in [*tiny_gguf.shapes(), "output.weight"]}
    assert len(names) == len(tiny_gguf.shapes()) + 1
    assert gguf.hf_name("blk.12.attn_q.weight", "file") == "model.layers.12.self_attn.q_proj.weight"
    for name in ("rope_freqs.weight", "blk.x.attn_q.weight", "blk.1.attn_q.bias", "attn_q.weight"):
        with pytest.raises(ModelError, match=re.escape(name)):
            gguf.hf_name(name, "file")


# ---- files that lie -------------------------------------------------------------------------------------------------


def header(num_tensors: int, num_pairs: int, magic: bytes = b"GGUF", version: int = 3) -> bytes:
    return magic + struct.pack("<IQQ", version, num_tensors, num_pairs)


def text(value: str | bytes) -> bytes:
    raw = value if isinstance(value, bytes) else value.encode()
    return struct.pack("<Q", len(raw)) + raw


def pair(key: str, kind: int, value: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + value


def entry(name: str, dims: list[int], kind: int = 0, offset: int = 0, num_dims: int | None = None) -> bytes:
    count = len(dims) if num_dims is None else num_dims
    return text(name) + struct.pack(f"<I{len(dims)}QIQ", count, *dims, kind, offset)


def padded(*entries: bytes, data: int = 256) -> bytes:
    table = header(len(entries), 0) + b"".join(entries)
    return table + bytes(-len(table) % 32 + data)


HUGE = 2**60
LIES = {
    "nothing in it": (b"", "empty"),
    "too short for a header": (b"GGUF\x03\0", "version"),
    "another magic": (header(0, 0, magic=b"GGML"), "not a GGUF file"),
    "version 1": (header(0, 0, version=1), "version 1 "),
    "big-endian": (header(0, 0, version=3 << 24), "version 50331648"),
    "more pairs than there are": (header(0, HUGE), "metadata key"),
    "more tensors than there are": (header(HUGE, 0), "tensor name"),
    "a key past the end": (header(0, 1) + struct.pack("<Q", HUGE) + b"a", str(HUGE)),
    "a key that is no UTF-8": (header(0, 1) + text(b"\xff"), "UTF-8"),
    "a key twice": (header(0, 2) + pair("k", 0, b"\1") * 2, "'k' occurs twice"),
    "an unknown value type": (header(0, 1) + pair("k", 13, b""), "type 13"),
    "a string past the end": (header(0, 1) + pair("k", 8, struct.pack("<Q", HUGE)), "'k'"),
    "a bool of 2": (header(0, 1) + pair("k", 7, b"\2"), "boolean"),
    "a huge array": (header(0, 1) + pair("k", 9, struct.pack("<IQ", 0, HUGE)), str(HUGE)),
    "a huge array of strings": (header(0, 1) + pair("k", 9, struct.pack("<IQ", 8, HUGE)), str(HUGE)),
    "an array past the end": (header(0, 1) + pair("k", 9, struct.pack("<IQ", 4, 1000)), "4000 bytes"),
    "strings past the end": (header(0, 1) + pair("k", 9, struct.pack("<IQ", 8, 3) + text("a")), "after 1"),
    "a string in an array past the end": (
        header(0, 1) + pair("k", 9, struct.pack("<IQQ", 8, 1, HUGE)),
        "string 0 ends",
    ),
    "an array of arrays": (header(0, 1) + pair("k", 9, struct.pack("<IQ", 9, 1)), "unsupported value type 9"),
    "an odd alignment": (header(0, 1) + pair("general.alignment", 4, struct.pack("<I", 24)), "24"),
    "an alignment in words": (header(0, 1) + pair("general.alignment", 8, text("32")), "'32'"),
    "no dimension": (padded(entry("t", [])), "0 dimensions"),
    "a billion dimensions": (padded(entry("t", [1], num_dims=10**9)), "1000000000 dimensions"),
    "an empty dimension": (padded(entry("t", [0])), r"\[0\]"),
    "a huge dimension": (padded(entry("t", [2**63, 2**63])), "past the end"),
    "a row of half a block": (padded(entry("t", [48, 2], kind=3)), r"\[2, 48\]"),
    "an unknown type": (padded(entry("t", [32], kind=99)), "number 99"),
    "a K-quant": (padded(entry("t", [256], kind=12)), "Q4_K"),
    "a tensor twice": (padded(entry("t", [8]), entry("t", [8], offset=32)), "'t' occurs twice"),
    "an offset between two steps": (padded(entry("t", [8], offset=4)), "offset 4"),
    "an offset past the end": (padded(entry("t", [8], offset=HUGE)), "past the end"),
    "an overlap": (padded(entry("t", [16]), entry("u", [8], offset=32)), "'t' and 'u' overlap at offset 32"),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_lie_is_one_model_error(tmp_path: Path, lie: str) -> None:
    """A header that lies raises a ModelError of one line that names the file and what is wrong."""
    content, message = LIES[lie]
    path = tmp_path / "lie.gguf"
    path.write_bytes(content)
    with pytest.raises(ModelError, match=message) as raised:
        gguf.read(path)
    assert str(path) in str(raised.value)
    assert "\n" not in str(raised.value)


def test_the_same_table_without_the_lie_is_read(tmp_path: Path) -> None:
    """The builders above make readable files, so each lie fails for its own reason."""
    path = tmp_path / "good.gguf"
    path.write_bytes(padded(entry("t", [8]), entry("u", [32, 2], kind=3, offset=32)))
    assert [tensor.shape for tensor in gguf.read(path).tensors.values()] == [(8,), (2, 32)]


def test_missing_files_and_folders_are_model_errors(tmp_path: Path) -> None:
    """What cannot be opened is named."""
    for path in (tmp_path / "absent.gguf", tmp_path):
        with pytest.raises(ModelError, match=re.escape(str(path))):
            gguf.read(path)


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_damage_never_crashes(tiny: Path, data: st.DataObject) -> None:
    """A file with flipped bytes or a cut end parses with every tensor inside it, or is one ModelError."""
    content = bytearray(tiny.read_bytes())
    table_end = len(content) - sum(len(tensor.data) for tensor in gguf.read(tiny).tensors.values())
    for position in data.draw(st.lists(st.integers(0, table_end), max_size=4)):
        content[position] = data.draw(st.integers(0, 255))
    if data.draw(st.booleans()):
        del content[data.draw(st.integers(0, len(content))) :]
    damaged = tiny.with_name("damaged.gguf")
    damaged.write_bytes(content)
    try:
        read = gguf.read(damaged)
    except ModelError:
        return
    for tensor in read.tensors.values():
        elements = int(numpy.prod(tensor.shape, dtype=object))
        assert len(tensor.data) == elements // tensor.type.block * tensor.type.size


@given(st.binary(max_size=200))
@example(b"GGUF\x03\0\0\0")
def test_noise_never_crashes(tmp_path_factory: pytest.TempPathFactory, noise: bytes) -> None:
    """Arbitrary bytes behind a good magic and version parse or are one ModelError."""
    path = tmp_path_factory.getbasetemp() / "noise.gguf"
    path.write_bytes(b"GGUF\x03\0\0\0" + noise)
    try:
        gguf.read(path)
    except ModelError:
        return
