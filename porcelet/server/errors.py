"""Every error as an HTTP answer. Its form follows from the path: OpenAI's, unless a dialect has another one.

    {"error": {"message": ..., "type": ..., "param": the field or null, "code": ...}}

400 is what cannot be understood, 422 a value outside of its range, as DeepSeek publishes it. `code` repeats `type`
where there is nothing more exact to say, as DeepSeek's does.
"""

from __future__ import annotations

import json
import reprlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import Response

from porcelet.errors import CapacityError, InputError, PorceletError
from porcelet.server.operations.logs import request_id

INVALID = InputError.kind
_MISTAKE = "the server made a mistake; its log says more"
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


class RangeError(FieldError):
    """A field whose value has the right type, but lies outside of its range."""

    status = 422


# ---- forms ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Fault:
    """What a client is told, in whatever form. `retry_after` are seconds."""

    status: int
    message: str
    kind: str = INVALID
    param: str | None = None
    code: str | None = None
    retry_after: int | None = None


def fault_of(problem: PorceletError, status: int | None = None) -> Fault:
    """One of our errors; `status` replaces its own."""
    retry_after = problem.retry_after if isinstance(problem, CapacityError) else None
    return Fault(status or problem.status, str(problem), problem.kind, problem.param, problem.code, retry_after)


def error_body(message: str, kind: str, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    """OpenAI's form."""
    return {"error": {"message": message, "type": kind, "param": param, "code": code or kind}}


def openai_form(fault: Fault) -> dict[str, Any]:
    return error_body(fault.message, fault.kind, fault.param, fault.code)


# Anthropic's names, where neither of the two families' own fits: a client's fault and the server's.
_ANTHROPIC_KINDS = {
    401: "authentication_error",
    402: "billing_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}


def anthropic_form(fault: Fault) -> dict[str, Any]:
    """Anthropic's form, which names the kind by the status."""
    kind = _ANTHROPIC_KINDS.get(fault.status, INVALID if fault.status < 500 else "api_error")
    # Agents look for these words and then shorten their conversation: the form has no codes.
    prefix = "prompt is too long: " if fault.code == "context_length_exceeded" else ""
    return {"type": "error", "error": {"type": kind, "message": prefix + fault.message}, "request_id": request_id()}


# The form of the errors below a path; the longest path counts.
FORMS: dict[str, Callable[[Fault], dict[str, Any]]] = {
    "/": openai_form,
    "/v1/messages": anthropic_form,
    "/anthropic/": anthropic_form,
}

# What every route may answer beside its answers, for OpenAPI: in OpenAI's form, and in Anthropic's.
_TEXT = {"type": "string"}
_FIELD = {"type": ["string", "null"]}


def _documented(error: dict[str, Any], **beside: Any) -> dict[int | str, dict[str, Any]]:
    """The bodies of a form: of the fields in `error`, and `beside` it."""
    inner = {"type": "object", "properties": error, "required": list(error)}
    outer = {"type": "object", "properties": {"error": inner, **beside}, "required": ["error", *beside]}
    content = {"application/json": {"schema": outer}}
    reasons = {"4XX": "the request cannot be served", "5XX": "the server cannot serve it now"}
    return {status: {"description": reason, "content": content} for status, reason in reasons.items()}


ERRORS = _documented({"message": _TEXT, "type": _TEXT, "param": _FIELD, "code": _TEXT})
ANTHROPIC_ERRORS = _documented({"type": _TEXT, "message": _TEXT}, type={"const": "error"}, request_id=_FIELD)


def fault_body(fault: Fault, path: str) -> dict[str, Any]:
    """The body of an error, in the form that belongs to a path."""
    prefix = max((prefix for prefix in FORMS if path.startswith(prefix)), key=len, default="/")
    return FORMS[prefix](fault)


def fault_response(fault: Fault, path: str = "/") -> Response:
    # ASCII, because a message may quote what is not valid Unicode.
    body = json.dumps(fault_body(fault, path), ensure_ascii=True)
    headers = {} if fault.retry_after is None else {"Retry-After": str(fault.retry_after)}
    return Response(body, fault.status, headers, media_type="application/json")


def error_response(
    status: int, message: str, kind: str = INVALID, param: str | None = None, code: str | None = None, path: str = "/"
) -> Response:
    return fault_response(Fault(status, message, kind, param, code), path)


def problem_response(problem: PorceletError, status: int, path: str = "/") -> Response:
    """One of our errors; what passes by itself says when to come back."""
    return fault_response(fault_of(problem, status), path)


# ---- handlers -------------------------------------------------------------------------------------------------------


def install(app: FastAPI) -> None:
    """Give the application its one handler for each family of errors."""
    app.add_exception_handler(PorceletError, _porcelet_error)
    app.add_exception_handler(RequestValidationError, _validation_error)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(ClientDisconnect, _client_gone)
    app.add_exception_handler(Exception, _own_mistake)


async def _porcelet_error(request: Request, problem: Exception) -> Response:
    assert isinstance(problem, PorceletError)
    return fault_response(fault_of(problem), request.url.path)


async def _validation_error(request: Request, problem: Exception) -> Response:
    assert isinstance(problem, RequestValidationError)
    return fault_response(_fault_of_field(problem.errors()[0]), request.url.path)


def _fault_of_field(error: Mapping[str, Any]) -> Fault:
    """Pydantic's word for what is wrong with a field, or ours (fields.py)."""
    param = _dotted(error["loc"][1:])
    place = param or "the body"
    match error["type"]:
        case "json_invalid":
            return Fault(400, f"the body is not valid JSON: {error['ctx']['error']}")
        case "missing":
            return Fault(400, f"{place} is missing", param=param)
        case "extra_forbidden":
            return Fault(400, f"{param!r} is not supported; leave it out", param=param)
        case "wrong":
            return Fault(400, f"{place}: {error['msg']}", param=param)
        case "too_long":
            length, most = error["ctx"]["actual_length"], error["ctx"]["max_length"]
            return Fault(RangeError.status, f"{place} has {length} entries; at most {most} are allowed", param=param)
        case "out_of_range":
            return Fault(RangeError.status, error["msg"], param=param)
    return Fault(400, f"{place} is {_brief.repr(error['input'])}: {error['msg']}", param=param)


async def _http_error(request: Request, problem: Exception) -> Response:
    assert isinstance(problem, HTTPException)
    message = {
        404: f"{request.url.path} does not exist here",
        405: f"{request.method} is not possible on {request.url.path}",
    }.get(problem.status_code, problem.detail)
    response = error_response(problem.status_code, message, path=request.url.path)
    response.headers.update(problem.headers or {})
    return response


async def _client_gone(request: Request, problem: Exception) -> Response:
    return Response(status_code=CLIENT_CLOSED_REQUEST)


async def _own_mistake(request: Request, problem: Exception) -> Response:
    return error_response(500, _MISTAKE, PorceletError.kind, path=request.url.path)


def _dotted(location: Sequence[str | int]) -> str | None:
    """("messages", 0, "role") as messages[0].role."""
    parts = [f"[{part}]" if isinstance(part, int) else f".{part}" for part in location]
    return "".join(parts).removeprefix(".") or None


_brief = reprlib.Repr()  # bounded in depth and length, whatever was sent
_brief.maxstring = _brief.maxother = 80
