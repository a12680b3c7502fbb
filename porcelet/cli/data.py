"""`porcelet data ...`: tokenizers, token stores and corpora, made from files on this machine."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from porcelet.train.corpus.readers import Document

Sources = Annotated[
    list[str], typer.Argument(help="Files, folders or patterns: .txt, .md, .rst, .jsonl, .parquet, datasets' folders.")
]
Key = Annotated[str, typer.Option(help="Where a row of JSONL, Parquet or a dataset has its text.")]
Output = Annotated[Path, typer.Option("--output", "-o", help="Where the result goes.")]

app = typer.Typer(no_args_is_help=True, help="Make what a model learns from.", rich_markup_mode=None)
build = typer.Typer(no_args_is_help=True, help="Build a corpus.", rich_markup_mode=None)
app.add_typer(build, name="build")


@app.command("tokenizer")
def tokenizer_(
    sources: Sources,
    output: Output,
    vocab: Annotated[int, typer.Option(help="Tokens in all, special ones included.")] = 4096,
    digits: Annotated[int, typer.Option(min=1, max=3, help="Digits that a token may join; 1 suits arithmetic.")] = 3,
    max_megabytes: Annotated[float, typer.Option(help="Learn from so much text at most; 0 is all.")] = 100,
    key: Key = "text",
) -> None:
    """Learn a byte-level BPE vocabulary with DeepSeek-V3's pattern and special tokens."""
    from porcelet.train.corpus.tokenizer import bytes_per_token, train_tokenizer

    made = train_tokenizer(_limited(sources, key, max_megabytes), vocab, output, digits=digits)
    ratio = bytes_per_token(made, _limited(sources, key, 1.0))
    print(f"tokenizer: {output}   {made.vocab_size} tokens, {ratio:.3f} bytes a token on the first megabyte")


@app.command()
def tokenize(
    sources: Sources,
    output: Output,
    tokenizer: Annotated[Path, typer.Option(help="A folder with tokenizer.json and tokenizer_config.json.")],
    key: Key = "text",
    fim_rate: Annotated[float, typer.Option(help="Share of documents made fill-in-the-middle; V3: 0.1.")] = 0.0,
    seed: Annotated[int, typer.Option(min=0, help="Decides which documents those are.")] = 0,
) -> None:
    """Turn documents into token ids that training reads in place."""
    from porcelet.train.corpus.store import write_store

    with _counter() as report:
        store = write_store(
            output, _documents(sources, key), tokenizer, sources=sources, fim_rate=fim_rate, seed=seed, report=report
        )
    header = store.header
    print(
        f"store: {output}   {header.num_documents:,} documents, {header.num_tokens:,} tokens, "
        f"{header.num_bytes:,} bytes ({header.num_bytes / max(1, header.num_tokens):.3f} a token)   "
        f"sha256 {header.content_sha256}"
    )


@app.command()
def verify(store: Annotated[Path, typer.Argument(help="A token store.")]) -> None:
    """Compare every byte of a token store with its hash."""
    from porcelet.train.corpus import store as stores

    opened = stores.open_store(store)
    stores.verify(opened)
    print(f"{store}: intact, {opened.header.num_tokens:,} tokens, sha256 {opened.header.content_sha256}")


@app.command()
def clean(
    sources: Sources,
    output: Output,
    against: Annotated[
        list[str] | None, typer.Option(help="Evaluation texts; documents sharing an n-gram with them go.")
    ] = None,
    ngram: Annotated[int, typer.Option(min=1, help="Words in a row that count as shared.")] = 13,
    similarity: Annotated[float, typer.Option(help="Drop near-duplicates from this similarity on; 0 is off.")] = 0.8,
    key: Key = "text",
) -> None:
    """Drop repeated, nearly repeated and leaked documents; what stays becomes one JSONL file."""
    from porcelet.train.corpus.decontaminate import Evaluation, Report, decontaminate
    from porcelet.train.corpus.dedup import drop_repeats
    from porcelet.train.corpus.minhash import drop_near_duplicates

    read, unique, distinct = _Count(), _Count(), _Count()
    kept = unique(drop_repeats(read(_documents(sources, key))))
    kept = distinct(drop_near_duplicates(kept, similarity) if similarity else kept)
    report = Report()
    if against:
        evaluation = Evaluation.of((document.text for document in _documents(against, key)), ngram)
        kept = decontaminate(kept, evaluation, report)
    num_written = _write_jsonl(output, kept)
    for place, overlap in report.dropped:
        print(f"{place}: {overlap:.1%} of its {ngram}-grams are in the evaluation texts", file=sys.stderr)
    if against and evaluation.num_unchecked:
        print(f"{evaluation.num_unchecked} evaluation texts are shorter than {ngram} words", file=sys.stderr)
    print(
        f"{output}: {num_written:,} of {read.number:,} documents; dropped {read.number - unique.number:,} repeated, "
        f"{unique.number - distinct.number:,} nearly repeated, {len(report.dropped):,} leaked"
    )


