"""Texts become token ids; a hostile tokenizer.json is refused at the door."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from array import array
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from appliance.core.errors import EngineError, ModelFileError
from appliance.engine.onnx import tokenizer as room
from appliance.engine.onnx.tokenizer import TextTokenizer, shares
from tests.tiny_encoders import tokenizer_json, vocabulary, write_json

IDS = {token: number for number, token in enumerate(vocabulary())}
CLS, SEP = IDS["[CLS]"], IDS["[SEP]"]
BOMB = {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated", "invert": False}


def ids(*tokens: str) -> list[int]:
    return [IDS[each] for each in tokens]


def tokenizer(
    folder: Path, *, vocabulary_size: int | None = None, lower_case: bool = False, **changes: Any
) -> TextTokenizer:
    write_json(folder / "tokenizer.json", tokenizer_json() | changes)
    return TextTokenizer(folder / "tokenizer.json", vocabulary_size=vocabulary_size, lower_case=lower_case)


def test_a_text_gets_the_tokens_that_the_model_wants_around_it(tmp_path: Path) -> None:
    rows = tokenizer(tmp_path).texts(["The pump stops!", "", "水泵 leaks"], 48)
    assert [each.tokens.tolist() for each in rows] == [
        [CLS, *ids("the", "pump", "stops", "!"), SEP],
        [CLS, SEP],
        [CLS, *ids("水", "泵", "leaks"), SEP],
    ]
    assert all(each.types is None for each in rows)


def test_the_limits_and_the_padding_in_the_file_do_not_count(tmp_path: Path) -> None:
    [short, long] = tokenizer(tmp_path).texts(["pump", "pump " * 20], 48)
    assert len(short.tokens) == 3
    assert len(long.tokens) == long.whole == 22


def test_a_text_that_is_too_long_keeps_its_start_and_its_end_token(tmp_path: Path) -> None:
    [row] = tokenizer(tmp_path).texts(["the pump of line 7 stops"], 5)
    assert row.tokens.tolist() == [CLS, *ids("the", "pump", "of"), SEP]
    assert row.whole == 8


def test_a_special_token_that_a_text_spells_out_is_plain_text(tmp_path: Path) -> None:
    [row] = tokenizer(tmp_path).texts(["pump [SEP] [CLS]"], 48)
    assert row.tokens.tolist().count(SEP) == 1
    assert row.tokens.tolist().count(CLS) == 1


def test_a_pair_is_read_as_two_segments(tmp_path: Path) -> None:
    [row] = tokenizer(tmp_path).pairs("why pump", ["the pump stops"], 48)
    assert row.tokens.tolist() == [CLS, *ids("why", "pump"), SEP, *ids("the", "pump", "stops"), SEP]
    assert row.types == array("i", [0] * 4 + [1] * 4)


def test_the_longer_text_of_a_pair_is_cut_first_and_no_special_token(tmp_path: Path) -> None:
    made = tokenizer(tmp_path)
    [long_document] = made.pairs("why pump", ["stops " * 40], 12)
    assert long_document.tokens.tolist() == [CLS, *ids("why", "pump"), SEP, *ids("stops") * 7, SEP]
    assert long_document.whole == 45
    [long_query] = made.pairs("why " * 40, ["pump"], 12)
    assert long_query.tokens.tolist() == [CLS, *ids("why") * 8, SEP, *ids("pump"), SEP]
    [both] = made.pairs("why " * 40, ["pump " * 30], 12)
    assert both.tokens.tolist() == [CLS, *ids("why") * 5, SEP, *ids("pump") * 4, SEP]


@given(st.integers(0, 40), st.integers(0, 40), st.integers(0, 50))
def test_what_stays_of_two_texts_fills_the_room_and_evens_them_out(first: int, second: int, room: int) -> None:
    kept, rest = shares(first, second, room)
    assert 0 <= kept <= first
    assert 0 <= rest <= second
    assert kept + rest == min(room, first + second)
    if kept < first and rest < second:
        assert abs(kept - rest) <= 1
    elif kept < first:
        assert kept >= rest - 1
    elif rest < second:
        assert rest >= kept - 1


def test_what_the_model_does_in_lower_case_is_done(tmp_path: Path) -> None:
    changes: dict[str, Any] = {"normalizer": None}
    [upper] = tokenizer(tmp_path, **changes).texts(["PUMP"], 48)
    [lower] = tokenizer(tmp_path, lower_case=True, **changes).texts(["PUMP"], 48)
    assert upper.tokens.tolist() == [CLS, IDS["[UNK]"], SEP]
    assert lower.tokens.tolist() == [CLS, IDS["pump"], SEP]


def test_a_tokenizer_that_adds_nothing_is_fine(tmp_path: Path) -> None:
    made = tokenizer(tmp_path, post_processor=None)
    assert made.added == 0
    assert made.texts(["pump"], 48)[0].tokens.tolist() == ids("pump")
    assert made.pairs("why", ["pump"], 48)[0].tokens.tolist() == ids("why", "pump")


def test_a_roberta_pair_has_two_tokens_between_its_texts(tmp_path: Path) -> None:
    processor = {"type": "RobertaProcessing", "sep": ["[SEP]", SEP], "cls": ["[CLS]", CLS]}
    made = tokenizer(tmp_path, post_processor={**processor, "trim_offsets": True, "add_prefix_space": False})
    [row] = made.pairs("why", ["pump"], 48)
    assert row.tokens.tolist() == [CLS, IDS["why"], SEP, SEP, IDS["pump"], SEP]
    assert row.types is None
    assert made.added == 4


def test_the_library_starts_no_threads_of_its_own(tmp_path: Path) -> None:
    write_json(tmp_path / "tokenizer.json", tokenizer_json())
    code = """
