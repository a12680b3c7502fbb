"""Multi-token prediction: how many guesses the model itself would have made, and what learning to guess costs it.

Published (DeepSeek-V3 report, arXiv 2412.19437): 85 to 90 % of second tokens are accepted (section 5.4.3), and the
main model predicts as well with MTP as without (table 4: Pile 0.729 bits a byte both). Acceptance depends on what is
written: here of text, drawn and greedy, and of worked sums, whose next tokens mostly follow from those before.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from benchmarks.shapes.text import Corpus, make_corpus, prompts, read_held_out
from benchmarks.shapes.trials import Claim, Setting, Shape, paired, run, take_turns
from porcelet import Engine, SamplingParams
from porcelet.config import EngineConfig
from porcelet.train.rendering import Renderer
from porcelet.train.tasks import load_task

TEXT_STEPS, SUMS_STEPS = 130, 250
NUM_PROMPTS, PROMPT_TOKENS, ANSWER_TOKENS = 64, 32, 64
AT_ONCE = 16  # answers a step: so few that each may have its guess
EQUAL = 0.01  # of the loss
PUBLISHED = 0.85


def measure(setting: Setting) -> Shape:
    corpus = make_corpus(setting.folder)
    text, sums = setting.steps(TEXT_STEPS), setting.steps(SUMS_STEPS)
    found = take_turns(
        setting,
        {
            "text": partial(on_text, corpus, text, 1),
            "text_without": partial(on_text, corpus, text, 0),
            "worked_sums": partial(on_sums, sums),
        },
    )
    plain = statistics.fmean(found["text_without"]["loss"])
    return Shape(
        found,
        [
            _accepted("text_drawn", "text, drawn at temperature 1", found["text"]["accepted_drawn"]),
            _accepted("text_greedy", "text, greedy", found["text"]["accepted_greedy"]),
            _accepted("worked_sums", "worked sums, greedy", found["worked_sums"]["accepted_greedy"]),
            Claim(
                "loss",
                f"held-out loss with MTP less that without: at most {EQUAL:.0%} more",
                "0.000 bits a byte",
                paired(found["text"]["loss"], found["text_without"]["loss"], lambda a, b: a - b),
                lambda difference: difference <= EQUAL * plain,
            ),
        ],
        corpus.facts,
    )


def _accepted(name: str, what: str, values: Sequence[float]) -> Claim:
    return Claim(name, f"guesses accepted: {what}", "0.85 to 0.90", values, lambda share: share >= PUBLISHED)


def on_text(corpus: Corpus, steps: int, num_layers: int, seed: int, folder: Path) -> dict[str, float]:
    """Train on text with or without the MTP layer; held-out loss and acceptance."""
    words = [f"model.num_nextn_predict_layers={num_layers}", *corpus.settings, f"steps={steps}", f"seed={seed}"]
    output, _ = run("text.toml", words, folder / "run")
    found = {"loss": read_held_out(output, corpus)["loss"]}
    if num_layers:
        asked = list(prompts(corpus.held_out, PROMPT_TOKENS, NUM_PROMPTS))
        found["accepted_drawn"] = acceptance(output, asked, temperature=1.0)
        found["accepted_greedy"] = acceptance(output, asked, temperature=0.0)
    return found


def on_sums(steps: int, seed: int, folder: Path) -> dict[str, float]:
    """Train on worked sums; acceptance on held-out ones."""
    output, config = run("worked_sums.toml", [f"steps={steps}", f"seed={seed}"], folder / "run")
    renderer, problems = Renderer(output), load_task(config.task.name, config.task.options).held_out[:NUM_PROMPTS]
    return {"accepted_greedy": acceptance(output, [renderer.prompt(one.question) for one in problems], temperature=0.0)}


def acceptance(folder: Path, asked: Sequence[tuple[int, ...]], *, temperature: float) -> float:
    """The share of the MTP layer's guesses that the model accepts while it writes."""
    engine = Engine.load(folder, EngineConfig(speculation="mtp", weights="float32", threads=1, max_sequences=AT_ONCE))
    outputs = engine.generate(
        asked,
        [SamplingParams(max_tokens=ANSWER_TOKENS, temperature=temperature, seed=i) for i in range(len(asked))],
    )
    stats, num_tokens = engine.stats(), sum(len(output.tokens) for output in outputs)
    # A step gives two tokens behind a right guess, else one; the first token of an answer and its last may go without.
    assert stats["num_drafted"] + stats["num_accepted"] > 0.9 * num_tokens, (stats["num_drafted"], num_tokens)
    return float(stats["num_accepted"] / stats["num_drafted"])
