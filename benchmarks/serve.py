"""porcelet beside other engines under load: throughput, waiting times, memory; what prefix cache and speculation give.

    python -m benchmarks.rivals.environments            once: the rivals' environments
    python -m benchmarks.serve [--quick] [--engines porcelet_int8 vllm_float32 ...] [--rounds 3] [--append]

Every engine runs the same seeded requests (workload.py) in a process of its own (rivals/), decoding greedily to a given
number of tokens; engines take turns, and a round disturbed by other machines is repeated (harness.py). Results by
configuration:

    once_N       at most N requests in flight, the next one asked when one ends; N requests, at least 4
    poisson_N    N requests that arrive at random within about 30 s
    prefix       a 2,000-token prefix asked twice, with different ends
    lookup_N     prompts that repeat themselves, without and with drafts looked up in the prompt

and within by engine: `output` and `total` tokens a second (answers; prompts as well), `ttft_ms` from arrival to the
first token, `gap_ms` between the pieces of an answer, `per_token_ms` a request's mean from first to last token, each a
median over requests or pieces and where it says p99 the 99th percentile; `finished`, the share of requests that
ended within the limit (an unfinished one counts with what came; without any token, with the time it waited);
`agreement`, the share of leading tokens equal to those of porcelet_float32; `peak_megabytes` of the whole process.
An engine that is not there, or fails, is named under `missing` with the reason. Ours are named by the weights they
compute with; porcelet_stored is the setting that users have unless they choose, `weights=auto`.

What the server costs, at 16 streams: porcelet_int8_http beside porcelet_int8_client, the same engine process without it
(its tokens are counted, not shown, so its agreement says nothing):

    python -m benchmarks.serve --engines porcelet_int8_client porcelet_int8_http --arrivals once --concurrency 16 \\
        --effects
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from statistics import fmean, median
from typing import Any

from benchmarks import workload
from benchmarks.harness import RESULTS, Run, interleave, report
from benchmarks.rivals import environments
from benchmarks.rivals.protocol import Asked
from porcelet import hub
from porcelet.engine.codec import open_tokenizer
from porcelet.weights.files import open_checkpoint
from porcelet.weights.load import chosen_format

ROOT = RESULTS.parent.parent
REFERENCE = "porcelet_float32"
# What ours are called by → the engine's setting `weights`, for the default model's GGUF file.
OUR_WEIGHTS = {"float32": "float32", "int8": "int8", "int4": "int4", "stored": "auto"}
WARM_UP = [Asked(str(i), range(100 + i, 150 + i), 8, 0.0) for i in range(4)]
START_LIMIT = 600.0
NOTHING: Mapping[str, Any] = {}  # more than an engine's own options
LOOKUP = {"speculation": "lookup"}
Answers = Mapping[str, Mapping[str, Any]]


class Failed(Exception):
    """An engine that cannot be started or has died; one line that says why."""


@dataclass(frozen=True)
class Engine:
    """How an engine's driver is started. `needs` must exist; `maker` of environments.py makes them."""

    module: str
    options: Mapping[str, Any]
    python: Path = Path(sys.executable)
    needs: tuple[Path, ...] = ()
    maker: str = ""
    looks_up: bool = True  # it can draft from the prompt
    keeps_prefixes: bool = True
    starts_slowly: bool = False  # in minutes, so --quick starts it once

    @property
    def missing(self) -> str | None:
        absent = [path for path in (self.python, *self.needs) if not path.exists()]
        return f"not installed: python -m benchmarks.rivals.environments {self.maker}" if absent else None


def engines(threads: int) -> dict[str, Engine]:
    """All that is known, the ones compared unless named first."""
    folder, gguf = environments.float32_folder(), hub.resolve(hub.DEFAULT_MODEL)
    options = {
        "threads": threads,
        "model": str(gguf),
        "folder": str(folder),
        "cache": str(environments.home() / "cache"),
    }
    known = {}
    for weights, setting in OUR_WEIGHTS.items():
        own = options | {"format": setting, "speculation": "off"}
        known[f"porcelet_{weights}"] = Engine("porcelet", own)
        for way in ("client", "http"):  # the engine's process alone, and behind the server
            known[f"porcelet_{weights}_{way}"] = Engine("porcelet_http", own | {"way": way})
    exact = options | {"format": "float32"}
    known["transformers_generate"] = Engine(
        "transformers_generate", exact, needs=(folder,), maker="transformers", keeps_prefixes=False
    )
    known["transformers_continuous"] = Engine(
        "transformers_continuous", exact, needs=(folder,), maker="transformers", looks_up=False
    )
    for weights in ("float32", "bfloat16"):
        known[f"vllm_{weights}"] = Engine(
            "vllm_cpu",
            options | {"format": weights},
            environments.python_of("vllm"),
            (folder,),
            "vllm",
            starts_slowly=True,
        )
    for weights in ("int8", "int4"):
        exported = environments.openvino_folder(weights)
        known[f"openvino_{weights}"] = Engine(
            "openvino_genai",
            options | {"format": weights, "folder": str(exported)},
            environments.python_of("openvino"),
            (exported,),
            "openvino",
        )
    for weights in ("q4_0", "q8_0", "f16", "q4_1"):
        file, program = environments.llama_model(weights), environments.llama_program()
        own = {"format": weights, "model": str(file), "program": str(program), "version": environments.LLAMA_VERSION}
        known[f"llama_{weights}"] = Engine("llama_server", options | own, needs=(file, program), maker="llama")
    return known


