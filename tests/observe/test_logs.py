from __future__ import annotations

import asyncio
import io
import json
import logging
import re
import subprocess
import sys
import warnings
from collections.abc import Iterator
from datetime import datetime
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from appliance.observe.logs import JsonFormatter, TextFormatter, configure_logging, request_id

LOGGER = logging.getLogger("appliance.test")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def restored_logging() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)
    logging.captureWarnings(False)


def configured(
    form: Literal["auto", "json", "text"] = "json",
    stream: io.StringIO | None = None,
    level: Literal["debug", "info", "warning", "error"] = "info",
) -> io.StringIO:
    stream = stream or io.StringIO()
    configure_logging(level, form, stream)
    return stream


def lines(stream: io.StringIO) -> list[dict[str, Any]]:
    return [json.loads(line) for line in stream.getvalue().splitlines()]


def record(message: str, **extra: object) -> logging.LogRecord:
    made = logging.LogRecord("appliance.test", logging.INFO, __file__, 1, "%s", (message,), None)
    made.__dict__.update(extra)
    return made


def fail(text: str) -> None:
    raise LookupError(text)


# JSON


def test_a_json_line_has_time_level_logger_message_and_extra_fields() -> None:
    stream = configured()
    LOGGER.warning("%d 个模型", 3, extra={"model": "通义:1", "seconds": 0.5, "path": object})
    (line,) = lines(stream)
    assert list(line) == ["timestamp", "level", "logger", "message", "model", "seconds", "path"]
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", line.pop("timestamp"))
    assert line == {
        "level": "warning",
        "logger": "appliance.test",
        "message": "3 个模型",
        "model": "通义:1",
        "seconds": 0.5,
        "path": "<class 'object'>",
    }
    assert "个模型" in stream.getvalue()


def test_the_timestamp_is_the_records_in_utc() -> None:
    made = record("a")
    made.created = 1_800_000_000.1239
    line = json.loads(JsonFormatter().format(made))
    assert line["timestamp"] == "2027-01-15T08:00:00.123Z"
    assert datetime.fromisoformat(line["timestamp"]).timestamp() == pytest.approx(1_800_000_000.123)


def test_an_exception_is_part_of_its_line() -> None:
    stream = configured()
    try:
        fail("first\nsecond")
    except LookupError:
        LOGGER.exception("it failed")
    (line,) = lines(stream)
    assert line["level"] == "error"
    assert line["exception"].startswith("Traceback")
    assert line["exception"].endswith("LookupError: first\nsecond")


def test_a_stack_is_part_of_its_line() -> None:
    stream = configured()
    LOGGER.info("here", stack_info=True)
    assert "test_a_stack_is_part_of_its_line" in lines(stream)[0]["exception"]


def test_an_extra_field_cannot_replace_the_message() -> None:
    line = json.loads(JsonFormatter().format(record("true", level="fatal", timestamp="never", logger="other")))
    assert (line["message"], line["level"], line["logger"]) == ("true", "info", "appliance.test")
    assert line["timestamp"] != "never"


@pytest.mark.parametrize("value", [float("nan"), 10**30, {1: {2}}, "\udc80", b"\xff", RuntimeError("x"), [[[]]]])
def test_a_field_of_any_kind_is_logged(value: object) -> None:
    line = json.loads(JsonFormatter().format(record("kept", value=value)))
    assert line["message"] == "kept"
    assert "value" in line


def test_a_field_that_contains_itself_is_logged() -> None:
    endless: list[object] = []
    endless.append(endless)
    line = json.loads(JsonFormatter().format(record("kept", value=endless)))
    assert (line["message"], line["value"]) == ("kept", "[[...]]")


@given(st.text(st.characters()))
def test_no_message_makes_a_second_json_line_or_an_escape_sequence(message: str) -> None:
    line = JsonFormatter().format(record(message, field=message))
    assert len(line.splitlines()) == 1
    assert all(each.isprintable() or each == "\u3000" for each in line)
    shown = json.loads(line)
    assert shown["message"] == shown["field"] == message.encode("utf-8", "backslashreplace").decode()


