"""Everything porcelet raises on purpose.

    PorceletError           500  exit 1
    ├── InputError          400  exit 2   a request, flag or config value that cannot be used
    ├── ModelError          422  exit 3   a model file that is missing, damaged or not supported
    ├── CapacityError       503  exit 4   it does not fit: memory, cache pages, queue, port
    ├── EngineError         500  exit 5   the engine process died or broke its protocol
    └── MissingExtraError   501  exit 6   an optional dependency is needed

Each class knows its HTTP status and its exit code; the server and the command line have one handler each.
A message names the value, the place and the remedy in one line.
"""


class PorceletError(Exception):
    """Base of all errors meant for a person. `status` is the HTTP status, `exit_code` the process's; a program tells
    them apart by `kind` and, where that is too coarse, by `code`."""

    status = 500
    exit_code = 1
    kind = "internal_error"
    code: str | None = None
    param: str | None = None  # the request's field that it is about


class InputError(PorceletError):
    """A request field, flag or config value that cannot be used."""

    status = 400
    exit_code = 2
    kind = "invalid_request_error"


class ModelError(PorceletError):
    """A model file or folder that is missing, damaged or not supported."""

    status = 422
    exit_code = 3
    kind = "model_error"


class CapacityError(PorceletError):
    """Something that does not fit: memory, cache pages, the queue, a port. `retry_after` are seconds after which it
    may, if that is known."""

    status = 503
    exit_code = 4
    kind = "capacity_error"
    code = "overloaded"

    def __init__(self, message: str, retry_after: int | None = None) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class EngineError(PorceletError):
    """The engine process died or answered outside its protocol."""

    exit_code = 5
    kind = "engine_error"
    code = "engine_unavailable"


class MissingExtraError(PorceletError):
    """An optional dependency is not installed."""

    status = 501
    exit_code = 6
    kind = "missing_extra"

    def __init__(self, package: str, extra: str) -> None:
        super().__init__(f"{package} is not installed; it comes with: pip install 'porcelet[{extra}]'")
