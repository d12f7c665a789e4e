"""Reading a form with one file (multipart/form-data, RFC 7578) as it comes: the file is handed on, never held.

The file may stand before, between or behind the other fields. What is behind it is known when its content has ended.
"""

from __future__ import annotations

from collections import deque
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.requests import Request

from appliance.core.errors import InvalidRequestError
from appliance.web.disconnect import ClientGoneError

MOST_FIELDS = 16
MOST_FIELD_BYTES = 8 * 1024


@dataclass(slots=True)
class _Part:
    """One part of a form: its name, and the file's name if it is one."""

    headers: dict[str, str] = field(default_factory=dict)
    name: str = ""
    filename: str | None = None
    value: bytearray = field(default_factory=bytearray)


class UploadForm:
    """A form that is being received.

    Attributes:
        fields: Those that have come, by name.
        filename: The file's, once it has begun.
    """

    def __init__(self, request: Request, file_field: str = "file") -> None:
        """Prepare to read a request's form.

        Raises:
            InvalidRequestError: The body is no form, or has no boundary.
        """
        self.fields: dict[str, str] = {}
        self.filename: str | None = None
        self._request = request
        self._file_field = file_field
        self._pieces: deque[bytes] = deque()
        self._part = _Part()
        self._header = (bytearray(), bytearray())
        self._more = True
        self._ended = False
        self._parser = MultipartParser(
            _boundary(request),
            {
                "on_part_begin": self._on_part_begin,
                "on_header_begin": self._on_header_begin,
                "on_header_field": self._on_header_field,
                "on_header_value": self._on_header_value,
                "on_header_end": self._on_header_end,
                "on_headers_finished": self._on_headers_finished,
                "on_part_data": self._on_part_data,
                "on_part_end": self._on_part_end,
                "on_end": self._on_end,
            },
        )

    async def begin(self) -> str:
        """Read up to the file, and return its name.

        Raises:
            InvalidRequestError: The form is broken, or has no file.
            TooLargeError: The body is over the limit.
            ClientGoneError: The client left.
        """
        while self.filename is None and self._more:
            await self._read()
        if self.filename is None:
            raise InvalidRequestError(
                f"The form has no file {self._file_field!r}.",
                advice=f"Send it as a part of the name {self._file_field!r} that has a file name.",
                param=self._file_field,
                code="invalid_value",
            )
        return self.filename

    async def content(self) -> AsyncIterator[bytes]:
        """Yield the file piece by piece, and read the form to its end. Raises as `begin` does."""
        while self._more or self._pieces:
            while self._pieces:
                yield self._pieces.popleft()
            if self._more:
                await self._read()

    async def _read(self) -> None:
        """Take in what comes next."""
        message = await self._request.receive()
        if message["type"] == "http.disconnect":
            raise ClientGoneError
        self._more = bool(message.get("more_body", False))
        try:
            self._parser.write(message.get("body", b""))
        except FormParserError as error:
            raise _broken(f"is no valid form: {error}") from error
        if not self._more and not self._ended:
            raise _broken("ends before the form does")

    # What the parser finds. It is called for each piece of a name or value, and for each piece of a part.

    def _on_part_begin(self) -> None:
        self._part = _Part()

    def _on_header_begin(self) -> None:
        self._header = (bytearray(), bytearray())

    def _on_header_field(self, data: bytes, start: int, end: int) -> None:
        self._header[0].extend(data[start:end])

    def _on_header_value(self, data: bytes, start: int, end: int) -> None:
        self._header[1].extend(data[start:end])

    def _on_header_end(self) -> None:
        name, value = (bytes(each).decode("latin-1") for each in self._header)
        self._part.headers[name.lower()] = value

    def _on_headers_finished(self) -> None:
        part = self._part
        _, options = parse_options_header(part.headers.get("content-disposition", ""))
        part.name = _text(options.get(b"name", b""), "The name of a form's field")
        if b"filename" in options:
            part.filename = _text(options[b"filename"], "The file's name")
        if part.name == self._file_field and part.filename is not None:
            if self.filename is not None:
                raise _broken("has two files", self._file_field)
            self.filename = part.filename.rpartition("/")[2]
        elif len(self.fields) == MOST_FIELDS:
            raise _broken(f"has more than {MOST_FIELDS} fields")
        elif part.name in self.fields:
            raise _broken(f"has the field {part.name[:100]!r} twice", part.name[:100])

    def _on_part_data(self, data: bytes, start: int, end: int) -> None:
        part = self._part
        if part.name == self._file_field and part.filename is not None:
            self._pieces.append(data[start:end])
            return
        if len(part.value) + end - start > MOST_FIELD_BYTES:
            raise _broken(f"has more than {MOST_FIELD_BYTES} bytes in the field {part.name[:100]!r}", part.name[:100])
        part.value += data[start:end]

    def _on_part_end(self) -> None:
        part = self._part
        if part.name != self._file_field or part.filename is None:
            self.fields[part.name] = _text(bytes(part.value), f"The field {part.name[:100]!r}")

    def _on_end(self) -> None:
        self._ended = True


def _boundary(request: Request) -> bytes:
    media_type, options = parse_options_header(request.headers.get("content-type", ""))
    if media_type != b"multipart/form-data":
        raise InvalidRequestError(
            f"The request body is {media_type.decode('latin-1')[:100]!r}.",
            advice="Send a form, with `Content-Type: multipart/form-data`.",
            code="unsupported_media_type",
        )
    boundary = options.get(b"boundary", b"")
    if not 1 <= len(boundary) <= 70:  # RFC 2046
        raise _broken("has no boundary of 1 to 70 characters in its Content-Type")
    return boundary


def _text(value: bytes, what: str) -> str:
    try:
        text = value.decode()
    except UnicodeDecodeError as error:
        raise InvalidRequestError(f"{what} is not UTF-8.", code="invalid_value") from error
    if "\0" in text:
        raise InvalidRequestError(f"{what} holds a NUL character.", code="invalid_value")
    return text


def _broken(problem: str, param: str | None = None) -> InvalidRequestError:
    return InvalidRequestError(f"The request body {problem}.", param=param, code="invalid_form")
