"""Models of the package: in the list beside the store's, not to be removed or replaced, made from a run's folder."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from porcelet import hub
from porcelet.chat.builtin import R1_TEMPLATE
from porcelet.errors import InputError, ModelError
from porcelet.hub import packaged
from porcelet.hub.packaged.__main__ import MAX_BYTES, pack

ROOT = Path(__file__).parents[2]


def test_it_is_there_without_a_pull(store: Path) -> None:
    """An empty store lists it, finds it and checks its bytes, and a pull has nothing to fetch."""
    (model,) = hub.list_models()
    assert (model.name, model.source) == (hub.R1_MINI, "package")
    assert hub.verify(hub.R1_MINI) == model
    assert hub.resolve(hub.R1_MINI) == hub.pull(hub.R1_MINI) == model.path == model.folder
    assert sorted(file.name for file in model.files) == sorted(
        path.name for path in model.folder.iterdir() if path.name != "manifest.json"
    )
    assert not store.exists()


def test_it_is_small() -> None:
    """All of it takes at most 8 MB."""
    assert sum(model.size for model in hub.list_models()) <= MAX_BYTES


def test_it_stays_what_it_is(tiny_folder: Path) -> None:
    """It is neither removed nor copied, and no other model takes its name."""
    with pytest.raises(InputError, match="part of the package.*pip uninstall porcelet"):
        hub.remove(hub.R1_MINI)
    with pytest.raises(InputError, match="part of the package.*not copied"):
        hub.pull(hub.R1_MINI, name="another")
    with pytest.raises(InputError, match="model of the package.*--name"):
        hub.pull(str(tiny_folder), name=hub.R1_MINI)


def test_a_store_entry_of_its_name_counts_as_absent(store: Path, tiny_folder: Path) -> None:
    """An entry that an earlier version may have made is neither listed nor used."""
    hub.pull(str(tiny_folder), name="other")
    (store / "models" / "other").rename(store / "models" / hub.R1_MINI)
    (model,) = hub.list_models()
    assert model.source == "package" and hub.resolve(hub.R1_MINI) == packaged.folder_of(hub.R1_MINI)


@pytest.mark.parametrize("name", ["porcelet-r1-mimi", "nothing-like-it", hub.DEFAULT_MODEL])
def test_who_misses_a_model_hears_of_it(name: str) -> None:
    """What cannot be found, the default model on a new machine too, leads to the model that needs no download."""
    with pytest.raises(ModelError, match=f"{hub.R1_MINI} needs no download"):
        hub.resolve(name)
    with pytest.raises(ModelError, match=f"did you mean {hub.R1_MINI}"):
        hub.pull("porcelet-r1-mimi")


def test_a_damaged_installation_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that was changed or has gone is named with the way to get it back."""
    copy = tmp_path / hub.R1_MINI
    shutil.copytree(packaged.folder_of(hub.R1_MINI), copy)
    monkeypatch.setattr(packaged, "folder_of", lambda name: copy)
    weights = copy / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"?")
    with pytest.raises(ModelError, match="model.safetensors has SHA-256.*pip install --force-reinstall"):
        hub.verify(hub.R1_MINI)
    weights.unlink()
    assert hub.list_models() == []
    with pytest.raises(ModelError, match="gone or cut.*pip install --force-reinstall"):
        hub.resolve(hub.R1_MINI)


# ---- its card -------------------------------------------------------------------------------------------------------


def card() -> str:
    return (packaged.folder_of(hub.R1_MINI) / packaged.CARD).read_text(encoding="utf-8")


def test_card_says_what_to_ask_and_how_it_was_made() -> None:
    """Licence, examples, the command that makes it, its recipe, and pass@1 with an interval stand in the card."""
    assert card().startswith("---\nlicense: mit\n")
    examples = hub.examples_of(hub.resolve(hub.R1_MINI))
    assert len(examples) >= 3 and all(re.fullmatch(r"\d+( \d+)+ = \d+", example) for example in examples)
    recipe = re.search(r"^porcelet train (recipes/\S+\.toml)$", card(), re.MULTILINE)
    assert recipe and (ROOT / recipe[1]).is_file()
    assert re.search(r"this model \| pass@1 \d+\.\d % \(\d+\.\d % to \d+\.\d %\)", card())


def test_only_the_packages_own_cards_are_asked(tiny_folder: Path) -> None:
    """A model that anybody gave says nothing to the chat page, whatever its card holds."""
    assert hub.examples_of(tiny_folder) == ()


# ---- making it ------------------------------------------------------------------------------------------------------


@pytest.fixture
def run(tmp_path: Path, tiny_folder: Path) -> Path:
    """The output folder of a training run, as far as it matters here."""
    shutil.copytree(tiny_folder, tmp_path / "run")
    (tmp_path / "run" / "metrics.jsonl").write_text("{}\n")
    text = tmp_path / "run" / "tokenizer_config.json"
    text.write_text(json.dumps(json.loads(text.read_text()) | {"chat_template": R1_TEMPLATE}))
    return tmp_path / "run"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model's folder before it is made: its card alone, and what an earlier model left."""
    made = tmp_path / "packaged"
    made.mkdir()
    (made / "README.md").write_text("---\nlicense: mit\n---\n# A card\n")
    (made / "old.safetensors").write_bytes(b"old")
    return made


def test_a_run_becomes_a_model(run: Path, folder: Path) -> None:
    """Weights are the run's in float16, the card stays, nothing else is kept; made again, all bytes are the same."""
    pack(run, folder)
    names = ["README.md", "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]
    assert sorted(path.name for path in folder.iterdir()) == sorted([*names, "manifest.json"])
    assert "# A card" in (folder / "README.md").read_text()
    trained, stored = load_file(run / "model.safetensors"), load_file(folder / "model.safetensors")
    assert trained.keys() == stored.keys()
    for name, tensor in trained.items():
        assert stored[name].dtype == np.float16 and (stored[name] == tensor.astype(np.float16)).all()
    configs = [json.loads((path / "config.json").read_text()) for path in (run, folder)]
    assert configs[0] | {"torch_dtype": "float16"} == configs[1]
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["source"] == "package" and sorted(manifest["files"]) == names
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    pack(run, folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_what_is_no_finished_run_is_refused(run: Path, folder: Path) -> None:
    """A missing file, a strange chat template and a value that float16 cannot hold are named."""
    weights = load_file(run / "model.safetensors")
    save_file(weights | {"model.norm.weight": np.full(16, 1e6, np.float32)}, run / "model.safetensors")
    with pytest.raises(ModelError, match="model.norm.weight has values beyond float16"):
        pack(run, folder)
    (run / "tokenizer_config.json").write_text("{}")
    with pytest.raises(ModelError, match="chat_template has no 'for message"):
        pack(run, folder)
    (run / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="has no model.safetensors"):
        pack(run, folder)