# Text


def test_a_text_line_is_readable() -> None:
    stream = configured("text")
    LOGGER.warning("雪", extra={"model": "a:1"})
    assert re.fullmatch(
        r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.\d{3} WARNING  appliance\.test: 雪 model=a:1\n", stream.getvalue()
    )


def test_a_traceback_is_indented_below_its_line() -> None:
    stream = configured("text")
    try:
        fail("first\n2026-01-01 00:00:00.000 INFO     forged: line\x1b[2J")
    except LookupError:
        LOGGER.exception("it failed")
    first, *others = stream.getvalue().splitlines()
    assert first.endswith("appliance.test: it failed")
    assert all(each.startswith("    ") for each in others)
    assert others[-1] == "    2026-01-01 00:00:00.000 INFO     forged: line\\x1b[2J"


@given(st.text(st.characters()), st.booleans())
def test_no_message_makes_a_second_text_line(message: str, colour: bool) -> None:
    line = TextFormatter(colour=colour).format(record(message, field=message))
    assert len(line.splitlines()) == 1
    assert line.count("\x1b") == 2 * colour


# Choosing and configuring


def test_auto_is_text_in_a_terminal_and_json_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    terminal, pipe = configured("auto", Terminal()), io.StringIO()
    LOGGER.info("hello")
    configure_logging("info", "auto", pipe)
    LOGGER.info("hello")
    assert "\x1b[32mINFO" in terminal.getvalue()
    assert lines(pipe)[0]["message"] == "hello"


def test_no_color_is_obeyed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    terminal = configured("auto", Terminal())
    LOGGER.info("hello")
    assert "\x1b" not in terminal.getvalue()


def test_what_is_below_the_level_is_left_out() -> None:
    stream = configured(level="warning")
    LOGGER.info("quiet")
    LOGGER.warning("loud")
    assert [line["message"] for line in lines(stream)] == ["loud"]


def test_configuring_twice_logs_once() -> None:
    stream = configured()
    configure_logging("info", "json", stream)
    LOGGER.info("once")
    assert len(lines(stream)) == 1


def test_a_servers_own_handlers_and_pythons_warnings_join_the_one_stream() -> None:
    own = io.StringIO()
    uvicorn = logging.getLogger("uvicorn.access")
    uvicorn.addHandler(logging.StreamHandler(own))
    uvicorn.propagate = False
    stream = configured()
    uvicorn.info("GET /", extra={"color_message": "\x1b[1mGET /"})
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.warn("old", DeprecationWarning, stacklevel=1)
    assert own.getvalue() == ""
    served, warned = lines(stream)
    assert (served["logger"], served["message"]) == ("uvicorn.access", "GET /")
    assert "color_message" not in served
    assert "DeprecationWarning: old" in warned["message"]


def test_standard_error_is_the_default_and_one_line_stays_one_line() -> None:
    program = (
        "import logging; from appliance.observe.logs import configure_logging;"
        "configure_logging('info', 'auto'); logging.info('a\\nb')"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=30, check=True)
    assert result.stdout == ""
    assert json.loads(result.stderr)["message"] == "a\nb"


# Requests


@pytest.mark.anyio
async def test_each_tasks_lines_carry_its_own_request() -> None:
    stream = configured()

    async def work(identifier: str) -> None:
        request_id.set(identifier)
        await asyncio.sleep(0)
        LOGGER.info("working")

    async with asyncio.TaskGroup() as group:
        for identifier in ("a", "b"):
            group.create_task(work(identifier))
    LOGGER.info("idle")
    assert [line.get("request_id") for line in lines(stream)] == ["a", "b", None]


def test_another_threads_line_may_name_its_request_itself() -> None:
    stream = configured()
    token = request_id.set("mine")
    LOGGER.info("working", extra={"request_id": "theirs"})
    request_id.reset(token)
    assert lines(stream)[0]["request_id"] == "theirs"
