"""Runs programs that nobody has read: bubblewrap's namespaces, our seccomp filter, the kernel's limits, a clock."""

from porcelet.train.sandbox.run import PYTHON, Limits, Run, require_sandbox, run, shielded

__all__ = ["PYTHON", "Limits", "Run", "require_sandbox", "run", "shielded"]
