"""Calls are read the same, however the answer is cut."""

from __future__ import annotations

import itertools
from collections.abc import Iterable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from appliance.serving.tools import dialects
from appliance.serving.tools.reader import LONGEST_HEADER, CallReader
from tests.serving.tools.samples import NAMES, SAMPLES, Sample


def reader_of(sample: Sample) -> CallReader:
    numbers = itertools.count()
    return CallReader(sample.dialect, NAMES, lambda: f"call_{next(numbers)}")


def read(sample: Sample, pieces: Iterable[str]) -> tuple[str, tuple[tuple[str, str], ...]]:
    reader = reader_of(sample)
    text = ""
    names: list[str] = []
    arguments: list[str] = []
    for reading in [*(reader.push(each) for each in pieces), reader.finish()]:
        text += reading.text
        for call in reading.calls:
            if call.id:
                assert (call.id, call.index) == (f"call_{len(names)}", len(names))
                names.append(call.name)
                arguments.append("")
            assert call.index == len(names) - 1
            arguments[-1] += call.arguments
    assert reader.begun == len(names)
    return text, tuple(zip(names, arguments, strict=True))


@pytest.mark.parametrize("sample", SAMPLES)
def test_recorded_answers(sample: Sample) -> None:
    wanted = (sample.text, sample.calls)
    assert read(sample, [sample.answer]) == wanted
    assert read(sample, sample.answer) == wanted
    for at in range(len(sample.answer)):
        assert read(sample, [sample.answer[:at], sample.answer[at:]]) == wanted


@given(st.sampled_from(SAMPLES), st.data())
def test_any_cut_of_an_answer_gives_the_same_calls(sample: Sample, data: st.DataObject) -> None:
    cuts = sorted(data.draw(st.sets(st.integers(0, len(sample.answer)))))
    pieces = [sample.answer[a:b] for a, b in itertools.pairwise([0, *cuts, len(sample.answer)])]
    assert read(sample, pieces) == (sample.text, sample.calls)


FRAGMENTS = (
    *("<tool_call>", "</tool_call>", "[TOOL_CALLS]", "[ARGS]", "<|python_tag|>", '{"name": "get"', '"arguments": {'),
    *('"parameters": {', "{}", "}", "[", "]", ", ", '"', "\\", "\n", " ", "; ", "get_weather", "x", "界"),
)


@given(st.sampled_from(SAMPLES), st.lists(st.sampled_from(FRAGMENTS), max_size=30), st.data())
def test_any_cut_of_anything_gives_the_same(sample: Sample, parts: list[str], data: st.DataObject) -> None:
    answer = "".join(parts)
    cuts = sorted(data.draw(st.sets(st.integers(0, len(answer)))))
    pieces = [answer[a:b] for a, b in itertools.pairwise([0, *cuts, len(answer)])]
    assert read(sample, pieces) == read(sample, [answer])


@given(st.sampled_from(SAMPLES), st.lists(st.sampled_from(FRAGMENTS), max_size=30))
def test_without_calls_no_character_is_lost(sample: Sample, parts: list[str]) -> None:
    answer = "".join(parts)
    text, calls = read(sample, [answer])
    assert calls or text == answer


def test_arguments_stream_as_they_come() -> None:
    reader = CallReader(dialects.HERMES, NAMES, lambda: "call_0")
    assert reader.push('Hi <tool_call>\n{"name": "get_weather", "arguments": ').text == "Hi"
    first = reader.push('{"city": ')
    assert [(each.name, each.arguments) for each in first.calls] == [("get_weather", ""), ("", '{"city": ')]
    assert not reader.whole
    assert reader.push("").calls == ()
    assert [each.arguments for each in reader.push('"Graz').calls] == ['"Graz']
    assert [each.arguments for each in reader.push('"}}').calls] == ['"}']
    assert reader.whole


def test_text_is_not_held_back_longer_than_it_may_begin_a_call() -> None:
    reader = CallReader(dialects.HERMES, NAMES, lambda: "call_0")
    assert reader.push("Less: a <").text == "Less: a"
    assert reader.push("tool b").text == " <tool b"


def test_a_flood_of_blanks_within_a_call_is_text_in_the_end() -> None:
    flood = "<tool_call>" + " " * 2 * LONGEST_HEADER
    sample = Sample(dialects.HERMES, flood, flood, ())
    assert read(sample, flood) == read(sample, [flood]) == (flood, ())
    late = f'{flood}{{"name": "get", "arguments": {{}}}}</tool_call>'
    sample = Sample(dialects.HERMES, late, late, ())
    assert read(sample, late) == read(sample, [late]) == (late, ())
