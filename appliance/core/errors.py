"""The one tree of errors.

Every error says what happened, with the figures, and what to do about it. A room turns the exceptions
of the libraries it hides into one of these before they cross its wall. `web/errors.py` maps each class to an
HTTP status, `cli/` to an exit code.
"""

from __future__ import annotations

from typing import ClassVar


class ApplianceError(Exception):
    """Base of all errors that the appliance raises on purpose.

    Attributes:
        message: What happened, with the figures, in words a field technician understands.
        advice: What to do about it; empty when the message says it already.
        code: A stable slug for programs, `snake_case`.
        param: The request field or setting at fault, or None.
        retry_after_s: Seconds after which the same request may succeed, or None when it never will by itself.
    """

    default_code: ClassVar[str] = "internal_error"

    def __init__(
        self,
        message: str,
        *,
        advice: str = "",
        code: str | None = None,
        param: str | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.advice = advice
        self.code = code or self.default_code
        self.param = param
        self.retry_after_s = retry_after_s

    def __str__(self) -> str:
        return f"{self.message} {self.advice}".rstrip()


class InvalidRequestError(ApplianceError):
    """The caller sent something that can never work; sending it again will not help."""

    default_code = "invalid_request"


class AuthenticationError(ApplianceError):
    """No API key, or one that is not known."""

    default_code = "invalid_api_key"


class PermissionDeniedError(ApplianceError):
    """The API key is known but lacks the scope."""

    default_code = "permission_denied"


class UntrustedError(InvalidRequestError):
    """It is not signed by those whose word counts, is older than what was seen, or has expired; nothing was changed."""

    default_code = "not_trusted"


class NotFoundError(ApplianceError):
    """The named thing does not exist; the message names those that do."""

    default_code = "not_found"


class ConflictError(ApplianceError):
    """The thing is in use or has changed meanwhile; nothing was changed."""

    default_code = "conflict"


class TooLargeError(ApplianceError):
    """The request is over a size limit."""

    default_code = "too_large"


class OverloadedError(ApplianceError):
    """The queue is full: try again after `retry_after_s`."""

    default_code = "overloaded"


class UnavailableError(ApplianceError):
    """Not ready: loading, draining, or an engine that failed."""

    default_code = "unavailable"


class DeadlineExceededError(ApplianceError):
    """The request's own time limit ran out on our side."""

    default_code = "deadline_exceeded"


class ModelFileError(InvalidRequestError):
    """A model file, manifest or template is damaged, hostile or not supported."""

    default_code = "bad_model_file"


class SourceError(ApplianceError):
    """No source could deliver a model file."""

    default_code = "source_failed"


class StorageError(ApplianceError):
    """The disk is full, read-only or damaged."""

    default_code = "storage_failed"


class UnreadableDatabaseError(StorageError):
    """A database file is damaged, or another version of this program wrote it: it stays so however often one tries."""


class SettingsError(ApplianceError):
    """A setting is unknown, of the wrong type or out of range; `param` names it."""

    default_code = "bad_setting"


class EngineError(ApplianceError):
    """Native inference failed for this request; others go on."""

    default_code = "engine_failed"


def errors_in(group: BaseExceptionGroup[ApplianceError]) -> list[ApplianceError]:
    """Return the errors that a group of tasks ended with, however deep they stand."""
    errors: list[ApplianceError] = []
    for each in group.exceptions:
        errors += errors_in(each) if isinstance(each, BaseExceptionGroup) else [each]
    return errors
