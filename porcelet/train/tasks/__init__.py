"""Problems whose answers can be checked.

A task is split by hash into problems trained on and problems held out. The stream over it is infinite and has no state:
position i draws by hashing (seed, i), so resuming needs nothing but the position.
"""

from porcelet.train.tasks.problem import Problem, Task
from porcelet.train.tasks.sums import load_task

__all__ = ["Problem", "Task", "load_task"]
