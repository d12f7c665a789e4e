"""`/v1/files`: by the official client, and by those who send broken forms, slowly or by halves."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import openai
import pytest

from tests.api.boxes import Reply, ScriptedBox, scripted_box, until, wire

pytestmark = pytest.mark.anyio

BOUNDARY = "----0123456789"
TEXT = b"The filter is changed every year.\n"


@pytest.fixture
async def client(box: ScriptedBox) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(base_url=f"{box.url}/v1", api_key="any", max_retries=0, timeout=60) as each:
        yield each


def part(name: str, value: bytes, filename: str | None = None) -> bytes:
    """Return one part of a form."""
    file = "" if filename is None else f'; filename="{filename}"'
    head = f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="{name}"{file}\r\n\r\n'
    return head.encode() + value + b"\r\n"


END = f"--{BOUNDARY}--\r\n".encode()
FILE = part("file", TEXT, "manual.txt")
PURPOSE = part("purpose", b"assistants")


async def send(box: ScriptedBox, body: bytes, media_type: str = f"multipart/form-data; boundary={BOUNDARY}") -> Reply:
    return await box.ask("POST", "/v1/files", body=body, headers={"content-type": media_type})


async def test_a_file_comes_back_as_it_was_sent(client: openai.AsyncOpenAI) -> None:
    content = bytes(range(256)) * 2000 + b"\r\n--x\r\n" * 1000
    sent = await client.files.create(file=('手册 "1" é.bin', content), purpose="user_data")
    assert sent.id.startswith("file-")
    assert (sent.object, sent.bytes, sent.purpose, sent.status) == ("file", len(content), "user_data", "processed")
    assert sent.filename.startswith("手册")
    assert sent.expires_at is None
    assert await client.files.retrieve(sent.id) == sent
    answer = await client.files.content(sent.id)
    assert answer.content == content
    assert answer.response.headers["content-type"] == "application/octet-stream"
    assert answer.response.headers["content-disposition"].startswith("attachment; filename*=UTF-8''%E6%89%8B")


async def test_a_file_can_be_given_a_time_to_live(client: openai.AsyncOpenAI) -> None:
    sent = await client.files.create(
        file=("a.txt", TEXT), purpose="assistants", expires_after={"anchor": "created_at", "seconds": 3600}
    )
    assert sent.expires_at == sent.created_at + 3600


async def test_files_are_listed_in_pages_and_by_purpose(client: openai.AsyncOpenAI) -> None:
    sent = [(await client.files.create(file=(f"{each}.txt", TEXT), purpose="assistants")).id for each in range(5)]
    other = await client.files.create(file=("v.txt", TEXT), purpose="vision")
    assert [each.id async for each in client.files.list(limit=2, order="asc")] == [*sent, other.id]
    assert [each.id async for each in client.files.list(limit=2)] == [other.id, *reversed(sent)]
    assert [each.id async for each in client.files.list(purpose="vision")] == [other.id]
    first = await client.files.list(limit=2, order="asc")
    assert first.has_more is True


async def test_a_deleted_file_is_gone(client: openai.AsyncOpenAI, box: ScriptedBox) -> None:
    sent = await client.files.create(file=("a.txt", TEXT), purpose="assistants")
    gone = await client.files.delete(sent.id)
    assert (gone.id, gone.deleted, gone.object) == (sent.id, True, "file")
    for call in (client.files.retrieve, client.files.delete, client.files.content):
        with pytest.raises(openai.NotFoundError, match=sent.id):
            await call(sent.id)
    assert box.files.contents == {}


async def test_what_is_behind_the_file_in_the_form_counts_too(box: ScriptedBox) -> None:
    expiry = part("expires_after[anchor]", b"created_at") + part("expires_after[seconds]", b"7200")
    answer = (await send(box, FILE + PURPOSE + expiry + END)).json()
    assert (answer["filename"], answer["purpose"], answer["bytes"]) == ("manual.txt", "assistants", len(TEXT))
    assert answer["expires_at"] == answer["created_at"] + 7200


async def test_a_name_with_folders_becomes_the_files_own(box: ScriptedBox) -> None:
    answer = await send(box, PURPOSE + part("file", TEXT, "../../etc/passwd") + END)
    assert answer.json()["filename"] == "passwd"


BAD_FORMS: list[tuple[str, bytes, str]] = [
    ("no file", PURPOSE + END, "invalid_value"),
    ("a file without a name", PURPOSE + part("file", TEXT) + END, "invalid_value"),
    ("no purpose", FILE + END, "invalid_value"),
    ("an unknown purpose", part("purpose", b"fun") + FILE + END, "invalid_value"),
    ("an unknown field", PURPOSE + part("colour", b"red") + FILE + END, "unknown_parameter"),
    ("an unknown field behind the file", PURPOSE + FILE + part("colour", b"red") + END, "unknown_parameter"),
    ("half an expiry", PURPOSE + part("expires_after[seconds]", b"7200") + FILE + END, "invalid_value"),
    (
        "too short an expiry",
        PURPOSE + part("expires_after[anchor]", b"created_at") + part("expires_after[seconds]", b"1") + FILE + END,
        "invalid_value",
    ),
    ("two files", PURPOSE + FILE + FILE + END, "invalid_form"),
    ("a field twice", PURPOSE + PURPOSE + FILE + END, "invalid_form"),
    ("too many fields", b"".join(part(f"f{each}", b"x") for each in range(17)) + FILE + END, "invalid_form"),
    ("a field that is too long", part("purpose", b"x" * 10_000) + FILE + END, "invalid_form"),
    ("no end", PURPOSE + FILE, "invalid_form"),
    ("half a file", PURPOSE + FILE[:-20], "invalid_form"),
    ("another boundary", PURPOSE.replace(b"0123", b"3210"), "invalid_form"),
    ("nothing", b"", "invalid_form"),
    ("a name that is not UTF-8", PURPOSE + FILE.replace(b"manual", b"\xff\xfe") + END, "invalid_value"),
    ("a field with NUL", part("purpose", b"assistants\0") + FILE + END, "invalid_value"),
    ("an empty file", PURPOSE + part("file", b"", "a.txt") + END, "empty_file"),
    (
        "a header that is too long",
        PURPOSE + FILE.replace(b"form-data", b"form-data" + b";" * 9000) + END,
        "invalid_form",
    ),
]


@pytest.mark.parametrize(("body", "code"), [each[1:] for each in BAD_FORMS], ids=[each[0] for each in BAD_FORMS])
async def test_a_bad_form_leaves_nothing(box: ScriptedBox, body: bytes, code: str) -> None:
    reply = await send(box, body)
    assert (reply.status, reply.error["code"]) == (400, code)
    assert box.files.contents == {}
    assert (await box.ask("GET", "/health")).status == 200


@pytest.mark.parametrize(
    ("media_type", "status", "code"),
    [
        ("application/json", 415, "unsupported_media_type"),
        ("multipart/mixed; boundary=a", 415, "unsupported_media_type"),
        ("multipart/form-data", 400, "invalid_form"),
        (f"multipart/form-data; boundary={'a' * 71}", 400, "invalid_form"),
    ],
)
async def test_what_is_no_form_is_refused(box: ScriptedBox, media_type: str, status: int, code: str) -> None:
    reply = await send(box, PURPOSE + FILE + END, media_type)
    assert (reply.status, reply.error["code"]) == (status, code)


@pytest.mark.parametrize(
    "query",
    ["limit=0", "limit=10001", "limit=x", "order=up", "purpose=fun", "colour=red", "limit=1&limit=2", "before=x"],
)
async def test_a_bad_query_is_refused(box: ScriptedBox, query: str) -> None:
    reply = await box.ask("GET", f"/v1/files?{query}")
    assert reply.status == 400
    assert reply.error["param"] == query.partition("=")[0]


async def test_a_file_over_the_limit_is_refused_before_it_has_come(tmp_path: Path) -> None:
    async with scripted_box(tmp_path, max_file_bytes=1000) as box:
        reply = await send(box, PURPOSE + part("file", b"x" * 200_000, "a.txt") + END)
        assert (reply.status, reply.error["code"]) == (413, "too_large")
        assert "max_file_bytes" in reply.error["message"]
        reply = await send(box, PURPOSE + part("file", b"x" * 1001, "a.txt") + END)
        assert (reply.status, reply.error["code"]) == (413, "file_too_large")
        assert (await send(box, PURPOSE + part("file", b"x" * 1000, "a.txt") + END)).status == 200
        assert len(box.files.contents) == 1


def head(length: int, *more: str) -> bytes:
    lines = [
        "POST /v1/files HTTP/1.1",
        "Host: 127.0.0.1",
        f"Content-Type: multipart/form-data; boundary={BOUNDARY}",
        f"Content-Length: {length}",
        *more,
    ]
    return "\r\n".join([*lines, "", ""]).encode()


async def test_a_client_that_leaves_in_the_middle_leaves_nothing(box: ScriptedBox) -> None:
    async with wire(box) as one:
        await one.send(head(10_000_000) + PURPOSE + part("file", b"x" * 100_000, "a.txt")[:-2])
        await until(lambda: box.files.received > 0)
    await until(lambda: box.files.broken == 1)
    assert box.files.contents == {}


async def test_a_file_is_handed_on_before_the_form_has_come(box: ScriptedBox) -> None:
    piece = b"y" * 50_000
    body = PURPOSE + part("file", piece + piece, "a.txt") + END
    begun = body.index(piece) + len(piece)
    async with wire(box) as one:
        await one.send(head(len(body)) + body[:begun])
        await until(lambda: box.files.received >= len(piece) - 100)
        assert box.files.contents == {}
        await one.send(body[begun:])
        assert (await one.read_reply()).json()["bytes"] == 2 * len(piece)


async def test_a_client_that_is_too_slow_is_told_so_and_leaves_nothing(tmp_path: Path) -> None:
    async with scripted_box(tmp_path, body_timeout_s=0.2) as box, wire(box) as one:
        await one.send(head(100_000) + PURPOSE + FILE[:-20])
        reply = await one.read_reply()
        assert (reply.status, reply.error["code"]) == (400, "body_timeout")
        assert box.files.broken == 1
        assert box.files.contents == {}


async def test_each_key_sees_its_own_files_only(tmp_path: Path) -> None:
    async with scripted_box(tmp_path, require_api_key=True) as box:
        assert box.keys is not None
        mine, others = ({"authorization": f"Bearer {box.keys.create(name, ['inference'])[1]}"} for name in ("a", "b"))
        form = {"content-type": f"multipart/form-data; boundary={BOUNDARY}"}
        sent: Any = (await box.ask("POST", "/v1/files", body=PURPOSE + FILE + END, headers=mine | form)).json()
        assert (await box.ask("GET", f"/v1/files/{sent['id']}", headers=mine)).status == 200
        for method, path in (("GET", ""), ("GET", "/content"), ("DELETE", "")):
            assert (await box.ask(method, f"/v1/files/{sent['id']}{path}", headers=others)).status == 404
        assert (await box.ask("GET", "/v1/files", headers=others)).json()["data"] == []
        assert len(box.files.contents) == 1


async def test_an_upload_has_its_time_for_each_mebibyte(tmp_path: Path) -> None:
    body = PURPOSE + part("file", b"z" * 3_000_000, "a.txt") + END
    async with scripted_box(tmp_path, body_timeout_s=0.5, max_file_bytes=4_000_000) as box, wire(box) as one:
        loop = asyncio.get_running_loop()
        started = loop.time()
        await one.send(head(len(body)) + body[:2_500_000])
        await until(lambda: box.files.received > 2_300_000)
        await until(lambda: loop.time() > started + 0.6)  # longer than a body without a file has
        await one.send(body[2_500_000:])
        assert (await one.read_reply()).status == 200
