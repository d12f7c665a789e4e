"""The verbs as a person or a script calls them, each in a process of its own."""

from __future__ import annotations

import hashlib
import json
import os
import pty
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from appliance.registry.blobs import Blobs
from appliance.registry.known import RegisteredModel
from appliance.registry.layout import lay_out
from appliance.registry.versions import Registry
from appliance.store.database import Database
from tests.registry.models import TinyModel, document, write_manifest
from tests.registry.onnx_models import write_encoder, write_encoder_folder
from tests.registry.processes import REPOSITORY, environment, holding, run, start
from tests.registry.servers import FileServer
from tests.tiny_gguf import write_tiny_llama, write_tiny_lora
from tests.tiny_onnx import external, fixed


class Box:
    """A data folder with a catalog beside it, worked on by the command line."""

    def __init__(self, folder: Path) -> None:
        self.data, self.site = folder / "data", folder / "site"
        self.site.mkdir()

    def call(self, *arguments: str, code: int = 0) -> str:
        """Run a verb of `appliance models`, check its exit code and return what it printed."""
        done = run("models", *arguments, "--data", str(self.data), APPLIANCE_CATALOG_DIR=str(self.site))
        assert done.returncode == code, done.stderr
        return done.stdout if code == 0 else done.stderr

    def json(self, *arguments: str) -> Any:
        return json.loads(self.call(*arguments, "--json"))


def registered(box: Box, name: str) -> RegisteredModel:
    with closing(Database(box.data / "appliance.db")) as database:
        return Registry(database, Blobs(box.data / "models" / "blobs")).resolve(name)


@pytest.fixture
def box(tmp_path: Path) -> Box:
    return Box(tmp_path)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    path = write_tiny_llama(tmp_path_factory.mktemp("models") / "tiny.gguf", context_length=512)
    content = path.read_bytes()
    return TinyModel(path, content, hashlib.sha256(content).hexdigest())


@pytest.fixture
def server(box: Box, tiny: TinyModel) -> Iterator[FileServer]:
    """The server that the manifest of `tiny` names."""
    with FileServer(tiny.content) as opened:
        source = {"kind": "https", "url": opened.url}
        write_manifest(box.site, document(tiny, source, description="A small model. 小模型。"))
        yield opened


def test_a_model_goes_from_catalog_to_box_and_away(box: Box, server: FileServer, tiny: TinyModel) -> None:
    catalog = {each["name"]: each for each in box.json("catalog")}
    assert catalog["tiny"]["installed"] is False
    assert catalog["tiny"]["size"] == tiny.size
    assert "smollm2-135m-instruct" in catalog

    pulled = box.json("pull", "tiny")
    assert (pulled["name"], pulled["version"], pulled["was_present"]) == ("tiny", "1", False)
    assert pulled["files"][0]["sha256"] == tiny.sha256
    assert Path(pulled["files"][0]["path"]).read_bytes() == tiny.content

    again = box.json("pull", "tiny:1")
    assert again == pulled | {"was_present": True}
    assert len(server.requests) == 1

    listed = box.json("list")
    assert [{**each, "was_present": False} for each in listed] == [pulled]
    assert box.json("show", "tiny") == listed[0]
    assert {each["name"]: each["installed"] for each in box.json("catalog")}["tiny"] is True
    assert box.json("verify") == [
        {
            "model": "tiny:1",
            "role": "model",
            "path": pulled["files"][0]["path"],
            "sha256": tiny.sha256,
            "sound": True,
            "problem": "",
        }
    ]
    assert box.json("remove", "tiny", "--yes") == {"removed": "tiny:1", "freed_bytes": tiny.size}
    assert box.json("list") == []
    assert list((box.data / "models" / "blobs").iterdir()) == []


@pytest.mark.parametrize("verb", [["list"], ["catalog"], ["verify"], ["show", "smollm2-135m-instruct"]])
def test_looking_makes_nothing(box: Box, verb: list[str]) -> None:
    box.call(*verb)
    assert not box.data.exists()


