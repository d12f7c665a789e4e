"""Tasks are read and judged by the data set's rules."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from appliance.bench.client import Response
from tests.benchmarks.test_command import run
from tests.benchmarks.tool.__main__ import CHOICES, PEERS, TASKS
from tests.benchmarks.tool.measure import Counts, count
from tests.benchmarks.tool.tasks import CATEGORIES, Task, converted, read_tasks

PARAMETERS = {
    "type": "dict",
    "properties": {
        "size": {"type": "float", "format": "float"},
        "names": {"type": "tuple", "items": {"type": "any"}},
        "unit": {"type": "string", "optional": True},
        "box": {"type": "dict", "properties": {"x": {"type": "integer"}}},
    },
    "required": ["size"],
}
ACCEPTED: dict[str, list[Any]] = {
    "size": [3, 3.5],
    "names": [["Li Wei", "Bo"], ""],
    "unit": ["m", ""],
    "box": [{"x": [1, 2]}, ""],
}


@pytest.fixture
def task(tmp_path: Path) -> Task:
    (tmp_path / "possible_answer").mkdir()
    question = {
        "id": "multiple_0",
        "question": [[{"role": "user", "content": "How large?"}]],
        "function": [{"name": "math.area", "description": "Tells it.", "parameters": PARAMETERS}],
    }
    answer = {"id": "multiple_0", "ground_truth": [{"math.area": ACCEPTED}]}
    (tmp_path / "BFCL_v4_multiple.json").write_text(json.dumps(question) + "\n")
    (tmp_path / "possible_answer" / "BFCL_v4_multiple.json").write_text(json.dumps(answer) + "\n")
    (found,) = read_tasks(tmp_path, "multiple", 5)
    return found


def test_schemas_are_put_in_the_terms_of_json_schema(task: Task) -> None:
    assert task.schema("math_area") == {
        "type": "object",
        "properties": {
            "size": {"type": "number"},
            "names": {"type": "array", "items": {"type": "string"}},
            "unit": {"type": "string"},
            "box": {"type": "object", "properties": {"x": {"type": "integer"}}},
        },
        "required": ["size"],
    }
    assert task.schema("other") is None
    assert converted([{"type": "bool"}, 7]) == [{"type": "boolean"}, 7]


@pytest.mark.parametrize(
    ("arguments", "right"),
    [
        ({"size": 3}, True),
        ({"size": 3.0, "unit": "M."}, True),
        ({"size": 3, "names": ["li-wei", "bo"], "box": {"x": 2}}, True),
        ({"size": 4}, False),
        ({"size": True}, False),
        ({"unit": "m"}, False),
        ({"size": 3, "unit": "cm"}, False),
        ({"size": 3, "colour": "red"}, False),
        ({"size": 3, "names": ["Bo", "Li Wei"]}, False),
        ({"size": 3, "box": {"x": 3}}, False),
        ({"size": 3, "box": {"x": 1, "y": 1}}, False),
        ({"size": 3, "box": {}}, False),
    ],
)
def test_right_is_what_the_data_set_accepts(task: Task, arguments: dict[str, Any], right: bool) -> None:
    assert task.is_right("math_area", arguments) is right
    assert not task.is_right("math.area", arguments)


def answered(*calls: tuple[str, str], reason: str = "tool_calls", status: int = 200) -> Response:
    message = {"tool_calls": [{"function": {"name": name, "arguments": arguments}} for name, arguments in calls]}
    body = json.dumps({"choices": [{"message": message, "finish_reason": reason}]}).encode()
    return Response(0.0, status=status, pieces=[(0.0, body)])


def test_answers_are_counted(task: Task) -> None:
    counts = Counts()
    for response in (
        answered(status=400),
        answered(reason="stop"),
        answered(("math_area", '{"size": 3}')),
        answered(("math_area", '{"size": "x"}')),
        answered(("rm", "{}")),
        answered(("math_area", "{")),
        answered(("math_area", "[]")),
        answered(("math_area", '{"size": 3}'), ("math_area", '{"size": 3}')),
        answered(("math_area", '{"size": 3'), reason="length"),
    ):
        count(counts, task, response)
    assert counts == Counts(tasks=9, refused=1, calling=7, cut=1, calls=7, parsed=5, valid=3, named=2, right=1)


def test_help_names_what_can_be_chosen_and_the_defaults() -> None:
    result = run("tools", "--help")
    assert result.returncode == 0
    assert f"both of: {' '.join(CATEGORIES)}\n" in result.stdout
    assert f"both of: {' '.join(CHOICES)}\n" in result.stdout
    assert f"the default is {PEERS[0]}" in result.stdout
    assert f"the default is {TASKS}" in result.stdout
    assert run("tools", "--no-such-option").returncode == 2
