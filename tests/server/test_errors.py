"""The errors' forms: what a client is told, whatever went wrong."""

from __future__ import annotations

import json

import pytest

from porcelet.errors import CapacityError, EngineError, InputError, ModelError, PorceletError
from porcelet.server import errors
from porcelet.server.errors import Fault, FieldError, RangeError, fault_body, fault_of, fault_response
from porcelet.server.generation.models import ContextError, UnknownModelError


@pytest.mark.parametrize(
    ("problem", "status", "code", "param"),
    [
        (InputError("x"), 400, "invalid_request_error", None),
        (FieldError("stop", "x"), 400, "invalid_request_error", "stop"),
        (RangeError("n", "x"), 422, "invalid_request_error", "n"),
        (UnknownModelError("x"), 404, "model_not_found", "model"),
        (ContextError("x"), 400, "context_length_exceeded", None),
        (CapacityError("x", 7), 503, "overloaded", None),
        (EngineError("x"), 500, "engine_unavailable", None),
        (ModelError("x"), 422, "model_error", None),
        (PorceletError("x"), 500, "internal_error", None),
    ],
)
def test_codes(problem: PorceletError, status: int, code: str, param: str | None) -> None:
    """Programs tell errors apart by status and code, and find the field."""
    response = fault_response(fault_of(problem))
    error = json.loads(response.body)["error"]
    assert (response.status_code, error["code"], error["param"]) == (status, code, param)
    assert response.headers.get("Retry-After") == ("7" if status == 503 else None)


def test_the_path_decides_on_the_form(monkeypatch: pytest.MonkeyPatch) -> None:
    """A dialect's own form holds below its path, OpenAI's everywhere else; the longest path counts."""
    monkeypatch.setitem(errors.FORMS, "/v1/other", lambda fault: {"oops": fault.message})
    monkeypatch.setitem(errors.FORMS, "/v1/other/deep", lambda fault: {"deep": fault.status})
    fault = Fault(418, "tea")
    assert fault_body(fault, "/v1/other/thing") == {"oops": "tea"}
    assert fault_body(fault, "/v1/other/deep/er") == {"deep": 418}
    assert fault_body(fault, "/v1/chat")["error"]["message"] == "tea"


def test_messages_may_hold_anything() -> None:
    """A message that quotes half of a surrogate pair is still valid JSON."""
    assert json.loads(fault_response(Fault(400, "\ud800")).body)["error"]["message"] == "\ud800"
