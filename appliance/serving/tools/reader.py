"""Text becomes text and tool calls while it comes, in whatever pieces it comes. Pure.

What may begin a call is held back until it is clear whether it does: a mark, or a brace where an answer begins. Only a
tool that is offered makes a call; anything else stays text. Between the parts of a call any whitespace may stand.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum, auto

from appliance.core.tools import ToolCallDelta
from appliance.serving.tools.dialects import Dialect

LONGEST_HEADER = 1024
"""Characters before a call's arguments; with more than these it is none."""

_PARTS = re.compile(r'<[^<>\s]+>|\[[A-Z_]{2,}\]|"\w+"|\S')
_BLANKS = " \t\r\n"
_STRUCTURE = re.compile(r'["{}\[\]\\]')


@dataclass(frozen=True, slots=True)
class Reading:
    """What has become clear: text first, then what calls gained."""

    text: str = ""
    calls: tuple[ToolCallDelta, ...] = ()


class _Verdict(Enum):
    MATCHES = auto()
    MAY_MATCH = auto()
    FAILS = auto()


class _State(Enum):
    TEXT = auto()
    """Text that may end in a call."""
    HEADER = auto()
    """A call may have begun."""
    ARGUMENTS = auto()
    CLOSING = auto()
    """The arguments are whole."""
    AFTER = auto()
    """A call is whole, and another may follow."""
    ONLY_TEXT = auto()


class CallReader:
    """Reads one choice.

    Attributes:
        begun: Calls that have begun so far.
        whole: Whether every call that has begun has all its arguments.
    """

    def __init__(self, dialect: Dialect, names: Sequence[str], new_id: Callable[[], str]) -> None:
        """Look for calls of the named tools; `new_id` names each."""
        self.begun = 0
        self._new_id = new_id
        self._anywhere = dialect.is_marked
        self._first = [(name, each) for name in names for each in _headers(dialect, name, dialect.start)]
        self._next = [(name, each) for name in names for each in _headers(dialect, name, (dialect.between,))]
        self._triggers = tuple(dict.fromkeys(header[0] for _, header in self._first))
        self._after, self._end = _parts(dialect.after), _parts(dialect.end)
        self._state = _State.TEXT
        self._held = ""
        self._structure = _Structure()
        self._text: list[str] = []
        self._calls: list[ToolCallDelta] = []

    @property
    def whole(self) -> bool:
        """Return whether nothing of a call is missing."""
        return self._state is not _State.ARGUMENTS

    def push(self, text: str) -> Reading:
        """Take the next piece, and return what is clear now."""
        self._held += text
        while self._step():
            pass
        return self._reading()

    def finish(self) -> Reading:
        """Return what was held back: it is text, but for blanks behind a call."""
        if self._state is not _State.CLOSING and (not self.begun or self._held.strip(_BLANKS)):
            self._text.append(self._held)
        self._held = ""
        return self._reading()

    def _reading(self) -> Reading:
        reading = Reading("".join(self._text), tuple(self._calls))
        self._text, self._calls = [], []
        return reading

    def _step(self) -> bool:
        """Go on by one state; False if that needs more text."""
        match self._state:
            case _State.TEXT:
                return self._look_for_call()
            case _State.HEADER:
                return self._read_header(self._first)
            case _State.ARGUMENTS:
                return self._read_arguments()
            case _State.CLOSING:
                return self._read_closing()
            case _State.AFTER:
                return self._read_after()
            case _:
                self._release(len(self._held))
                return False

    def _look_for_call(self) -> bool:
        if not self._anywhere:
            return self._look_at_the_beginning()
        found = [at for each in self._triggers if (at := self._held.find(each)) >= 0]
        if found:
            self._release(len(self._held[: min(found)].rstrip(_BLANKS)))
            self._state = _State.HEADER
            return True
        held_back = max(_overlap(self._held, each) for each in self._triggers)
        self._release(len(self._held[: len(self._held) - held_back].rstrip(_BLANKS)))
        return False

    def _look_at_the_beginning(self) -> bool:
        beginning = self._held.lstrip(_BLANKS)
        if any(beginning.startswith(each) for each in self._triggers):
            self._state = _State.HEADER
            return True
        if any(each.startswith(beginning) for each in self._triggers):
            return False
        self._state = _State.ONLY_TEXT
        return True

    def _read_header(self, headers: Sequence[tuple[str, tuple[str, ...]]]) -> bool:
        verdict, name, end = self._match_header(headers)
        if verdict is _Verdict.MATCHES:
            self._begin(name, end)
            return True
        if verdict is _Verdict.MAY_MATCH:
            return False
        if self._anywhere:
            mark = min((at, len(each)) for each in self._triggers if (at := self._held.find(each)) >= 0)
            self._release(sum(mark))
            self._state = _State.TEXT
        else:
            self._state = _State.ONLY_TEXT
        return True

    def _match_header(self, headers: Sequence[tuple[str, tuple[str, ...]]]) -> tuple[_Verdict, str, int]:
        result = _Verdict.FAILS
        for name, header in headers:
            verdict, end = _match(self._held, header)
            if verdict is _Verdict.MATCHES:
                return verdict, name, end
            if verdict is _Verdict.MAY_MATCH:
                result = verdict
        return result, "", 0

    def _begin(self, name: str, end: int) -> None:
        """Begin a call whose arguments' brace is the last character before `end`."""
        self._held = self._held[end - 1 :]
        self._calls.append(ToolCallDelta(self.begun, "", self._new_id(), name))
        self.begun += 1
        self._structure = _Structure()
        self._state = _State.ARGUMENTS

    def _read_arguments(self) -> bool:
        end = self._structure.take(self._held)
        if end:
            self._calls.append(ToolCallDelta(self.begun - 1, self._held[:end]))
        self._held = self._held[end:]
        if self._structure.complete:
            self._state = _State.CLOSING
        return self._structure.complete

    def _read_closing(self) -> bool:
        verdict, end = _match(self._held, self._after)
        if verdict is _Verdict.MAY_MATCH:
            return False
        self._held = self._held[end:]
        self._state = _State.AFTER
        return True

    def _read_after(self) -> bool:
        verdict, name, end = self._match_header(self._next)
        if verdict is _Verdict.MATCHES:
            self._begin(name, end)
            return True
        ends, end = _match(self._held, self._end) if self._end else (_Verdict.FAILS, 0)
        if _Verdict.MAY_MATCH in (verdict, ends):
            return False
        if ends is _Verdict.MATCHES:
            self._held = self._held[end:]
        self._state = _State.TEXT if self._anywhere else _State.ONLY_TEXT
        return True

    def _release(self, count: int) -> None:
        self._text.append(self._held[:count])
        self._held = self._held[count:]


