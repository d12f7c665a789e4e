"""Texts become token ids, by the `tokenizer.json` of the model.

The file's own truncation and padding are off: inputs are cut here, so that a caller hears of it, and padded when a
batch is made. What the post-processor puts around a text or a pair is learned once, from a sample, and so kept where a
text is cut. Special tokens that a text spells out, such as `[SEP]`, are plain text: no document ends itself early.
"""

from __future__ import annotations

import os
from array import array
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from appliance.core.errors import ApplianceError, EngineError, ModelFileError

LARGEST_FILE = 64 * 2**20
"""Bytes of a `tokenizer.json`; that of a vocabulary of 250,000 tokens has 17 MB."""
LARGEST_ID = 2**31 - 1
READ_CHARACTERS = 65_536
"""Characters that are tokenized together: the library needs some 110 bytes for each meanwhile."""
MOST_CHARACTERS = 16 * READ_CHARACTERS
"""Characters of a text after which it counts as too long, however few tokens they are."""
_LONG = 48
_SAMPLES = ("", "Hello, world! 你好，世界。 1.5", *(character * _LONG + "!" for character in "a1 é你\n"))


@dataclass(frozen=True, slots=True, eq=False)
class Row:
    """The tokens of a text or of a pair of texts as the model reads them.

    Attributes:
        types: Each token's segment, or None if all are 0.
        whole: Tokens before it was cut to `tokens`.
        counted: Whether those are all; of a text that is far too long only the start is read.
    """

    tokens: array[int]
    types: array[int] | None
    whole: int
    counted: bool = True


@dataclass(frozen=True, slots=True)
class _Text:
    """A text's own tokens, and whether they are all."""

    tokens: array[int]
    counted: bool = True


@dataclass(frozen=True, slots=True)
class _Piece:
    """What the post-processor puts in one place."""

    tokens: array[int]
    types: array[int]


@dataclass(frozen=True, slots=True)
class _Template:
    """What the post-processor puts around and between texts, one piece more than texts; and each text's segment."""

    pieces: tuple[_Piece, ...]
    segments: tuple[int, ...]

    @property
    def added(self) -> int:
        return sum(len(each.tokens) for each in self.pieces)

    def around(self, texts: Sequence[_Text], kept: Sequence[int]) -> Row:
        """Return the row of texts of which so much is kept."""
        tokens, types = self.pieces[0].tokens[:], self.pieces[0].types[:]
        for text, count, segment, piece in zip(texts, kept, self.segments, self.pieces[1:], strict=True):
            tokens += text.tokens[:count] + piece.tokens
            types += array("i", [segment]) * min(count, len(text.tokens)) + piece.types
        whole = self.added + sum(len(each.tokens) for each in texts)
        return Row(tokens, types if any(types) else None, whole, all(each.counted for each in texts))


