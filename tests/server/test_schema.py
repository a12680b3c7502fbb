"""The OpenAPI description holds for every route it names: schemathesis sends what it allows and what it forbids."""

from __future__ import annotations

from typing import Any

import hypothesis
import pytest
import schemathesis
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.core.failures import FailureGroup
from schemathesis.specs.openapi import checks

from tests.server.conftest import Server

CHECKS: Any = [
    not_a_server_error,
    checks.status_code_conformance,
    checks.content_type_conformance,
    checks.response_schema_conformance,
    checks.response_headers_conformance,
    checks.negative_data_rejection,
]
NUM_EXAMPLES = 10  # of each route and mode
LIMITS = ("max_tokens", "max_completion_tokens", "max_output_tokens")


@pytest.mark.parametrize("mode", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE], ids=lambda mode: mode.value)
def test_routes_are_as_described(server: Server, mode: GenerationMode) -> None:
    """No request makes the server fail; answers have the status, type and form that are documented; what the schema
    forbids is refused."""
    schema: Any = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
    operations = [found.ok() for found in schema.get_all_operations()]
    assert {"/v1/chat/completions", "/v1/completions", "/v1/models"} <= {operation.path for operation in operations}
    failures = []
    for operation in operations:
        try:
            if mode is GenerationMode.POSITIVE or operation.body:
                _try(operation, mode, server)
        except FailureGroup as group:
            failures.append(str(group))
    assert not failures, "\n".join(failures)


def _try(operation: Any, mode: GenerationMode, server: Server) -> None:
    @hypothesis.settings(
        max_examples=NUM_EXAMPLES,
        deadline=None,
        derandomize=True,
        database=None,
        phases=[hypothesis.Phase.generate],
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    @hypothesis.given(operation.as_strategy(mode))
    def trial(case: Any) -> None:
        _bound(case)
        case.call_and_validate(base_url=server.url, checks=CHECKS, timeout=20)

    trial()


def _bound(case: Any) -> None:
    """Ask a model that exists, for a short answer; what else is wrong with a body stays wrong."""
    if not isinstance(case.body, dict) or not isinstance(case.body.get("model"), str):
        return
    case.body["model"] = "tiny"
    known = case.operation.body[0].resolved_schema["properties"]
    for name in LIMITS:
        if name in known and (name not in case.body or _is_long(case.body[name])):
            case.body[name] = 2


def _is_long(limit: object) -> bool:
    return limit is None or (type(limit) is int and 2 < limit < 2**31)
