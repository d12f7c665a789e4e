"""What `self_test` and its child say to each other: one JSON document each way, then the end of the stream."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec

from appliance.core.releases import Criteria
from appliance.core.settings import Settings
from appliance.core.wishes import SelfTestReport


class Order(msgspec.Struct, frozen=True):
    """What is to be tried.

    Attributes:
        settings: As the server has them.
        full_name: The registered version.
        most_memory: Bytes that the process may use.
    """

    settings: Settings
    full_name: str
    criteria: Criteria
    most_memory: int


def failed_test(code: str, detail: str, *, memory: int = 0, pace: float = 0.0) -> SelfTestReport:
    """Return the report of a version that failed."""
    return SelfTestReport(passed=False, code=code, detail=detail, tokens_per_second=pace, memory=memory)


def encode(message: Order | SelfTestReport) -> bytes:
    """Return a message as it is sent."""
    return msgspec.json.encode(message, enc_hook=str)


def decode_order(text: bytes) -> Order:
    """Return the order that was sent.

    Raises:
        msgspec.DecodeError: It is none.
    """
    return msgspec.json.decode(text, type=Order, dec_hook=_path)


def decode_report(text: bytes) -> SelfTestReport:
    """Return the report that was sent.

    Raises:
        msgspec.DecodeError: It is none.
    """
    return msgspec.json.decode(text, type=SelfTestReport)


def _path(wanted: type, value: Any) -> Any:
    return Path(value) if issubclass(wanted, Path) else value
