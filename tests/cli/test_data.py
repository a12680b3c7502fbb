"""`porcelet data` as a person meets it."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from porcelet import hub
from porcelet.cli import app, main
from porcelet.config import TrainConfig
from porcelet.train.corpus.store import open_store
from porcelet.train.recipe import read_recipe

TEXTS = [
    "A sentence about porcelain, and another one about small pigs, to be read twice at the most." + end
    for end in (" One.", " Two, which ends quite differently from all others here, by far.", " One.")
]


def data(*arguments: object) -> Result:
    result = CliRunner().invoke(app, ["data", *map(str, arguments)], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS), encoding="utf-8")
    return path


def test_from_texts_to_a_store(tmp_path: Path, source: Path) -> None:
    """A tokenizer is learnt, the texts are tokenized with it, and the store is verified."""
    said = data("tokenizer", source, "-o", tmp_path / "tokenizer", "--vocab", 300, "--digits", 1).stdout
    assert "300 tokens" in said and "bytes a token" in said
    made = data("tokenize", source, "-o", tmp_path / "store", "--tokenizer", tmp_path / "tokenizer", "--fim-rate", 0.5)
    header = open_store(tmp_path / "store").header
    assert f"{header.num_documents} documents, {header.num_tokens:,} tokens" in made.stdout
    assert (header.sources, header.fim_rate) == ((str(source),), 0.5)
    assert "intact" in data("verify", tmp_path / "store").stdout


def test_a_limit_counts_bytes(tmp_path: Path) -> None:
    """Learning ends with the document that reaches the limit; a Chinese letter is three bytes."""
    for name, text in (("a.txt", "你" * 400), ("b.txt", "zyzyzyzy" * 50)):
        (tmp_path / name).write_text(text, encoding="utf-8")
    data("tokenizer", tmp_path, "-o", tmp_path / "tokenizer", "--vocab", 300, "--max-megabytes", 0.001)
    assert '"zy' not in (tmp_path / "tokenizer" / "tokenizer.json").read_text(encoding="utf-8")


def test_cleaning_says_what_it_dropped(tmp_path: Path, source: Path) -> None:
    """Repeated, nearly repeated and leaked documents, counted and, where leaked, named; the rest stays in order."""
    said = data("clean", source, "-o", tmp_path / "clean.jsonl", "--similarity", 0.9).stdout
    assert "2 of 3 documents; dropped 1 repeated, 0 nearly repeated, 0 leaked" in said
    (tmp_path / "question.txt").write_text(TEXTS[1].split(" Two, ")[1], encoding="utf-8")
    leaked = data(
        "clean",
        source,
        "-o",
        tmp_path / "b.jsonl",
        "--against",
        tmp_path / "question.txt",
        "--ngram",
        5,
        "--similarity",
        0,
    )
    assert "1 of 3 documents" in leaked.stdout and "1 leaked" in leaked.stdout
    assert f"{source}:2: " in leaked.stderr
    rows = [json.loads(line) for line in (tmp_path / "b.jsonl").read_text(encoding="utf-8").splitlines()]
    assert rows == [{"id": f"{source}:1", "text": TEXTS[0]}]


def test_bits_are_measured_by_a_models_name(source: Path) -> None:
    """A name is as good as a folder; the texts are few enough to be counted whole."""
    said = data("bits", hub.R1_MINI, source).stdout
    num_bytes = sum(len(text.encode()) for text in TEXTS)
    assert f"bits a byte on {num_bytes} bytes" in said and "of 3 documents" in said


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["tokenizer", "SOURCE", "-o", "OUT", "--vocab", "100"], 2, "the vocabulary size is 100"),
        (["tokenizer", "EMPTY", "-o", "OUT"], 2, "no text to learn"),
        (["tokenizer", "SOURCE", "-o", "OUT", "--max-megabytes", "-1"], 2, "max_megabytes is -1"),
        (["tokenizer", "SOURCE", "-o", "OUT", "--max-megabytes", "nan"], 2, "max_megabytes is nan"),
        *(([command, "SOURCE", "-o", "SOURCE"], 2, "exists") for command in ("tokenizer", "clean")),
        *(([command, "SOURCE", "-o", "SOURCE/x"], 2, "cannot be written") for command in ("tokenizer", "clean")),
        *(([command, "SOURCE", "-o", "/proc/x"], 2, "cannot be written") for command in ("tokenizer", "clean")),
        (["tokenize", "SOURCE", "-o", "/proc/x", "--tokenizer", "."], 2, "cannot be written"),
        (["clean", "HALF", "-o", "OUT"], 2, "half.jsonl:1: 'text' is not Unicode"),
        (["tokenize", "SOURCE", "-o", "OUT", "--tokenizer", "nowhere"], 3, "does not exist"),
        (["tokenize", "nothing.jsonl", "-o", "OUT", "--tokenizer", "nowhere"], 3, "does not exist"),
        (["verify", "nowhere"], 3, "is not a token store"),
        (["build", "debian-docs", "-o", "OUT", "--packages", "perl"], 2, "did you mean|known: linux-doc"),
        (["bits", "nowhere", "SOURCE", "SOURCE"], 2, "one source"),
    ],
)
def test_mistakes_are_one_line(
    tmp_path: Path,
    source: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    code: int,
    said: str,
) -> None:
    """Each names the value and ends with the exit code of its kind."""
    import re

    (tmp_path / "half.jsonl").write_text('{"text": "a\\ud800"}', encoding="utf-8")
    (tmp_path / "empty.txt").touch()
    words = {
        "SOURCE": source,
        "OUT": tmp_path / "out",
        "HALF": tmp_path / "half.jsonl",
        "EMPTY": tmp_path / "empty.txt",
    }
    for word, path in words.items():
        arguments = [argument.replace(word, str(path)) for argument in arguments]
    monkeypatch.setattr(sys, "argv", ["porcelet", "data", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == code
    message = capsys.readouterr().err
    assert re.search(said, message) and message.count("\n") == 1


def test_a_recipe_names_stores_and_weights(tmp_path: Path) -> None:
    """As lists in the file or, on the command line, parted by commas; a weight must be a number, one for each store."""
    recipe = tmp_path / "recipe.toml"
    recipe.write_text('[data]\ncorpus = ["a", "b"]\nweights = [1, 2.5]\ncontext = 128\n', encoding="utf-8")
    config: TrainConfig = read_recipe(recipe)[0]
    assert (config.data.corpus, config.data.weights, config.data.context) == (("a", "b"), (1.0, 2.5), 128)
    config = read_recipe(recipe, ["data.corpus=c,d", "data.weights=3,4"])[0]
    assert (config.data.corpus, config.data.weights) == (("c", "d"), (3.0, 4.0))
    with pytest.raises(Exception, match="1 weights for 2"):
        read_recipe(recipe, ["data.weights=3"])
    with pytest.raises(Exception, match="weights is 'x'"):
        read_recipe(recipe, ["data.weights=x,y"])