def test_a_person_reads_tables_and_sentences(box: Box, server: FileServer) -> None:
    assert "There is no model yet" in box.call("list")
    assert "小模型" in box.call("catalog")
    shown = box.call("show", "tiny")
    assert "installed" in shown
    assert "False" in shown
    assert "tiny:1 is ready: llama F32, 512 tokens of context" in box.call("pull", "tiny")
    assert "tiny:1 is here already; nothing to do." in box.call("pull", "tiny")
    table = box.call("list")
    assert all(word in table for word in ("tiny:1", "chat", "llama", "F32", "512", "MIT"))
    assert "yes" in box.call("catalog")
    assert "license" not in box.call("show", "tiny")
    assert "sound" in box.call("verify", "tiny")
    assert "Removed tiny:1" in box.call("remove", "tiny", "--yes")


def test_a_file_of_ones_own_is_imported(box: Box, tiny: TinyModel, tmp_path: Path) -> None:
    path = shutil.copy(tiny.path, tmp_path / "My Model.gguf")
    imported = box.json("import", str(path), "--licence", "mit")
    assert (imported["name"], imported["version"], imported["licence"]) == ("my-model", "1", "MIT")
    named = box.json("import", str(path), "--name", "other", "--version", "7", "--license", "Apache-2.0")
    assert (named["name"], named["version"]) == ("other", "7")
    assert "here already" in box.call("import", str(path))


def test_an_adapter_goes_from_a_file_to_the_box_and_away(box: Box, tiny: TinyModel, tmp_path: Path) -> None:
    path = write_tiny_lora(tmp_path / "Legal LoRA.gguf", tiny.path, rank=2)
    refused = box.call("import", str(path), "--base", "tiny", code=3)
    assert "no model 'tiny'" in refused
    box.call("import", str(tiny.path), "--name", "tiny")
    assert "comes in with --base MODEL" in box.call("import", str(path), code=5)
    assert "no version of its own" in box.call("import", str(path), "--base", "tiny", "--version", "2", code=5)
    told = box.call("import", str(path), "--base", "tiny", "--name", "legal", "--licence", "MIT")
    assert "tiny:1:legal is ready: an adapter of tiny:1, F32, rank 2" in told
    shown = box.json("show", "tiny:legal")
    assert (shown["name"], shown["version"], shown["adapter"], shown["rank"]) == ("tiny", "1", "legal", 2)
    assert (shown["kind"], shown["files"][0]["role"]) == ("lora", "adapter")
    assert [each["adapter"] for each in box.json("list")] == [None, "legal"]
    table = box.call("list")
    assert all(word in table for word in ("tiny:1:legal", "adapter"))
    assert [each["model"] for each in box.json("verify")] == ["tiny:1", "tiny:1:legal"]
    assert "base of 1 adapters: legal" in box.call("remove", "tiny", "--yes", code=4)
    assert box.json("remove", "tiny:legal", "--yes") == {"removed": "tiny:1:legal", "freed_bytes": path.stat().st_size}
    assert [each["name"] for each in box.json("list")] == ["tiny"]


def test_an_onnx_folder_goes_to_the_box_and_away(box: Box, tmp_path: Path) -> None:
    folder = write_encoder_folder(tmp_path / "tiny-encoder")
    imported = box.json("import", str(folder), "--licence", "MIT")
    assert (imported["name"], imported["kind"], imported["task"]) == ("tiny-encoder", "onnx", "embedding")
    assert imported["signature"]["inputs"][0] == {"name": "input_ids", "datatype": "INT64", "shape": [-1, -1]}
    assert {each["role"] for each in imported["files"]} > {"model", "tokenizer.json", "1_Pooling/config.json"}
    assert "is here already" in box.call("import", str(folder))
    assert box.json("show", "tiny-encoder") | {"was_present": False} == imported

    told = box.call("show", "tiny-encoder")
    for line in (
        "last_hidden_state FP32 [?, ?, 8]",
        "batch                           first dimension",
        "opset                           20",
        "task                            embedding",
        "file 1_Pooling/config.json",
    ):
        assert line in told
    assert "embedding  bert" in box.call("list")
    assert box.call("verify").count("sound") == 6
    assert {each["role"] for each in box.json("verify")} == {each["role"] for each in imported["files"]}

    laid_out = lay_out(registered(box, "tiny-encoder"), box.data / "onnx")
    box.call("remove", "tiny-encoder", "--yes")
    assert not laid_out.exists()
    assert list((box.data / "models" / "blobs").iterdir()) == []


