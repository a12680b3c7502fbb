"""Tasks: where problems come from. `load_task` gives one by name; `problem.py` says what one is."""

from porcelet.train.tasks.load import load_task
from porcelet.train.tasks.problem import FiniteTask, Problem, Task

__all__ = ["FiniteTask", "Problem", "Task", "load_task"]
