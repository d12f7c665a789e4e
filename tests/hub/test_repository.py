"""The signed repository's folder: whoever is killed on the way leaves the old generation or the new one."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from appliance.core.errors import ConflictError, InvalidRequestError, NotFoundError, StorageError, UntrustedError
from appliance.hub.authority import Authority, KeyPlan
from appliance.hub.director import Director, director_keys, rotate_director
from appliance.hub.releases import fetching
from appliance.hub.repository import Repository
from appliance.security.envelopes import open_envelope
from appliance.security.metadata import Client, MemoryRecord, Verified
from appliance.security.repository_files import read_slice
from appliance.security.signing import PublicKey, list_keys
from tests.fleet.trusting import DAY, START, HandClock

PATH = "releases/chat/1/release.json"


@pytest.fixture
def clock() -> HandClock:
    return HandClock()


@pytest.fixture
def authority(tmp_path: Path, clock: HandClock) -> Authority:
    made = Authority(tmp_path / "hub", clock)
    made.create()
    return made


def seen(authority: Authority, anchor: bytes, now: float = START) -> Verified:
    """Look at the repository as a device would that has just come."""
    fetch = fetching(authority.repository.folder)
    return asyncio.run(Client(MemoryRecord(anchor), built=START - DAY).refresh(fetch, lambda: now))


def killed_at(number: int, change: Callable[[], object]) -> bool:
    """Run a change in a child that kills itself before its file operation of this number; False if it ended before."""
    child = os.fork()
    if child == 0:
        count = 0

        def counting(real: Callable[..., Any]) -> Callable[..., Any]:
            def call(*arguments: Any, **options: Any) -> Any:
                nonlocal count
                count += 1
                if count == number:
                    os.kill(os.getpid(), signal.SIGKILL)
                return real(*arguments, **options)

            return call

        for name in ("fsync", "rename", "replace", "link", "symlink", "unlink", "mkdir", "rmdir"):
            setattr(os, name, counting(getattr(os, name)))
        try:
            change()
        except BaseException:  # noqa: BLE001  (the child must not run the tests' own clean-up)
            os._exit(2)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert status in (0, signal.SIGKILL), status
    return status == signal.SIGKILL


def test_a_publisher_that_is_killed_at_any_operation_leaves_the_old_repository_or_the_new_one(
    authority: Authority,
) -> None:
    anchor = authority.root()
    authority.change_targets({"notes/0": b"first"})
    outcomes = set()

    def change(number: int) -> None:
        authority.change_targets({f"notes/{number}": b"x" * number})

    number = 1
    while killed_at(number, partial(change, number)):
        found = seen(authority, anchor)
        names = found.targets().keys()
        outcomes.add(f"notes/{number}" in names)
        for path, target in found.targets().items():
            found.check(path, authority.read_target(target))
        number += 1
    assert number > 15
    assert outcomes == {False, True}
    authority.change_targets({"notes/last": b"last"})
    assert "notes/last" in seen(authority, anchor).targets()


def test_rotating_keys_that_is_killed_at_any_operation_leaves_a_repository_that_devices_believe(
    authority: Authority,
) -> None:
    anchor = authority.root()
    versions = set()
    number = 1
    while killed_at(number, authority.rotate_online) and number < 80:
        versions.add(seen(authority, anchor).versions()["root"])
        number += 3
    assert len(versions) > 1
    authority.sign_again("online")
    assert seen(authority, anchor).versions()["root"] >= max(versions)


def test_a_reader_in_the_middle_of_a_change_finds_his_generation(authority: Authority) -> None:
    anchor = authority.root()
    fetch = fetching(authority.repository.folder)

    async def slowly(path: str, most: int) -> bytes | None:
        data = await fetch(path, most)
        if path == "metadata/timestamp.json":
            authority.change_targets({PATH: b"new"})
        return data

    found = asyncio.run(Client(MemoryRecord(anchor), built=START - DAY).refresh(slowly, lambda: START))
    assert PATH not in found.targets()


def test_only_the_newest_generations_are_kept(authority: Authority) -> None:
    for number in range(6):
        authority.change_targets({f"notes/{number}": b"x"})
    folder = authority.repository.folder
    assert len(list((folder / "generations").iterdir())) == 2
    assert sorted(each for each in authority.repository.metadata() if "targets" in each) == [
        "5.targets.json",
        "6.targets.json",
        "7.targets.json",
    ]


def test_a_withdrawn_file_is_gone_from_the_disk_too(authority: Authority) -> None:
    authority.change_targets({PATH: b"x"})
    target = authority.targets()[PATH]
    path = authority.repository.folder / target.stored
    assert path.read_bytes() == b"x"
    authority.change_targets({}, [PATH])
    assert not path.exists()


def test_a_release_is_signed_only_once(authority: Authority) -> None:
    authority.change_targets({PATH: b"x"})
    before = authority.repository.metadata()
    with pytest.raises(ConflictError):
        authority.change_targets({PATH: b"y"})
    assert authority.repository.metadata() == before


@pytest.mark.parametrize(
    "path",
    [
        "",
        "../hub.db",
        "metadata/../../keys/x.pem",
        "metadata/../lock",
        "/etc/passwd",
        "lock",
        "generations/00000001/timestamp.json",
        "metadata/.timestamp.json",
        "metadata/timestamp.json\n",
        "metadata",
        "targets/keys",
        "metadata/timestamp.json\x00",
        "targets/out",
        "targets/" + "a/" * 400 + "b",
    ],
)
def test_no_question_leads_out_of_the_repository(authority: Authority, path: str) -> None:
    (authority.repository.folder / "targets" / "out").symlink_to("/etc/hostname")
    answer = read_slice(authority.repository.folder, path, 0)
    assert not answer.ok
    assert answer.code == "not_found"
    assert answer.data == b""


def test_slices_are_bounded(authority: Authority) -> None:
    data = bytes(range(256)) * 1024
    authority.change_targets({"notes/large": data})
    stored = authority.targets()["notes/large"].stored
    folder = authority.repository.folder
    assert read_slice(folder, stored, 0, now=5.0).data == data[:65536]
    assert read_slice(folder, stored, 65536).data == data[65536:131072]
    end = read_slice(folder, stored, 2**53)
    assert (end.ok, end.data, end.total) == (True, b"", len(data))


# Keys


def test_offline_keys_that_are_away_are_asked_for_and_nothing_is_changed(authority: Authority, tmp_path: Path) -> None:
    stick = tmp_path / "stick"
    authority.offline_folders[0].rename(stick)
    before = authority.repository.metadata()
    for change in (
        lambda: authority.change_targets({PATH: b"x"}),
        lambda: authority.sign_again("root"),
        lambda: authority.sign_again("targets"),
        lambda: authority.change_keys("targets", add=1),
        authority.rotate_online,
        authority.require_targets_keys,
    ):
        with pytest.raises(NotFoundError) as refusal:
            change()
        assert refusal.value.code == "keys_missing"
        assert "--keys" in str(refusal.value)
    assert authority.repository.metadata() == before
    authority.sign_again("online")
    returned = Authority(tmp_path / "hub", HandClock(), offline=[stick])
    returned.change_targets({PATH: b"x"})
    assert PATH in seen(returned, returned.root()).targets()


def test_the_holders_of_root_keys_may_come_with_a_folder_each(authority: Authority, tmp_path: Path) -> None:
    home = authority.offline_folders[0]
    folders = [tmp_path / name for name in ("alice", "bob")]
    for folder, key in zip(folders, list_keys([home], "root"), strict=False):
        folder.mkdir()
        key.path.rename(folder / key.path.name)
        (folder / "root.json").write_bytes((home / "root.json").read_bytes())
    together = Authority(tmp_path / "hub", HandClock(), offline=folders)
    together.sign_again("root")
    alone = Authority(tmp_path / "hub", HandClock(), offline=folders[:1])
    with pytest.raises(NotFoundError, match="2 of the 3 root keys must sign, and 1 were found"):
        alone.sign_again("root")
    assert seen(together, (home / "root.json").read_bytes()).versions()["root"] == 2


def test_keys_under_a_passphrase_sign_with_it_only(tmp_path: Path) -> None:
    Authority(tmp_path, HandClock(), passphrase="secret").create(KeyPlan(2, 1), KeyPlan(1, 1))
    with pytest.raises(UntrustedError) as refusal:
        Authority(tmp_path, HandClock()).change_targets({PATH: b"x"})
    assert refusal.value.code == "passphrase_needed"
    Authority(tmp_path, HandClock(), passphrase="secret").change_targets({PATH: b"x"})
    Authority(tmp_path, HandClock()).sign_again("online")  # the hub's own keys are not encrypted: nobody is there


@pytest.mark.parametrize("role", ["root", "targets"])
def test_offline_keys_are_added_replaced_and_removed(authority: Authority, role: str) -> None:
    anchor = authority.root()
    old = authority.find_keys(role, [])
    made = authority.change_keys(role, add=1)
    authority.change_keys(role, remove=[old[0][:10]])
    authority.change_keys(role, add=1, threshold=2)
    state = next(each for each in authority.states() if each.role == role)
    assert set(made) <= set(state.keys)
    assert old[0] not in state.keys
    assert state.threshold == 2
    authority.change_targets({PATH: b"x"})
    found = seen(authority, anchor)
    assert found.versions()["root"] == 4
    assert PATH in found.targets()


def test_a_threshold_that_could_not_be_met_is_refused(authority: Authority) -> None:
    before = authority.repository.metadata()
    with pytest.raises(InvalidRequestError, match="cannot be made to sign"):
        authority.change_keys("targets", threshold=3)
    assert authority.repository.metadata() == before
    with pytest.raises(NotFoundError, match="has no key"):
        authority.find_keys("targets", ["zz"])


def test_nothing_is_signed_over_a_repository_that_someone_else_changed(authority: Authority, tmp_path: Path) -> None:
    """A taken-over hub puts a target of its own into the folder, and waits for the rightful keys to sign it."""
    roles = authority.roles()
    roles.set_target("releases/evil/1/release.json", b"evil")
    online = Authority(tmp_path / "hub", HandClock())
    stolen = [each for role in ("snapshot", "timestamp") for each in online._signers(roles, role)]
    roles.sign_targets(START, stolen)
    roles.sign_snapshot(START, stolen)
    roles.sign_timestamp(START, stolen)
    with authority.repository.changing():
        authority.repository.publish(roles.written, {})
    for change in (
        lambda: authority.change_targets({PATH: b"x"}),
        lambda: authority.sign_again("targets"),
        lambda: authority.change_keys("targets", add=1),
        authority.rotate_online,
    ):
        with pytest.raises(UntrustedError) as refusal:
            change()
        assert refusal.value.code == "repository_changed"


def test_another_hubs_root_is_not_signed_over_either(authority: Authority, tmp_path: Path) -> None:
    other = Authority(tmp_path / "other", HandClock())
    other.create()
    with authority.repository.changing():
        authority.repository.publish(other.repository.metadata(), {})
    with pytest.raises(UntrustedError) as refusal:
        authority.sign_again("root")
    assert refusal.value.code == "repository_changed"


def test_what_the_hub_can_do_by_itself_it_does_daily(authority: Authority, clock: HandClock) -> None:
    anchor = authority.root()
    assert authority.sign_when_due() == {"snapshot": "no", "timestamp": "no"}
    first = seen(authority, anchor).versions()
    for _ in range(20):
        clock.now += DAY
        authority.sign_when_due()
    found = seen(authority, anchor, clock.now)
    assert found.versions()["timestamp"] == first["timestamp"] + 20
    assert found.versions()["snapshot"] == first["snapshot"] + 1
    assert found.versions()["targets"] == first["targets"]


@pytest.mark.parametrize("jump", [-DAY, 400 * DAY])
def test_a_wrong_clock_signs_nothing(authority: Authority, clock: HandClock, jump: float) -> None:
    before = authority.repository.metadata()
    clock.now += jump
    assert "clock" in authority.sign_when_due()["timestamp"]
    assert authority.repository.metadata() == before


def test_there_is_one_repository_to_a_folder(authority: Authority, tmp_path: Path) -> None:
    before = authority.repository.metadata()
    with pytest.raises(ConflictError):
        authority.create()
    assert authority.repository.metadata() == before
    with pytest.raises(NotFoundError):
        Repository(tmp_path / "none").metadata()
    assert Repository(tmp_path / "none").generation == ""


@pytest.mark.parametrize("damage", [b"", b"{}", b"[]", b'{"signed": {"_type": "root"}}'])
def test_a_damaged_repository_is_said_to_be_so(authority: Authority, damage: bytes) -> None:
    for each in (authority.repository.folder / "metadata").resolve().iterdir():
        each.write_bytes(damage)
    with pytest.raises(StorageError) as refusal:
        authority.roles()
    assert refusal.value.code == "repository_damaged"


# The director


def test_the_director_signs_with_the_newest_key_that_devices_believe(authority: Authority) -> None:
    director = Director(authority)
    before = director.sign(b"{}", "test")
    rotate_director(authority, keep_old=True)
    keys = [PublicKey(each) for each in director_keys(authority).keys]
    after = director.sign(b"{}", "test")
    assert open_envelope(before, "test", keys[1:]) == b"{}"
    assert open_envelope(after, "test", keys[:1]) == b"{}"
    rotate_director(authority, keep_old=False)
    assert len(director_keys(authority).keys) == 1


def test_a_hub_without_its_directors_key_says_so(authority: Authority) -> None:
    for each in list_keys([authority.online_folder], "director"):
        each.path.unlink()
    with pytest.raises(StorageError) as refusal:
        Director(authority).sign(b"{}", "test")
    assert refusal.value.code == "keys_missing"