def test_a_model_of_tensors_is_shown_without_what_it_has_not(box: Box, tmp_path: Path) -> None:
    told = box.call("import", str(fixed(tmp_path / "plain.onnx")), "--licence", "MIT")
    assert told.startswith("plain:1 is ready: onnx, for the task tensor, 0.0 MB, licence MIT.")
    shown = box.call("show", "plain")
    assert "context" not in shown
    assert "batch           none" in shown


def test_of_several_onnx_files_one_is_chosen(box: Box, tmp_path: Path) -> None:
    folder = write_encoder_folder(tmp_path / "encoder")
    write_encoder(folder / "model_int8.onnx")
    assert "--file NAME" in box.call("import", str(folder), code=5)
    chosen = box.json("import", str(folder), "--file", "model_int8.onnx", "--task", "tensor")
    assert chosen["task"] == "tensor"


@pytest.mark.parametrize("option", [("--file", "x.onnx"), ("--task", "rerank")])
def test_what_is_for_onnx_models_is_refused_elsewhere(box: Box, tiny: TinyModel, option: tuple[str, str]) -> None:
    error = json.loads(box.call("import", str(tiny.path), *option, "--json", code=5))["error"]
    assert (error["code"], error["advice"]) == ("invalid_request", f"Check what is in {tiny.path}.")
    assert box.json("list") == []


def test_a_hostile_onnx_file_is_refused_with_advice(box: Box, tmp_path: Path) -> None:
    path = external(tmp_path / "hostile.onnx", "../../../etc/passwd")
    error = json.loads(box.call("import", str(path), "--json", code=5))["error"]
    assert error["code"] == "bad_model_file"
    assert "no plain path inside its folder" in error["message"]
    assert box.json("list") == []


def test_a_model_comes_from_a_memory_stick(box: Box, server: FileServer, tiny: TinyModel, tmp_path: Path) -> None:
    stick = tmp_path / "stick"
    stick.mkdir()
    shutil.copy(tiny.path, stick / "tiny.gguf")
    assert box.json("pull", "tiny", "--from", str(stick))["was_present"] is False
    assert server.requests == []


@pytest.mark.parametrize(
    ("arguments", "code", "told"),
    [
        (["pull", "nothing"], 3, ("model_not_found", "import PATH")),
        (["show", "nothing"], 3, ("model_not_found", "models catalog")),
        (["remove", "nothing", "--yes"], 3, ("model_not_found", "models catalog")),
        (["verify", "nothing"], 3, ("model_not_found", "models catalog")),
        (["import", "/nothing.gguf"], 3, ("not_found", "")),
        (["import", "/dev/null", "--name", "null"], 5, ("invalid_request", "file on a disk")),
        (["pull", "tiny", "--from", "http://mirror.example/f"], 5, ("invalid_request", "https")),
        (["pull", "tiny", "--from", "/nothing"], 1, ("source_failed", "")),
    ],
)
def test_a_refusal_has_an_exit_code_a_slug_and_advice(
    box: Box, server: FileServer, arguments: list[str], code: int, told: tuple[str, str]
) -> None:
    error = json.loads(box.call(*arguments, "--json", code=code))["error"]
    assert error["code"] == told[0]
    assert told[1] in error["advice"]
    assert error["message"] in box.call(*arguments, code=code)
    assert box.json("list") == []


def test_removal_without_anyone_to_ask_wants_yes(box: Box, server: FileServer) -> None:
    box.call("pull", "tiny")
    assert "Add --yes" in box.call("remove", "tiny", code=5)
    assert len(box.json("list")) == 1


def test_damage_is_an_exit_code_for_scripts_and_a_line_for_people(box: Box, server: FileServer) -> None:
    path = Path(box.json("pull", "tiny")["files"][0]["path"])
    path.chmod(0o644)
    with path.open("r+b") as file:
        file.seek(50_000)
        file.write(b"\xff\x00\xff")
    told = box.call("verify", code=1)
    assert "1 of 1 models are damaged: tiny:1" in told
    assert "appliance models remove tiny:1" in told
    done = run("models", "verify", "--json", "--data", str(box.data))
    assert done.returncode == 1
    assert json.loads(done.stdout)[0]["sound"] is False
    assert json.loads(done.stderr)["error"]["code"] == "damaged_model"


