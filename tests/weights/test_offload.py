"""Experts that stay on disk: the same numbers, a budget kept, and a file that is never half there."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from porcelet.config import EngineConfig
from porcelet.engine.engine import EXPERT_COUNTS, Engine
from porcelet.errors import CapacityError, InputError, ModelError
from porcelet.kernels import cpu
from porcelet.kernels.experts import PackedExperts, experts
from porcelet.models.experts import Experts, residency_of
from porcelet.models.transformer import Transformer, build, initialize
from porcelet.types import SamplingParams
from porcelet.weights import gguf, memory, offload, records
from porcelet.weights.files import open_checkpoint
from porcelet.weights.load import load, save
from porcelet.weights.offload import Offload
from tests.models.variants import V2_LITE
from tests.weights import tiny_gguf
from tests.weights.test_load import logits

pytestmark = pytest.mark.skipif(not cpu.available(), reason="no compiler, hence no native module")

WIDTH, INNER, NUM_EXPERTS = 128, 96, 8
RECORD = -(-3 * WIDTH * INNER * 5 // 8 // 4096) * 4096  # bytes of an expert in four bits, in whole pages
SHAPE = {"width": WIDTH, "expert_inner": INNER, "layers": 4, "scale": 0.1, "tied": False}  # three layers of experts


@pytest.fixture
def model_file(tmp_path: Path) -> Path:
    tiny_gguf.write(tmp_path / "tiny.gguf", "Q4_0", architecture="deepseek2", **SHAPE)
    return tmp_path / "tiny.gguf"


def on_disk(path: Path, num_experts: float, weights: str = "stored") -> Transformer:
    """The model with so many experts' memory."""
    return load(path, weights, offload=Offload(path.parent / "experts", int(num_experts * RECORD)))


def counts(model: Transformer) -> dict[str, int]:
    residency = residency_of(model)
    assert residency
    return dict(zip(EXPERT_COUNTS, residency.counts(), strict=True))


def choose(model: Transformer, layer: int, *chosen: int) -> Tensor:
    """One token through some experts of a layer of `model`."""
    module = [module for module in model.modules() if isinstance(module, Experts)][layer]
    x = torch.randn(1, WIDTH, generator=torch.Generator().manual_seed(layer))
    with torch.inference_mode():
        return experts(
            x, module.gate_up_proj, module.down_proj, torch.tensor([chosen]), torch.full((1, len(chosen)), 0.5)
        )


# ---- the same numbers -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weights", ["stored", "int8"])
@pytest.mark.parametrize("num_experts", [100, 7, 2])  # all of them; some; fewer than a prompt's layer chooses
def test_results_are_those_of_the_model_in_memory(model_file: Path, weights: str, num_experts: int) -> None:
    """Bit for bit, eagerly and in a recorded engine, for prompts and single tokens, whatever the budget."""
    here, there = (
        load(model_file, weights),
        on_disk(model_file, num_experts * (1 if weights == "stored" else 2), weights),
    )
    assert torch.equal(logits(here), logits(there))
    prompts = [[1, 2, 3], list(range(4, 30)), [9]]
    params = SamplingParams(max_tokens=20, temperature=0, ignore_eos=True, logprobs=0)
    config = EngineConfig(cache_tokens=1024, speculation="off")  # guesses go by time
    engines = [Engine(model, config) for model in (here, there)]
    expected, outputs = (engine.generate(prompts, params) for engine in engines)
    for one, other in zip(expected, outputs, strict=True):
        assert one.tokens == other.tokens and one.logprobs == other.logprobs
    assert engines[1].runner.recorded
    assert counts(there)["num_expert_misses"] > 0
    assert counts(there)["num_expert_bytes_resident"] <= num_experts * 2 * RECORD


def test_safetensors_are_rounded_on_the_way_to_the_disk(tmp_path: Path) -> None:
    """Float weights as int4, of another gate: equal to the model in memory."""
    save(initialize(build(V2_LITE), seed=3), tmp_path / "model")
    here = load(tmp_path / "model", "int4")
    there = load(tmp_path / "model", "int4", offload=Offload(tmp_path / "experts", 1 << 20))
    assert torch.equal(logits(here), logits(there))


# ---- what is in memory ----------------------------------------------------------------------------------------------


