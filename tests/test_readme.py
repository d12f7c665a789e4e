"""README cannot drift: its tables of verbs, settings, routes, metrics and error codes are the code's, to the word."""

from __future__ import annotations

import ast
import importlib
import pkgutil
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest
from starlette.routing import Route

import appliance
from appliance.api.app import create_app
from appliance.cli import VERBS
from appliance.core import fleet, wishes
from appliance.core.errors import ApplianceError
from appliance.core.settings import Settings, setting_fields
from appliance.observe.metrics import PREFIX, Metrics
from appliance.web.errors import KINDS, STATUS_OF_CODE
from appliance.web.routes import Operation, Resource

CHECKOUT = Path(__file__).resolve().parents[1]
README = (CHECKOUT / "README.md").read_text(encoding="utf-8")
SOURCES = sorted((CHECKOUT / "appliance").rglob("*.py"))


def table(heading: str) -> list[tuple[str, ...]]:
    """Return the rows of the first table under a heading, without its head; code marks are taken off."""
    _, found, rest = README.partition(f"\n## {heading}\n")
    assert found, f"README has no heading '{heading}'"
    lines = rest.partition("\n## ")[0].splitlines()
    rows = [line for line in lines if line.startswith("|")]
    assert len(rows) > 2, f"README has no table under '{heading}'"
    cells = [re.split(r"(?<!\\)\|", row.strip().strip("|")) for row in rows[2:]]
    return [tuple(re.sub(r"^`([^`]*)`$", r"\1", cell.strip()) for cell in row) for row in cells]


def difference(documented: set[Any], existing: set[Any]) -> str:
    """Say what to add to README and what to take out."""
    return f"missing in README: {sorted(existing - documented)}; not in the code: {sorted(documented - existing)}"


def test_every_verb_is_explained_as_it_explains_itself() -> None:
    documented, existing = set(table("Verbs")), set(VERBS.items())
    assert documented == existing, difference(documented, existing)


def shown(value: object) -> str:
    """Return a default as README shows it."""
    if value is None or value == "":
        return ""
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) else str(value)


def test_every_setting_has_its_name_default_and_meaning() -> None:
    documented = set(table("Settings"))
    existing = {
        (name, shown(getattr(Settings(), name)), each.metadata["meaning"]) for name, each in setting_fields().items()
    }
    assert documented == existing, difference(documented, existing)


def test_every_metric_has_its_name_kind_and_labels() -> None:
    metrics = Metrics()
    metrics.for_model("any")
    existing = set()
    for family in metrics.registry.collect():
        if family.name.startswith(PREFIX):
            name = family.name + ("_total" if family.type == "counter" else "")
            existing.add((name, family.type))
    documented = {(row[0], row[1]) for row in table("Metrics")}
    assert documented == existing, difference(documented, existing)


def all_operations() -> list[Operation]:
    """Return the operations that the application routes to; none is called."""
    nothing = cast("Any", None)
    app = create_app(
        settings=Settings(),
        text_models=nothing,
        embedding_models=nothing,
        classifiers=nothing,
        tensor_models=nothing,
        files=nothing,
        vector_stores=nothing,
        agents=nothing,
        conversations=nothing,
        batches=nothing,
        tunable_models=nothing,
        versions=nothing,
        keys=nothing,
        metrics=Metrics(),
        health=nothing,
    )
    resources = [cast("Resource", cast("Route", each).endpoint) for each in app.routes]
    return [operation for each in resources for method, operation in each._operations.items() if method != "HEAD"]


def test_every_route_has_its_method_and_scope() -> None:
    operations = all_operations()
    existing = {(each.method, each.path, each.access or "none") for each in operations}
    documented = {(row[0], row[1], row[2]) for row in table("Routes")}
    assert documented == existing, difference(documented, existing)


def modules() -> None:
    """Import every module, so that every error class is known."""
    for each in pkgutil.walk_packages(appliance.__path__, "appliance."):
        if each.name != "appliance.__main__":
            importlib.import_module(each.name)


def descendants(root: type[ApplianceError]) -> Iterator[type[ApplianceError]]:
    """Yield a class and all that derive from it."""
    yield root
    for each in root.__subclasses__():
        yield from descendants(each)


def status_of(kind: type[ApplianceError], code: str) -> int:
    """Return the HTTP status of an error of this class with this code."""
    nearest = next(KINDS[each] for each in kind.__mro__ if each in KINDS)
    return STATUS_OF_CODE.get(code, nearest.status)


def texts(node: ast.expr) -> Iterator[str]:
    """Yield the texts that an expression may have as its value."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        yield node.value
    elif isinstance(node, ast.IfExp):
        yield from texts(node.body)
        yield from texts(node.orelse)


STRUCTS_WITH_CODES = {
    name
    for name, each in [*vars(fleet).items(), *vars(wishes).items()]
    if "code" in getattr(each, "__annotations__", ())
}
"""Messages and reports of the fleet, whose codes devices and hub tell each other; they are no HTTP errors."""


def raised_codes() -> set[tuple[str, int]]:
    """Return each error code in the sources with the status that it comes with."""
    modules()
    classes = {each.__name__: each for each in descendants(ApplianceError)}
    found = {(each.default_code, status_of(each, each.default_code)) for each in classes.values()}
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call):
                continue
            if getattr(node.func, "id", "") in STRUCTS_WITH_CODES:
                continue
            for code in (text for word in node.keywords if word.arg == "code" for text in texts(word.value)):
                name = node.func.id if isinstance(node.func, ast.Name) else getattr(node.func, "attr", "")
                assert name in classes, f"{path}:{node.lineno}: {name}(code={code!r}) is none of our errors"
                found.add((code, status_of(classes[name], code)))
    return found


def test_every_error_code_has_its_status() -> None:
    existing = raised_codes()
    documented = {(row[0], int(status)) for row in table("Error codes") for status in row[1].split(", ")}
    assert documented == existing, difference(documented, existing)


def test_every_error_code_is_explained() -> None:
    assert [row[0] for row in table("Error codes") if not row[2]] == []


@pytest.mark.parametrize("target", sorted(set(re.findall(r"\]\(([^)#:]+)\)", README))))
def test_every_link_into_the_repository_leads_somewhere(target: str) -> None:
    assert (CHECKOUT / target).exists()


@pytest.mark.parametrize("program", sorted(set(re.findall(r"(?:firmware_scripts|tests)/[a-z_]+(?![\w./*])", README))))
def test_every_script_that_is_named_exists(program: str) -> None:
    assert (CHECKOUT / program).exists()