import os, sys
from pathlib import Path
from appliance.engine.onnx.tokenizer import TextTokenizer
tokenizer = TextTokenizer(Path(sys.argv[1]))
tokenizer.texts(["the pump stops " * 50] * 500, 512)
print(len(os.listdir("/proc/self/task")))
"""
    environment = os.environ | {"TOKENIZERS_PARALLELISM": "true"}
    command = [sys.executable, "-c", code, str(tmp_path / "tokenizer.json")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=True)
    numpy_alone = "import numpy, os; print(len(os.listdir('/proc/self/task')))"
    alone = subprocess.run([sys.executable, "-c", numpy_alone], capture_output=True, text=True, timeout=60, check=True)
    assert int(done.stdout) <= int(alone.stdout), (done.stdout, alone.stdout)


# Hostile files


def template(single: list[Any], pair: list[Any]) -> dict[str, Any]:
    return {"type": "TemplateProcessing", "single": single, "pair": pair, "special_tokens": {}}


FIRST, SECOND = {"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}
WORDPIECE = tokenizer_json()["model"]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        pytest.param({"pre_tokenizer": BOMB}, "retry-limit", id="a regular expression that explodes"),
        pytest.param({"pre_tokenizer": {**BOMB, "pattern": {"Regex": "("}}}, "parenthesis", id="one that is none"),
        pytest.param(
            {"post_processor": template([{"SpecialToken": {"id": "[X]", "type_id": 0}}, FIRST], [FIRST, SECOND])},
            "no entry found",
            id="a panic in Rust",
        ),
        pytest.param({"post_processor": template([FIRST], [SECOND, FIRST])}, "order", id="texts in another order"),
        pytest.param({"post_processor": template([FIRST], [FIRST])}, "leaves out", id="a text is left out"),
        pytest.param({"post_processor": template([], [])}, "leaves out", id="every text is left out"),
        pytest.param({"model": {"type": "Magic"}}, "cannot be used", id="a model that does not exist"),
        pytest.param({"model": {**WORDPIECE, "vocab": {"a": 0}}, "post_processor": None}, "UNK", id="no unknown token"),
        pytest.param(
            {"model": {**WORDPIECE, "vocab": {"[UNK]": 2**32 - 1}}, "added_tokens": [], "post_processor": None},
            "4294967295",
            id="an id that is no number of 31 bits",
        ),
    ],
)
def test_a_tokenizer_that_makes_the_library_fail_is_refused(
    tmp_path: Path, changes: dict[str, Any], reason: str
) -> None:
    with pytest.raises(ModelFileError, match=reason):
        tokenizer(tmp_path, **changes)


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"\xff\xfe", b"[" * 100_000, b'{"a":' * 100_000, b"null", b"[]", b"{}", json.dumps("x").encode()],
)
def test_what_is_no_tokenizer_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(ModelFileError, match=r"tokenizer\.json cannot be used"):
        TextTokenizer(tmp_path / "tokenizer.json")


def test_a_file_that_is_missing_is_told(tmp_path: Path) -> None:
    with pytest.raises(ModelFileError, match="No such file"):
        TextTokenizer(tmp_path / "tokenizer.json")


def test_a_file_that_is_too_large_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / "tokenizer.json").open("wb") as file:
        file.truncate(room.LARGEST_FILE + 1)
    with pytest.raises(ModelFileError, match=str(room.LARGEST_FILE + 1)):
        TextTokenizer(tmp_path / "tokenizer.json")


def test_the_tokenizer_of_a_larger_model_is_refused_where_it_shows(tmp_path: Path) -> None:
    with pytest.raises(ModelFileError, match="does not know"):
        tokenizer(tmp_path, vocabulary_size=CLS)
    made = tokenizer(tmp_path, vocabulary_size=IDS["pump"])
    with pytest.raises(EngineError, match=f"token {IDS['pump']} of a text; the model knows 0 to {IDS['pump'] - 1}"):
        made.texts(["the pump"], 48)


def test_a_text_that_makes_the_library_panic_fails_alone(tmp_path: Path) -> None:
    late = {**BOMB, "pattern": {"Regex": "(z+)+$"}}  # no sample is like that
    made = tokenizer(tmp_path, pre_tokenizer=late)
    with pytest.raises(EngineError, match="tokenizer failed"):
        made.texts(["z" * 60 + "!"], 48)
    assert made.texts(["pump"], 48)[0].tokens.tolist() == [CLS, IDS["pump"], SEP]
