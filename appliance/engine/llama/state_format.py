"""What a parked state's file says about itself: the head, written and read back.

A file is a head and the payload, numbers in the machine's byte order:

    ┌───────┬─────────┬────┬─────────────┬─────────────────┬─────────┬───────┬─────────┬────────┬─────────┬─────────┐
    │ magic │ version │ id │ origin's    │ lengths of the  │ SHA-256 │ space │ session │ tokens │ SHA-256 │ payload │
    │       │         │    │ fingerprint │ last four parts │ of it   │ UTF-8 │ UTF-8   │ int32  │ of this │         │
    └───────┴─────────┴────┴─────────────┴─────────────────┴─────────┴───────┴─────────┴────────┴─────────┴─────────┘
     ◀─────────────────────────────────────────── head ──────────────────────────────────────────▶

The digests are against accidents and mix-ups; who may write to the folder, which is this user's alone, may forge both.
"""

from __future__ import annotations

import hashlib
import io
import os
import struct
import sys
from array import array
from dataclasses import dataclass

import msgspec

FORMAT_VERSION = 2

_MAGIC = b"KVSTATE\n"
_FIXED = struct.Struct("=8sI16s32sIIIQ32s")
_DIGEST_BYTES = 32
_TOKEN_BYTES = array("i").itemsize
_MOST_NAME_BYTES = 1024
_MOST_TOKENS = 2**24


class DamagedError(Exception):
    """A state's file is not what it should be. Never leaves `state_files`."""


@dataclass(frozen=True, slots=True)
class Origin:
    """All that a state's bytes and meaning depend on, but for its tokens and its adapter.

    Attributes:
        model_sha256: The model file's hash.
        library: The version of llama.cpp, by that of its package.
        cells: The context's length, by which some models choose their rotary factors.
        key_type: Of the KV cache, as `value_type`.
        flash_attention: Whether it is on: values are laid out otherwise then.
        full_window: Whether sliding layers keep all positions.
    """

    model_sha256: str
    library: str
    cells: int
    key_type: str
    value_type: str
    flash_attention: bool
    full_window: bool

    @property
    def fingerprint(self) -> str:
        """Return a name for it, 64 hexadecimal digits."""
        facts = msgspec.json.encode((FORMAT_VERSION, sys.byteorder, self), order="deterministic")
        return hashlib.sha256(facts).hexdigest()


@dataclass(frozen=True, slots=True)
class StateHead:
    """What a state is.

    Attributes:
        id: From `new_id`.
        space: The adapter that its tokens were evaluated with.
        tokens: Whose KV it holds, as C ints.
        size: Bytes of its payload.
        session: Whose text the tokens are, "" if that is nobody's to delete.
    """

    id: str
    space: str
    tokens: array[int]
    size: int
    session: str = ""


def encode_head(head: StateHead, fingerprint: str, payload_digest: bytes) -> bytes:
    """Return what a state's file begins with.

    Raises:
        ValueError: The head has more tokens, or longer names, than a file may have.
    """
    space, session = head.space.encode(), head.session.encode()
    longest = max(len(space), len(session))
    if longest > _MOST_NAME_BYTES or len(head.tokens) > _MOST_TOKENS:
        raise ValueError(f"a state of {len(head.tokens)} tokens, a name of it of {longest} bytes")
    state_id, counts = bytes.fromhex(head.id), (len(space), len(session), len(head.tokens), head.size)
    fixed = _FIXED.pack(_MAGIC, FORMAT_VERSION, state_id, bytes.fromhex(fingerprint), *counts, payload_digest)
    covered = fixed + space + session + head.tokens.tobytes()
    return covered + hashlib.sha256(covered).digest()


def read_head(file: io.FileIO, state_id: str, fingerprint: str) -> tuple[StateHead, bytes]:
    """Return a file's head, and the digest of the payload, which is next to be read from the file then.

    Lengths in the head are believed only once they agree with the file's own.

    Args:
        file: Open at its start.
        state_id: The state that it is supposed to be.
        fingerprint: The origin that it is supposed to be of.

    Raises:
        DamagedError: It is not.
    """
    size = os.fstat(file.fileno()).st_size
    fixed = _read_exactly(file, _FIXED.size)
    magic, version, stored_id, origin, *lengths, token_count, payload_size, digest = _FIXED.unpack(fixed)
    if magic != _MAGIC or version != FORMAT_VERSION:
        raise DamagedError(f"it is no state of format {FORMAT_VERSION}")
    if stored_id.hex() != state_id or origin.hex() != fingerprint:
        raise DamagedError("it is another state than its name says")
    rest = sum(lengths) + token_count * _TOKEN_BYTES
    if max(lengths) > _MOST_NAME_BYTES or token_count > _MOST_TOKENS:
        raise DamagedError(f"its head speaks of {token_count} tokens")
    if size != _FIXED.size + rest + _DIGEST_BYTES + payload_size:
        raise DamagedError(f"it has {size} bytes, which its head contradicts")
    covered = fixed + _read_exactly(file, rest)
    if _read_exactly(file, _DIGEST_BYTES) != hashlib.sha256(covered).digest():
        raise DamagedError("its head is not what was written")
    names, numbers = covered[_FIXED.size : _FIXED.size + sum(lengths)], covered[_FIXED.size + sum(lengths) :]
    tokens = array("i")
    tokens.frombytes(numbers)
    space, session = (each.decode(errors="replace") for each in (names[: lengths[0]], names[lengths[0] :]))
    return StateHead(state_id, space, tokens, payload_size, session), digest


def _read_exactly(file: io.FileIO, count: int) -> bytes:
    data = file.read(count)
    if len(data) != count:
        raise DamagedError(f"it ends after {file.tell()} bytes")
    return data