def test_a_model_that_a_server_has_loaded_is_not_removed(box: Box, server: FileServer) -> None:
    box.call("pull", "tiny")
    with holding(box.data, "tiny") as holder:
        assert f"in use by process {holder.pid}" in box.call("remove", "tiny", "--yes", code=4)
        assert len(box.json("list")) == 1
    box.call("remove", "tiny", "--yes")


def test_a_running_process_sees_what_the_command_line_does_at_once(box: Box, server: FileServer) -> None:
    database = Database(box.data / "appliance.db")
    registry = Registry(database, Blobs(box.data / "models" / "blobs"))
    try:
        assert registry.list() == []
        box.call("pull", "tiny")
        assert registry.resolve("tiny").full_name == "tiny:1"
        box.call("remove", "tiny", "--yes")
        assert registry.list() == []
    finally:
        database.close()


@pytest.mark.slow
def test_many_command_lines_at_once_leave_one_sound_registry(box: Box, tmp_path: Path) -> None:
    paths = [write_tiny_llama(tmp_path / f"model-{seed}.gguf", seed=seed) for seed in range(4)]
    imports = [start("models", "import", str(path), "--data", str(box.data)) for path in paths for _ in range(2)]
    for each in imports:
        _, errors = each.communicate(timeout=60)
        assert each.returncode == 0, errors
    assert sorted(each["name"] for each in box.json("list")) == [f"model-{seed}" for seed in range(4)]
    assert all(each["sound"] for each in box.json("verify"))
    assert list((box.data / "models" / "partial").iterdir()) == []


def test_every_verb_tells_an_example(box: Box) -> None:
    verbs = ("catalog", "pull", "import", "list", "show", "verify", "tune", "remove")
    overview = run("models", "--help").stdout
    for verb in verbs:
        assert verb in overview
        told = run("models", verb, "--help").stdout
        assert "Example" in told
        assert all(option in told for option in ("--data", "--config", "--json"))


def test_a_terminal_shows_a_bar_and_asks_before_removing(box: Box, server: FileServer) -> None:
    def in_terminal(*arguments: str, typed: bytes = b"") -> tuple[int, str]:
        controller, terminal = pty.openpty()
        os.write(controller, typed)
        with subprocess.Popen(
            [sys.executable, "-m", "appliance", "models", *arguments, "--data", str(box.data)],
            env=environment(APPLIANCE_CATALOG_DIR=str(box.site), TERM="xterm"),
            cwd=REPOSITORY,
            stdin=terminal,
            stdout=terminal,
            stderr=terminal,
        ) as process:
            os.close(terminal)
            shown = b""
            try:
                while part := os.read(controller, 65_536):
                    shown += part
            except OSError:  # the other end is closed
                pass
            finally:
                os.close(controller)
        return process.returncode, shown.decode(errors="replace")

    code, shown = in_terminal("pull", "tiny")
    assert code == 0
    assert "Downloading" in shown
    assert "tiny:1 is ready" in shown
    assert in_terminal("remove", "tiny", typed=b"n\n")[0] == 1
    assert len(box.json("list")) == 1
    code, shown = in_terminal("remove", "tiny", typed=b"y\n")
    assert code == 0
    assert "Remove tiny:1" in shown
    assert box.json("list") == []


@pytest.mark.journey
def test_the_default_model_is_what_its_manifest_says(box: Box) -> None:
    data = os.environ.get("APPLIANCE_TEST_MODEL_DATA")
    if data is None:
        pytest.skip("APPLIANCE_TEST_MODEL_DATA is not set: tests/check pulls the model and sets it")
    pulled = box.json("pull", "smollm2-135m-instruct", "--from", str(Path(data) / "models" / "blobs"))
    assert (pulled["architecture"], pulled["quantisation"], pulled["context_length"]) == ("llama", "Q4_1", 8192)
    assert (pulled["task"], pulled["licence"], pulled["was_present"]) == ("chat", "Apache-2.0", False)
    assert box.json("verify", "smollm2-135m-instruct")[0]["sound"] is True
