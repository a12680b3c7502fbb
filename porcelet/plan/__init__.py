"""Know beforehand: what a model needs, does and costs on some machines.

    from porcelet.plan import plan
    answer = plan("r1", on="8xH20", users=500)
    answer.figure("speed", "users").value

model.py, hardware.py and tariffs.py say what is known, each number with its source; layout.py, memory.py and work.py
what a device holds and how long a step takes; serve.py, training.py, cost.py and search.py what follows; answer.py puts
it together, verdicts.py draws conclusions, text.py and report.py show them. Imports no torch.
"""

from __future__ import annotations

from porcelet.plan.answer import Answer, Question, answer
from porcelet.plan.cost import Supply
from porcelet.plan.hardware import parse_fleet
from porcelet.plan.model import find_model
from porcelet.plan.serve import Traffic
from porcelet.plan.training import Run
from porcelet.plan.verdicts import Verdict, verdicts

__all__ = ["Answer", "Question", "Run", "Supply", "Traffic", "Verdict", "answer", "plan", "verdicts"]


def plan(
    model: str,
    on: str = "8xH20",
    *,
    weights: str = "",
    traffic: Traffic | None = None,
    users: float = 0,
    supply: Supply | None = None,
    train: Run | None = None,
) -> Answer:
    """The answer to a question put in words: a model by name, folder or file, and devices such as "16xH800".

    Raises:
        InputError: a name is not known, or a value cannot be.
        ModelError: the model's files are damaged or not supported.
    """
    asked = Question(
        model=find_model(model, weights),
        fleet=parse_fleet(on),
        traffic=traffic or Traffic(),
        users=users,
        supply=supply or Supply(),
        train=train,
    )
    return answer(asked)