def test_the_least_recently_used_goes(model_file: Path) -> None:
    """Chosen experts stay until later ones need their room; a hit makes an expert the most recent again."""
    model = on_disk(model_file, 3)
    for expert in (0, 1, 2, 0, 3):  # 1 goes for 3
        choose(model, 0, expert)
    assert (counts(model)["num_expert_hits"], counts(model)["num_expert_misses"]) == (1, 4)
    choose(model, 0, 0)
    choose(model, 0, 2)
    assert counts(model)["num_expert_hits"] == 3
    choose(model, 0, 1)
    assert counts(model)["num_expert_misses"] == 5
    assert counts(model)["num_expert_bytes_resident"] == 3 * RECORD
    assert counts(model)["num_expert_bytes_read"] == 5 * RECORD


def test_the_next_layers_last_choice_is_read_ahead(model_file: Path) -> None:
    """While a layer computes, what the next one chose at its last step comes; after the last layer, the first's."""
    model = on_disk(model_file, 4)
    for layer in range(3):
        choose(model, layer, 2 * layer, 2 * layer + 1)
    assert counts(model)["num_expert_prefetches"] == 0  # nothing was chosen before, or it is still there
    choose(model, 0, 0, 1)  # was let go when layer 2 came, whose step asked for it again
    assert counts(model)["num_expert_prefetches"] >= 2
    misses = counts(model)["num_expert_misses"]
    for layer in (1, 2, 0, 1, 2):  # a text that keeps to its experts never waits, though all have no room together
        choose(model, layer, 2 * layer, 2 * layer + 1)
    assert counts(model)["num_expert_misses"] == misses


def test_choices_that_do_not_repeat_are_not_read_ahead(model_file: Path) -> None:
    """Where each step goes to other experts, reading ahead ends: the disk has better to do."""
    model = on_disk(model_file, 2)
    before = 0
    for step in range(120):
        if step == 60:
            before = counts(model)["num_expert_prefetches"]
        for layer in range(3):
            choose(model, layer, step % NUM_EXPERTS)
    assert before and counts(model)["num_expert_prefetches"] == before


def test_a_prompts_choice_is_not_read_ahead_for_a_token(model_file: Path) -> None:
    """After a step of many experts, a step of few asks for none but its own."""
    model = on_disk(model_file, 4)
    for layer in range(3):
        choose(model, layer, *range(NUM_EXPERTS))
    before = counts(model)
    choose(model, 0, 0)
    choose(model, 1, 0)
    assert counts(model)["num_expert_prefetches"] == before["num_expert_prefetches"]


def test_a_step_that_wants_more_than_there_is_reads_past_what_is_there(model_file: Path) -> None:
    """A prompt that goes through all experts leaves those resident that were: its own are the first to go."""
    model = on_disk(model_file, 6)
    for _ in range(2):
        choose(model, 1, 3)
    for _ in range(4):
        choose(model, 0, *range(NUM_EXPERTS))
    hits = counts(model)["num_expert_hits"]
    choose(model, 1, 3)
    assert counts(model)["num_expert_hits"] == hits + 1
    assert counts(model)["num_expert_bytes_resident"] <= 6 * RECORD


def test_the_process_holds_no_more_than_the_budget(tmp_path: Path) -> None:
    """What the kernel counts as mapped follows: experts that went are out of the process."""
    shape = SHAPE | {"width": 512, "expert_inner": 512}
    tiny_gguf.write(tmp_path / "tiny.gguf", "Q4_0", architecture="deepseek2", **shape)
    record = 3 * 512 * 512 * 5 // 8
    model = load(tmp_path / "tiny.gguf", "stored", offload=Offload(tmp_path / "experts", 6 * record))
    for expert in range(NUM_EXPERTS):
        for layer in range(3):
            module = [module for module in model.modules() if isinstance(module, Experts)][layer]
            x, one = torch.randn(1, 512), torch.ones(1, 1)
            experts(x, module.gate_up_proj, module.down_proj, torch.tensor([[expert]]), one)
    lines = Path("/proc/self/smaps").read_text().splitlines()
    start = next(i for i, line in enumerate(lines) if str(tmp_path) in line and line.endswith(".experts"))
    resident = next(int(line.split()[1]) for line in lines[start:] if line.startswith("Rss:")) * 1024
    assert 3 * record < resident <= 7 * record


def test_a_budget_below_one_expert_is_refused(model_file: Path) -> None:
    """It could never compute; the message names both sizes."""
    with pytest.raises(InputError, match=r"expert_memory is 0\.0 MB, and one expert takes 0\.0 MB; raise it"):
        on_disk(model_file, 0.5)


# ---- the file -------------------------------------------------------------------------------------------------------


