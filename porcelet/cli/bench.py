"""`porcelet bench`: measures this machine once, and says how far a plan's forecast is from what the engine does."""

from __future__ import annotations

import dataclasses
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from porcelet.kernels.triton.contest import Contest
    from porcelet.models.transformer import Transformer
    from porcelet.plan.machine import Machine

PASSES, MOST_STOLEN = 3, 0.02
SIZES = ((1, 200), (4, 200), (16, 200), (1, 512), (16, 512))  # sequences, tokens of each one's prompt
WRITTEN = 24


def bench(
    model: Annotated[
        str | None, typer.Argument(help="Also run this model of the store, file or folder, beside its forecast.")
    ] = None,
    weights: Annotated[str, typer.Option(help="float32, int8 or int4: how that model is loaded.")] = "int4",
    rounds: Annotated[int, typer.Option(min=1, help="Runs of that model at each size; medians are shown.")] = 3,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Measure this machine's kernels, about a minute, and keep the result for `porcelet plan MODEL --on here`. Where
    there is a GPU, also which kernels are the fastest on it; `device=cuda` takes these.

    With a model, its forecast is compared with the engine itself. The machine must have nothing else to do: runs that
    lost more than 2 % of the time to others are dropped and repeated.
    """
    from porcelet.errors import InputError
    from porcelet.kernels import cpu
    from porcelet.plan import machine as machines
    from porcelet.plan.engine_time import FORMATS

    if not cpu.available():
        raise InputError("bench measures the native library, which is not here; `porcelet doctor` says why")
    if weights not in FORMATS:
        raise InputError(f"--weights is {weights!r}; forecasts are known for {', '.join(FORMATS)}")
    found = machines.load()
    now = _conditions()
    if model is None or found is None:
        found = _measured(now)
        path = machines.save(found)
        print(f"{path} has what was measured", file=sys.stderr)
    machines.check_current(found, now)
    on_gpu = _gpu_measured() if model is None else None
    compared = list(_compared(model, weights, found, rounds)) if model else []
    if as_json:
        shown: dict[str, Any] = {"machine": dataclasses.asdict(found), "compared": compared}
        if on_gpu:
            shown["gpu"] = dataclasses.asdict(on_gpu)
        print(json.dumps(shown, indent=2))
    else:
        print("\n".join([*_lines(found, compared), *_gpu_lines(on_gpu)]))


def _gpu_measured() -> Contest | None:
    """Which kernels this machine's GPU takes from now on; None without one that can."""
    import torch

    from porcelet import hub
    from porcelet.kernels.triton import contest, device

    if not device.available():
        return None
    gpu = torch.device("cuda", torch.cuda.current_device())
    held = contest.hold(gpu, tell=lambda text: print(text, file=sys.stderr))
    path = hub.home() / contest.FILE
    contest.save(held, path)
    print(f"{path} has which are taken", file=sys.stderr)
    return held


def _gpu_lines(held: Contest | None) -> Iterator[str]:
    """Each task's kernel, and how the others did."""
    if held is None:
        return
    yield f"{held.conditions['gpu']}, kernels by their speed over Triton's"
    for outcome in held.outcomes:
        others = [f"{name} {ratio:.2f}" for name, ratio in outcome.ratios.items()]
        others += [f"{name}: {reason}" for name, reason in outcome.failed.items()]
        yield f"  {outcome.task:<20} takes {outcome.taken:<10} {'; '.join(others)}".rstrip()


def _conditions() -> Machine:
    """What a profile of this machine holds for; no costs yet."""
    import torch

    from porcelet.kernels import cpu
    from porcelet.plan.machine import Machine, processor

    return Machine(processor(), torch.get_num_threads(), cpu.isa(), torch.__version__, time.strftime("%Y-%m-%d"), {})


def _measured(now: Machine) -> Machine:
    """Medians of some passes over all costs, and the scales that the reference model gives.

    Raises:
        CapacityError: others took too much of the machine's time, again and again.
    """
    from porcelet.engine import measure as of_engine
    from porcelet.kernels import measure as of_kernels
    from porcelet.plan.engine_time import scaled_to

    passes: dict[str, list[float]] = {}
    stolen = []
    for number in range(PASSES):
        print(f"measuring, {number + 1} of {PASSES}", file=sys.stderr)
        costs, lost = _quiet(
            lambda: {**dict(of_kernels.costs()), **dict(of_engine.costs()), **dict(of_engine.reference())}
        )
        stolen.append(lost)
        for name, cost in costs.items():
            passes.setdefault(name, []).append(cost)
    costs = {name: statistics.median(values) for name, values in passes.items()}
    machine = dataclasses.replace(now, costs=costs, stolen=max(stolen))
    return scaled_to(machine, of_engine.REFERENCE, of_engine.REFERENCE_PROMPT, of_engine.STEPS)


def _quiet(run: Callable[[], Any], attempts: int = 4) -> tuple[Any, float]:
    """What `run` gives in an attempt during which others took little of the time, and how much they did."""
    from porcelet.errors import CapacityError
    from porcelet.plan.machine import processor_times

    lost = 0.0
    for _ in range(attempts):
        before = processor_times()
        result = run()
        after = processor_times()
        lost = (after[0] - before[0]) / max(after[1] - before[1], 1)
        if lost <= MOST_STOLEN:
            return result, lost
    raise CapacityError(
        f"others took {lost:.1%} of this machine's time in {attempts} attempts, where {MOST_STOLEN:.0%} are allowed; "
        "try again when it has less to do"
    )


# ---- comparing ------------------------------------------------------------------------------------------------------


def _compared(name: str, weights: str, machine: Machine, rounds: int) -> Iterator[dict[str, float]]:
    """Forecast and medians of the engine's own rates at each size. The reference model runs in turns with it and sets
    the scales anew: what else goes on in a machine moves its memory's speed by tens of per cent within minutes."""
    from porcelet import hub
    from porcelet.engine import measure as of_engine
    from porcelet.plan.engine_time import EngineTime, scaled_to
    from porcelet.weights.load import load

    model = load(hub.resolve(name), weights)
    with of_engine.reference_engine(weights) as reference:
        for sequences, prompt in SIZES:

            def both(sequences: int = sequences, prompt: int = prompt) -> list[tuple[float, ...]]:
                ours = of_engine.timed(reference, sequences, of_engine.REFERENCE_PROMPT)
                return [ours + _run(model, sequences, prompt)]

            runs = [run for _ in range(rounds) for run in _quiet(both)[0]]
            step, token, decode, computed = (statistics.median(run[i] for run in runs) for i in range(4))
            fresh = {f"reference.{weights}.{sequences}": step, f"reference_prompt.{weights}": token}
            now = dataclasses.replace(machine, costs={**machine.costs, **fresh})
            scaled = scaled_to(now, of_engine.REFERENCE, of_engine.REFERENCE_PROMPT, of_engine.STEPS)
            forecast = EngineTime(model.config, weights, scaled)
            told = forecast.decode_rate(sequences, prompt + WRITTEN / 2), forecast.prompt_rate(sequences, prompt)
            yield {
                "sequences": sequences,
                "prompt": prompt,
                "decode": decode,
                "decode_forecast": told[0],
                "decode_ratio": told[0] / decode,
                "prefill": computed,
                "prefill_forecast": told[1],
                "prefill_ratio": told[1] / computed,
            }


def _run(model: Transformer, sequences: int, prompt: int) -> tuple[float, float]:
    """Tokens a second that the engine writes, and that it computes of prompts."""
    from porcelet.config import EngineConfig
    from porcelet.engine.engine import Engine
    from porcelet.engine.measure import timed

    room = sequences * (prompt + WRITTEN + 128)
    engine = Engine(model, EngineConfig(speculation="off", prefix_cache="off", cache_tokens=room))
    timed(engine, 1, prompt, 4)  # records
    step, token = timed(engine, sequences, prompt, WRITTEN)
    return sequences / step, 1 / token


def _lines(machine: Machine, compared: list[dict[str, float]]) -> Iterator[str]:
    """The profile in short, and the comparison."""
    yield f"{machine.processor}, {machine.threads} threads, {machine.instructions}, measured {machine.date}"
    yield f"reads {machine.costs['read'] / 1e9:.1f} GB/s"
    yield f"  {'billion weights a second':<28}{'1 token':>10}{'16 tokens':>12}{'512 tokens':>12}"
    for name in ("float32", "int8", "int4"):
        rates = [1e-9 / machine.cost(f"product.{name}", tokens) for tokens in (1, 16, 512)]
        yield f"  {name:<28}{rates[0]:>10.1f}{rates[1]:>12.1f}{rates[2]:>12.2f}"
    if compared:
        columns = ("written", "forecast", "ratio", "prompts", "forecast", "ratio")
        yield "  {:<20}{:>10}{:>10}{:>7}{:>10}{:>10}{:>7}".format("tokens/s", *columns)
    for row in compared:
        size = f"{row['sequences']} x {row['prompt']}"
        yield (
            f"  {size:<20}{row['decode']:>10,.0f}{row['decode_forecast']:>10,.0f}{row['decode_ratio']:>7.2f}"
            f"{row['prefill']:>10,.0f}{row['prefill_forecast']:>10,.0f}{row['prefill_ratio']:>7.2f}"
        )