DEFAULT = [
    "porcelet_float32",
    "porcelet_int8",
    "porcelet_stored",
    "transformers_generate",
    "transformers_continuous",
    "vllm_float32",
    "openvino_int8",
    "llama_q4_0",
]


class Process:
    """An engine's process, started and warmed up."""

    def __init__(self, engine: Engine, more: Mapping[str, Any]) -> None:
        self.log = tempfile.TemporaryFile("w+")  # noqa: SIM115  close() closes it
        command = [
            str(engine.python),
            "-m",
            f"benchmarks.rivals.{engine.module}",
            json.dumps({**engine.options, **more}),
        ]
        self.child = subprocess.Popen(
            command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log, text=True
        )
        self.versions: dict[str, str] = self._hear()["versions"]
        self.run(WARM_UP, limit=START_LIMIT)

    def run(self, requests: Sequence[Asked], limit: float, at_most: int | None = None) -> dict[str, Any]:
        command = {"requests": [asdict(r) | {"prompt": list(r.prompt)} for r in requests]}
        assert self.child.stdin
        try:
            self.child.stdin.write(json.dumps(command | {"limit": limit, "at_most": at_most}) + "\n")
            self.child.stdin.flush()
        except BrokenPipeError as problem:
            raise self._failure() from problem
        return self._hear()

    def close(self) -> None:
        self.child.communicate()
        self.log.close()

    def _hear(self) -> dict[str, Any]:
        assert self.child.stdout
        line = self.child.stdout.readline()
        if not line:
            raise self._failure()
        message: dict[str, Any] = json.loads(line)
        return message

    def _failure(self) -> Failed:
        code = self.child.wait()
        self.log.seek(0)
        words = [line.strip() for line in self.log if line.strip()]
        return Failed(f"failed with exit code {code}: {words[-1][:300] if words else 'no word'}")


@dataclass
class Bench:
    """The settings of one program run, the processes that are up, and what could not be had."""

    options: argparse.Namespace
    known: Mapping[str, Engine]
    encode: workload.Encode
    processes: dict[str, Process] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)
    results: dict[str, Any] = field(default_factory=dict)
    notes: dict[str, Any] = field(default_factory=dict)

    @property
    def lengths(self) -> workload.Lengths:
        return workload.Lengths(tuple(self.options.prompt), tuple(self.options.answer))

    def start(self, name: str, more: Mapping[str, Any]) -> Process | None:
        """The process of engine `name` with `more` options; None, and noted, if it cannot be had."""
        key = " ".join([name, *(f"{option}={value}" for option, value in more.items())])
        if key not in self.processes and key not in self.missing:
            print(f"starting {key}", file=sys.stderr)
            reason = self.known[name].missing
            try:
                if reason:
                    raise Failed(reason)
                self.processes[key] = Process(self.known[name], more)
                self.versions |= self.processes[key].versions
            except Failed as problem:
                self.note_missing(key, problem)
        return self.processes.get(key)

    def note_missing(self, label: str, problem: Failed) -> None:
        print(f"{label}: {problem}", file=sys.stderr)
        self.missing[label] = str(problem)

    def measure(self, configuration: str, variants: Mapping[str, Run]) -> dict[str, dict[str, float]]:
        """Interleaved medians by variant. One that dies is noted, and the configuration measured without it."""
        left = dict(variants)
        while left:
            try:
                medians, note = interleave(
                    {name: _named(name, run) for name, run in left.items()},
                    self.options.rounds,
                    max_stolen=self.options.max_stolen,
                    warm_up=False,
                )
                self.notes[configuration] = note
                self.results[configuration] = medians
                return medians
            except NamedFailure as failure:
                self.note_missing(f"{failure.name} in {configuration}", failure.problem)
                del left[failure.name]
        return {}

    def tell(self, configuration: str) -> None:
        for name, metrics in self.results.get(configuration, {}).items():
            print(f"{configuration} {name}: {json.dumps(metrics)}", file=sys.stderr)

    def stop(self) -> None:
        for process in self.processes.values():
            process.close()


