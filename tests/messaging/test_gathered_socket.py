"""What is said in small pieces arrives whole, in large ones, whatever the other end does."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from appliance.messaging.gathered_socket import MOST_UNSENT_BYTES, PIECE_BYTES, GatheredSocket


@pytest.fixture
def ends() -> Iterator[tuple[GatheredSocket, socket.socket]]:
    near, far = socket.socketpair()
    far.settimeout(5)
    gathered = GatheredSocket(near)
    yield gathered, far
    gathered.abort()
    far.close()


Ends = tuple[GatheredSocket, socket.socket]


def test_nothing_is_sent_before_the_end_of_a_turn(ends: Ends) -> None:
    gathered, far = ends
    far.setblocking(False)
    assert (gathered.send(b"one"), gathered.send(b"two"), gathered.unsent) == (3, 3, 6)
    with pytest.raises(BlockingIOError):
        far.recv(1)
    gathered.flush()
    assert (far.recv(100), gathered.unsent) == (b"onetwo", 0)


def test_a_full_piece_does_not_wait_for_the_end_of_a_turn(ends: Ends) -> None:
    gathered, far = ends
    gathered.send(bytes(PIECE_BYTES))
    gathered.send(b"next")
    assert gathered.unsent == len(b"next")
    assert len(far.recv(2 * PIECE_BYTES, socket.MSG_WAITALL | socket.MSG_DONTWAIT)) == PIECE_BYTES


def test_an_end_that_does_not_read_holds_the_writer_up_and_misses_nothing(ends: Ends) -> None:
    gathered, far = ends
    said = bytearray()

    def say_all() -> None:
        for number in range(1_000_000):
            gathered.send(b"%07d" % number)
            said.extend(b"%07d" % number)

    with pytest.raises(BlockingIOError):
        say_all()
    assert gathered.unsent <= MOST_UNSENT_BYTES + 7
    heard = bytearray()
    while len(heard) < len(said):
        heard += far.recv(65_536)
        gathered.flush()
    assert heard == said
    assert gathered.send(b"again") == 5


@given(
    said=st.lists(st.binary(max_size=3 * PIECE_BYTES), max_size=8), sizes=st.lists(st.integers(1, 40_000), min_size=1)
)
def test_what_is_read_in_any_pieces_is_what_was_written(said: list[bytes], sizes: list[int]) -> None:
    near, far = socket.socketpair()
    writer, reader = GatheredSocket(near), GatheredSocket(far)
    heard = bytearray()
    turn = 0

    def read() -> bytes:
        nonlocal turn
        turn += 1
        most = sizes[turn % len(sizes)]
        got = reader.recv(most)
        assert len(got) <= most
        return got

    def read_all() -> None:
        try:
            while got := read():
                heard.extend(got)
        except BlockingIOError:
            assert reader.pending() == 0

    for each in said:
        writer.send(each)
        writer.flush()
        while writer.unsent:
            read_all()
            writer.flush()
    writer.close()
    while got := read():
        heard += got
    assert bytes(heard) == b"".join(said)
    reader.close()


def test_what_has_been_read_but_not_taken_is_pending(ends: Ends) -> None:
    gathered, far = ends
    assert gathered.pending() == 0
    far.sendall(b"abc")
    assert (gathered.recv(1), gathered.pending()) == (b"a", 2)
    assert (gathered.recv(9), gathered.pending()) == (b"bc", 0)
    with pytest.raises(BlockingIOError):
        gathered.recv(1)


def test_closing_sends_what_was_said_and_aborting_does_not() -> None:
    for close, heard in ((GatheredSocket.close, b"farewell"), (GatheredSocket.abort, b"")):
        near, far = socket.socketpair()
        gathered = GatheredSocket(near)
        gathered.send(b"farewell")
        close(gathered)
        assert (gathered.fileno(), far.recv(100)) == (-1, heard)
        far.close()


def test_a_far_end_that_is_gone_is_an_error_of_flushing_and_none_of_closing(ends: Ends) -> None:
    gathered, far = ends
    far.close()
    gathered.send(b"lost")
    with pytest.raises(BrokenPipeError):
        gathered.flush()
    assert gathered.recv(10) == b""
    gathered.close()
