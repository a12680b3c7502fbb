"""Every error as an HTTP answer, in the form that OpenAI's clients read: {"error": {message, type, param, code}}."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import Response

from porcelet.errors import CapacityError, InputError, PorceletError

INVALID = InputError.kind
CLIENT_CLOSED_REQUEST = 499  # nobody reads it; nginx's number for a client that hung up


class FieldError(InputError):
    """A request's field that cannot be used; `param` is its name."""

    def __init__(self, param: str, message: str) -> None:
        super().__init__(message)
        self.param = param


class NotFoundError(InputError):
    """What a path names is not there, or is another's."""

    status = 404
    code = "not_found"

    def __init__(self, what: str, id: str) -> None:
        super().__init__(f"there is no {what} {id[:80]!r}; it may have been deleted")


def error_body(message: str, kind: str, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def error_response(
    status: int, message: str, kind: str = INVALID, param: str | None = None, code: str | None = None
) -> Response:
    # ASCII, because a message may quote what is not valid Unicode.
    body = json.dumps(error_body(message, kind, param, code), ensure_ascii=True)
    return Response(body, status, media_type="application/json")


def problem_response(problem: PorceletError, status: int) -> Response:
    """One of our errors; what passes by itself says when to come back."""
    response = error_response(status, str(problem), problem.kind, problem.param, problem.code)
    if isinstance(problem, CapacityError) and problem.retry_after is not None:
        response.headers["Retry-After"] = str(problem.retry_after)
    return response


def install(app: FastAPI) -> None:
    """Give the application its one handler for each family of errors."""
    app.add_exception_handler(PorceletError, _porcelet_error)
    app.add_exception_handler(RequestValidationError, _validation_error)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(ClientDisconnect, _client_gone)
    app.add_exception_handler(Exception, _own_mistake)


async def _porcelet_error(request: Request, problem: Exception) -> Response:
    assert isinstance(problem, PorceletError)
    return problem_response(problem, problem.status)


async def _validation_error(request: Request, problem: Exception) -> Response:
    assert isinstance(problem, RequestValidationError)
    first: dict[str, Any] = problem.errors()[0]
    if first["type"] == "json_invalid":
        return error_response(400, f"the body is not valid JSON: {first['ctx']['error']}")
    param = _dotted(first["loc"][1:])
    if first["type"] == "missing":
        return error_response(400, f"{param or 'the body'} is missing", param=param)
    return error_response(400, f"{param or 'the body'} is {_short(first['input'])}: {first['msg']}", param=param)


async def _http_error(request: Request, problem: Exception) -> Response:
    assert isinstance(problem, HTTPException)
    message = {
        404: f"{request.url.path} does not exist here",
        405: f"{request.method} is not possible on {request.url.path}",
    }.get(problem.status_code, problem.detail)
    response = error_response(problem.status_code, message)
    response.headers.update(problem.headers or {})
    return response


async def _client_gone(request: Request, problem: Exception) -> Response:
    return Response(status_code=CLIENT_CLOSED_REQUEST)


async def _own_mistake(request: Request, problem: Exception) -> Response:
    return error_response(500, "the server made a mistake; its log says more", PorceletError.kind)


def _dotted(location: Sequence[str | int]) -> str | None:
    """("messages", 0, "role") as messages[0].role."""
    parts = [f"[{part}]" if isinstance(part, int) else f".{part}" for part in location]
    return "".join(parts).removeprefix(".") or None


def _short(value: object, limit: int = 80) -> str:
    text = repr(value)
    return text if len(text) <= limit else text[:limit] + "..."
