"""Releases: from a manifest and files to a signed document that a device would believe, and back out again."""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import msgspec
import pytest
from click.testing import CliRunner, Result

from appliance.cli.hub.drafts import draft_of, read_criteria
from appliance.cli.hub.keys import command as keys_command
from appliance.cli.hub.releases import command as releases_command
from appliance.core.errors import (
    ConflictError,
    InvalidRequestError,
    NotFoundError,
    StorageError,
    UnavailableError,
    UntrustedError,
)
from appliance.core.fleet import Question
from appliance.core.releases import Criteria, GoldenInput, Release, pieces_target
from appliance.fleet.schema import MIGRATIONS as FLEET_MIGRATIONS
from appliance.fleet.signed_files import FolderAsking
from appliance.fleet.trust import Trust
from appliance.fleet.trust_record import TrustRecord
from appliance.hub.authority import Authority
from appliance.hub.release_blobs import ReleaseBlobs
from appliance.hub.release_plug import SignedRepository
from appliance.hub.release_store import SqliteReleases
from appliance.hub.releases import Draft, DraftFile, Releases
from appliance.hub.schema import MIGRATIONS
from appliance.store.database import Database
from tests.fleet.trusting import DAY, START, HandClock

CONTENT = bytes(range(256)) * 8192 + b"end"  # two pieces and three bytes
DIGEST = hashlib.sha256(CONTENT).hexdigest()


