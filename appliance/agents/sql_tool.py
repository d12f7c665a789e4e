"""The tool `sql`, an extension: the model asks SQLite files that the operator has registered, and changes nothing.

    {"type": "sql", "databases": ["sales"], "require_approval": "never"}

Without `databases` it has all of them. The model sees their tables in the tool's description. What a query may do is
`store.read_only_child`'s business.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import msgspec

from appliance.agents.definitions import bad_definition, read_definition
from appliance.core.errors import ApplianceError, DeadlineExceededError, InvalidRequestError
from appliance.core.printable import printable
from appliance.core.tools import Tool, ToolResult
from appliance.store.read_only import ReadOnlyFiles, Rows, Table

LABEL = "sql"
NAME = "query_database"
MOST_ROWS = 200
MOST_BYTES = 64 * 1024
MOST_QUERY_CHARACTERS = 20_000
MOST_SCHEMA_CHARACTERS = 6000
"""Of all schemas together, as the model is shown them with every step."""
SCHEMA_TIMEOUT_S = 5.0
QUERY_TIMEOUT_S = 10.0


class SqlDefinition(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The tool as a request describes it."""

    type: Literal["sql"]
    databases: list[str] | None = None
    require_approval: Literal["always", "never"] = "never"


class SqlTools:
    """Makes the tool; an `agents.registry.ToolFactory`."""

    def __init__(self, databases: Mapping[str, Path], files: ReadOnlyFiles) -> None:
        """Take the registered files by name."""
        self._databases = dict(databases)
        self._files = files

    async def __call__(self, definition: Mapping[str, Any], *, tenant: str, request_id: str) -> SqlTool:
        """Return the tool for a request."""
        del tenant, request_id
        wanted = read_definition(definition, SqlDefinition)
        names = list(dict.fromkeys(wanted.databases or self._databases))
        strange = [each for each in names if each not in self._databases]
        if strange or not names:
            known = ", ".join(self._databases) or "none"
            raise bad_definition(LABEL, f"there is no database {(strange or [''])[0][:64]!r}; registered are: {known}.")
        chosen = {each: self._databases[each] for each in names}
        schemas = {name: await self._files.schema(path, deadline_s=SCHEMA_TIMEOUT_S) for name, path in chosen.items()}
        return SqlTool(chosen, schemas, self._files, guarded=wanted.require_approval == "always")


class SqlTool:
    """Runs queries; a `core.tools.BuiltInTool`."""

    def __init__(
        self,
        databases: Mapping[str, Path],
        schemas: Mapping[str, Sequence[Table]],
        files: ReadOnlyFiles,
        *,
        guarded: bool,
    ) -> None:
        self._databases = databases
        self._files = files
        self._guarded = guarded
        self._tool = Tool(NAME, described(schemas), _parameters(tuple(databases)))

    @property
    def label(self) -> str:
        """Return `sql`."""
        return LABEL

    @property
    def tools(self) -> Sequence[Tool]:
        """Return the one tool."""
        return (self._tool,)

    def needs_approval(self, name: str) -> bool:
        """Return whether a person must agree before a query runs."""
        del name
        return self._guarded

    async def call(
        self, name: str, arguments: Mapping[str, Any], *, tenant: str, deadline_s: float, request_id: str
    ) -> ToolResult:
        """Run a query; see `core.tools.BuiltInTool.call`."""
        del name, tenant, request_id
        database = arguments.get("database", next(iter(self._databases)))
        query = arguments.get("query")
        path = self._databases.get(database) if isinstance(database, str) else None
        if path is None:
            return ToolResult("bad_arguments", f"There is no such database; there are: {', '.join(self._databases)}.")
        if not isinstance(query, str) or not 0 < len(query) <= MOST_QUERY_CHARACTERS:
            return ToolResult("bad_arguments", f"query is a SELECT of at most {MOST_QUERY_CHARACTERS} characters.")
        try:
            found = await self._files.query(
                path,
                query,
                most_rows=MOST_ROWS,
                most_bytes=MOST_BYTES,
                deadline_s=max(0.1, min(deadline_s - 1.0, QUERY_TIMEOUT_S)),
            )
        except DeadlineExceededError as error:
            return ToolResult("timeout", str(error))
        except InvalidRequestError as error:
            return ToolResult("bad_arguments", str(error))
        except ApplianceError as error:
            return ToolResult("failed", str(error))
        return ToolResult("ok", written(found))


def described(schemas: Mapping[str, Sequence[Table]]) -> str:
    """Return what the model is told of the tool: what it does, and the tables that there are."""
    lines = ["Reads SQLite with one SELECT. Nothing can be changed."]
    for name, tables in schemas.items():
        lines.append(f"Tables of {name}:")
        lines += [printable(f"{each.name}({', '.join(each.columns)})") for each in tables]
    text = "\n".join(lines)
    if len(text) > MOST_SCHEMA_CHARACTERS:
        text = f"{text[:MOST_SCHEMA_CHARACTERS]}\n(More tables are left out; sqlite_schema has them.)"
    return text


def written(found: Rows) -> str:
    """Return rows as the model reads them: JSON, the columns' names first, one row a line."""
    lines = [msgspec.json.encode(each).decode() for each in (found.columns, *found.rows)]
    if found.more:
        lines.append(f"(More rows are left out behind these {len(found.rows)}.)")
    return "\n".join(lines)


def _parameters(databases: tuple[str, ...]) -> dict[str, Any]:
    properties: dict[str, Any] = {"query": {"type": "string", "description": "One SELECT in SQLite's SQL"}}
    if len(databases) > 1:
        properties = {"database": {"type": "string", "enum": list(databases)}, **properties}
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }
