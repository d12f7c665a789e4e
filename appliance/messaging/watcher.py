"""Tells when sockets can be read and written, on an epoll of its own that the event loop watches.

uvloop's `add_reader` says nothing at all when the other end resets the connection: libuv answers POLLERR by closing its
own handle, and the next `add_writer` of that socket raises. An epoll has no such state, costs one descriptor for all
connections of a loop, and says everything.
"""

from __future__ import annotations

import asyncio
import select
from collections.abc import Callable
from weakref import WeakKeyDictionary

BROKEN = select.EPOLLERR | select.EPOLLHUP
READABLE = select.EPOLLIN | BROKEN
WRITABLE = select.EPOLLOUT

_AT_ONCE = 256

Ready = Callable[[int], None]
"""Called with READABLE or WRITABLE bits."""


class Watcher:
    """The sockets of one event loop; it is there as long as there is one."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._epoll = select.epoll()
        self._ready: dict[int, Ready] = {}
        self._events: dict[int, int] = {}
        loop.add_reader(self._epoll.fileno(), self._tell)

    def watch(self, descriptor: int, ready: Ready) -> None:
        """Call `ready` whenever the socket can be read, or is broken."""
        self._epoll.register(descriptor, select.EPOLLIN)
        self._ready[descriptor] = ready
        self._events[descriptor] = select.EPOLLIN

    def want_reading(self, descriptor: int, wanted: bool) -> None:
        """Call it whenever the socket can be read, or only when it is broken."""
        self._want(descriptor, select.EPOLLIN, wanted)

    def want_writing(self, descriptor: int, wanted: bool) -> None:
        """Call it also whenever the socket can be written, or no longer."""
        self._want(descriptor, WRITABLE, wanted)

    def forget(self, descriptor: int) -> None:
        """Watch a socket no more; before it is closed."""
        if self._ready.pop(descriptor, None) is None:
            return
        del self._events[descriptor]
        self._epoll.unregister(descriptor)
        if not self._ready:
            _WATCHERS.pop(self._loop, None)
            self._loop.remove_reader(self._epoll.fileno())
            self._epoll.close()

    def _want(self, descriptor: int, event: int, wanted: bool) -> None:
        before = self._events.get(descriptor)
        if before is None:
            return
        events = before | event if wanted else before & ~event
        if events != before:  # each change is a system call, and there are as many as messages
            self._epoll.modify(descriptor, events)
            self._events[descriptor] = events

    def _tell(self) -> None:
        for descriptor, events in self._epoll.poll(0, _AT_ONCE):
            ready = self._ready.get(descriptor)
            if ready is not None:  # the one before it may have ended this one
                ready(events)


_WATCHERS: WeakKeyDictionary[asyncio.AbstractEventLoop, Watcher] = WeakKeyDictionary()


def watcher() -> Watcher:
    """Return the running loop's watcher."""
    loop = asyncio.get_running_loop()
    found = _WATCHERS.get(loop)
    if found is None:
        found = _WATCHERS[loop] = Watcher(loop)
    return found
