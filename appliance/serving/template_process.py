"""The process that renders one model's chat template: `python -m appliance.serving.template_process`.

A chat template comes with the model file, so it is somebody else's program. It runs in Jinja's sandbox, which keeps
it from Python's objects but can neither end a loop nor bound what one expression takes. So the sandbox runs in
a process that may be killed: with bounded memory, no files, no children, an alarm clock, and an end with its parent.

The dialect is that of Hugging Face's `apply_chat_template` (transformers, `chat_template_utils.py`). Imports only the
standard library, Jinja and msgspec, to be small and to start fast.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import resource
import signal
import sys
from collections.abc import Callable, Mapping
from datetime import datetime
from typing import Any, BinaryIO, NoReturn

import jinja2.debug  # noqa: F401  (Jinja imports it on the first error, when no file can be opened any more)
import msgspec
from jinja2 import TemplateError, UndefinedError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from appliance.core.exits import leave_memory_to_the_system
from appliance.serving.control_text import ControlTexts, Suspicion
from appliance.serving.template_protocol import HEADER_BYTES, Compile, Render, Reply, Segment, to_frame

MEMORY_BYTES = 256 * 1024 * 1024
"""Address space beyond what the process has at its start, and beyond some copies of the largest prompt."""

_COPIES = 8
_LONGEST_REASON = 500


class RefusedError(TemplateError):
    """The template called `raise_exception`: the conversation does not suit it."""


class TooLargeError(Exception):
    """The rendered text went past its limit."""


class _Generation(Extension):
    """`{% generation %}`: marks the assistant's text for training; means nothing here."""

    tags = {"generation"}  # noqa: RUF012  (Jinja's own way to declare tags)

    def parse(self, parser: Parser) -> nodes.Node | list[nodes.Node]:
        """Return what is between the tags."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _raise_exception(message: object) -> NoReturn:
    raise RefusedError(str(message))


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)  # noqa: DTZ005  (templates tell the model the local date)


def _to_json(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Return JSON as it is; Jinja's own filter escapes it for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


class ChatTemplate:
    """A compiled template."""

    def __init__(self, wanted: Compile) -> None:
        """Compile. Raises whatever Jinja and Python's compiler raise on a bad template."""
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols], cache_size=0
        )
        environment.globals.pop("lipsum")
        environment.globals |= {"raise_exception": _raise_exception, "strftime_now": _strftime_now}
        environment.filters["tojson"] = _to_json
        self._template = environment.from_string(wanted.template)
        self._tokens = {"bos_token": wanted.bos_token, "eos_token": wanted.eos_token}
        self._max_bytes = wanted.max_bytes
        self._control_texts = ControlTexts(wanted.control_texts)

    def render(self, wanted: Render) -> Reply:
        """Render a conversation, with control tokens in messages kept apart if that is wanted.

        If a message is suspicious, the conversation is rendered once more with a random word in its place. Where
        putting the message back for the word gives the same text, the words show where the message lies. Where not,
        the template rewrites it, which is well if that made no control token.

        Raises:
            TooLargeError: Too much text.
            Exception: Whatever the template raises.
        """
        variables = {"messages": wanted.messages, "extra": wanted.extra}
        text = self._render(variables, wanted.add_generation_prompt)
        if not wanted.protect or not self._control_texts:
            return Reply(segments=[(text, True)])
        stand_ins = _StandIns(self._control_texts, text)
        replaced = stand_ins.replace(variables)
        if not stand_ins.originals:
            return Reply(segments=[(text, True)])
        try:
            marked = self._render(replaced, wanted.add_generation_prompt)
        except Exception:  # noqa: BLE001  (the template liked the real text, so it must have looked into it)
            return stand_ins.forged()
        pieces = stand_ins.split(marked)
        if "".join(piece for piece, _ in pieces) == text:
            return Reply(segments=self._join_harmless(pieces, text))
        if self._control_texts.found_in(marked) == self._control_texts.found_in(text):
            return Reply(segments=[(text, True)])
        return stand_ins.forged()

    def _render(self, variables: Mapping[str, Any], add_generation_prompt: bool) -> str:
        given = {"tools": None, "documents": None, **variables["extra"], **self._tokens}
        parts, size = [], 0
        for part in self._template.generate(
            given, messages=variables["messages"], add_generation_prompt=add_generation_prompt
        ):
            size += len(part)
            if size > self._max_bytes:
                raise TooLargeError
            parts.append(part)
        text = "".join(parts)
        if len(text.encode()) > self._max_bytes:
            raise TooLargeError
        return text

    def _join_harmless(self, pieces: list[tuple[str, Suspicion]], text: str) -> list[Segment]:
        """Return segments, with pieces that turn out harmless joined to their neighbours.

        A prompt in one piece is tokenized exactly as the model was trained, so it is cut only where it must be.
        """
        segments: list[Segment] = []
        end = 0
        for piece, suspicion in pieces:
            start, end = end, end + len(piece)
            harmless = suspicion is Suspicion.NONE or (
                suspicion is Suspicion.AT_AN_EDGE
                and not self._control_texts.crosses(text, start)
                and not self._control_texts.crosses(text, end)
            )
            if harmless and segments and segments[-1][1]:
                segments[-1] = (segments[-1][0] + piece, True)
            elif piece:
                segments.append((piece, harmless))
        return segments


