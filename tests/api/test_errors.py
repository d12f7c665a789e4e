"""How errors look on the wire."""

from __future__ import annotations

import pytest

from appliance.core import errors
from appliance.core.errors import ApplianceError
from appliance.web.errors import (
    MethodNotAllowedError,
    error_headers,
    error_response,
    internal_error,
    kind_of,
)

STATUS = {
    errors.ApplianceError: 500,
    errors.InvalidRequestError: 400,
    errors.AuthenticationError: 401,
    errors.PermissionDeniedError: 403,
    errors.UntrustedError: 400,
    errors.NotFoundError: 404,
    errors.ConflictError: 409,
    errors.TooLargeError: 413,
    errors.OverloadedError: 429,
    errors.UnavailableError: 503,
    errors.DeadlineExceededError: 503,
    errors.ModelFileError: 400,
    errors.SourceError: 503,
    errors.StorageError: 500,
    errors.UnreadableDatabaseError: 500,
    errors.SettingsError: 500,
    errors.EngineError: 500,
}


def every_class() -> list[type[ApplianceError]]:
    return [each for each in vars(errors).values() if isinstance(each, type) and issubclass(each, ApplianceError)]


def test_every_class_of_errors_has_its_status() -> None:
    assert {each: kind_of(each("Broken.")).status for each in every_class()} == STATUS


@pytest.mark.parametrize("kind", every_class())
def test_a_server_error_says_nothing_of_our_insides_and_any_other_says_all(kind: type[ApplianceError]) -> None:
    error = kind("/srv/secret is broken.", advice="Mend it.", param="field", code="broken")
    detail = error_response(error, "req-7").error
    assert detail.code == "broken"
    if STATUS[kind] == 500:
        assert "secret" not in detail.message
        assert "req-7" in detail.message
        assert detail.param is None
        assert detail.type == "server_error"
    else:
        assert detail.message == "/srv/secret is broken. Mend it."
        assert detail.param == "field"


def test_statuses_that_clients_retry_are_never_the_clients_own_fault() -> None:
    for kind, status in STATUS.items():
        if issubclass(kind, errors.InvalidRequestError):
            assert status not in (408, 409, 429)
            assert status < 500


@pytest.mark.parametrize(
    ("retry_after_s", "header"),
    [(None, b"1"), (0.0, b"1"), (0.2, b"1"), (2.01, b"3"), (30.0, b"30"), (1e9, b"3600"), (-5.0, b"1")],
)
@pytest.mark.parametrize("kind", [errors.OverloadedError, errors.UnavailableError, errors.DeadlineExceededError])
def test_retry_after_is_in_whole_seconds(kind: type[ApplianceError], retry_after_s: float, header: bytes) -> None:
    assert error_headers(kind("Busy.", retry_after_s=retry_after_s)) == [(b"retry-after", header)]


def test_other_errors_do_not_ask_for_a_retry() -> None:
    assert error_headers(errors.InvalidRequestError("No.", retry_after_s=5)) == []
    assert error_headers(internal_error()) == []
    assert error_headers(errors.AuthenticationError("No key."))[0][0] == b"www-authenticate"


@pytest.mark.parametrize(
    ("code", "status"), [("unsupported_media_type", 415), ("method_not_allowed", 405), ("request_head_too_large", 431)]
)
def test_some_codes_have_a_status_of_their_own(code: str, status: int) -> None:
    assert kind_of(errors.InvalidRequestError("No.", code=code)).status == status


def test_a_wrong_method_names_the_right_ones() -> None:
    error = MethodNotAllowedError("PUT", "/health", ("GET", "HEAD"))
    assert kind_of(error).status == 405
    assert error_headers(error) == [(b"allow", b"GET, HEAD")]
    assert "GET, HEAD" in str(error)