def test_the_file_is_written_once(model_file: Path) -> None:
    """A second load finds it; another format gets another file in its place; so does a changed checkpoint."""
    on_disk(model_file, 8)
    [file] = (model_file.parent / "experts").iterdir()
    before = file.stat()
    reported: list[tuple[int, int]] = []
    load(model_file, "stored", lambda *done: reported.append(done), Offload(file.parent, 8 * RECORD))
    assert (file.stat().st_ino, file.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    assert reported[-1][0] == reported[-1][1] < model_file.stat().st_size // 2  # experts were not read again
    on_disk(model_file, 16, "int8")
    [other] = file.parent.iterdir()
    assert other != file
    os.utime(model_file, ns=(1, 1))
    on_disk(model_file, 16, "int8")
    [changed] = file.parent.iterdir()
    assert changed not in (file, other)


@pytest.mark.parametrize("damage", ["cut", "grown", "header", "empty"])
def test_a_damaged_file_is_written_again(model_file: Path, caplog: pytest.LogCaptureFixture, damage: str) -> None:
    """One that was cut, has grown or begins otherwise is told of and replaced; the answers are right."""
    expected = logits(on_disk(model_file, 8))
    [file] = (model_file.parent / "experts").iterdir()
    size = file.stat().st_size
    if damage == "header":
        with file.open("r+b") as opened:
            opened.write(b"{x")
    else:
        os.truncate(file, {"cut": size - 4096, "grown": size + 1, "empty": 0}[damage])
    with caplog.at_level(logging.WARNING):
        assert torch.equal(logits(on_disk(model_file, 8)), expected)
    assert "is damaged, and written again" in caplog.text
    assert file.stat().st_size == size


def test_every_experts_damage_is_found(model_file: Path) -> None:
    """A whole file has a count of experts; one bit in a record is told of with its expert, and what
    is cut or none of ours, too."""
    on_disk(model_file, 8)
    [file] = (model_file.parent / "experts").iterdir()
    whole, layout = file.read_bytes(), records.read_layout(file)
    assert records.verify(file) == 3 * NUM_EXPERTS
    start = len(layout.header)
    for layer, expert, place in [(0, 0, 0), (1, 3, layout.layers[0].gate_up_bytes), (2, 7, -1)]:
        bytes_ = bytearray(whole)
        of = layout.layers[layer]
        bytes_[start + of.start + expert * of.record_bytes + place % of.used_bytes] ^= 1
        file.write_bytes(bytes_)
        with pytest.raises(ModelError, match=rf"expert {expert} of {of.stacks.module} is damaged; delete it"):
            records.verify(file)
    for content, message in [
        (whole[:-1], f"has {len(whole) - 1} bytes of {len(whole)}; delete it"),
        (b"{}" + whole[2:], "is not a file of experts as this version writes them"),
        (whole.replace(b'"format": 2', b'"format": 1', 1), "is not a file of experts as this version writes them"),
        (b"", "is not a file of experts as this version writes them"),
    ]:
        file.write_bytes(content)
        with pytest.raises(ModelError, match=message):
            records.verify(file)


def test_files_of_a_model_are_found_and_removed(model_file: Path, tmp_path: Path) -> None:
    """By the model's path, whatever became of it; others' files stay, and one that is being written."""
    other = tmp_path / "other.gguf"
    other.write_bytes(model_file.read_bytes())
    on_disk(model_file, 8)
    on_disk(other, 8)
    folder = tmp_path / "experts"
    [mine], [theirs] = records.found(folder, model_file), records.found(folder, other)
    left, busy = mine.with_suffix(".part"), mine.with_name(mine.stem + "1.part")
    left.touch()
    model_file.unlink()
    with busy.open("w") as opened:
        fcntl.flock(opened, fcntl.LOCK_EX)
        assert records.remove(folder, model_file) == [mine]
    assert set(folder.iterdir()) == {theirs, busy}
    assert records.remove(folder, model_file) == [] and set(folder.iterdir()) == {theirs}


def test_what_a_killed_process_left_is_taken_over(model_file: Path) -> None:
    """A temporary file of any content becomes the file, and nothing else is left."""
    on_disk(model_file, 8)
    [file] = (model_file.parent / "experts").iterdir()
    whole = file.read_bytes()
    file.rename(file.with_suffix(".part"))
    with file.with_suffix(".part").open("r+b") as opened:
        opened.write(bytes(100_000))
    on_disk(model_file, 8)
    assert [path.name for path in file.parent.iterdir()] == [file.name] and file.read_bytes() == whole


def test_a_folder_that_cannot_be_written_is_an_error(model_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A read-only store is named with the way out; a file that is there already is used."""
    folder = model_file.parent / "experts"

    def refuse(self: Path, **_: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    with monkeypatch.context() as patch:  # by permissions it could not be told to root
        patch.setattr(Path, "mkdir", refuse)
        with pytest.raises(ModelError, match=r"cannot be written there: Read-only file system; set PORCELET_HOME"):
            on_disk(model_file, 8)
    expected = logits(on_disk(model_file, 8))
    with monkeypatch.context() as patch:
        patch.setattr(Path, "mkdir", refuse)
        assert torch.equal(logits(on_disk(model_file, 8)), expected)
    assert len(list(folder.iterdir())) == 1


def test_a_disk_without_room_is_an_error(model_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Said before anything is written, and when the room goes meanwhile; nothing is left in the folder."""
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
        with pytest.raises(CapacityError, match=r"take 0\.0 GB, and 0\.0 GB are free; free some space"):
            on_disk(model_file, 8)

    def full(file: int, start: int, length: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "posix_fallocate", full)
        with pytest.raises(CapacityError, match=r"and the disk is full"):
            on_disk(model_file, 8)
    assert not list((model_file.parent / "experts").iterdir())


def test_a_checkpoint_that_fails_leaves_no_file(model_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A damaged tensor in the middle ends the load, and no file is there to be believed."""

    def fail(*_: object) -> None:
        raise ModelError("damaged")

    monkeypatch.setattr(offload, "_write_at", fail)
    with pytest.raises(ModelError, match="damaged"):
        on_disk(model_file, 8)
    assert not list((model_file.parent / "experts").iterdir())


# ---- around it ------------------------------------------------------------------------------------------------------


def test_a_model_without_packed_experts_is_refused(tmp_path: Path, model_file: Path) -> None:
    """Dense models, and formats whose experts are not packed, are told why expert_memory is not for them."""
    with pytest.raises(InputError, match="packed ones, and here they are float32"):
        on_disk(model_file, 8, "float32")
    tiny_gguf.write(tmp_path / "dense.gguf", "Q4_0")
    with pytest.raises(InputError, match="has no routed experts that could stay on disk"):
        on_disk(tmp_path / "dense.gguf", 8)


def test_only_the_budget_counts(model_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that is too large for memory fits when its experts stay on disk; the refusal says so."""
    size = sum(stored.num_bytes for stored in open_checkpoint(model_file).tensors)
    monkeypatch.setattr(memory, "available_memory", lambda: size // 2)
    with pytest.raises(CapacityError, match="or let experts stay on disk with expert_memory"):
        load(model_file, "stored")
    on_disk(model_file, 1)
    with pytest.raises(CapacityError, match="or lower expert_memory"):
        on_disk(model_file, NUM_EXPERTS * 3 - 6)


def test_the_engine_takes_the_setting(model_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`expert_memory` is bytes or a share of free memory; the file lies in the store, the counts are in the statistics,
    and a cache that is a share of free memory leaves the experts theirs."""
    monkeypatch.setenv("PORCELET_HOME", str(model_file.parent / "home"))
    engine = Engine.load(model_file, EngineConfig(expert_memory="1MiB", cache_tokens=1024))
    engine.generate([[1, 2, 3]], SamplingParams(max_tokens=4))
    stats = engine.stats()
    assert stats["num_expert_misses"] > 0 and stats["num_expert_bytes_resident"] <= 2**20
    assert len(list((model_file.parent / "home" / "experts").iterdir())) == 1
    assert not set(EXPERT_COUNTS) & set(Engine(load(model_file, "stored")).stats())
    with pytest.raises(InputError, match="expert_memory is 'lots'; give bytes such as 2GB"):
        EngineConfig(expert_memory="lots")
    half = Engine.load(model_file, EngineConfig(expert_memory="0.5", cache_memory="0.01"))
    residency = residency_of(half.model)
    assert residency and residency.budget() > memory.available_memory() // 4
    whole = Engine(load(model_file, "stored"), EngineConfig(cache_memory="0.01"))
    assert half.stats()["num_pages"] < 0.8 * whole.stats()["num_pages"]


def test_packed_experts_know_where_they_live(model_file: Path) -> None:
    """In memory they have no residence; on disk both stacks of a layer share one."""
    for model, lives_on_disk in ((load(model_file, "stored"), False), (on_disk(model_file, 8), True)):
        for module in model.modules():
            if isinstance(module, Experts):
                assert isinstance(module.gate_up_proj, PackedExperts) and isinstance(module.down_proj, PackedExperts)
                assert module.gate_up_proj.residence == module.down_proj.residence
                assert bool(module.down_proj.residence) == lives_on_disk


def test_a_file_larger_than_memory_can_be_mapped(model_file: Path) -> None:
    """A GGUF file of more bytes than the machine has is opened; the surplus here is a hole."""
    os.truncate(model_file, 3 * memory.total_memory())
    assert "token_embd.weight" in gguf.read(model_file).tensors