@app.command()
def bits(
    model: Annotated[str, typer.Argument(help="A name in the store, a GGUF file or a model folder.")],
    sources: Sources,
    max_bytes: Annotated[int, typer.Option(min=1, help="Bytes to measure with, of documents by hash.")] = 1 << 20,
    context: Annotated[int, typer.Option(min=0, help="Tokens a document is cut at; 0: what the model reads.")] = 0,
    key: Key = "text",
) -> None:
    """Measure a model in bits a byte, on the held-out part of a corpus."""
    from porcelet import hub
    from porcelet.errors import InputError
    from porcelet.train.corpus.bits import held_out_bits

    if len(sources) != 1:
        raise InputError(f"bits are measured on one source; {len(sources)} were given")
    found = held_out_bits(hub.resolve(model), sources[0], max_bytes, context=context, key=key)
    print(
        f"{found.bits_per_byte:.4f} bits a byte on {found.num_bytes:,} bytes "
        f"({found.num_tokens:,} tokens of {found.num_documents:,} documents)"
    )


@build.command("debian-docs")
def debian_docs(
    output: Output,
    packages: Annotated[str, typer.Option(help="Names parted by commas; else all but those on request.")] = "",
    max_megabytes: Annotated[float, typer.Option(min=0, help="Keep a sample of about this size; 0 is all.")] = 0,
) -> None:
    """The reference corpus: Debian's documentation as text, with licences, hashes and a held-out part."""
    from porcelet.train.corpus.debian import build_corpus

    names = [name.strip() for name in packages.split(",") if name.strip()]
    with _steps() as report:
        manifest = build_corpus(output, names, max_megabytes=max_megabytes, report=report)
    for entry in manifest["packages"]:
        size = entry["train"]["bytes"] + entry["held-out"]["bytes"]
        print(f"{entry['name']:16} {entry['version']:24} {size / 1e6:7.2f} MB   {', '.join(entry['licences'])[:60]}")
    train, held_out = manifest["train"], manifest["held-out"]
    print(
        f"corpus: {output}   train {train['documents']:,} documents, {train['bytes'] / 1e6:.1f} MB; "
        f"held-out {held_out['documents']:,} documents, {held_out['bytes'] / 1e6:.2f} MB   sha256 {manifest['sha256']}"
    )


# ---- documents in and out -------------------------------------------------------------------------------------------


def _documents(sources: Iterable[str], key: str) -> Iterator[Document]:
    from porcelet.train.corpus.readers import documents

    for source in sources:
        yield from documents(source, key)


def _limited(sources: Iterable[str], key: str, max_megabytes: float) -> Iterator[str]:
    """Texts until they are so many megabytes in UTF-8; 0 is all."""
    from porcelet.errors import InputError

    if not 0 <= max_megabytes < math.inf:
        raise InputError(f"max_megabytes is {max_megabytes}; a number of megabytes, or 0 for all")
    size = 0
    for document in _documents(sources, key):
        if max_megabytes and size >= max_megabytes * 1e6:
            return
        size += len(document.text.encode())
        yield document.text


class _Count:
    """Counts the documents that pass by."""

    def __init__(self) -> None:
        self.number = 0

    def __call__(self, documents: Iterable[Document]) -> Iterator[Document]:
        for document in documents:
            self.number += 1
            yield document


def _write_jsonl(output: Path, documents: Iterable[Document]) -> int:
    """Write documents to a file that appears when it is complete; how many there were."""
    from porcelet.train.corpus.outputs import appearing
    from porcelet.train.corpus.readers import as_line

    number = 0
    with appearing(output) as unfinished, unfinished.open("w", encoding="utf-8") as file:
        for document in documents:
            file.write(as_line(document))
            number += 1
    return number


# ---- progress -------------------------------------------------------------------------------------------------------


@contextmanager
def _counter() -> Iterator[Callable[[int, int], None]]:
    """A live line for work whose end is not known: documents and megabytes so far, and the speed."""
    from rich.console import Console
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    start = time.perf_counter()
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("", total=None)

        def report(num_documents: int, num_bytes: int) -> None:
            rate = num_bytes / 1e6 / (time.perf_counter() - start)
            line = f"{num_documents:,} documents  {num_bytes / 1e6:.1f} MB  {rate:.2f} MB/s"
            progress.update(task, description=line)

        yield report


@contextmanager
def _steps() -> Iterator[Callable[[str, int, int], None]]:
    """A bar of named steps."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    columns = (TextColumn("{task.description:14}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("", total=None)

        def report(what: str, done: int, total: int) -> None:
            progress.update(task, description=what, completed=done, total=total)

        yield report
