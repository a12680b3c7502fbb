"""`porcelet plan`: what a model needs, does and costs on some machines, before anybody buys, rents or loads it."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from porcelet.plan.answer import Question

LANGUAGES = "en, fr or zh."


def plan(
    model: Annotated[
        str,
        typer.Argument(
            help="A model known by name (deepseek-v3, r1, v2-lite, r1-distill-qwen-7b, ...), a folder with "
            "config.json, a GGUF file, or a model of the store."
        ),
    ],
    on: Annotated[
        str,
        typer.Option(
            "--on",
            help="Devices: 8xH20, 16xH800, 4090, 2x EPYC 9654, ...; `here` is this machine, "
            "once `porcelet bench` has measured it.",
        ),
    ] = "8xH20",
    weights: Annotated[str, typer.Option(help="float32, bf16, fp8, int8 or int4; else as the model is stored.")] = "",
    cache_bits: Annotated[int, typer.Option(help="Bits of a cached value: 16, or 8.")] = 16,
    mtp: Annotated[bool, typer.Option("--mtp", help="Guess a token ahead with the model's own MTP layer.")] = False,
    prompt: Annotated[int, typer.Option(help="Tokens of a request's prompt, the conversation so far included.")] = 2000,
    answer: Annotated[int, typer.Option(help="Tokens of an answer that are shown.")] = 400,
    thinking: Annotated[
        float, typer.Option(help="Tokens written for one that is shown; 3 to 10 for a reasoning model.")
    ] = 1.0,
    hits: Annotated[float, typer.Option(help="Share of the prompts' tokens that the cache holds.")] = 0.0,
    speed: Annotated[float, typer.Option(help="Tokens a second that an answer must have.")] = 10.0,
    first_token: Annotated[float, typer.Option(help="Seconds within which an answer must begin.")] = 5.0,
    users: Annotated[float, typer.Option(help="People online at once; 0: as many as can be served.")] = 0.0,
    turns: Annotated[float, typer.Option(help="Questions an hour of each of them.")] = 10.0,
    busy_hours: Annotated[float, typer.Option(help="Hours of a day that they are online.")] = 10.0,
    supply: Annotated[str, typer.Option(help="The devices are rented, bought, or owned (paid already).")] = "rented",
    electricity: Annotated[float, typer.Option(help="Dollars a kWh.")] = 0.15,
    cooling: Annotated[float, typer.Option(help="Power of the building over that of the devices (PUE).")] = 1.3,
    life: Annotated[float, typer.Option(help="Years over which a price is spread.")] = 4.0,
    operations: Annotated[float, typer.Option(help="Dollars a device and month: space, repair, people.")] = 0.0,
    tariff: Annotated[str, typer.Option(help="The API to compare with: deepseek-flash, deepseek-v4-pro, ...")] = (
        "deepseek-flash"
    ),
    train: Annotated[float, typer.Option(help="Tokens of a training run to plan as well, such as 14.8e12.")] = 0.0,
    sequence: Annotated[int, typer.Option(help="Tokens of a training sequence.")] = 4096,
    language: Annotated[str, typer.Option(help=LANGUAGES)] = "en",
    report: Annotated[Path | None, typer.Option(help="Write one HTML page with plots and all sources here.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON: each figure with formula and sources.")] = False,
) -> None:
    """Know beforehand: memory, speed, users served and cost of a model on some machines, and what follows.

    Figures have ranges, formulas and sources (--json, --report). Devices of your own go to hardware.toml in the store's
    folder. Nothing is loaded, and no network is asked.
    """
    from porcelet.errors import InputError
    from porcelet.plan.answer import Question
    from porcelet.plan.cost import Supply
    from porcelet.plan.hardware import parse_fleet
    from porcelet.plan.model import find_model
    from porcelet.plan.serve import Traffic
    from porcelet.plan.training import Run

    if on == "here":
        _here(model, weights, prompt, answer, as_json)
        return
    if cache_bits not in (8, 16, 32):
        raise InputError(f"--cache-bits is {cache_bits}; it must be 8, 16 or 32")
    traffic = Traffic(
        prompt=prompt,
        answer=answer,
        thinking=thinking,
        hits=hits,
        speed=speed,
        first_token=first_token,
        turns=turns,
    )
    question = Question(
        model=find_model(model, weights),
        fleet=parse_fleet(on),
        traffic=traffic,
        users=users,
        busy_hours=busy_hours,
        supply=Supply(way=supply, electricity=electricity, cooling=cooling, life=life, operations=operations),
        tariff=tariff,
        cache_bytes=cache_bits / 8,
        mtp=mtp,
        train=Run(tokens=train, sequence=sequence) if train else None,
    )
    _show(question, language, report, as_json)


def _show(question: Question, language: str, report: Path | None, as_json: bool) -> None:
    from porcelet.plan import text
    from porcelet.plan.answer import answer

    found = answer(question)
    if as_json:
        print(json.dumps(text.as_json(found, language), indent=2, ensure_ascii=False))
    else:
        print("\n".join(text.lines(found, language)))
    if report is not None:
        from porcelet.plan.report import write_report

        print(f"{write_report(found, report, language)} has the plots and all sources", file=sys.stderr)


def _here(name: str, weights: str, prompt: int, answer: int, as_json: bool) -> None:
    """What porcelet's own engine does with a model on this machine, which `porcelet bench` has measured."""
    from porcelet.config import EngineConfig
    from porcelet.errors import InputError
    from porcelet.memory.engine import engine_memory
    from porcelet.memory.fit import gigabytes, largest_parts
    from porcelet.plan import machine
    from porcelet.plan.engine_time import FORMATS, EngineTime
    from porcelet.plan.model import find_model

    measured = machine.load()
    if measured is None:
        raise InputError("this machine has not been measured yet; run `porcelet bench`, which takes about a minute")
    model = find_model(name)
    chosen = weights or ("float32" if model.format.name in ("bf16", "float32") else model.format.name)
    if chosen not in FORMATS:
        raise InputError(f"the engine's times are known for {', '.join(FORMATS)}, not {chosen}; give --weights int8")
    time = EngineTime(model.config, chosen, measured)
    context, size = prompt + answer / 2, find_model(name, chosen).num_bytes
    rates = {count: time.decode_rate(count, context) for count in (1, 4, 16)}
    computed, parts = time.prompt_rate(1, prompt), {part.name: part.seconds for part in time.decode(1, context)}
    memory = engine_memory(model.config, EngineConfig(weights=chosen))
    if as_json:
        found = {"weights": chosen, "weight_bytes": size, "tokens_per_second": rates, "step_alone": parts}
        found["memory_bytes"] = memory.peak
        print(json.dumps({**found, "prompt_tokens_per_second": computed}, indent=2))
        return
    print(f"{model.name} as {chosen} on {measured.processor}, {measured.threads} threads, measured {measured.date}")
    print(f"  weights           {size / 1e9:,.2f} GB")
    print(f"  memory            up to {gigabytes(memory.peak)} with the default cache ({largest_parts(memory)})")
    print(
        f"  prompts           {computed:,.0f} tokens/s; the answer to {prompt} begins after {prompt / computed:.1f} s"
    )
    for count, rate in rates.items():
        print(f"  {count:>2} at once        {rate:,.1f} tokens/s, {rate / count:,.1f} each")
    print("  a token alone     " + ", ".join(f"{part} {1e3 * seconds:.2f} ms" for part, seconds in parts.items()))
