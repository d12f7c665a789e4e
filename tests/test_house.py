"""The house rules that no other tool holds: sizes, docstrings, and the home of each foreign library.

Which room may import which other is import-linter's (see pyproject.toml).
"""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).resolve().parents[1]
PACKAGE = CHECKOUT / "appliance"
MODULES = sorted(PACKAGE.rglob("*.py"))
SCRIPTS = sorted((CHECKOUT / "firmware_scripts").glob("*.py"))

MOST_LINES = 400

HOMES = {
    "charset_normalizer": ("retrieval/parsing/",),
    "Stemmer": ("core/words.py",),
    "click": ("cli/",),
    "cryptography": ("security/",),
    "ctypes": (
        "observe/allocator.py",
        "engine/llama/",
        "engine/llama_embedding/context.py",
        "retrieval/vectors/native.py",
    ),
    "faiss": ("retrieval/vectors/",),
    "filetype": ("retrieval/parsing/",),
    "httptools": ("bench/",),
    "jinja2": ("serving/template_process.py", "serving/template_child.py"),
    "llama_cpp": ("engine/llama/",),
    "llguidance": ("engine/llama/",),
    "lxml": ("retrieval/parsing/",),
    "markdown_it": ("retrieval/parsing/",),
    "httpx2": ("agents/mcp_client.py",),
    "mcp": ("agents/mcp_client.py", "api/mcp/server.py"),
    "mcp_types": ("agents/mcp_client.py", "api/mcp/server.py"),
    "ml_dtypes": ("api/oip/", "engine/onnx/"),
    "numpy": ("api/oip/", "core/tensors.py", "engine/", "retrieval/"),
    "onnx": (
        "engine/onnx/quantize.py",
        "registry/onnx_header.py",
        "registry/onnx_operators.py",
        "registry/onnx_tensors.py",
        "registry/onnx_wire.py",
    ),
    "onnxruntime": ("engine/onnx/",),
    "openpyxl": ("retrieval/parsing/",),
    "paho": ("messaging/session.py",),
    "prometheus_client": ("observe/metrics.py", "observe/fleet_metrics.py", "observe/hub_metrics.py"),
    "psutil": ("observe/resources.py", "bench/"),
    "PIL": ("retrieval/parsing/pictures.py",),
    "pypdf": ("retrieval/parsing/",),
    "python_multipart": ("api/multipart.py",),
    "rich": ("cli/",),
    "sdnotify": ("compose.py", "hub/room.py"),
    "simdjson": ("api/oip/",),
    "securesystemslib": ("security/",),
    "sqlite3": ("store/",),
    "sqlite_utils": ("store/",),
    "sseclient": ("cli/chat_client.py",),
    "starlette": ("api/", "hub/http/", "web/"),
    # model.py and lexical.py start no thread: they guard what any thread may use with a lock.
    # model.py and indexes.py start no thread: they guard with locks what any thread may use.
    "threading": (
        "engine/llama/model.py",
        "engine/llama/worker.py",
        "engine/llama_embedding/worker.py",
        "engine/onnx/worker.py",
        "engine/cpu_budget.py",
        "retrieval/lexical.py",
        "retrieval/vectors/indexes.py",
        "store/database.py",
    ),
    "tokenizers": ("engine/onnx/",),
    "truststore": ("cli/chat_client.py", "registry/sources/https.py"),
    "urllib3": ("cli/chat_client.py", "registry/"),
    "tuf": ("security/metadata.py", "hub/metadata.py"),
    "uvicorn": ("web/",),
    "zstandard": ("messaging/compression.py",),
}
"""Where a library may be imported, relative to the package: a file, or a folder that ends with a slash."""

BANISHED = {
    "certifi": "its licence is MPL; truststore uses the system's certificates",
    "gguf": "headers are hostile input, and our own reader is bounded; gguf only writes the tests' models",
    "httpx": "it pulls in certifi; urllib3 is here",
    "multiprocessing": "it forks a process with threads, and pickles",
    "pickle": "reading it runs what it says",
    "requests": "it pulls in certifi; urllib3 is here",
}


def name(path: Path) -> str:
    return str(path.relative_to(CHECKOUT))


def imports(source: str) -> set[str]:
    """Return the top-level names of everything that a module imports, in functions and under conditions too."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found.update(alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            found.add(node.module.partition(".")[0])
    return found


def docstring(path: Path) -> str:
    return ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""


def is_at_home(library: str, module: str) -> bool:
    return any(module == home or (home.endswith("/") and module.startswith(home)) for home in HOMES[library])


def test_every_import_is_seen() -> None:
    source = "import a.b, c\nfrom d.e import f\nfrom . import g\ndef h():\n    if 1:\n        import i as j\n"
    assert imports(source) == {"a", "c", "d", "i"}


def test_a_home_is_a_file_or_a_folder() -> None:
    assert is_at_home("sqlite3", "store/database.py")
    assert is_at_home("sdnotify", "compose.py")
    assert not is_at_home("sqlite3", "storehouse.py")
    assert not is_at_home("threading", "engine/llama/context.py")


@pytest.mark.parametrize("path", MODULES, ids=name)
def test_a_foreign_library_is_imported_only_in_its_home(path: Path) -> None:
    module = str(path.relative_to(PACKAGE))
    found = imports(path.read_text(encoding="utf-8"))
    strays = [library for library in sorted(HOMES.keys() & found) if not is_at_home(library, module)]
    assert not strays, {library: HOMES[library] for library in strays}
    assert not BANISHED.keys() & found, {library: BANISHED[library] for library in BANISHED.keys() & found}


def test_every_library_with_a_home_lives_there() -> None:
    used = set().union(*(imports(path.read_text(encoding="utf-8")) for path in MODULES))
    assert HOMES.keys() - used == set(), "a home for a library that nobody uses"


@pytest.mark.parametrize("path", [*MODULES, *SCRIPTS], ids=name)
def test_every_public_module_says_what_it_is_for(path: Path) -> None:
    text = docstring(path)
    assert text, "no docstring"
    first = text.partition("\n\n")[0]
    assert first.rstrip()[-1] in ".:", f"its first sentence has no end: {first!r}"


@pytest.mark.parametrize("path", [*MODULES, *SCRIPTS], ids=name)
def test_a_long_module_gives_its_reason(path: Path) -> None:
    lines = len(path.read_text(encoding="utf-8").splitlines())
    assert lines <= MOST_LINES or f"over {MOST_LINES} lines" in " ".join(docstring(path).split()).lower(), (
        f"{lines} lines: split it, or begin a sentence of its docstring with 'Over {MOST_LINES} lines because'"
    )
