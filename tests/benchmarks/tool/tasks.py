"""BFCL's tasks of one call each, and whether an answer is right by its rules.

Types are converted as its own runner does for models with OpenAI's tools: `dict` is an object, `float` a number,
`tuple` an array, `any` a string, and a dot in a name an underscore. Right is a call of the right function with every
required argument and no unknown one, each with one of the values that the data set accepts; text is compared without
case, blanks and punctuation. Source: https://github.com/ShishirPatil/gorilla, berkeley-function-call-leaderboard.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CATEGORIES = {"simple": "simple_python", "multiple": "multiple"}
SEED = 6

_TYPES = {
    "dict": "object",
    "float": "number",
    "double": "number",
    "tuple": "array",
    "list": "array",
    "any": "string",
    "bool": "boolean",
}
_IGNORED = re.compile(r"[ ,./\-_*^]")


@dataclass(frozen=True, slots=True)
class Task:
    """One question.

    Attributes:
        tools: As OpenAI's clients send them.
        accepted: Of the right call: its name, and for each argument the values that will do; "" is leaving it out.
    """

    name: str
    messages: tuple[Mapping[str, Any], ...]
    tools: tuple[Mapping[str, Any], ...]
    accepted: tuple[str, Mapping[str, Sequence[Any]]]

    def schema(self, name: str) -> Mapping[str, Any] | None:
        """Return the schema of a tool's arguments, or None if it was not offered."""
        return next((each["function"]["parameters"] for each in self.tools if each["function"]["name"] == name), None)

    def is_right(self, name: str, arguments: Mapping[str, Any]) -> bool:
        """Return whether a call is the right one."""
        wanted, accepted = self.accepted
        schema = self.schema(name)
        if name != wanted or schema is None or not set(schema.get("required", ())) <= set(arguments):
            return False
        left_out = accepted.keys() - arguments.keys()
        if not arguments.keys() <= accepted.keys() or any("" not in accepted[each] for each in left_out):
            return False
        return all(any(_same(value, each) for each in accepted[key]) for key, value in arguments.items())


def read_tasks(folder: Path, category: str, count: int) -> list[Task]:
    """Return so many tasks of a category, always the same ones.

    Raises:
        OSError: The data set is not there.
    """
    stem = f"BFCL_v4_{CATEGORIES[category]}.json"
    questions = [json.loads(line) for line in (folder / stem).read_text(encoding="utf-8").splitlines() if line]
    answers = {}
    for line in (folder / "possible_answer" / stem).read_text(encoding="utf-8").splitlines():
        answer = json.loads(line)
        answers[answer["id"]] = answer["ground_truth"]
    drawn = random.Random(SEED).sample(questions, min(count, len(questions)))
    return [_task(each, answers[each["id"]]) for each in drawn]


def converted(schema: Any) -> Any:
    """Return a schema with the data set's types as JSON Schema names them."""
    if isinstance(schema, list):
        return [converted(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    changed = {key: converted(value) for key, value in schema.items() if key != "optional"}
    if isinstance(kind := schema.get("type"), str):
        changed["type"] = _TYPES.get(kind, kind)
    if schema.get("format") == "float":
        del changed["format"]
    return changed


def _task(question: Mapping[str, Any], truth: Sequence[Mapping[str, Any]]) -> Task:
    [[name, accepted]] = truth[0].items()
    tools = tuple(
        {
            "type": "function",
            "function": {
                "name": _name(each["name"]),
                "description": each["description"],
                "parameters": converted(each["parameters"]),
            },
        }
        for each in question["function"]
    )
    return Task(question["id"], tuple(question["question"][0]), tools, (_name(name), accepted))


def _name(name: str) -> str:
    return name.replace(".", "_")


def _same(value: Any, accepted: Any) -> bool:
    """Return whether a value is one that will do; in objects each key has a list of those."""
    if isinstance(value, bool) or isinstance(accepted, bool):
        return value is accepted
    if isinstance(value, str) and isinstance(accepted, str):
        return _plain(value) == _plain(accepted)
    if isinstance(value, list) and isinstance(accepted, list):
        return len(value) == len(accepted) and all(map(_same, value, accepted))
    if isinstance(value, dict) and isinstance(accepted, dict):
        present = all(key in value or "" in each for key, each in accepted.items())
        return present and all(
            key in accepted and any(_same(each, one) for one in accepted[key]) for key, each in value.items()
        )
    return bool(value == accepted)


def _plain(text: str) -> str:
    return _IGNORED.sub("", text).lower().replace("'", '"')
