"""Text that every machine has: the standard library's top folder, in tokens, and how well a model predicts what was
held out."""

from __future__ import annotations

import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from porcelet.models.attention import PackedView
from porcelet.train.balance import balance_metrics, expert_loads
from porcelet.train.corpus.packing import Pretraining
from porcelet.train.corpus.readers import Document
from porcelet.train.corpus.store import Store, write_store
from porcelet.train.corpus.tokenizer import train_tokenizer
from porcelet.train.hashing import hashed
from porcelet.train.loss import cross_entropy
from porcelet.train.packing import pack
from porcelet.weights.load import load

VOCABULARY = 512
HELD_OUT_SHARE = 12  # one file of so many, by the hash of its name
CONTEXT = 256
TOKENS_PER_STEP = 4096
HELD_OUT_STEPS = 16  # 65,536 predictions


@dataclass(frozen=True)
class Corpus:
    """Two token stores of one tokenizer."""

    training: Store
    held_out: Store

    @property
    def settings(self) -> list[str]:
        """What a recipe has to be told."""
        return [f"data.corpus={self.training.path}", f"data.context={CONTEXT}"]

    @property
    def facts(self) -> dict[str, str]:
        """Hashes of the tokens: another version of Python has other texts."""
        return {
            "training_sha256": self.training.header.content_sha256,
            "held_out_sha256": self.held_out.header.content_sha256,
        }


def make_corpus(folder: Path) -> Corpus:
    """The library as two stores in `folder`."""
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    parts: tuple[list[Document], list[Document]] = ([], [])
    for file in files:
        document = Document(file.read_text(encoding="utf-8", errors="replace"), file.name)
        parts[hashed(file.name) % HELD_OUT_SHARE == 0].append(document)
    train_tokenizer((document.text for document in parts[0]), VOCABULARY, folder / "tokenizer")
    stores = [
        write_store(folder / name, documents, folder / "tokenizer")
        for name, documents in zip(("training", "held-out"), parts, strict=True)
    ]
    return Corpus(*stores)


def read_held_out(folder: Path, corpus: Corpus) -> dict[str, float]:
    """Nats a token of held-out text, and MaxVio over all of it, the mean over layers (arXiv 2408.15664, eq. 4)."""
    return measure(folder, corpus.held_out, HELD_OUT_STEPS)


@torch.inference_mode()
def measure(folder: Path, store: Store, num_steps: int) -> dict[str, float]:
    """The same over the first `num_steps` batches of a store, in an order by hash."""
    model = load(folder)
    source = Pretraining([store], tokens_per_step=TOKENS_PER_STEP, context=CONTEXT, seed=0)
    num_experts = model.config.n_routed_experts
    losses, loads = [], [torch.zeros(num_experts) for _ in range(model.config.num_hidden_layers)]
    for step in range(num_steps):
        batch = pack(source(step)[0])
        view = PackedView(batch.segments)
        hidden = model(batch.tokens, batch.positions, view)
        losses.append(float(cross_entropy(model, hidden, batch, float(batch.weights.sum()))))
        loads = [sum_ + new for sum_, new in zip(loads, expert_loads(view.routing, num_experts), strict=False)]
    found = {"loss": sum(losses) / num_steps}
    return found | ({"max_violation": balance_metrics(loads)["mean_violation"]} if num_experts else {})


def prompts(store: Store, length: int, count: int) -> Iterator[tuple[int, ...]]:
    """Pieces of `length` tokens from anywhere in the text, by hash."""
    for i in range(count):
        start = hashed("prompt", i) % (len(store.tokens) - length)
        yield tuple(int(token) for token in store.tokens[start : start + length])
