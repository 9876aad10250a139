"""Everything the engine refuses or fails at, with an HTTP status and a stable code.

DapeError
├── ModelFolderError      a model folder is missing, damaged or inconsistent   (exit code 2)
├── SettingsError         a flag or setting is wrong                           (exit code 2)
├── RequestError          the request itself is wrong                          400
│   └── ContextLengthError    prompt and max_tokens do not fit                 400
├── QueueFullError        too many requests or tokens wait                     429
├── DeadlineError         the request's own time limit has passed              504
├── EngineStoppedError    the engine is stopping or has stopped                503
├── NoMemoryError         a request needs more memory than there is            503
└── StepError             a step of the model failed                           500
"""

from __future__ import annotations


class DapeError(Exception):
    """Base of all errors; `message` is fit to be shown to the user."""

    status = 500
    code = "internal_error"
    kind = "server_error"

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None):
        super().__init__(message)
        self.message = message
        self.param = param
        if code is not None:
            self.code = code


class ModelFolderError(DapeError):
    """A model folder is missing, damaged or inconsistent."""

    code = "model_folder"


class SettingsError(DapeError):
    """A flag, environment variable or configuration file holds a wrong value."""

    code = "settings"


class RequestError(DapeError):
    """The request itself is wrong; `param` names the field."""

    status = 400
    code = "invalid_value"
    kind = "invalid_request_error"


class ContextLengthError(RequestError):
    """Prompt and completion do not fit the model's length or the cache."""

    code = "context_length_exceeded"


class QueueFullError(DapeError):
    """Too many requests or tokens wait; try again after `retry_after` seconds."""

    status = 429
    code = "queue_full"
    kind = "rate_limit_error"

    def __init__(self, message: str, *, retry_after: int = 1):
        super().__init__(message)
        self.retry_after = retry_after


class DeadlineError(DapeError):
    """A request without partial results has reached its time limit."""

    status = 504
    code = "deadline_exceeded"
    kind = "timeout_error"


class EngineStoppedError(DapeError):
    """The engine is stopping or has stopped."""

    status = 503
    code = "engine_stopped"


class NoMemoryError(DapeError):
    """A request needs more memory than there is now."""

    status = 503
    code = "no_memory"


class StepError(DapeError):
    """A step of the model failed; the requests of that step are lost, the engine goes on."""

    code = "step_failed"