class _StandIns:
    """Random words that stand in for suspicious texts; whitespace around a text stays, since templates strip it."""

    def __init__(self, control_texts: ControlTexts, rendered: str) -> None:
        self._control_texts = control_texts
        self._rendered = rendered
        self._base = "x" + os.urandom(16).hex() + "x"
        self.originals: list[str] = []

    def replace(self, value: Any) -> Any:
        """Return plain data with each suspicious text in it replaced."""
        if isinstance(value, str):
            return self._replace_text(value)
        if isinstance(value, list):
            return [self.replace(each) for each in value]
        if isinstance(value, dict):
            return {self.replace(key): self.replace(each) for key, each in value.items()}
        return value

    def split(self, marked: str) -> list[tuple[str, Suspicion]]:
        """Return a rendered text in pieces, with the originals put back for the words."""
        pieces = []
        for index, piece in enumerate(re.split(f"{self._base}(\\d+)x", marked)):
            if index % 2:
                original = self.originals[int(piece)]
                pieces.append((original, self._control_texts.suspicion(original)))
            else:
                pieces.append((piece, Suspicion.NONE))
        return pieces

    def forged(self) -> Reply:
        """Return the refusal of a conversation, naming what must not be in it."""
        found = {each for original in self.originals for each in self._control_texts.found_in(original)}
        return Reply(problem="forged", message=_clip(", ".join(sorted(found)) or "parts of them"))

    def _replace_text(self, text: str) -> str:
        core = text.strip() or text
        if self._control_texts.suspicion(text) is Suspicion.NONE:
            is_rewritten = core not in self._rendered
            if not is_rewritten or not self._control_texts.could_become(core):
                return text
        before, after = text.split(core, 1)
        self.originals.append(core)
        return f"{before}{self._base}{len(self.originals) - 1}x{after}"


def problem_of(error: Exception) -> Reply:
    """Return the reply that tells the parent of an error."""
    match error:
        case TooLargeError():
            return Reply(problem="too_large")
        case RefusedError():
            return Reply(problem="refused", message=_clip(str(error)))
        case MemoryError():
            return Reply(problem="failed", message="it needs more memory than it may have")
        case RecursionError():
            return Reply(problem="failed", message="it is nested or calls itself too deeply")
        case _:
            return Reply(problem="failed", message=_clip(f"{type(error).__name__}: {error}"))


def _clip(reason: str) -> str:
    """Return a reason that is short and can be encoded."""
    return reason[:_LONGEST_REASON].encode(errors="replace").decode()


def serve(inbound: BinaryIO, outbound: BinaryIO, restrict: Callable[[Compile], None]) -> None:
    """Answer until the parent closes its end: first one `Compile`, then any number of `Render`."""

    def send(reply: Reply) -> None:
        outbound.write(to_frame(reply))
        outbound.flush()

    send(Reply())
    if not (body := _read_frame(inbound)):
        return
    wanted = msgspec.json.decode(body, type=Compile)
    restrict(wanted)
    try:
        with _Alarm(wanted.timeout_s):
            template = ChatTemplate(wanted)
    except Exception as error:  # noqa: BLE001  (Jinja and Python's compiler raise many kinds; the parent is told)
        send(problem_of(error))
        return
    send(Reply())
    decoder = msgspec.json.Decoder(Render)
    while body := _read_frame(inbound):
        try:
            with _Alarm(wanted.timeout_s):
                reply = template.render(decoder.decode(body))
        except Exception as error:  # noqa: BLE001  (somebody else's program may raise anything; the parent is told)
            reply = problem_of(error)
        send(reply)


def _read_frame(inbound: BinaryIO) -> bytes:
    return inbound.read(int.from_bytes(inbound.read(HEADER_BYTES), "big"))


class _Alarm:
    """Ends this process should a message still be worked on when its parent, which ends it sooner, must be gone."""

    def __init__(self, timeout_s: float) -> None:
        self._seconds = 2 * timeout_s + 1

    def __enter__(self) -> None:
        signal.setitimer(signal.ITIMER_REAL, self._seconds)

    def __exit__(self, *_: object) -> None:
        signal.setitimer(signal.ITIMER_REAL, 0)


def restrict_process(wanted: Compile) -> None:
    """Take from this process, for good, all that a template has no use for."""
    _import_the_rest(wanted)
    pages = int(open("/proc/self/statm").read().split()[0])  # noqa: SIM115, PTH123  (the process is about to lose files)
    memory = pages * resource.getpagesize() + MEMORY_BYTES + _COPIES * wanted.max_bytes
    for kind, limit in (
        (resource.RLIMIT_AS, memory),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_NPROC, 0),
        (resource.RLIMIT_NOFILE, 3),
    ):
        resource.setrlimit(kind, (limit, limit))


def _import_the_rest(wanted: Compile) -> None:
    """Use all that Python and Jinja load on first use, while files can be opened; the time zone's is one of them."""
    exercise = (
        "{% for each in messages %}{{ strftime_now('%d %B %Y') ~ '\\n' ~ (each | tojson(indent=2)) }}{% endfor %}"
    )
    warm = ChatTemplate(msgspec.structs.replace(wanted, template=exercise + "{{ undefined.attribute }}"))
    with contextlib.suppress(UndefinedError):
        warm.render(Render([{"content": "世界"}], add_generation_prompt=True, extra={}, protect=True))


def main() -> None:
    """Serve on standard input and output. Only the parent ends this process, however the service is stopped."""
    leave_memory_to_the_system()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    serve(sys.stdin.buffer, sys.stdout.buffer, restrict_process)


if __name__ == "__main__":
    main()