class Desk:
    """A hub's folder with what works on it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.clock = HandClock()
        self.authority = Authority(folder, self.clock)
        self.authority.create()
        self.blobs = ReleaseBlobs(folder / "blobs")
        self.database = Database(folder / "hub.db", migrations=MIGRATIONS)
        self.store = SqliteReleases(self.database, self.clock)
        self.releases = Releases(self.authority, self.blobs, self.store, self.clock)

    def draft(self, content: bytes = CONTENT, *, version: str = "1", model: str = "reader") -> Draft:
        path = self.folder / "incoming.gguf"
        path.write_bytes(content)
        expected = (hashlib.sha256(content).hexdigest(), len(content))
        files = [DraftFile("model", path, expected)]
        return Draft(model=model, version=version, kind="gguf", task="chat", licence="MIT", files=files)

    def actions(self) -> list[str]:
        return self.database.read(
            lambda each: [row["action"] for row in each.execute("SELECT action FROM audit ORDER BY id")]
        )

    def verify(self, *, deep: bool = False) -> list[str]:
        return [each.problem for each in asyncio.run(self.releases.verify(deep=deep)) if each.problem]


@pytest.fixture
def desk(tmp_path: Path) -> Iterator[Desk]:
    each = Desk(tmp_path / "hub")
    with closing(each.database):
        yield each


def test_a_release_has_its_pieces_its_counter_and_its_files(desk: Desk) -> None:
    signed = desk.releases.add(desk.draft(), "alice")
    assert (signed.release.counter, signed.name) == (1, "reader:1")
    assert desk.blobs.path(DIGEST).read_bytes() == CONTENT
    assert desk.blobs.path(DIGEST).stat().st_mode & 0o222 == 0
    target = desk.authority.targets()[pieces_target("reader", 1, DIGEST)]
    pieces = desk.authority.read_target(target)
    assert pieces == b"".join(
        hashlib.sha256(CONTENT[at : at + 1024 * 1024]).digest() for at in (0, 1024 * 1024, 2048 * 1024)
    )
    document = desk.authority.read_target(desk.authority.targets()[signed.target])
    assert (len(document), hashlib.sha256(document).hexdigest()) == (signed.length, signed.digest)
    assert msgspec.json.decode(document, type=Release) == signed.release
    assert desk.releases.find("reader") == signed
    assert desk.actions() == ["release.add"]
    assert desk.verify(deep=True) == []


def test_counters_never_fall_not_even_after_a_withdrawal_or_a_lost_database(desk: Desk) -> None:
    for number in range(1, 4):
        assert desk.releases.add(desk.draft(bytes([number]), version=str(number)), "a").release.counter == number
    desk.releases.withdraw("reader#3", "slow", "alice")
    desk.database.close()
    (desk.folder / "hub.db").unlink()
    with closing(Database(desk.folder / "hub.db", migrations=MIGRATIONS)) as database:
        anew = Releases(desk.authority, desk.blobs, SqliteReleases(database, desk.clock), desk.clock)
        assert [each.release.counter for each in anew.listed()] == [1, 2]  # found again in the signed repository
        assert anew.add(desk.draft(b"next", version="9"), "a").release.counter == 4


def test_a_deliberate_downgrade_is_a_new_release_of_old_bytes(desk: Desk) -> None:
    desk.releases.add(desk.draft(b"old", version="1"), "a")
    desk.releases.add(desk.draft(b"new", version="2"), "a")
    again = desk.releases.add(desk.draft(b"old", version="1"), "a")
    assert again.release.counter == 3
    assert desk.releases.find("reader:1").release.counter == 3


def test_a_version_means_the_same_files_for_ever(desk: Desk) -> None:
    desk.releases.add(desk.draft(b"old"), "a")
    before = desk.authority.repository.metadata()
    with pytest.raises(ConflictError) as refusal:
        desk.releases.add(desk.draft(b"other"), "a")
    assert refusal.value.code == "release_exists"
    assert desk.authority.repository.metadata() == before


def test_a_file_that_is_not_the_manifests_is_refused_and_leaves_nothing(desk: Desk) -> None:
    draft = desk.draft()
    (desk.folder / "incoming.gguf").write_bytes(CONTENT[:-1] + b"X")
    before = desk.authority.repository.metadata()
    with pytest.raises(UntrustedError):
        desk.releases.add(draft, "a")
    assert list((desk.folder / "blobs").glob("*")) == [desk.folder / "blobs" / ".lock"]
    assert desk.authority.repository.metadata() == before
    assert desk.actions() == []


def test_an_empty_file_a_missing_one_and_a_bad_field_are_refused(desk: Desk) -> None:
    with pytest.raises(InvalidRequestError, match="empty"):
        desk.releases.add(desk.draft(b""), "a")
    with pytest.raises(InvalidRequestError, match="cannot be released"):
        desk.releases.add(desk.draft(model="Not A Name"), "a")
    draft = desk.draft()
    (desk.folder / "incoming.gguf").unlink()
    with pytest.raises(NotFoundError):
        desk.releases.add(draft, "a")
    assert desk.releases.listed() == []


def test_without_the_offline_keys_no_file_is_read(desk: Desk, tmp_path: Path) -> None:
    (desk.folder / "offline-keys").rename(tmp_path / "stick")
    with pytest.raises(NotFoundError) as refusal:
        desk.releases.add(desk.draft(), "a")
    assert refusal.value.code == "keys_missing"
    assert not (desk.folder / "blobs").exists()


def test_a_full_disk_is_said_before_anything_is_written(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("appliance.hub.release_blobs.free_bytes", lambda folder: 1000)
    with pytest.raises(StorageError) as refusal:
        desk.releases.add(desk.draft(), "a")
    assert refusal.value.code == "disk_full"
    assert list((desk.folder / "blobs").glob("*")) == [desk.folder / "blobs" / ".lock"]


def test_a_withdrawn_release_is_signed_away_and_its_files_can_go(desk: Desk) -> None:
    desk.releases.add(desk.draft(), "a")
    kept = desk.releases.add(desk.draft(b"kept", version="2"), "a")
    desk.releases.withdraw("reader:1", "reads tables wrong", "alice")
    assert desk.actions() == ["release.add", "release.add", "release.withdraw"]
    assert [each.reason for each in desk.releases.listed()] == ["reads tables wrong", ""]
    assert not any("/reader/1/" in path for path in desk.authority.targets())
    with pytest.raises(NotFoundError) as refusal:
        desk.releases.find("reader:1")
    assert refusal.value.code == "release_not_found"
    assert desk.releases.remove_unused_files() == len(CONTENT)
    assert [each.name for each in (desk.folder / "blobs").glob("sha*")] == [f"sha256-{kept.release.files[0].digest}"]
    assert desk.verify() == []


def test_files_that_are_just_being_released_are_not_taken_for_unused(desk: Desk) -> None:
    path = desk.folder / "incoming.gguf"
    path.write_bytes(CONTENT)
    with desk.blobs.adding():
        desk.blobs.store(path, None)
        assert desk.releases.remove_unused_files() == 0
        assert desk.blobs.path(DIGEST).exists()
    assert desk.releases.remove_unused_files() == len(CONTENT)


def test_a_hub_that_was_killed_between_signature_and_row_finds_the_release_again(desk: Desk) -> None:
    desk.releases.add(desk.draft(), "a")
    desk.database.write_blocking(lambda each: each.execute("DELETE FROM releases").rowcount)
    assert [each.name for each in desk.releases.listed()] == ["reader:1"]
    paths = [path for path in desk.authority.targets() if "/reader/1/" in path]
    desk.authority.change_targets({}, paths)  # and killed before the row
    assert desk.releases.listed()[0].withdrawn is not None


def test_verify_finds_each_kind_of_damage(desk: Desk) -> None:
    signed = desk.releases.add(desk.draft(), "a")
    blob = desk.blobs.path(DIGEST)
    blob.chmod(0o644)
    blob.write_bytes(CONTENT[:-1] + b"X")
    assert desk.verify() == []  # the size is right: only reading it tells
    assert len(desk.verify(deep=True)) == 1
    blob.write_bytes(b"short")
    assert len(desk.verify()) == 1
    blob.unlink()
    assert len(desk.verify()) == 1
    document = desk.authority.repository.folder / desk.authority.targets()[signed.target].stored
    document.write_bytes(document.read_bytes().replace(b"MIT", b"BSD"))
    assert len(desk.verify()) == 1
    desk.clock.now += 15 * DAY
    assert "expired" in desk.verify()[0]


# The part of the running hub


def test_the_hub_gives_out_files_and_says_the_time(desk: Desk) -> None:
    part = SignedRepository(desk.authority, desk.clock)
    answer = asyncio.run(part.answer("box-1", Question("file", "metadata/timestamp.json")))
    assert answer.ok
    assert answer.data == desk.authority.repository.metadata()["timestamp.json"]
    assert answer.now == START
    assert not asyncio.run(part.answer("box-1", Question("file", "../keys"))).ok


def test_a_hub_without_a_repository_says_so(tmp_path: Path) -> None:
    part = SignedRepository(Authority(tmp_path, HandClock()), HandClock())
    with pytest.raises(UnavailableError):
        asyncio.run(part.answer("box-1", Question("file", "metadata/timestamp.json")))
    assert asyncio.run(part._look()) == 60.0


def test_the_running_hub_signs_again_and_survives_a_missing_key(desk: Desk, caplog: pytest.LogCaptureFixture) -> None:
    part = SignedRepository(desk.authority, desk.clock)
    desk.clock.now += 2 * DAY
    assert asyncio.run(part._look()) == 3600.0
    assert desk.authority.roles().version("timestamp") == 2
    for each in desk.authority.online_folder.iterdir():
        each.unlink()
    desk.clock.now += 2 * DAY
    assert asyncio.run(part._look()) == 60.0
    assert "keys must sign" in caplog.text


# The command line


def manifest(folder: Path, content: bytes = CONTENT, **fields: str) -> Path:
    values = {"name": "reader", "version": "1", "kind": "gguf", "task": "chat", "licence": "MIT", **fields}
    lines = [f'{key} = "{value}"' for key, value in values.items()]
    digest = hashlib.sha256(content).hexdigest()
    lines += ["minimum_memory = 1000", "[[files]]", 'name = "reader.gguf"', f"size = {len(content)}"]
    (folder / "reader.toml").write_text("\n".join([*lines, f'sha256 = "{digest}"']))
    (folder / "reader.gguf").write_bytes(content)
    return folder / "reader.toml"


def run(desk: Desk, group: object, *arguments: object) -> Result:
    words = [str(each) for each in arguments]
    return CliRunner().invoke(group, [*words, "--data", str(desk.folder)])  # type: ignore[arg-type]


def test_a_release_goes_through_the_command_line(desk: Desk, tmp_path: Path) -> None:
    path = manifest(tmp_path)
    criteria = tmp_path / "criteria.toml"
    criteria.write_text('least_tokens_per_second = 2.5\n[[golden]]\nprompt = "2+2="\nexpected = "4"\n')
    added = run(desk, releases_command, "add", path, tmp_path, "--criteria", criteria, "--hardware", "x86", "--json")
    assert added.exit_code == 0, added.output
    document = json.loads(added.stdout)
    assert (document["name"], document["counter"], document["hardware"]) == ("reader:1", 1, ["x86"])
    assert document["criteria"]["golden"][0]["expected"] == "4"
    assert json.loads(run(desk, releases_command, "list", "--json").stdout)[0]["digest"] == document["digest"]
    shown = run(desk, releases_command, "show", "reader:1")
    assert document["digest"] in shown.stdout
    assert run(desk, releases_command, "verify", "--deep").exit_code == 0
    withdrawn = run(desk, releases_command, "withdraw", "reader", "--reason", "wrong")
    assert withdrawn.exit_code == 0, withdrawn.output
    assert "withdrawn: wrong" in run(desk, releases_command, "list").stdout
    assert run(desk, releases_command, "show", "reader").exit_code == 3
    again = run(desk, releases_command, "add", path, tmp_path, "--counter", 40, "--json")
    assert json.loads(again.stdout)["counter"] == 40


def test_verify_ends_with_an_error_when_something_is_wrong(desk: Desk) -> None:
    desk.releases.add(desk.draft(), "a")
    desk.blobs.path(DIGEST).unlink()
    result = run(desk, releases_command, "verify", "--json")
    assert result.exit_code == 1
    assert any(each["problem"] for each in json.loads(result.stdout))
    assert json.loads(result.stderr)["error"]["code"] == "repository_damaged"


def test_keys_are_listed_rotated_added_removed_and_signed_with(desk: Desk, tmp_path: Path) -> None:
    stick = tmp_path / "stick"
    (desk.folder / "offline-keys").rename(stick)
    missing = run(desk, keys_command, "sign", "targets", "--json")
    assert missing.exit_code == 3
    assert json.loads(missing.stderr)["error"]["code"] == "keys_missing"
    for words in (
        ("sign", "root"),
        ("sign", "online"),
        ("add", "targets", "--threshold", "2"),
        ("rotate", "root"),
        ("rotate", "online"),
        ("rotate", "director"),
        ("rotate", "director", "--drop-old"),
    ):
        result = run(desk, keys_command, *words, "--keys", stick)
        assert result.exit_code == 0, (words, result.output)
    states = json.loads(run(desk, keys_command, "list", "--keys", stick, "--json").stdout)
    assert {each["role"]: (each["threshold"], len(each["keys"])) for each in states} == {
        "root": (2, 3),
        "targets": (2, 3),
        "snapshot": (1, 1),
        "timestamp": (1, 1),
    }
    targets = states[1]["keys"]
    assert run(desk, keys_command, "remove", "targets", targets[0][:12], "--keys", stick).exit_code == 0
    assert run(desk, keys_command, "rotate", "targets", "--key", targets[1][:12], "--keys", stick).exit_code == 0
    assert run(desk, keys_command, "list").exit_code == 0
    assert run(desk, releases_command, "verify").exit_code == 0
    assert desk.actions()[-2:] == ["key.remove", "key.rotate"]


def test_a_stick_brings_releases_to_a_box_that_never_sees_the_hub(desk: Desk, tmp_path: Path) -> None:
    desk.releases.add(desk.draft(b"old", version="1"), "a")
    newest = desk.releases.add(desk.draft(version="2"), "a")
    desk.releases.add(desk.draft(b"other", model="writer"), "a")
    stick = tmp_path / "stick"
    exported = run(desk, releases_command, "export", stick, "reader", "--json")
    assert json.loads(exported.stdout) == {"releases": ["reader:2"], "written": len(CONTENT)}
    assert (stick / f"sha256-{DIGEST}").read_bytes() == CONTENT
    assert json.loads(run(desk, releases_command, "export", stick, "reader", "--json").stdout)["written"] == 0
    assert "writer:1" in run(desk, releases_command, "export", stick).stdout

    async def scenario() -> None:
        with closing(Database(tmp_path / "fleet.db", migrations=FLEET_MIGRATIONS)) as database:
            record = TrustRecord(database)
            await record.anchor(desk.authority.root())
            trust = Trust("box-1", record, FolderAsking(stick), built=START - DAY)
            jobs = await trust.offered()
            assert [job.target for job in jobs] == ["releases/reader/2/release.json", "releases/writer/1/release.json"]
            release = await trust.verified_release(jobs[0])
            assert release == newest.release
            assert len(await trust.piece_list(release, release.files[0])) == 3

    asyncio.run(scenario())


def test_a_folder_without_a_hub_is_not_made_into_one(tmp_path: Path) -> None:
    result = CliRunner().invoke(releases_command, ["list", "--data", str(tmp_path / "none")])
    assert result.exit_code == 3
    assert "hub init" in result.output
    assert not (tmp_path / "none").exists()


def test_a_manifests_files_are_found_by_name_and_by_hash(tmp_path: Path) -> None:
    path = manifest(tmp_path)
    options = {"version": None, "criteria": None, "hardware": (), "least_agent": ""}
    assert draft_of(str(path), tmp_path / "reader.gguf", **options).files[0].path == tmp_path / "reader.gguf"  # type: ignore[arg-type]
    (tmp_path / "reader.gguf").rename(tmp_path / f"sha256-{DIGEST}")
    assert draft_of(str(path), tmp_path, **options).files[0].path == tmp_path / f"sha256-{DIGEST}"  # type: ignore[arg-type]
    (tmp_path / f"sha256-{DIGEST}").unlink()
    with pytest.raises(NotFoundError, match="looked for by name"):
        draft_of(str(path), tmp_path, **options)  # type: ignore[arg-type]
    assert draft_of("smollm2-135m-instruct", _with_files(tmp_path), **options).model == "smollm2-135m-instruct"  # type: ignore[arg-type]


def _with_files(folder: Path) -> Path:
    from appliance.core.settings import Settings
    from appliance.registry.catalog import open_catalog

    for each in open_catalog(Settings()).find("smollm2-135m-instruct").manifest.files:
        (folder / each.name).write_bytes(b"")
    return folder


@pytest.mark.parametrize(
    "text", ["least_token_per_second = 2", "[[golden]]\nprompts = 'x'", "golden = 3", "test_timeout_s = 'x'", "= ="]
)
def test_criteria_with_a_mistake_are_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "c.toml").write_text(text)
    with pytest.raises(InvalidRequestError, match="criteria"):
        read_criteria(tmp_path / "c.toml")


def test_criteria_are_read(tmp_path: Path) -> None:
    (tmp_path / "c.toml").write_text("most_memory = 5\n[[golden]]\nprompt = 'a'\nexpected = 'b'")
    assert read_criteria(tmp_path / "c.toml") == Criteria(golden=(GoldenInput("a", "b"),), most_memory=5)
