"""E-mail: what its head says, the text that a reader would be shown, and the names of what is attached."""

from __future__ import annotations

from email import policy
from email.errors import HeaderParseError
from email.header import decode_header, make_header
from email.message import Message
from email.parser import BytesParser
from pathlib import Path

from appliance.retrieval.parsing.decoding import decode
from appliance.retrieval.parsing.html import write_html
from appliance.retrieval.parsing.plain import write_plain
from appliance.retrieval.parsing.source import read_bytes
from appliance.retrieval.parsing.writer import BlockWriter, one_line

MOST_PARTS = 10_000
_SHOWN = ("From", "To", "Cc", "Date")


def read(path: Path, writer: BlockWriter) -> None:
    """Take the text from a file; messages within the message follow it."""
    message = BytesParser(policy=policy.compat32).parsebytes(read_bytes(path, writer.max_characters))
    attachments: list[str] = []
    waiting: list[Message] = [message]
    seen = 0
    while waiting and seen < MOST_PARTS:
        part = waiting.pop()
        seen += 1
        if part is message or part.get_content_type() == "message/rfc822":
            _write_head(part if part is message else _inner(part), writer)
        if name := part.get_filename():
            attachments.append(one_line(_decoded(name)))
        elif part.is_multipart():
            waiting += reversed(_shown_parts(part))
        elif part.get_content_maintype() == "text":
            _write_text(part, writer)
    if attachments:
        writer.add("list", "\n".join(["Attachments:", *(f"- {each}" for each in attachments)]))


def _shown_parts(part: Message) -> list[Message]:
    """Return the parts that a reader would be shown: of several forms of one text the plain one."""
    parts = [each for each in _payload(part) if isinstance(each, Message)]
    if part.get_content_type() != "multipart/alternative":
        return parts
    plain = [each for each in parts if each.get_content_type() == "text/plain"]
    return plain[:1] if plain and _text(plain[0]).strip() else parts[-1:]


def _payload(part: Message) -> list[object]:
    payload = part.get_payload()
    return list(payload) if isinstance(payload, list) else []


def _inner(part: Message) -> Message:
    inner = _payload(part)
    return inner[0] if inner and isinstance(inner[0], Message) else Message()


def _write_head(message: Message, writer: BlockWriter) -> None:
    subject = one_line(_header(message, "Subject"))
    writer.name(subject)
    writer.heading(subject, 1)
    shown = [(name, one_line(_header(message, name))) for name in _SHOWN]
    writer.add("paragraph", "\n".join(f"{name}: {value}" for name, value in shown if value))


def _write_text(part: Message, writer: BlockWriter) -> None:
    text = _text(part)
    if part.get_content_subtype() == "html":
        write_html(text, writer)
    else:
        write_plain(text, writer)


def _text(part: Message) -> str:
    data = part.get_payload(decode=True)
    return decode(data, part.get_content_charset("")) if isinstance(data, bytes) else ""


def _header(message: Message, name: str) -> str:
    """Return the first header of a name, in which bytes that are not ASCII still are as they came."""
    found = (str(value) for key, value in message.raw_items() if key.lower() == name.lower())
    return _decoded(next(found, ""))


def _decoded(value: str) -> str:
    """Return a header's text; one whose encoding is damaged stays as it is."""
    raw = value.encode("ascii", "surrogateescape") if not value.isascii() and _is_raw(value) else b""
    if raw:
        return decode(raw)
    try:
        return str(make_header(decode_header(value)))
    except (HeaderParseError, LookupError, ValueError):
        return value


def _is_raw(value: str) -> bool:
    """Return True if all that is not ASCII are bytes that the mail should not have had in its head."""
    return all(ord(each) < 128 or "\udc80" <= each <= "\udcff" for each in value)
