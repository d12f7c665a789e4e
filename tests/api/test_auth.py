"""API keys at the door."""

from __future__ import annotations

from pathlib import Path

import pytest
from starlette.datastructures import Headers

from appliance.web.auth import bearer_token
from tests.api.boxes import Reply, ScriptedBox, scripted_box

PRIVATE = [
    ("GET", "/v1/models"),
    ("GET", "/v1/models/tiny"),
    ("POST", "/v1/chat/completions"),
    ("POST", "/v1/completions"),
    ("POST", "/v1/tokenize"),
    ("GET", "/openapi.json"),
    ("GET", "/metrics"),
]


@pytest.mark.parametrize(
    ("value", "token"),
    [("Bearer abc", "abc"), ("bearer abc", "abc"), ("Bearer  abc ", "abc"), ("Basic abc", ""), ("abc", ""), ("", "")],
)
def test_the_bearer_token_is_found(value: str, token: str) -> None:
    assert bearer_token(Headers({"authorization": value})) == token


def test_two_authorization_headers_are_none() -> None:
    twice = Headers(raw=[(b"authorization", b"Bearer a"), (b"authorization", b"Bearer b")])
    assert bearer_token(twice) == ""


async def with_key(box: ScriptedBox, secret: str, method: str = "GET", path: str = "/v1/models") -> Reply:
    return await box.ask(method, path, headers={"authorization": f"Bearer {secret}"})


@pytest.mark.anyio
@pytest.mark.parametrize(("method", "path"), PRIVATE)
async def test_without_a_key_nothing_private_is_told(tmp_path: Path, method: str, path: str) -> None:
    async with scripted_box(tmp_path, require_api_key=True) as box:
        for headers in ({}, {"authorization": "Bearer ea-wrong"}, {"authorization": "Bearer \xff"}):
            reply = await box.ask(method, path, body=b"{}" if method == "POST" else None, headers=headers)
            assert (reply.status, reply.error["code"]) == (401, "invalid_api_key")
            assert reply.headers["www-authenticate"].startswith("Bearer")


@pytest.mark.anyio
async def test_health_is_public(tmp_path: Path) -> None:
    async with scripted_box(tmp_path, require_api_key=True) as box:
        assert (await box.ask("GET", "/health")).status == 200
        assert (await box.ask("GET", "/health/live")).status == 200


@pytest.mark.anyio
async def test_each_scope_opens_its_own_doors(tmp_path: Path) -> None:
    async with scripted_box(tmp_path, require_api_key=True) as box:
        assert box.keys is not None
        secrets = {scope: box.keys.create(scope, [scope])[1] for scope in ("inference", "metrics", "admin")}
        for scope, path, status in (
            ("inference", "/v1/models", 200),
            ("inference", "/metrics", 403),
            ("metrics", "/metrics", 200),
            ("metrics", "/v1/models", 403),
            ("admin", "/metrics", 200),
            ("admin", "/v1/models", 200),
        ):
            reply = await with_key(box, secrets[scope], path=path)
            assert reply.status == status, (scope, path)
            if status == 403:
                assert scope in reply.error["message"]


@pytest.mark.anyio
async def test_a_revoked_key_stops_working_at_once(tmp_path: Path) -> None:
    async with scripted_box(tmp_path, require_api_key=True) as box:
        assert box.keys is not None
        key, secret = box.keys.create("temporary", ["inference"])
        assert (await with_key(box, secret)).status == 200
        box.keys.revoke(key.id)
        assert (await with_key(box, secret)).status == 401


@pytest.mark.anyio
async def test_an_open_box_passes_over_any_token_but_knows_its_tenants(tmp_path: Path) -> None:
    async with scripted_box(tmp_path) as box:
        assert box.keys is not None
        key, secret = box.keys.create("tenant", ["inference"])
        request = {"model": "tiny", "prompt": "Hello"}
        for token, tenant in (("none", ""), (secret, key.id)):
            sent = {"authorization": f"Bearer {token}"}
            assert (await box.ask("POST", "/v1/completions", request, headers=sent)).status == 200
            assert box.models.requests[-1].tenant == tenant


@pytest.mark.anyio
async def test_the_first_key_closes_an_insecure_box_and_revoking_it_does_not_open_it(tmp_path: Path) -> None:
    async with scripted_box(tmp_path, host="0.0.0.0", insecure=True) as box:
        assert box.keys is not None
        assert (await box.ask("GET", "/v1/models")).status == 200
        key, secret = box.keys.create("first", ["inference"])
        assert (await box.ask("GET", "/v1/models")).status == 401
        assert (await with_key(box, secret)).status == 200
        box.keys.revoke(key.id)
        assert (await box.ask("GET", "/v1/models")).status == 401
