"""Packages that only some commands need; importing porcelet needs none of them."""

from __future__ import annotations

import importlib
from typing import Any

from porcelet.errors import MissingExtraError


def optional(module: str, extra: str = "train") -> Any:
    """A module of an optional package.

    Raises:
        MissingExtraError: it is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as problem:
        raise MissingExtraError(module.partition(".")[0], extra) from problem
