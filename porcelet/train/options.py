"""Options of tasks and rewards: a recipe's table becomes a function's keyword arguments, checked before it is called.

The function's signature is the declaration; nothing is listed twice.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from porcelet.errors import InputError

PLAIN: dict[str, tuple[type, ...]] = {"int": (int,), "float": (int, float), "str": (str,), "bool": (bool,)}


def check_options(function: Callable[..., Any], options: Mapping[str, Any], place: str) -> None:
    """Refuse what `function` has no keyword for, and values of another type than its annotation's.

    Raises:
        InputError: names the option, the place and what would do.
    """
    parameters = inspect.signature(function).parameters.values()
    known = {parameter.name: parameter for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY}
    open_ended = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters)
    for name, value in options.items():
        if name in known:
            _check_type(name, value, str(known[name].annotation), place)
        elif not open_ended:
            raise InputError(f"{place}: unknown option {name!r}{nearest(name, known)}")
    for name, parameter in known.items():
        if parameter.default is parameter.empty and name not in options:
            raise InputError(f"{place}: the option {name!r} is missing")


def _check_type(name: str, value: Any, annotation: str, place: str) -> None:
    wanted = PLAIN.get(annotation)
    if wanted and (not isinstance(value, wanted) or (isinstance(value, bool) and annotation != "bool")):
        raise InputError(f"{place}: {name} is {value!r}; it must be {annotation}")


def nearest(name: str, known: Iterable[str]) -> str:
    """The end of a message about an unknown name."""
    names = list(known)
    near = difflib.get_close_matches(name, names, n=1)
    return f"; did you mean {near[0]!r}?" if near else f"; known: {', '.join(names) or 'none'}"
