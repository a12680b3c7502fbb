"""Runs programs that nobody has read: bubblewrap's namespaces, our seccomp filter, the kernel's limits, a clock."""

from porcelet.train.sandbox.bubblewrap import require_sandbox, shielded
from porcelet.train.sandbox.limits import PYTHON, Limits, check_limits
from porcelet.train.sandbox.run import Run, run

__all__ = ["PYTHON", "Limits", "Run", "check_limits", "require_sandbox", "run", "shielded"]
