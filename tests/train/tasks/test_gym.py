from __future__ import annotations

import json
import os
import subprocess
import sys
import time

import pytest

from porcelet.errors import InputError
from porcelet.train.tasks import Problem, gym, load_task

factory = pytest.importorskip("reasoning_gym.factory", reason="reasoning-gym comes with the extra [train]")

SLOW = {"acre", "arc_agi", "figlet_font", "futoshiki", "group_anagrams", "knight_swap", "zebra_puzzles"}
NO_GOLD = {"boxnet", "rush_hour"}  # they judge, but know no answer themselves
UNSTEADY = [
    "intermediate_integration",
    "isomorphic_strings",
    "list_functions",
    "polynomial_multiplication",
    "pool_matrix",
    "ransom_note",
    "word_ladder",
]
OPTIONS = {"composite": {"datasets": [{"name": "chain_sum"}, {"name": "graph_color", "weight": 2.0}]}}
FAMILIES = [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in sorted(factory.DATASETS)]


@pytest.mark.filterwarnings("ignore::ResourceWarning")  # some families leave files of theirs open
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_draws_and_scores(family: str) -> None:
    """A problem comes at any position, its data is JSON, its own answer earns 1 and an empty one less, both soon."""
    task = load_task(f"reasoning-gym:{family}", OPTIONS.get(family, {}))
    problem = task.draw(0, 3)
    assert problem.question and (problem.answer != "") != (family in NO_GOLD)
    source = json.loads(json.dumps(problem.data))
    began = time.monotonic()
    if family not in NO_GOLD:
        assert gym.score(source, problem.answer) == 1.0
    assert gym.score(source, "") < 1.0
    assert time.monotonic() - began < 5.0


def test_all_families_are_there() -> None:
    """The list that the tests go through is the library's own."""
    assert len(FAMILIES) >= 106


def test_an_item_depends_on_seed_and_position_alone() -> None:
    """Another process, which draws only this item, gets the same one."""
    task = load_task("reasoning-gym:chain_sum", {"max_terms": 3})
    drawn = [task.draw(5, i) for i in range(300)]
    assert len({problem.question for problem in drawn}) > 250
    assert elsewhere("task = load_task('reasoning-gym:chain_sum', {'max_terms': 3})", "task.draw(5, 299).question") == (
        drawn[299].question
    )


@pytest.mark.parametrize("hash_seed", ["0", "1"])
def test_no_family_depends_on_the_hash_seed_or_on_what_was_drawn_before(hash_seed: str) -> None:
    """These walk through sets or draw from the global generators; what judges them must know the same problems."""
    tasks = [load_task(f"reasoning-gym:{family}", {}) for family in UNSTEADY]
    here = [task.draw(7, position) for task in tasks for position in (0, 1)]
    setup = f"tasks = [load_task(f'reasoning-gym:{{family}}', {{}}) for family in {UNSTEADY}]"
    there = elsewhere(setup, "[task.draw(7, position).question for task in tasks for position in (0, 1)]", hash_seed)
    assert there == str([problem.question for problem in here])
    rights = elsewhere(
        f"from porcelet.train.tasks import gym; import json; asked = json.loads({dumped(here)!r})",
        "{gym.score(data, answer) for data, answer in asked}",
        hash_seed,
    )
    assert rights == "{1.0}"


def dumped(problems: list[Problem]) -> str:
    return json.dumps([(problem.data, problem.answer) for problem in problems])


def elsewhere(setup: str, value: str, hash_seed: str = "random") -> str:
    """What another process prints."""
    program = f"from porcelet.train.tasks import load_task\n{setup}\nprint({value})"
    environment = os.environ | {"PYTHONHASHSEED": hash_seed}
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60, env=environment)
    return done.stdout.strip()


@pytest.mark.parametrize(
    ("name", "options", "named"),
    [
        ("reasoning-gym:chain_sums", {}, "did you mean 'chain_sum'"),
        ("reasoning-gym:chain_sum", {"min_terms": 9, "max_terms": 3}, "refuses"),
        ("reasoning-gym:chain_sum", {"terms": 9}, "refuses"),
        ("reasoning-gym:chain_sum", {"seed": 9}, "seed is the stream's"),
        ("reasoning-gym:composite", {}, "refuses"),
        ("count-down", {}, "did you mean 'countdown'"),
    ],
)
def test_unusable_names_and_options_are_refused(name: str, options: dict[str, object], named: str) -> None:
    """Families and their options are checked before training begins."""
    with pytest.raises(InputError, match=named):
        load_task(name, options)
