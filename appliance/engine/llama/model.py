"""A GGUF file's weights and vocabulary."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

from appliance.core.errors import EngineError, InvalidRequestError, ModelFileError
from appliance.engine.llama.memory import MemoryKind
from appliance.engine.llama.native import initialize, llama, short

_UNKNOWN = 1 << 0
_CONTROL = 1 << 3
_USER_DEFINED = 1 << 4
"""`llama_token_attr` bits. A chat template writes control and user-defined tokens as text; in an answer unknown and
control tokens stand for no text."""
_TEXT_LIMIT = 2**31 - 1
_METADATA_BYTES = 256
"""Longer values of the header are cut; numbers and names are shorter."""


class LlamaModel:
    """Weights mapped into memory, and the vocabulary.

    Any thread may use the vocabulary at any time: while someone does, `close` leaves the memory to the last user, and
    afterwards they get an EngineError instead of freed memory.

    Attributes:
        training_context: Tokens of context the model was trained on.
        vocabulary_size: Number of token ids.
        memory: How the model remembers: what of a sequence's past can be reused.
        end_tokens: Ids that end a generation.
        building: Held while a context is made, or an adapter is loaded or freed: llama.cpp makes room in every context
            for all adapters that there are.
    """

    def __init__(self, path: Path, *, gpu_layers: int) -> None:
        """Load the file.

        Raises:
            ModelFileError: llama.cpp refuses it; its log lines say why.
        """
        initialize()
        parameters = llama.llama_model_default_params()
        parameters.n_gpu_layers = gpu_layers if gpu_layers >= 0 else _TEXT_LIMIT
        self.handle = llama.llama_model_load_from_file(str(path).encode(), parameters)
        if not self.handle:
            raise ModelFileError(
                f"llama.cpp cannot load {path.name}.",
                advice="`appliance models verify` checks the file; the log has llama.cpp's own words.",
            )
        self._lock = threading.Lock()
        self.building = threading.Lock()
        self._owners = 1
        self._users = 0
        self._closed = False
        self._vocabulary = short.llama_model_get_vocab(self.handle)
        self._pieces: dict[int, bytes] = {}
        self.vocabulary_size: int = short.llama_vocab_n_tokens(self._vocabulary)
        self.training_context: int = short.llama_model_n_ctx_train(self.handle)
        self.memory = MemoryKind(
            window=short.llama_model_n_swa(self.handle),
            recurrent=short.llama_model_is_recurrent(self.handle) or short.llama_model_is_hybrid(self.handle),
        )
        tokens = range(self.vocabulary_size)
        self.end_tokens = frozenset(each for each in tokens if short.llama_vocab_is_eog(self._vocabulary, each))

    def share(self) -> LlamaModel:
        """Return the model for one more owner; each owner closes it once.

        Raises:
            EngineError: The model was unloaded.
        """
        with self._in_use(), self._lock:
            self._owners += 1
        return self

    def close(self) -> None:
        """Give the weights up: the last owner frees them, or has the last user of the vocabulary do so."""
        with self._lock:
            self._owners -= 1
            last = self._owners == 0
            self._closed = self._closed or last
            unused = self._users == 0
        if last and unused:
            self._free()

    @contextmanager
    def _in_use(self) -> Iterator[None]:
        with self._lock:
            if self._closed:
                raise EngineError("The model was unloaded.", advice="Send the request again.", code="model_unloaded")
            self._users += 1
        try:
            yield
        finally:
            self._leave()

    def _leave(self) -> None:
        with self._lock:
            self._users -= 1
            last = self._closed and self._users == 0
        if last:
            self._free()

    def _free(self) -> None:
        llama.llama_model_free(self.handle)
        self.handle = None

    @cached_property
    def chat_template(self) -> str | None:
        """Return the file's default chat template, untrusted, or None."""
        with self._in_use():
            text = short.llama_model_chat_template(self.handle, None)
            return text.decode("utf-8", "replace") if text else None

    def metadata(self, key: str) -> str | None:
        """Return what the file's header says under a key, as text, or None; `{arch}` stands for the architecture."""
        with self._in_use():
            if "{arch}" in key:
                key = key.replace("{arch}", self._metadata("general.architecture") or "")
            return self._metadata(key)

    def _metadata(self, key: str) -> str | None:
        buffer: Any = ctypes.create_string_buffer(_METADATA_BYTES)
        length = short.llama_model_meta_val_str(self.handle, key.encode(), buffer, _METADATA_BYTES)
        return None if length < 0 else buffer.value.decode("utf-8", "replace")

    @cached_property
    def head_lengths(self) -> tuple[int, int]:
        """Return how many numbers the keys and the values of one attention head have; 0 without attention."""
        with self._in_use():
            heads, width = short.llama_model_n_head(self.handle), short.llama_model_n_embd(self.handle)
        usual = width // heads if heads else 0
        told = [self.metadata(f"{{arch}}.attention.{each}_length") or "" for each in ("key", "value")]
        key, value = (int(each) if each.isdecimal() else usual for each in told)
        return key, value

    @cached_property
    def begin_text(self) -> str:
        """Return the begin-of-sequence token as text, empty when there is none."""
        return self._special_text(short.llama_vocab_bos)

    @cached_property
    def end_text(self) -> str:
        """Return the end-of-sequence token as text, empty when there is none."""
        return self._special_text(short.llama_vocab_eos)

    @cached_property
    def adds_begin(self) -> bool:
        """Return True if `tokenize(add_special=True)` puts the begin token first."""
        with self._in_use():
            return bool(short.llama_vocab_get_add_bos(self._vocabulary))

    @cached_property
    def control_texts(self) -> list[str]:
        """Return every text that `parse_special=True` would read as a control token."""
        texts = []
        with self._in_use():
            for token in range(self.vocabulary_size):
                if short.llama_vocab_get_attr(self._vocabulary, token) & (_CONTROL | _USER_DEFINED):
                    text = short.llama_vocab_get_text(self._vocabulary, token).decode("utf-8", "replace")
                    if text.strip():
                        texts.append(text)
        return texts

    def tokenize(self, text: str, *, add_special: bool, parse_special: bool) -> list[int]:
        """Return the text's token ids.

        Args:
            text: Any text without lone surrogates.
            add_special: Add the tokens that the model wants around every text, such as the begin token.
            parse_special: Read control tokens written as text as those tokens; only for trusted text.

        Raises:
            InvalidRequestError: The text is over 2 GiB or cannot be tokenized.
            EngineError: The model was unloaded.
        """
        with self._in_use():
            return self._tokenize(text, add_special=add_special, parse_special=parse_special)

    def _tokenize(self, text: str, *, add_special: bool, parse_special: bool) -> list[int]:
        encoded = text.encode()
        capacity = len(encoded) + 8
        for _ in range(2):
            tokens = (llama.llama_token * capacity)()
            count = llama.llama_tokenize(
                self._vocabulary, encoded, len(encoded), tokens, capacity, add_special, parse_special
            )
            if count >= 0:
                return list(tokens[:count])
            capacity = -count
        raise InvalidRequestError(f"The text of {len(encoded)} bytes cannot be tokenized.", param="prompt")

    def piece(self, token: int) -> bytes:
        """Return a token's bytes; empty for control tokens."""
        piece = self._pieces.get(token)
        if piece is None:
            with self._in_use():
                piece = self._pieces[token] = self._piece(token, special=False)
        return piece

    def name(self, token: int) -> bytes:
        """Return a token's bytes, or the name of one that stands for no text."""
        with self._in_use():
            return self._piece(token, special=True)

    @contextmanager
    def vocabulary(self) -> Iterator[tuple[Any, list[tuple[bytes, bool]]]]:
        """Lend the native vocabulary, with what each token adds to a text.

        Those that add nothing, since they stand for no text, come with their name and True.
        """
        with self._in_use():
            tokens = []
            for token in range(self.vocabulary_size):
                special = bool(short.llama_vocab_get_attr(self._vocabulary, token) & (_UNKNOWN | _CONTROL))
                tokens.append((self._piece(token, special=special), special))
            yield self._vocabulary, tokens

    def _special_text(self, which: Callable[[Any], int]) -> str:
        with self._in_use():
            token = which(self._vocabulary)
            return self._piece(token, special=True).decode("utf-8", "replace") if token >= 0 else ""

    def _piece(self, token: int, *, special: bool) -> bytes:
        size = 64
        while True:
            buffer: Any = ctypes.create_string_buffer(size)
            length = short.llama_token_to_piece(self._vocabulary, token, buffer, size, 0, special)
            if length >= 0:
                return bytes(buffer.raw[:length])
            size = -length