class _Structure:
    """Finds where a JSON value that begins with a brace ends."""

    def __init__(self) -> None:
        self.complete = False
        self._depth = 0
        self._in_string = False
        self._skip = False

    def take(self, text: str) -> int:
        """Return how much of the text belongs to the value."""
        if self._skip and text:  # the character behind a backslash that ended the last piece
            self._skip = False
            return self._scan(text, 1)
        return self._scan(text, 0)

    def _scan(self, text: str, at: int) -> int:
        while (found := _STRUCTURE.search(text, at)) is not None:
            at = found.end()
            character = found[0]
            if character == "\\":
                self._skip = at == len(text)
                at += 1
            elif character == '"':
                self._in_string = not self._in_string
            elif not self._in_string:
                self._depth += 1 if character in "{[" else -1
                if self._depth == 0:
                    self.complete = True
                    return at
        return len(text)


def _headers(dialect: Dialect, name: str, leads: Sequence[str]) -> list[tuple[str, ...]]:
    """Return what may stand before a tool's arguments, with the brace that begins them."""
    return [(*_parts(lead + dialect.before), name, *_parts(dialect.middle), "{") for lead in leads]


def _parts(text: str) -> tuple[str, ...]:
    return tuple(_PARTS.findall(text))


def _match(text: str, parts: Sequence[str]) -> tuple[_Verdict, int]:
    """Tell whether the text begins with the parts, with blanks before each; and where those that it has end."""
    at = end = 0
    text = text[:LONGEST_HEADER]
    for part in parts:
        while at < len(text) and text[at] in _BLANKS:
            at += 1
        if not text.startswith(part, at):
            may_match = part.startswith(text[at:]) and len(text) < LONGEST_HEADER
            return (_Verdict.MAY_MATCH if may_match else _Verdict.FAILS), end
        at = end = at + len(part)
    return _Verdict.MATCHES, end


def _overlap(text: str, mark: str) -> int:
    """Return the length of the longest end of the text that begins the mark."""
    for length in range(min(len(mark) - 1, len(text)), 0, -1):
        if text.endswith(mark[:length]):
            return length
    return 0
