"""The vector stores of a running server, as `appliance docs` uses them: one store, found by its name or id."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import quote

import msgspec

from appliance.cli.chat_wire import decode, encode
from appliance.cli.docs_wire import (
    Attribute,
    Passages,
    Store,
    StoreFile,
    StoreFilePage,
    StorePage,
    Uploaded,
    UploadedPage,
    Verification,
)
from appliance.core.errors import InvalidRequestError, NotFoundError

if TYPE_CHECKING:
    from appliance.cli.chat_client import ChatClient

PIECE_BYTES = 256 * 1024

EntryT = TypeVar("EntryT")


class DocsClient:
    """Speaks of files and vector stores over a client's connection."""

    def __init__(self, client: ChatClient) -> None:
        """Use a connection, which its owner closes."""
        self._client = client

    def find_store(self, name: str) -> Store:
        """Return the store of this name or id.

        Raises:
            NotFoundError: There is none; the message names those that exist.
            InvalidRequestError: Several have the name.
        """
        stores: list[Store] = list(self._pages("/vector_stores", StorePage))
        fitting = [each for each in stores if name in (each.name, each.id)]
        if len(fitting) > 1:
            ids = ", ".join(each.id for each in fitting)
            raise InvalidRequestError(
                f"{len(fitting)} stores are called {name!r}.", advice=f"Name one by its id: {ids}."
            )
        if not fitting:
            known = ", ".join(sorted(each.name or each.id for each in stores)) or "none"
            raise NotFoundError(
                f"There is no store {name!r}; there is {known}.", advice="`appliance docs add PATH` makes one."
            )
        return fitting[0]

    def make_store(self, name: str) -> Store:
        """Make an empty store."""
        return self._post("/vector_stores", {"name": name}, Store)

    def files(self, store: Store) -> list[StoreFile]:
        """Return all files of a store."""
        return list(self._pages(f"/vector_stores/{store.id}/files", StoreFilePage))

    def uploads(self) -> dict[str, Uploaded]:
        """Return all uploaded files by their ids."""
        return {each.id: each for each in self._pages("/files", UploadedPage)}

    def upload(self, path: Path, progress: Callable[[int], None]) -> Uploaded:
        """Send a file, a piece at a time.

        Args:
            path: What to send.
            progress: Called with the bytes of each piece.

        Raises:
            InvalidRequestError: The file cannot be read, or changes meanwhile.
            ApplianceError: The server cannot be reached, or refuses.
        """
        boundary = secrets.token_hex(16)
        name = path.name.encode("utf-8", "replace").replace(b"\\", b"_").replace(b'"', b"%22")
        head = (
            f'--{boundary}\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nassistants\r\n'
            f'--{boundary}\r\nContent-Disposition: form-data; name="file"; filename="'
        ).encode() + name.replace(b"\r", b"_").replace(b"\n", b"_")
        head += b'"\r\nContent-Type: application/octet-stream\r\n\r\n'
        tail = f"\r\n--{boundary}--\r\n".encode()
        try:
            size = path.stat().st_size

            def pieces() -> Iterator[bytes]:
                yield head
                with path.open("rb") as file:
                    left = size
                    while piece := file.read(min(PIECE_BYTES, left)):
                        left -= len(piece)
                        progress(len(piece))
                        yield piece
                if left:
                    raise InvalidRequestError(f"{path} has become shorter while it was read.", advice="Add it again.")
                yield tail

            body = self._client.call(
                "POST",
                "/files",
                pieces(),
                media_type=f"multipart/form-data; boundary={boundary}",
                length=len(head) + size + len(tail),
            )
        except OSError as error:
            raise InvalidRequestError(f"{path} cannot be read: {error.strerror}.", param="path") from error
        return decode(body, Uploaded, self._client.url)

    def take_in(self, store: Store, file: str, attributes: dict[str, Attribute]) -> StoreFile:
        """Queue an uploaded file to be taken into a store."""
        document = {"file_id": file, "attributes": attributes}
        return self._post(f"/vector_stores/{store.id}/files", document, StoreFile)

    def search(self, store: Store, query: str, limit: int, mode: str) -> Passages:
        """Return the passages that answer a query, best first."""
        document = {"query": query, "max_num_results": limit, "mode": mode}
        return self._post(f"/vector_stores/{store.id}/search", document, Passages)

    def erase(self, file: str) -> None:
        """Erase an uploaded file and all that was made of it."""
        self._client.call("DELETE", f"/files/{quote(file, safe='')}")

    def erase_store(self, store: Store) -> None:
        """Erase a store; its files stay."""
        self._client.call("DELETE", f"/vector_stores/{store.id}")

    def rebuild(self, store: Store) -> None:
        """Make a store's indexes anew."""
        self._client.call("POST", f"/vector_stores/{store.id}/rebuild")

    def reembed(self, store: Store) -> Store:
        """Have a store embedded with the model that the server's settings name."""
        return decode(self._client.call("POST", f"/vector_stores/{store.id}/reembed"), Store, self._client.url)

    def store(self, name: str) -> Store:
        """Return the store of this id."""
        return self._get(f"/vector_stores/{quote(name, safe='')}", Store)

    def verify(self, store: Store) -> Verification:
        """Return what is wrong with a store's indexes."""
        return self._get(f"/vector_stores/{store.id}/verify", Verification)

    def _get(self, path: str, kind: type[EntryT]) -> EntryT:
        return decode(self._client.call("GET", path), kind, self._client.url)

    def _post(self, path: str, document: dict[str, Any], kind: type[EntryT]) -> EntryT:
        return decode(self._client.call("POST", path, encode(document)), kind, self._client.url)

    def _pages(self, path: str, kind: type[msgspec.Struct]) -> Iterator[Any]:
        """Yield the entries of all pages of a list, oldest first."""
        after = ""
        while True:
            page: Any = self._get(f"{path}?limit=100&order=asc{after}", kind)
            yield from page.data
            if not page.has_more or not page.data:
                return
            after = f"&after={quote(page.data[-1].id, safe='')}"