class TextTokenizer:
    """One model's tokenizer; any thread may use it.

    Attributes:
        vocabulary_size: Ids go from 0 to one less.
    """

    def __init__(
        self, path: Path, *, vocabulary_size: int | None = None, lower_case: bool = False, prompt: str = ""
    ) -> None:
        """Read the file and try it.

        Args:
            path: The `tokenizer.json`.
            vocabulary_size: Tokens that the model knows, None for as many as the tokenizer has.
            lower_case: Texts are made lower case first.
            prompt: What stands in front of every text that is no pair.

        Raises:
            ModelFileError: The file is damaged or too large, or makes the library fail.
        """
        self._lower_case = lower_case
        self._prompt = prompt
        with _ours(ModelFileError, "The model's tokenizer.json cannot be used"):
            self._tokenizer = _read(path)
            self.vocabulary_size = vocabulary_size or self._tokenizer.get_vocab_size(with_added_tokens=True)
            self._tokenizer.encode_batch_fast(list(_SAMPLES), add_special_tokens=True)
            self._text, self._pair = (_learned(self._tokenizer, texts) for texts in (1, 2))
        for piece in (*self._text.pieces, *self._pair.pieces):
            if any(each >= self.vocabulary_size for each in piece.tokens):
                raise ModelFileError(
                    f"The tokenizer adds a token that the model does not know; it knows {self.vocabulary_size}.",
                    advice="Import the tokenizer.json that belongs to the model.",
                )

    @property
    def added(self) -> int:
        """Return how many tokens are put around a text, or around a pair if that is more."""
        return max(self._text.added, self._pair.added)

    def texts(self, texts: Sequence[str], longest: int) -> list[Row]:
        """Return the tokens of each text with those that the model wants around it, cut to `longest`.

        Raises:
            EngineError: The tokenizer failed on them.
        """
        room = longest - self._text.added
        texts = [self._prompt + each for each in texts] if self._prompt else texts
        return [self._text.around([each], [room]) for each in self._plain(texts, longest)]

    def counts(self, texts: Sequence[str]) -> list[int]:
        """Return how many tokens each text has, uncut, those that the model wants around it included.

        Raises:
            EngineError: The tokenizer failed on them.
        """
        return [row.whole for row in self.texts(texts, self._text.added)]

    def pairs(self, first: str, seconds: Sequence[str], longest: int) -> list[Row]:
        """Return the tokens of each pair as the model reads it; the longer text of one that is too long is cut first.

        Raises:
            EngineError: The tokenizer failed on them.
        """
        room = longest - self._pair.added
        head, *tails = self._plain([first, *seconds], longest)
        return [self._pair.around([head, tail], shares(len(head.tokens), len(tail.tokens), room)) for tail in tails]

    def _plain(self, texts: Sequence[str], longest: int) -> list[_Text]:
        """Return each text's own tokens: all, or of one that is far too long more than `longest`."""
        found: list[_Text] = []
        group: list[str] = []
        room = READ_CHARACTERS
        for text in texts:
            if len(text) > room:
                found += [_Text(each) for each in self._read(group)]
                group, room = [], READ_CHARACTERS
            if len(text) > READ_CHARACTERS:
                found.append(self._start(text, longest))
            else:
                group.append(text)
                room -= len(text)
        return found + [_Text(each) for each in self._read(group)]

    def _start(self, text: str, longest: int) -> _Text:
        size = READ_CHARACTERS
        [tokens] = self._read([text[:size]])
        while len(tokens) <= longest and size < min(len(text), MOST_CHARACTERS):
            size *= 2
            [tokens] = self._read([text[:size]])
        return _Text(tokens, counted=size >= len(text))

    def _read(self, texts: Sequence[str]) -> list[array[int]]:
        texts = [each.lower() for each in texts] if self._lower_case else texts
        with _ours(EngineError, "The model's tokenizer failed"):
            found = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
            return [self._checked(each.ids) for each in found]

    def _checked(self, tokens: list[int]) -> array[int]:
        if tokens and max(tokens) >= self.vocabulary_size:
            raise EngineError(
                f"The tokenizer makes token {max(tokens)} of a text; the model knows 0 to {self.vocabulary_size - 1}.",
                advice="Import the tokenizer.json that belongs to the model.",
            )
        return array("i", tokens)


def shares(first: int, second: int, room: int) -> tuple[int, int]:
    """Return how much of two texts stays where both have `room` tokens: the longer is cut first, then both alike."""
    if first + second <= room:
        return first, second
    half = room // 2
    if first <= half:
        return first, room - first
    if second <= half:
        return room - second, second
    return (half, room - half) if first <= second else (room - half, half)


def _read(path: Path) -> Any:
    from tokenizers import Tokenizer  # noqa: PLC0415 - it takes 50 ms, and other models need none

    # The library has a pool of a thread for each core, beside the engines' own; read when it is used.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    size = path.stat().st_size
    if size > LARGEST_FILE:
        raise ModelFileError(f"The model's tokenizer.json has {size} bytes; {LARGEST_FILE} are allowed.")
    tokenizer = Tokenizer.from_str(path.read_text(encoding="utf-8"))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True
    return tokenizer


def _learned(tokenizer: Any, texts: int) -> _Template:
    sample = tokenizer.encode("a", "a" if texts == 2 else None)
    owners, ids, types = sample.sequence_ids, sample.ids, sample.type_ids
    spans = [[at for at, owner in enumerate(owners) if owner == text] for text in range(texts)]
    ends = [0]
    for span in spans:
        if not span or span != list(range(span[0], span[-1] + 1)) or span[0] < ends[-1]:
            raise ModelFileError("The tokenizer.json leaves out a text, or changes the order of two.")
        ends += [span[0], span[-1] + 1]
    ends.append(len(ids))
    if max(ids) > LARGEST_ID:
        raise ModelFileError(f"The tokenizer.json has token {max(ids)}; {LARGEST_ID} is the last possible.")
    pieces = (
        _Piece(array("i", ids[start:end]), array("i", types[start:end]))
        for start, end in zip(ends[::2], ends[1::2], strict=True)
    )
    return _Template(tuple(pieces), tuple(types[span[0]] for span in spans))


@contextmanager
def _ours(kind: type[ApplianceError], what: str) -> Iterator[None]:
    """Turn whatever the library raises into one of ours; a panic in Rust is no `Exception`, and has no public type."""
    try:
        yield
    except ApplianceError:
        raise
    except OSError as error:
        raise kind(f"{what}: {error.strerror}.") from error
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise kind(f"{what}: {error!s:.200}.") from error
