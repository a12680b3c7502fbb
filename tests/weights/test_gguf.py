"""The GGUF reader against the `gguf` library, and against files that lie."""

from __future__ import annotations

import math
import re
import struct
import subprocess
import sys
import time
import tracemalloc
from itertools import pairwise
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


def test_the_table_of_types_is_the_library_s() -> None:
    """Numbers, names, block lengths and sizes of every type."""
    for number, kind in gguf.TYPES.items():
        library_kind = library.GGMLQuantizationType[kind.name]
        assert (number, (kind.block, kind.size)) == (library_kind.value, library.GGML_QUANT_SIZES[library_kind])
    for number, name in gguf.OTHER_TYPES.items():
        assert library.GGMLQuantizationType(number).name == name


@pytest.mark.parametrize("type_name", [kind.name for kind in gguf.TYPES.values()])
def test_reads_what_the_library_wrote(tmp_path: Path, type_name: str) -> None:
    """Names, types, shapes and bytes of every tensor are those that were stored."""
    width = 256 if type_name.endswith("_K") else 64
    stored = tiny_gguf.write(tmp_path / "tiny.gguf", type_name, width=width, inner=2 * width, head_dim=width // 4)
    shapes = tiny_gguf.Model(width=width, inner=2 * width, head_dim=width // 4).shapes()
    read = gguf.read(tmp_path / "tiny.gguf")
    assert list(read.tensors) == list(stored)
    for name, tensor in read.tensors.items():
        assert tensor.shape == shapes[name]
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


# ---- names ----------------------------------------------------------------------------------------------------------

# What the library lists for an architecture and no model that we run holds: mixtral's experts under llama, plain keys
# and values under deepseek2.
NOT_OURS = {
    "llama": {"ffn_gate_inp", "ffn_gate_exps", "ffn_up_exps", "ffn_down_exps", "attn_rot_embd"},
    "qwen2": set(),
    "qwen3": set(),
    "deepseek2": {"attn_k", "attn_v", "attn_rot_embd"},
}
MODELS = {
    "llama": {"architecture": "llama"},
    "qwen2": {"architecture": "qwen2"},
    "qwen3": {"architecture": "qwen3", "head_dim": 32, "tied": False},
    "V2-Lite": {"architecture": "deepseek2", "q_rank": None, "split_kv_b": False, "sigmoid": False},
    "V2": {"architecture": "deepseek2", "sigmoid": False, "groups": 4, "groups_used": 2},
    "V3": {"architecture": "deepseek2", "tied": False, "yarn": (40.0, 32, 1.0)},
}


def library_names(architecture: str) -> dict[str, library.MODEL_TENSOR]:
    """Every GGUF name that the library lists for block 12 or the whole model, without its suffix."""
    number = next(number for number, name in library.MODEL_ARCH_NAMES.items() if name == architecture)
    return {library.TENSOR_NAMES[tensor].format(bid=12): tensor for tensor in library.MODEL_TENSORS[number]}


@pytest.mark.parametrize("architecture", NOT_OURS)
def test_hf_names_are_the_library_s_backwards(architecture: str) -> None:
    """Each tensor the library lists gets a name of its own, which the library's converter maps to the same tensor."""
    number = next(number for number, name in library.MODEL_ARCH_NAMES.items() if name == architecture)
    converter = library.get_tensor_name_map(number, 13)
    found = {}
    for name in library_names(architecture):
        suffix = ".bias" if name.endswith("exp_probs_b") else ".weight"
        if name.removeprefix("blk.12.") in NOT_OURS[architecture]:
            with pytest.raises(ModelError, match=re.escape(name)):
                gguf.hf_name(name + suffix, architecture, "file")
        else:
            found[name] = gguf.hf_name(name + suffix, architecture, "file")
    assert found.pop("rope_freqs") == "rope_freqs.weight"
    assert len(set(found.values())) == len(found)
    for name, hf_name in found.items():
        # The converter has cut "_bias" into a suffix of its own by then.
        base = hf_name.removesuffix(".weight").removesuffix("_bias")
        assert converter.get_name(base) == name


@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
def test_biases_are_named_like_their_weights(architecture: str) -> None:
    """q, k and v (and llama's output) may have a bias."""
    for part in ("q", "k", "v") + (("output",) if architecture == "llama" else ()):
        weight, bias = (gguf.hf_name(f"blk.3.attn_{part}.{end}", architecture, "file") for end in ("weight", "bias"))
        assert bias == weight.removesuffix("weight") + "bias"


def test_hf_names_of_a_mixture_of_experts() -> None:
    """The names that are not the checkpoint's: stacked experts without a number, the two parts of kv_b_proj."""
    names = {
        "ffn_gate_exps.weight": "mlp.experts.gate_proj.weight",
        "ffn_down_shexp.weight": "mlp.shared_experts.down_proj.weight",
        "exp_probs_b.bias": "mlp.gate.e_score_correction_bias",
        "attn_k_b.weight": "self_attn.k_b_proj.weight",
    }
    for name, expected in names.items():
        assert gguf.hf_name(f"blk.60.{name}", "deepseek2", "file") == f"model.layers.60.{expected}"


@pytest.mark.parametrize(
    ("name", "architecture"),
    [
        ("blk.x.attn_q.weight", "llama"),
        ("attn_q.weight", "llama"),
        ("blk.01.attn_q.weight", "llama"),
        (f"blk.{'9' * 5000}.attn_q.weight", "llama"),
        ("blk.1.attn_q.weight\n", "llama"),
        ("blk.1.attn_output.bias", "qwen2"),
        ("blk.1.attn_q.bias", "qwen3"),
        ("blk.1.attn_k.weight", "deepseek2"),
        ("blk.1.ffn_gate_up_exps.weight", "deepseek2"),
        ("blk.1.attn_q.weight", "gemma"),
    ],
)
def test_other_names_are_refused(name: str, architecture: str) -> None:
    """The error names file, tensor and architecture."""
    with pytest.raises(ModelError, match=f"^model.gguf: tensor .* {architecture} model") as raised:
        gguf.hf_name(name, architecture, "model.gguf")
    assert repr(name) in str(raised.value)


@pytest.mark.parametrize(("type_name", "width"), [("F32", 64), ("Q5_1", 64), ("Q4_K", 256)])
@pytest.mark.parametrize("model", MODELS)
def test_the_tiny_models_are_whole(tmp_path: Path, model: str, type_name: str, width: int) -> None:
    """What the other tests load: each architecture's file is read back, and every tensor has a name of its own."""
    options = MODELS[model]
    architecture = options["architecture"]
    stored = tiny_gguf.write(tmp_path / "tiny.gguf", type_name, width=width, inner=2 * width, **options)
    read = gguf.read(tmp_path / "tiny.gguf")
    assert read.tensors["blk.0.ffn_down.weight"].type.name == type_name
    assert read.metadata["general.architecture"] == architecture
    assert len({gguf.hf_name(name, architecture, "file") for name in read.tensors}) == len(stored)


def test_the_parts_of_kv_b_are_those_of_the_whole(tmp_path: Path) -> None:
    """The tiny deepseek2 with attn_k_b and attn_v_b holds the numbers of the one with attn_kv_b."""
    joined = tiny_gguf.write(tmp_path / "joined.gguf", "F32", architecture="deepseek2", split_kv_b=False)
    split = tiny_gguf.write(tmp_path / "split.gguf", "F32", architecture="deepseek2")
    parts = numpy.concatenate((split["blk.1.attn_k_b.weight"].swapaxes(1, 2), split["blk.1.attn_v_b.weight"]), axis=1)
    assert numpy.array_equal(parts.reshape(-1, parts.shape[2]), joined["blk.1.attn_kv_b.weight"])
    assert all(numpy.array_equal(split[name], joined[name]) for name in split.keys() & joined.keys())


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
MINUS_ONE = 2**64 - 1
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
    "a key of length -1": (header(0, 1) + struct.pack("<Q", MINUS_ONE) + b"a", str(MINUS_ONE)),
    "-1 pairs": (header(0, MINUS_ONE), "metadata key"),
    "-1 tensors": (header(MINUS_ONE, 0), "tensor name"),
    "a key twice": (header(0, 2) + pair("k", 0, b"\1") * 2, "'k' occurs twice"),
    "an unknown value type": (header(0, 1) + pair("k", 13, b""), "type 13"),
    "a string past the end": (header(0, 1) + pair("k", 8, struct.pack("<Q", HUGE)), "'k'"),
    "a bool of 2": (header(0, 1) + pair("k", 7, b"\2"), "boolean"),
    "a huge array": (header(0, 1) + pair("k", 9, struct.pack("<IQ", 0, HUGE)), str(HUGE)),
    "a huge array of strings": (header(0, 1) + pair("k", 9, struct.pack("<IQ", 8, HUGE)), str(HUGE)),
    "a billion strings": (header(0, 1) + pair("k", 9, struct.pack("<IQ", 8, 10**9)), "1000000000 values"),
    "an array of -1 values": (header(0, 1) + pair("k", 9, struct.pack("<IQ", 12, MINUS_ONE)), str(MINUS_ONE)),
    "four million numbers in no bytes": (header(0, 1) + pair("k", 9, struct.pack("<IQ", 12, 1 << 22)), "past the end"),
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
    "a product of 2^64": (padded(entry("t", [2**32, 2**32])), f"'t' ends at byte {2**66 // 1000}"),
    "a product of 2^64 + 64": (padded(entry("t", [64, 2**58 + 1])), f"'t' ends at byte {2**66 // 1000}"),
    "a dimension of -1": (padded(entry("t", [MINUS_ONE])), "'t' ends at byte"),
    "a row of half a block": (padded(entry("t", [48, 2], kind=3)), r"\[2, 48\]"),
    "a row of half a K block": (padded(entry("t", [128, 2], kind=12)), r"\[2, 128\].*whole blocks of 256"),
    "an unknown type": (padded(entry("t", [32], kind=99)), "number 99"),
    "a K-quant that is not read": (padded(entry("t", [256], kind=10)), "Q2_K.*supported: F32.*Q6_K"),
    "a tensor twice": (padded(entry("t", [8]), entry("t", [8], offset=32)), "'t' occurs twice"),
    "an offset between two steps": (padded(entry("t", [8], offset=4)), "offset 4"),
    "an offset past the end": (padded(entry("t", [8], offset=HUGE)), "past the end"),
    "an overlap": (padded(entry("t", [16]), entry("u", [8], offset=32)), "'t' and 'u' overlap at offset 32"),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_lie_is_one_model_error(tmp_path: Path, lie: str) -> None:
    """A header that lies raises a ModelError of one line that names the file and what is wrong, in little memory."""
    content, message = LIES[lie]
    path = tmp_path / "lie.gguf"
    path.write_bytes(content)
    tracemalloc.start()
    try:
        with pytest.raises(ModelError, match=message) as raised:
            gguf.read(path)
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()
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


def check_read(path: Path) -> None:
    """The property of every file: it parses with every tensor inside it, or is one ModelError that names the file."""
    try:
        read = gguf.read(path)
    except ModelError as problem:
        assert str(path) in str(problem)
        assert "\n" not in str(problem)
        return
    places = []
    for tensor in read.tensors.values():
        assert len(tensor.data) == math.prod(tensor.shape) // tensor.type.block * tensor.type.size
        start = numpy.frombuffer(tensor.data, numpy.uint8).ctypes.data
        places.append((start, start + len(tensor.data)))
    places.sort()
    assert all(before[1] <= after[0] for before, after in pairwise(places))
    assert not places or places[-1][1] - places[0][0] <= path.stat().st_size


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_damage_never_crashes(tiny: Path, data: st.DataObject) -> None:
    """A file with flipped bytes, a moved piece or a cut end is read or refused as `check_read` says."""
    content = bytearray(tiny.read_bytes())
    table_end = len(content) - sum(len(tensor.data) for tensor in gguf.read(tiny).tensors.values())
    for position in data.draw(st.lists(st.integers(0, table_end), max_size=4)):
        content[position] = data.draw(st.integers(0, 255))
    if data.draw(st.booleans()):
        source, target = data.draw(st.integers(0, table_end)), data.draw(st.integers(0, table_end))
        content[target : target + 8] = content[source : source + 8]
    if data.draw(st.booleans()):
        del content[data.draw(st.integers(0, len(content))) :]
    damaged = tiny.with_name("damaged.gguf")
    damaged.write_bytes(content)
    check_read(damaged)


EXTREMES = st.sampled_from([0, 1, 31, 2**31, 2**32, 2**58 + 1, HUGE, 2**63, MINUS_ONE])
VALUES = st.one_of(
    st.tuples(st.integers(0, 13), st.binary(max_size=16)),
    st.builds(
        lambda kind, count, raw: (9, struct.pack("<IQ", kind, count) + raw),
        st.integers(0, 13),
        st.integers(0, 4) | EXTREMES,
        st.binary(),
    ),
)


@settings(max_examples=150, deadline=None)
@given(
    pairs=st.lists(st.tuples(st.sampled_from(["k", "l", "general.alignment"]), VALUES), max_size=3),
    miscounted=st.sampled_from([0, 0, 0, 1, MINUS_ONE, HUGE]),
)
def test_any_metadata_is_read_or_refused(
    tmp_path_factory: pytest.TempPathFactory, pairs: list[tuple[str, tuple[int, bytes]]], miscounted: int
) -> None:
    """Metadata of all value types with unlikely counts: twice the same key, arrays longer than memory."""
    path = tmp_path_factory.getbasetemp() / "metadata.gguf"
    content = b"".join(pair(key, kind, value) for key, (kind, value) in pairs)
    path.write_bytes(header(0, (len(pairs) + miscounted) % 2**64) + content)
    check_read(path)


@st.composite
def tables(draw: st.DrawFn) -> list[bytes]:
    """Tensors that lie one after another, until a name comes twice, an offset is moved or a number is extreme."""
    table, end = [], 0
    for place in range(draw(st.integers(1, 4))):
        name, kind = f"t{place}", gguf.TYPES[number := draw(st.sampled_from(sorted(gguf.TYPES)))]
        dims = [kind.block, *draw(st.lists(st.integers(1, 3), max_size=3))]
        offset = end
        end += -(-math.prod(dims) // kind.block * kind.size // 32) * 32
        match draw(st.integers(0, 9)):
            case 0:
                name = "t0"
            case 1:
                offset = max(0, offset - 32 * draw(st.integers(1, 3)))
            case 2:
                offset = draw(EXTREMES)
            case 3:
                dims[draw(st.integers(0, len(dims) - 1))] = draw(EXTREMES)
        table.append(entry(name, dims, kind=number, offset=offset))
    return table


@settings(max_examples=200, deadline=None)
@given(table=tables(), tail=st.integers(0, 3000))
def test_any_table_is_read_or_refused(tmp_path_factory: pytest.TempPathFactory, table: list[bytes], tail: int) -> None:
    """Tables of tensors with unlikely numbers: duplicates, overlaps, places past the end, products beyond 64 bits."""
    path = tmp_path_factory.getbasetemp() / "table.gguf"
    path.write_bytes(padded(*table, data=tail))
    check_read(path)


@given(st.binary(max_size=200))
@example(b"GGUF\x03\0\0\0")
def test_noise_never_crashes(tmp_path_factory: pytest.TempPathFactory, noise: bytes) -> None:
    """Arbitrary bytes behind a good magic and version are read or refused as `check_read` says."""
    path = tmp_path_factory.getbasetemp() / "noise.gguf"
    path.write_bytes(b"GGUF\x03\0\0\0" + noise)
    check_read(path)
