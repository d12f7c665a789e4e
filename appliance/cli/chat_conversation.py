"""A conversation in the terminal: what has been said, kept in memory and in files."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import msgspec

from appliance.cli.chat_wire import Message
from appliance.core.errors import ConflictError, InvalidRequestError, StorageError

LARGEST_FILE_BYTES = 64 * 1024 * 1024


class SavedConversation(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A conversation as a file has it: JSON, with the messages as the API takes them."""

    model: str
    messages: list[Message]


class Conversation:
    """The system prompt and the exchanges so far, each a question and its answer."""

    def __init__(self, system: str = "") -> None:
        """Begin with nothing said; an empty system prompt is none."""
        self.system = system
        self._said: list[Message] = []

    @property
    def messages(self) -> list[Message]:
        """Return all messages in order."""
        return ([Message("system", self.system)] if self.system else []) + self._said

    def with_question(self, question: str) -> list[Message]:
        """Return the messages to send; nothing is kept until there is an answer."""
        return [*self.messages, Message("user", question)]

    def keep(self, question: str, answer: str) -> None:
        """Add an exchange."""
        self._said += [Message("user", question), Message("assistant", answer)]

    def take_back(self) -> str | None:
        """Remove the last exchange and return its question, or None if there is none."""
        while self._said:
            message = self._said.pop()
            if message.role == "user":
                return message.content
        return None

    def clear(self) -> None:
        """Forget all exchanges; the system prompt stays."""
        self._said.clear()

    def save(self, path: Path, model: str) -> None:
        """Write the conversation to a file, which appears whole or not at all.

        Raises:
            ConflictError: The file exists and holds something else.
            StorageError: It cannot be written.
        """
        if path.exists():
            try:
                _read(path)
            except InvalidRequestError as error:
                raise ConflictError(
                    f"{path} exists and is no saved conversation.", advice="It was left as it is; choose another name."
                ) from error
        body = msgspec.json.format(msgspec.json.encode(SavedConversation(model, self.messages)), indent=2)
        try:
            with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
                temporary = Path(file.name)
                try:
                    file.write(body + b"\n")
                    file.flush()
                    os.fsync(file.fileno())
                    temporary.replace(path)
                except BaseException:
                    temporary.unlink(missing_ok=True)
                    raise
        except OSError as error:
            raise StorageError(
                f"{path} cannot be written: {error.strerror}.", advice="Choose another place."
            ) from error

    def load(self, path: Path) -> str:
        """Replace everything by a saved conversation and return the model it was held with.

        Raises:
            InvalidRequestError: The file cannot be read or holds something else; nothing has changed.
        """
        saved = _read(path)
        messages = list(saved.messages)
        self.system = messages.pop(0).content if messages and messages[0].role == "system" else ""
        self._said = messages
        return saved.model


def _read(path: Path) -> SavedConversation:
    try:
        if path.stat().st_size > LARGEST_FILE_BYTES:
            raise InvalidRequestError(f"{path} has more than {LARGEST_FILE_BYTES} bytes.")
        return msgspec.json.decode(path.read_bytes(), type=SavedConversation)
    except OSError as error:
        raise InvalidRequestError(f"{path} cannot be read: {error.strerror}.") from error
    except msgspec.DecodeError as error:
        raise InvalidRequestError(f"{path} is no saved conversation: {error}.") from error
