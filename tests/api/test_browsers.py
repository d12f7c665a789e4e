"""Web pages that try to use a server on this machine."""

from __future__ import annotations

from pathlib import Path

import pytest
from starlette.datastructures import Headers

from appliance.core.errors import InvalidRequestError, PermissionDeniedError
from appliance.web.browsers import refuse_foreign_page
from tests.api.boxes import scripted_box, wire


def headers(**pairs: str) -> Headers:
    return Headers(pairs)


@pytest.mark.parametrize(
    "host",
    ["", "localhost", "localhost:8080", "LocalHost:8080", "127.0.0.1:8080", "[::1]:8080", "a.localhost", "10.0.0.9"],
)
def test_loopback_names_and_addresses_are_let_in(host: str) -> None:
    refuse_foreign_page(headers(host=host) if host else headers(), check_host=True)


@pytest.mark.parametrize(
    "host",
    ["evil.example", "127.0.0.1.evil.example:8080", "localhost.evil.example", "box.lan", "[::1", "a b", "@", ":80"],
)
def test_a_foreign_name_that_leads_here_is_refused(host: str) -> None:
    with pytest.raises(PermissionDeniedError) as refusal:
        refuse_foreign_page(headers(host=host), check_host=True)
    assert refusal.value.code == "foreign_page"
    assert "require_api_key" in refusal.value.advice
    refuse_foreign_page(headers(host=host), check_host=False)


@pytest.mark.parametrize("check_host", [True, False])
@pytest.mark.parametrize(
    "origin",
    ["https://evil.example", "null", "http://localhost:3000", "http://localhost", "file://", "", "http://[::1"],
)
def test_a_page_of_another_origin_is_refused(origin: str, check_host: bool) -> None:
    with pytest.raises(PermissionDeniedError):
        refuse_foreign_page(headers(host="localhost:8080", origin=origin), check_host=check_host)


def test_a_page_of_this_origin_is_let_in() -> None:
    refuse_foreign_page(headers(host="localhost:8080", origin="http://localhost:8080"), check_host=True)
    refuse_foreign_page(headers(host="box:8080", origin="http://Box:8080"), check_host=False)


def test_an_origin_without_a_host_is_refused() -> None:
    with pytest.raises(PermissionDeniedError):
        refuse_foreign_page(headers(origin="http://"), check_host=True)


def test_two_hosts_are_refused() -> None:
    two = Headers(raw=[(b"host", b"localhost"), (b"host", b"evil.example")])
    with pytest.raises(InvalidRequestError):
        refuse_foreign_page(two, check_host=True)


@pytest.mark.anyio
async def test_a_page_cannot_make_the_model_work(tmp_path: Path) -> None:
    async with scripted_box(tmp_path) as box:
        request = {"model": "tiny", "messages": [{"role": "user", "content": "Hello"}]}
        for foreign in ({"origin": "https://evil.example"}, {"host": "evil.example"}):
            reply = await box.ask("POST", "/v1/chat/completions", request, headers=foreign)
            assert (reply.status, reply.error["code"]) == (403, "foreign_page")
            assert "access-control-allow-origin" not in reply.headers
        assert box.models.generations == []


@pytest.mark.anyio
async def test_with_a_key_any_page_and_any_name_may_ask(tmp_path: Path) -> None:
    async with scripted_box(tmp_path, require_api_key=True) as box:
        assert box.keys is not None
        _, secret = box.keys.create("page", ["inference"])
        sent = {"authorization": f"Bearer {secret}", "host": "box.lan", "origin": "https://page.example"}
        assert (await box.ask("GET", "/v1/models", headers=sent)).status == 200


@pytest.mark.anyio
async def test_old_clients_without_a_host_are_served(tmp_path: Path) -> None:
    async with scripted_box(tmp_path) as box, wire(box) as old:
        await old.send(b"GET /health HTTP/1.0\r\n\r\n")
        assert (await old.read_reply()).status == 200
