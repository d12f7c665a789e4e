"""The process that takes text from files: `python -m appliance.retrieval.parsing.process`.

Files come from anybody, and the libraries that read them are large. So they run in a process that may be killed: with
bounded memory and CPU time, at low priority, without network or children, and with nothing to read but the file in hand
and Python's modules. It ends with its parent.
"""

from __future__ import annotations

import logging
import mimetypes
import os
import resource
import signal
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import msgspec

import appliance
from appliance.core.exits import leave_memory_to_the_system
from appliance.retrieval.parsing import formats
from appliance.retrieval.parsing.protocol import HEADER_BYTES, STRIP_BYTES, End, Job, Look, Pieces, Strip, to_frame
from appliance.retrieval.parsing.writer import BlockWriter, InvalidError, UnsupportedError, one_line

MEMORY_BYTES = 2**30
"""Address space beyond what the process has at its start."""
MOST_OPEN_FILES = 16
NICENESS = 10

_LONGEST_REASON = 300
_FORBIDDEN = ("socket.", "subprocess.", "os.exec", "os.fork", "os.posix_spawn", "os.system", "os.remove", "os.rename")
_DAMAGE_ADVICE = "Open and save it again with the program that made it, or send it in another format."


class Guard:
    """Python's audit hook: refuses what no reader has a use for. A hook can never be taken away again."""

    def __init__(self) -> None:
        self.path = ""
        folders = (*sys.path, sys.prefix, sys.base_prefix, *appliance.__path__)  # ours may be in none of the others
        self._roots = tuple({os.path.realpath(each) + os.sep for each in folders})

    def __call__(self, event: str, arguments: tuple[object, ...]) -> None:
        """Take an event.

        Raises:
            PermissionError: A reader must not do that.
        """
        if event.startswith(_FORBIDDEN):
            raise PermissionError(f"{event} is not allowed here")
        if event != "open" or isinstance(arguments[0], int):
            return
        path, mode = os.fsdecode(arguments[0]), arguments[1]  # type: ignore[arg-type]
        is_known = path == self.path or os.path.realpath(path).startswith(self._roots)
        if not is_known or (isinstance(mode, str) and set(mode) & set("wax+")):
            raise PermissionError("only the file that is read may be opened")


def take_text(job: Job, send: Callable[[Pieces], None]) -> End:
    """Read one file, and return how it went."""
    writer = BlockWriter(lambda pieces: send(Pieces(pieces)), job.max_characters)
    try:
        formats.read(Path(job.path), job.media_type, writer)
        writer.flush()
    except Exception as error:  # noqa: BLE001  (libraries raise many kinds on a hostile file; the parent is told)
        return problem_of(error)
    return End(title=writer.title, pages_without_text=writer.pages_without_text)


def show_pictures(look: Look, send: Callable[[Strip], None]) -> End:
    """Decode the pictures on a page, and return how it went."""
    try:
        from appliance.retrieval.parsing.pictures import show  # noqa: PLC0415  (few files need it)

        for picture in show(Path(look.path), look.media_type, look.page):
            pixels = picture.tobytes()
            rows = max(1, STRIP_BYTES // picture.width) * picture.width
            for start in range(0, len(pixels), rows):
                send(Strip(picture.width, picture.height, pixels[start : start + rows]))
    except Exception as error:  # noqa: BLE001  (as above)
        return problem_of(error)
    return End()


def problem_of(error: Exception) -> End:
    """Return what tells the parent of an error."""
    match error:
        case UnsupportedError():
            return End("unsupported_file", _clip(str(error)), formats.ADVICE)
        case InvalidError():
            return End("invalid_file", _clip(str(error)), error.advice or _DAMAGE_ADVICE)
        case MemoryError():
            return End("invalid_file", "needs more memory than it may have", "Split it into several files.")
        case RecursionError():
            return End("invalid_file", "is nested too deeply", _DAMAGE_ADVICE)
        case _:
            return End("invalid_file", _clip(f"cannot be read: {type(error).__name__}: {error}"), _DAMAGE_ADVICE)


def _clip(reason: str) -> str:
    """Return a reason that is short and can be encoded."""
    return one_line(reason)[:_LONGEST_REASON].rstrip(".")


def serve(inbound: BinaryIO, outbound: BinaryIO, prepare: Callable[[Job | Look], None]) -> None:
    """Answer until the parent closes its end."""

    def send(message: Pieces | Strip | End) -> None:
        outbound.write(to_frame(message))
        outbound.flush()

    send(End())
    decoder = msgspec.json.Decoder(Job | Look)
    while body := inbound.read(int.from_bytes(inbound.read(HEADER_BYTES), "big")):
        job = decoder.decode(body)
        prepare(job)
        send(show_pictures(job, send) if isinstance(job, Look) else take_text(job, send))


def restrict_process() -> Callable[[Job | Look], None]:
    """Take from this process, for good, all that readers have no use for.

    Returns:
        What to call before each file.
    """
    os.nice(NICENESS)
    pages = int(open("/proc/self/statm").read().split()[0])  # noqa: SIM115, PTH123  (opened before the guard is set)
    for kind, limit in (
        (resource.RLIMIT_AS, pages * resource.getpagesize() + MEMORY_BYTES),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_NPROC, 0),
        (resource.RLIMIT_NOFILE, MOST_OPEN_FILES),
    ):
        resource.setrlimit(kind, (limit, limit))
    mimetypes.init([])  # else a library has it read the system's tables
    guard = Guard()
    sys.addaudithook(guard)

    def prepare(job: Job | Look) -> None:
        guard.path = job.path
        usage = resource.getrusage(resource.RUSAGE_SELF)
        seconds = int(usage.ru_utime + usage.ru_stime + job.timeout_s) + 1
        resource.setrlimit(resource.RLIMIT_CPU, (seconds, resource.RLIM_INFINITY))

    return prepare


def main() -> None:
    """Serve on standard input and output. Only the parent ends this process, however the service is stopped."""
    leave_memory_to_the_system()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    logging.disable()  # libraries tell the log what they find odd in a file
    warnings.simplefilter("ignore")
    serve(sys.stdin.buffer, sys.stdout.buffer, restrict_process())


if __name__ == "__main__":
    main()
