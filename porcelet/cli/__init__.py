"""The command line. Commands import what they need when they run, so that `porcelet --help` answers at once."""

from __future__ import annotations

import logging
import os
import sys

import typer

from porcelet import __version__
from porcelet.cli import adapters, bench, chat, data, doctor, evaluate, keys, models, plan, serve, train
from porcelet.errors import PorceletError

app = typer.Typer(
    name="porcelet",
    help="Your own DeepSeek in one Python package: load, train, adapt and serve reasoning models, offline.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    epilog="Exit codes: 0 done, 1 an error of our own, failed requests of a batch or a problem that doctor found, "
    "2 a flag or value that cannot be used, 3 a model that is missing, damaged or not supported, 4 it does not fit "
    "(memory, disk, port), 5 the engine died, 6 an optional package is missing, 130 interrupted, 141 the reader of the "
    "output left.",
    rich_markup_mode=None,  # plain help: importing rich for it takes longer than all the rest
)
app.command()(chat.generate)
app.command()(chat.chat)
app.command()(serve.serve)
app.add_typer(keys.app, name="keys")
app.command()(train.train)
app.command("eval")(evaluate.evaluate)
app.command()(evaluate.report)
app.command()(adapters.merge)
app.add_typer(data.app, name="data")
app.command()(models.pull)
app.command("list")(models.list_)
app.command()(models.show)
app.command()(models.rm)
app.command()(models.verify)
app.command()(plan.plan)
app.command()(bench.bench)
app.command()(doctor.doctor)


@app.callback(invoke_without_command=True)
def root(version: bool = typer.Option(False, "--version", help="Show the version and exit.", is_eager=True)) -> None:
    if version:
        print(f"porcelet {__version__}")
        raise typer.Exit


def main() -> None:
    """Run a command; an error meant for a person becomes one line and its exit code."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    try:
        app()
    except PorceletError as problem:
        print(f"porcelet: {problem}", file=sys.stderr)
        sys.exit(problem.exit_code)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # who read our output has left; writing the rest at exit must not fail again
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