class NamedFailure(Exception):
    """Which variant failed, and how."""

    def __init__(self, name: str, problem: Failed) -> None:
        super().__init__(name)
        self.name, self.problem = name, problem


def main() -> None:
    options = parse()
    path = hub.resolve(hub.DEFAULT_MODEL)
    bench = Bench(options, engines(options.threads), open_tokenizer(path).encode)
    try:
        for arrivals in options.arrivals:
            for count in options.concurrency:
                if not (arrivals == "poisson" and count == 1):
                    load(bench, arrivals, count)
        if "prefix" in options.effects:
            prefix(bench)
        if "lookup" in options.effects:
            for count in options.lookup:
                lookup(bench, count)
    finally:
        bench.stop()
        config = {"model": hub.DEFAULT_MODEL, "engine_versions": bench.versions, **vars(options)}
        # What the server costs is a benchmark of its own: its line does not stand for the comparison with rivals.
        alone = all(engine.endswith(("_client", "_http")) for engine in options.engines)
        report(
            "server" if alone else "serve",
            config,
            bench.results,
            {"missing": bench.missing, "notes": bench.notes},
            append=options.append,
        )


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few, short requests; one round")
    quick = parser.parse_known_args()[0].quick
    parser.add_argument("--engines", nargs="+", default=DEFAULT)
    parser.add_argument("--arrivals", nargs="*", choices=["once", "poisson"], default=["once", "poisson"])
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 16] if quick else [1, 4, 16, 64])
    parser.add_argument("--effects", nargs="*", choices=["prefix", "lookup"], default=["prefix", "lookup"])
    parser.add_argument("--lookup", type=int, nargs="+", default=[1] if quick else [1, 4], help="requests at once")
    parser.add_argument("--prompt", type=int, nargs=2, default=[50, 200] if quick else [50, 500], help="tokens")
    parser.add_argument("--answer", type=int, nargs=2, default=[32, 64] if quick else [32, 256], help="tokens")
    parser.add_argument("--window", type=float, default=6 if quick else 30, help="seconds of Poisson arrivals")
    parser.add_argument("--limit", type=float, default=20 if quick else 180, help="seconds a run may take")
    parser.add_argument("--rounds", type=int, default=1 if quick else 3)
    parser.add_argument(
        "--max-stolen", type=float, default=0.25 if quick else 0.05, help="share; above, a round is lost"
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--append", action="store_true", help="add the line to results.jsonl")
    options = parser.parse_args()
    unknown = sorted(set(options.engines) - set(known := engines(options.threads)))
    if unknown:
        parser.error(f"unknown engines {', '.join(unknown)}; known: {', '.join(known)}")
    if any(name.startswith("porcelet_stored") for name in options.engines):
        found = chosen_format("auto", open_checkpoint(hub.resolve(hub.DEFAULT_MODEL)))
        if found != "stored":
            parser.error(f"porcelet_stored would be {found}, as weights=auto is here; see porcelet doctor")
    return options


def load(bench: Bench, arrivals: str, count: int) -> None:
    """Requests of mixed lengths."""
    options, configuration = bench.options, f"{arrivals}_{count}"
    answers: dict[str, Answers] = {}

    def run(label: str, process: Process, round: int) -> Mapping[str, float]:
        requests = workload.mixed(
            count if arrivals == "poisson" else max(count, 2 if options.quick else 4),
            bench.lengths,
            bench.encode,
            seed=options.seed,
            round=round,
            window=options.window if arrivals == "poisson" else 0.0,
        )
        done = process.run(requests, options.limit, count if arrivals == "once" else None)
        answers[label] = done["answers"]
        return figures(requests, done)

    medians = bench.measure(configuration, _variants(bench, run, {name: (name, NOTHING) for name in options.engines}))
    for name in medians:
        if REFERENCE in medians:
            medians[name]["agreement"] = agreement(answers[REFERENCE], answers[name])
    bench.tell(configuration)


def prefix(bench: Bench) -> None:
    """The time to the first token of a prompt whose beginning was just computed."""

    def run(label: str, process: Process, round: int) -> Mapping[str, float]:
        requests = workload.shared_prefix(bench.encode, seed=bench.options.seed, round=round)
        first, second = (figures([request], process.run([request], bench.options.limit)) for request in requests)
        return {
            "first_ttft_ms": first["ttft_ms"],
            "second_ttft_ms": second["ttft_ms"],
            "shorter": first["ttft_ms"] / second["ttft_ms"],
            "finished": (first["finished"] + second["finished"]) / 2,
        }

    names = [name for name in bench.options.engines if bench.known[name].keeps_prefixes]
    bench.measure("prefix", _variants(bench, run, {name: (name, NOTHING) for name in names}))
    bench.tell("prefix")


def lookup(bench: Bench, count: int) -> None:
    """Speed without and with drafts looked up in the prompt; `gain` is with over without, `agreement` with without."""
    answers: dict[str, Answers] = {}

    def run(label: str, process: Process, round: int) -> Mapping[str, float]:
        requests = workload.repeating(count, bench.encode, seed=bench.options.seed, round=round)
        done = process.run(requests, bench.options.limit, count)
        answers[label] = done["answers"]
        return figures(requests, done)

    asked: dict[str, tuple[str, Mapping[str, Any]]] = {}
    for name in bench.options.engines:
        engine = bench.known[name]
        if bench.options.quick and engine.starts_slowly:
            bench.missing[f"{name} speculation=lookup"] = "left out by --quick: it takes minutes to start"
        elif engine.looks_up:
            asked |= {f"{name}_off": (name, NOTHING), f"{name}_lookup": (name, LOOKUP)}
    medians = bench.measure(f"lookup_{count}", _variants(bench, run, asked))
    for off, on in zip(list(asked)[::2], list(asked)[1::2], strict=True):
        if off in medians and on in medians:
            medians[on]["gain"] = _round(medians[on]["output"] / medians[off]["output"])
            medians[on]["agreement"] = agreement(answers[off], answers[on])
    bench.tell(f"lookup_{count}")


def _variants(
    bench: Bench,
    run: Callable[[str, Process, int], Mapping[str, float]],
    asked: Mapping[str, tuple[str, Mapping[str, Any]]],
) -> dict[str, Run]:
    """By label what can be had of the engines asked for. Each counts its rounds, dropped ones too, so all keep step."""
    processes = {label: bench.start(name, more) for label, (name, more) in asked.items()}
    return {label: _counted(partial(run, label, process)) for label, process in processes.items() if process}


def _counted(run: Callable[[int], Mapping[str, float]]) -> Run:
    rounds = iter(range(sys.maxsize))
    return lambda: run(next(rounds))


def _named(name: str, run: Run) -> Run:
    """`run`, whose failure says whose it is."""

    def named() -> Mapping[str, float]:
        with _failure_of(name):
            return run()

    return named


@contextmanager
def _failure_of(name: str) -> Iterator[None]:
    try:
        yield
    except Failed as problem:
        raise NamedFailure(name, problem) from problem


def figures(requests: Sequence[Asked], done: Mapping[str, Any]) -> dict[str, float]:
    """The metrics of one run; the module's docstring says what each is."""
    answers: Answers = done["answers"]
    seconds = done["seconds"]
    came = [answers[request.id] for request in requests]
    num_output = sum(len(answer["tokens"]) for answer in came)
    num_prompt = sum(len(r.prompt) for r, answer in zip(requests, came, strict=True) if answer["tokens"])
    waits = [(answer["times"] or [seconds])[0] - answer["begun"] for answer in came]
    gaps = [gap for answer in came for gap in pauses(answer["times"])]
    means = [
        (answer["times"][-1] - answer["times"][0]) / (len(answer["times"]) - 1)
        for answer in came
        if len(answer["times"]) > 1
    ]
    ended = [len(answer["tokens"]) >= r.max_tokens for r, answer in zip(requests, came, strict=True)]
    return {
        "output": num_output / seconds,
        "total": (num_output + num_prompt) / seconds,
        "ttft_ms": 1e3 * median(waits),
        "ttft_p99_ms": 1e3 * percentile(waits, 0.99),
        "gap_ms": 1e3 * percentile(gaps, 0.5),
        "gap_p99_ms": 1e3 * percentile(gaps, 0.99),
        "per_token_ms": 1e3 * percentile(means, 0.5),
        "finished": fmean(ended),
        "seconds": seconds,
        "peak_megabytes": done["peak_bytes"] / 1e6,
    }


def pauses(times: Sequence[float]) -> list[float]:
    """The gaps between the pieces of an answer; tokens of one piece have the same time."""
    pieces = sorted(set(times))
    return [after - before for before, after in zip(pieces, pieces[1:], strict=False)]


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest value that at least `share` of all do not exceed; 0 of none."""
    if not values:
        return 0.0
    return sorted(values)[max(0, -int(-share * len(values) // 1) - 1)]


def agreement(reference: Answers, other: Answers) -> float:
    """The mean share of an answer's leading tokens that are the reference's, as far as both came."""
    return _round(fmean(_agreement(reference[id]["tokens"], other[id]["tokens"]) for id in reference))


def _agreement(ours: Sequence[int], theirs: Sequence[int]) -> float:
    length = min(len(ours), len(theirs))
    different = next((i for i in range(length) if ours[i] != theirs[i]), length)
    return different / length if length else 0.0


def _round(value: float) -> float:
    return float(f"{value:.3g}")


if __name__ == "__main__":
    main()
