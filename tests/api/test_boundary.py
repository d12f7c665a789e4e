"""Request ids, the log, the counters, and paths and methods that do not exist."""

from __future__ import annotations

import asyncio
import logging

import pytest
from starlette.datastructures import Headers

from appliance.core.errors import StorageError
from appliance.web.boundary import request_id_of
from tests.api.boxes import ScriptedBox, post, until, wire
from tests.api.scripted import say


@pytest.mark.parametrize("given", ["abc", "req-1.2_3:4/5+6=7@8", "x" * 128])
def test_a_request_id_that_is_fit_for_the_log_is_kept(given: str) -> None:
    assert request_id_of(Headers({"x-request-id": given})) == given


@pytest.mark.parametrize("given", ["", " ", "x" * 129, "a b", "a\tb", '"', "é", "\x7f", "%0a<script>"])
def test_any_other_request_id_is_replaced(given: str) -> None:
    first, second = (request_id_of(Headers({"x-request-id": given})) for _ in range(2))
    assert first != second
    assert first.startswith("req-")


def lines(caplog: pytest.LogCaptureFixture) -> list[logging.LogRecord]:
    return [each for each in caplog.records if each.name == "appliance.api" and hasattr(each, "route")]


@pytest.mark.anyio
async def test_each_request_is_one_line_of_the_log(box: ScriptedBox, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    sent = {"x-request-id": "mine-1"}
    request = {"model": "tiny", "messages": [{"role": "user", "content": "a secret"}]}
    reply = await box.ask("POST", "/v1/chat/completions", request, headers=sent)
    assert reply.headers["x-request-id"] == "mine-1"
    assert reply.headers["x-content-type-options"] == "nosniff"
    assert "server" not in reply.headers
    assert reply.headers["date"].endswith("GMT")
    assert box.models.requests[0].request_id == "mine-1"
    (line,) = lines(caplog)
    assert {
        "request_id": "mine-1",
        "method": "POST",
        "route": "/v1/chat/completions",
        "status": 200,
        "model": "tiny",
        "tenant": "",
        "code": "",
    }.items() <= line.__dict__.items()
    assert 0 <= line.__dict__["duration_s"] < 10
    assert "secret" not in caplog.text


@pytest.mark.anyio
async def test_a_raw_path_is_neither_logged_nor_counted(box: ScriptedBox, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    for number in range(3):
        assert (await box.ask("GET", f"/wp-admin/{number}?token=secret")).status == 404
        assert (await box.ask("GET", f"/v1/models/unknown-{number}")).status == 404
    assert {line.__dict__["route"] for line in lines(caplog)} == {"unmatched", "/v1/models/{model}"}
    counts = [line for line in box.metrics.render().decode().splitlines() if "http_requests_total{" in line]
    assert len(counts) == 2
    assert "wp-admin" not in caplog.text


@pytest.mark.anyio
async def test_probes_do_not_fill_the_log(box: ScriptedBox, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    for path in ("/health", "/health/live", "/metrics"):
        await box.ask("GET", path)
    assert lines(caplog) == []


@pytest.mark.anyio
@pytest.mark.parametrize(
    "path", ["/", "/v1", "/v1/models/", "/v1/chat/completions/", "/health/x", "/v1/%00", "//health"]
)
async def test_an_unknown_path_is_a_404_in_our_shape(box: ScriptedBox, path: str) -> None:
    reply = await box.ask("GET", path)
    assert (reply.status, reply.error["code"]) == (404, "not_found")
    assert "/openapi.json" in reply.error["message"]


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("method", "path", "allow"),
    [
        ("POST", "/health", "GET, HEAD, OPTIONS"),
        ("GET", "/v1/chat/completions", "OPTIONS, POST"),
        ("DELETE", "/v1/models/tiny", "GET, HEAD, OPTIONS"),
        ("PUT", "/openapi.json", "GET, HEAD, OPTIONS"),
    ],
)
async def test_a_wrong_method_is_a_405_that_names_the_right_ones(
    box: ScriptedBox, method: str, path: str, allow: str
) -> None:
    reply = await box.ask(method, path)
    assert (reply.status, reply.error["code"], reply.headers["allow"]) == (405, "method_not_allowed", allow)
    reply = await box.ask("OPTIONS", path)
    assert (reply.status, reply.headers["allow"], reply.body) == (204, allow, b"")
    assert not [name for name in reply.headers if name.lower().startswith("access-control")]


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"content-type": "application/json"}, 200),
        ({"content-type": "application/json; charset=utf-8"}, 200),
        ({"content-type": "application/vnd.box+json"}, 200),
        ({"content-type": ""}, 200),
        ({"content-type": "text/plain"}, 415),
        ({"content-type": "application/x-www-form-urlencoded"}, 415),
        ({"content-type": "multipart/form-data; boundary=x"}, 415),
        ({"content-encoding": "gzip"}, 415),
        ({"content-encoding": "identity"}, 200),
    ],
)
async def test_only_what_says_it_is_something_else_than_json_is_refused(
    box: ScriptedBox, headers: dict[str, str], status: int
) -> None:
    reply = await box.ask("POST", "/v1/completions", {"model": "tiny", "prompt": "x"}, headers=headers)
    assert reply.status == status
    if status == 415:
        assert reply.error["code"] == "unsupported_media_type"
        assert box.models.generations == []


@pytest.mark.anyio
async def test_a_server_error_is_logged_with_its_cause(box: ScriptedBox, caplog: pytest.LogCaptureFixture) -> None:
    box.models.refusals = [StorageError("The disk of /srv is full.")]
    reply = await box.chat()
    assert (reply.status, reply.error["code"]) == (500, "storage_failed")
    assert b"/srv" not in reply.body
    assert "/srv is full" in caplog.text


@pytest.mark.anyio
async def test_requests_in_progress_are_counted_until_they_end(box: ScriptedBox) -> None:
    go = asyncio.Event()
    box.models.script = lambda _: [go, *say("Hello")]

    def running() -> float | None:
        return box.metrics.registry.get_sample_value("appliance_http_requests_in_progress")

    async with wire(box) as client:
        await client.send(
            post("/v1/completions", {"model": "tiny", "prompt": "x", "stream": True}, "Connection: close")
        )
        await box.models.accepted.wait()
        assert running() == 1
        go.set()
        await client.read_to_end()
    await until(lambda: running() == 0)
