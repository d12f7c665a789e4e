"""A misbehaving hub behind a real broker: what a device refuses, and what did not change by it."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, closing
from pathlib import Path
from typing import Any

import msgspec
import pytest

from appliance.core.errors import UnavailableError, UntrustedError
from appliance.core.fleet import Answer, Desired, Question, down
from appliance.core.messaging import Message
from appliance.core.releases import DESIRED_TYPE, JOB_TYPE, release_target
from appliance.fleet.asking import Questions
from appliance.security.certificates import HUB_NAME
from appliance.security.envelopes import seal
from appliance.security.signing import make_key
from tests.fleet.broker import Broker, Peer
from tests.fleet.trusting import DAY, DEVICE, START, Device, HandClock, Hub, Intruder, changed

pytestmark = pytest.mark.anyio

TEN_YEARS = 3650 * DAY
LARGEST = 2**53


@pytest.fixture(scope="module")
def one_broker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Broker]:
    broker = Broker(tmp_path_factory.mktemp("broker"))
    broker.start()
    yield broker
    broker.stop()


@pytest.fixture
def hub(tmp_path: Path) -> Hub:
    hub = Hub(tmp_path / "hub", HandClock())
    hub.release()
    return hub


@pytest.fixture
async def device(tmp_path: Path, hub: Hub, one_broker: Broker) -> AsyncIterator[Device]:
    """Return an enrolled device that knows release 1 and the director, and reaches the hub over the broker."""
    (tmp_path / "device").mkdir()
    async with connected(one_broker, hub) as questions:
        each = Device(tmp_path / "device", hub, questions)
        await each.enrol()
        await each.trust.director_keys()
        hub.asked.clear()
        with closing(each.database):
            yield each


@asynccontextmanager
async def connected(broker: Broker, hub: Hub) -> AsyncIterator[Questions]:
    """Connect the hub's answers and a device's questions over the broker."""
    front = Peer(broker.options(HUB_NAME), "ea/1/up/+/req")
    box = Peer(broker.options(DEVICE), down(DEVICE, "res"))
    async with front, box:
        questions = Questions(DEVICE, box.link)

        async def serve() -> None:
            while True:
                message = await front.received.get()
                answer = await hub.ask(msgspec.json.decode(message.payload, type=Question))
                assert message.response_topic is not None
                await front.link.publish(
                    Message(message.response_topic, msgspec.msgpack.encode(answer), correlation=message.correlation)
                )

        async def receive() -> None:
            while True:
                await questions.handle("res", await box.received.get())

        tasks = [asyncio.get_running_loop().create_task(each) for each in (serve(), receive())]
        try:
            yield questions
        finally:
            for each in tasks:
                each.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.gather(*tasks)


async def refuses(device: Device, code: str) -> None:
    """Check that looking at the hub is refused, and that no row of the record has changed."""
    before = device.state()
    with pytest.raises(UntrustedError) as refusal:
        await device.trust.refresh()
    assert refusal.value.code == code, refusal.value
    assert device.state() == before


async def believes(device: Device) -> dict[str, int]:
    """Check that looking at the hub succeeds, and return the versions."""
    return (await device.trust.refresh()).versions()


# Old metadata


async def test_an_old_timestamp_played_again_is_refused(hub: Hub, device: Device) -> None:
    old = hub.metadata()
    hub.release()
    await believes(device)
    hub.replay(old)
    await refuses(device, "metadata_old")


@pytest.mark.parametrize(
    "damage",
    [
        "DELETE FROM trust_documents",
        "UPDATE trust_documents SET document = x''",
        "UPDATE trust_documents SET document = substr(document, 1, length(document) / 2)",
        "UPDATE trust_documents SET document = zeroblob(100)",
    ],
    ids=["gone", "empty", "torn", "garbage"],
)
async def test_a_damaged_record_lets_nothing_old_in_and_is_mended_by_an_honest_hub(
    hub: Hub, device: Device, damage: str
) -> None:
    old = hub.metadata()
    hub.release()
    newest = await believes(device)
    device.spoil(damage)
    marks = device.marks()
    hub.replay(old)
    await refuses(device, "metadata_old")
    assert device.marks() == marks
    hub.lies.clear()
    device.restart()
    assert await believes(device) == newest
    assert device.marks() == marks
    assert device.trust._client.recorded().versions() == newest


async def test_an_older_signed_document_in_the_record_is_not_taken_for_the_newest(hub: Hub, device: Device) -> None:
    """What python-tuf accepts when its cache is torn: every document replaced by an older, validly signed one."""
    old = hub.metadata()
    old_rows = device.state()["trust_documents"]
    hub.release()
    await believes(device)
    for role, document in old_rows:
        device.database.write_blocking(
            lambda each, role=role, document=document: (
                each.execute(  # type: ignore[misc]
                    "UPDATE trust_documents SET document = ? WHERE role = ?", (document, role)
                ).rowcount
            )
        )
    device.restart()
    with pytest.raises(UntrustedError) as refusal:
        device.trust._client.recorded()
    assert refusal.value.code == "metadata_old"
    hub.replay(old)
    await refuses(device, "metadata_old")


async def test_a_hub_that_was_restored_from_a_backup_is_believed_once_a_person_has_signed_again(
    hub: Hub, device: Device, tmp_path: Path
) -> None:
    shutil.copytree(hub.folder / "repository", tmp_path / "backup", symlinks=True)
    for _ in range(10):
        hub.clock.now += DAY
        hub.authority.sign_when_due()
    hub.release()
    hub.release()
    await believes(device)
    shutil.rmtree(hub.folder / "repository")
    shutil.copytree(tmp_path / "backup", hub.folder / "repository", symlinks=True)
    await refuses(device, "metadata_old")
    hub.authority.sign_again("targets")
    await believes(device)
    release = hub.release()  # the lost ones are signed anew, with their counters
    assert await device.trust.verified_release(hub.job(release)) == release


async def test_mixed_files_of_two_days_are_refused(hub: Hub, device: Device) -> None:
    old = hub.metadata()
    hub.release()
    hub.release()
    new = hub.metadata()
    for role in ("snapshot", "targets"):
        number = max(int(name.partition(".")[0]) for name in new if name.endswith(f"{role}.json"))
        before = max(int(name.partition(".")[0]) for name in old if name.endswith(f"{role}.json"))
        hub.lies.clear()
        hub.serve(f"metadata/{number}.{role}.json", old[f"{before}.{role}.json"])
        marks = device.marks()
        with pytest.raises(UntrustedError) as refusal:
            await device.trust.refresh()
        assert refusal.value.code == "wrong_content"
        assert device.marks()[role] == marks[role]
        assert device.marks()["targets"] == marks["targets"]
    hub.lies.clear()
    assert (await believes(device))["targets"] == 4


async def test_a_taken_over_hub_cannot_name_older_targets(hub: Hub, device: Device) -> None:
    intruder = Intruder(hub)
    hub.release()
    await believes(device)
    intruder.sign(snapshot=50, timestamp=50)  # over the targets of before
    marks = device.marks()
    with pytest.raises(UntrustedError) as refusal:
        await device.trust.refresh()
    assert refusal.value.code == "metadata_old"
    assert device.marks()["targets"] == marks["targets"]
    assert device.marks()["snapshot"] == marks["snapshot"]


# Signatures


@pytest.mark.parametrize("role", ["timestamp", "snapshot", "targets"])
async def test_unsigned_metadata_is_refused(hub: Hub, device: Device, role: str) -> None:
    hub.release()
    files = hub.metadata()
    name = max((each for each in files if each.endswith(f"{role}.json")), key=lambda each: (len(each), each))
    hub.serve(f"metadata/{name}", changed(files[name], lambda each: each.update(signatures=[])))
    marks = device.marks()
    with pytest.raises(UntrustedError) as refusal:
        await device.trust.refresh()
    assert refusal.value.code in ("bad_signature", "wrong_content")
    assert device.marks()[role] == marks[role]


async def test_metadata_that_was_changed_after_signing_is_refused(hub: Hub, device: Device) -> None:
    def later(document: dict[str, Any]) -> None:
        document["signed"]["expires"] = "2099-01-01T00:00:00Z"
        document["signed"]["version"] += 1

    hub.serve("metadata/timestamp.json", changed(hub.metadata()["timestamp.json"], later))
    await refuses(device, "bad_signature")


async def test_a_stranger_cannot_sign(hub: Hub, device: Device) -> None:
    stranger = Intruder(hub)
    stranger.keys = {role: make_key() for role in stranger.keys}
    stranger.sign()
    await refuses(device, "bad_signature")
    with pytest.raises(UntrustedError) as refusal:
        await device.trust.open_job(stranger.order(hub.job(hub.release())))
    assert refusal.value.code == "bad_signature"


@pytest.mark.parametrize(
    "garbage", [b"", b"{}", b"null", b"[" * 100_000, b"\xff" * 100, b'{"signatures":3,"signed":{}}']
)
@pytest.mark.parametrize("name", ["2.root.json", "timestamp.json"])
async def test_garbage_is_refused(hub: Hub, device: Device, name: str, garbage: bytes) -> None:
    hub.serve(f"metadata/{name}", garbage)
    before = device.state()
    with pytest.raises(UntrustedError) as refusal:
        await device.trust.refresh()
    assert refusal.value.code in ("bad_metadata", "wrong_content")
    assert device.state() == before


async def test_a_root_below_its_threshold_is_refused(hub: Hub, device: Device) -> None:
    hub.authority.sign_again("root")
    root = hub.metadata()["2.root.json"]
    hub.serve("metadata/2.root.json", changed(root, lambda each: each["signatures"].pop()))
    await refuses(device, "bad_signature")


async def test_a_root_of_strangers_is_refused(hub: Hub, device: Device, tmp_path: Path) -> None:
    stranger = Hub(tmp_path / "stranger", HandClock())
    stranger.authority.sign_again("root")
    hub.serve("metadata/2.root.json", stranger.metadata()["2.root.json"])
    await refuses(device, "bad_signature")


async def test_a_root_that_skips_a_version_is_refused(hub: Hub, device: Device) -> None:
    hub.authority.sign_again("root")
    hub.authority.sign_again("root")
    hub.serve("metadata/2.root.json", hub.metadata()["3.root.json"])
    await refuses(device, "metadata_old")


async def test_a_hidden_root_leaves_the_old_keys_in_force_for_nobody(hub: Hub, device: Device) -> None:
    hub.authority.rotate_online()
    hub.hide("metadata/2.root.json")
    await refuses(device, "bad_signature")


# Keys change


async def test_a_device_that_was_away_for_many_rotations_catches_up(hub: Hub, device: Device) -> None:
    for role in ("root", "targets", "root"):
        leaving = hub.authority.find_keys(role, [])
        hub.authority.change_keys(role, add=len(leaving), remove=leaving)
    hub.authority.rotate_online()
    release = hub.release()
    assert (await believes(device))["root"] == 5
    job = await device.trust.open_job(hub.signed(hub.job(release)))
    assert await device.trust.verified_release(job) == release


async def test_keys_that_were_rotated_out_sign_nothing_any_more(hub: Hub, device: Device) -> None:
    intruder = Intruder(hub)
    hub.authority.rotate_online()
    await believes(device)
    intruder.sign(snapshot=100, timestamp=100)
    await refuses(device, "bad_signature")
    hub.lies.clear()
    before = device.state()["trust_seen"]
    with pytest.raises(UntrustedError):
        await device.trust.open_job(intruder.order(hub.job(hub.release())))
    assert device.state()["trust_seen"] == before


async def test_a_rightful_hub_recovers_from_versions_that_an_intruder_drove_up(hub: Hub, device: Device) -> None:
    intruder = Intruder(hub)
    intruder.sign(snapshot=LARGEST, timestamp=LARGEST)
    await believes(device)
    assert device.marks()["timestamp"].version == LARGEST
    hub.lies.clear()
    await refuses(device, "metadata_old")  # locked out, as the intruder meant it

    hub.authority.rotate_online()
    versions = await believes(device)
    assert versions["timestamp"] < 100
    assert device.marks()["timestamp"].version == versions["timestamp"]
    assert device.marks()["targets"].version == versions["targets"]
    intruder.sign(snapshot=LARGEST, timestamp=LARGEST)
    await refuses(device, "bad_signature")


async def test_versions_that_an_intruder_left_in_the_hubs_folder_are_left_behind_too(hub: Hub, device: Device) -> None:
    intruder = Intruder(hub)
    intruder.sign(snapshot=LARGEST, timestamp=LARGEST)
    with hub.authority.repository.changing():
        hub.authority.repository.publish(intruder.roles.written, {})
    hub.lies.clear()
    await believes(device)
    hub.authority.rotate_online()
    assert (await believes(device))["timestamp"] == 1
    hub.release()
    assert (await believes(device))["timestamp"] == 2


async def test_a_director_with_a_new_key_is_believed_and_the_old_one_no_longer(hub: Hub, device: Device) -> None:
    from appliance.hub.director import rotate_director

    intruder = Intruder(hub)
    release = hub.release()
    rotate_director(hub.authority, keep_old=False)
    assert await device.trust.open_job(hub.signed(hub.job(release))) == hub.job(release)
    with pytest.raises(UntrustedError):
        await device.trust.open_job(intruder.order(hub.job(release, 2)))


# Time


async def test_expired_metadata_blocks_what_is_new_and_changes_nothing(hub: Hub, device: Device) -> None:
    job = hub.job(hub.release())
    await device.trust.verified_release(job)
    hub.clock.now += 15 * DAY  # and the hub did not sign again
    await refuses(device, "metadata_expired")
    before = device.state()
    with pytest.raises(UntrustedError) as refusal:
        await device.trust.verified_release(job)
    assert refusal.value.code == "metadata_expired"
    assert device.state() == before
    hub.authority.sign_when_due()
    await device.trust.verified_release(job)


async def test_targets_that_nobody_signed_for_a_year_have_expired_however_busy_the_hub_is(
    hub: Hub, device: Device
) -> None:
    for _ in range(38):
        hub.clock.now += 10 * DAY
        hub.authority.sign_when_due()
    with pytest.raises(UntrustedError) as refusal:
        await device.trust.refresh()
    assert refusal.value.code == "metadata_expired"
    hub.authority.sign_again("targets")
    await believes(device)


async def test_a_hub_that_says_it_is_1970_cannot_keep_old_metadata_alive(hub: Hub, device: Device) -> None:
    old = hub.metadata()
    hub.clock.now += 20 * DAY
    hub.authority.sign_when_due()
    await believes(device)
    hub.time = 0.0
    fresh = Device(device.path.parent / "..", hub)
    with closing(fresh.database):
        await fresh.enrol()
        await fresh.trust.refresh()  # it was signed just now, whatever the hub says of the time
        hub.replay(old)
        with pytest.raises(UntrustedError) as refusal:
            await fresh.trust.refresh()
        assert refusal.value.code in ("metadata_old", "metadata_expired")
    await refuses(device, "metadata_old")


async def test_a_hub_that_says_it_is_ten_years_later_is_not_believed_for_longer_than_that(
    hub: Hub, device: Device
) -> None:
    hub.time = hub.clock.now + TEN_YEARS
    await refuses(device, "metadata_expired")
    hub.time = None
    await believes(device)


async def test_time_that_jumps_back_brings_nothing_back(hub: Hub, device: Device) -> None:
    old = hub.metadata()
    hub.clock.now += 14 * DAY
    hub.authority.sign_when_due()
    await believes(device)
    issued = device.marks()["timestamp"].issued
    hub.clock.now -= 14 * DAY
    hub.replay(old)
    await refuses(device, "metadata_old")
    assert device.marks()["timestamp"].issued == issued


@pytest.mark.parametrize("now", [1_000_000_000.0, START, START + TEN_YEARS], ids=["ahead", "near", "behind"])
async def test_the_devices_own_clock_has_no_say(tmp_path: Path, now: float) -> None:
    """This machine's clock is decades ahead of the hub, or ten years behind; the device goes by signed and hub time."""
    hub = Hub(tmp_path / "hub", HandClock(now))
    device = Device(tmp_path, hub)
    with closing(device.database):
        await device.enrol()
        await believes(device)
        hub.clock.now += 15 * DAY
        await refuses(device, "metadata_expired")


# Answers without end


@pytest.mark.parametrize(
    "path", ["metadata/2.root.json", "metadata/timestamp.json", "metadata/3.snapshot.json", "metadata/3.targets.json"]
)
async def test_endless_data_is_cut_off(hub: Hub, device: Device, path: str) -> None:
    hub.release()
    hub.lies[path] = lambda question, answer: Answer(ok=True, data=b"x" * 65_536, total=2**60, now=answer.now)
    marks = device.marks()
    with pytest.raises(UntrustedError) as refusal:
        await device.trust.refresh()
    assert refusal.value.code == "wrong_content"
    assert hub.asked.count(path) == 1
    assert device.marks()["targets"] == marks["targets"]


async def test_a_release_that_grows_while_it_is_read_is_cut_off(hub: Hub, device: Device) -> None:
    job = hub.job(hub.release())
    await believes(device)
    before = device.state()
    hub.lies["targets/"] = lambda question, answer: Answer(
        ok=True, data=b"x" * (job.length + 1), total=job.length, now=answer.now
    )
    with pytest.raises(UntrustedError) as refusal:
        await device.trust.verified_release(job)
    assert refusal.value.code == "wrong_content"
    assert device.state() == before


@pytest.mark.parametrize("size", [0, 1])
async def test_a_drip_of_bytes_is_refused_at_the_first_drop(hub: Hub, device: Device, size: int) -> None:
    hub.lies["metadata/timestamp.json"] = lambda question, answer: Answer(
        ok=True, data=answer.data[:size], total=answer.total, now=answer.now
    )
    await refuses(device, "wrong_content")
    assert hub.asked.count("metadata/timestamp.json") == 1


async def test_slow_answers_end_at_a_deadline(hub: Hub, device: Device) -> None:
    hub.delay_s = 0.15
    device.file_timeout_s = 0.1
    device.restart()
    before = device.state()
    with pytest.raises(UnavailableError) as refusal:
        await device.trust.refresh()
    assert refusal.value.code == "hub_slow"
    assert device.state() == before


async def test_a_signed_file_with_another_content_is_refused(hub: Hub, device: Device) -> None:
    job = hub.job(hub.release())
    await believes(device)
    before = device.state()
    hub.serve("targets/", b"x" * job.length)
    with pytest.raises(UntrustedError) as refusal:
        await device.trust.verified_release(job)
    assert refusal.value.code == "wrong_content"
    assert device.state() == before


# Jobs and desired twins


@pytest.mark.parametrize(
    ("lie", "code"),
    [
        ({"length": 1}, "job_mismatch"),
        ({"digest": "0" * 64}, "job_mismatch"),
        ({"counter": 7}, "job_mismatch"),
        ({"target": "releases/chat/9/release.json"}, "not_released"),
        ({"target": "keys/director.json"}, "job_mismatch"),
    ],
    ids=["length", "digest", "counter", "target", "no release"],
)
async def test_a_job_that_disagrees_with_the_signed_repository_is_refused(
    hub: Hub, device: Device, lie: dict[str, Any], code: str
) -> None:
    intruder = Intruder(hub)
    job = await device.trust.open_job(intruder.order(hub.job(hub.release(), **lie)))
    await believes(device)
    before = device.state()
    with pytest.raises(UntrustedError) as refusal:
        await device.trust.verified_release(job)
    assert refusal.value.code == code
    after = device.state()
    del before["trust_files"], after["trust_files"]  # a signed release may have been read, to see what it is
    assert after == before


async def test_a_taken_over_hub_can_choose_among_signed_releases_and_never_downgrade(hub: Hub, device: Device) -> None:
    first, second, third = (hub.release(content=bytes([number])) for number in range(3))
    device.floors["chat"] = second.counter
    intruder = Intruder(hub)
    choice = await device.trust.open_job(intruder.order(hub.job(third)))
    assert await device.trust.verified_release(choice) == third  # it may choose
    again = await device.trust.open_job(intruder.order(hub.job(second, 2)))
    assert await device.trust.verified_release(again) == second
    old = await device.trust.open_job(intruder.order(hub.job(first, 3)))
    with pytest.raises(UntrustedError) as refusal:
        await device.trust.verified_release(old)
    assert refusal.value.code == "release_old"
    relabelled = await device.trust.open_job(intruder.order(hub.job(first, 4, counter=third.counter)))
    with pytest.raises(UntrustedError) as refusal:
        await device.trust.verified_release(relabelled)
    assert refusal.value.code == "release_old"


async def test_a_taken_over_hub_cannot_add_a_release(hub: Hub, device: Device) -> None:
    """It has every key on the hub; the targets are signed elsewhere."""
    intruder = Intruder(hub)
    document = b'{"model":"evil"}'
    intruder.roles.set_target(release_target("evil", 1), document)
    intruder.roles.sign_targets(hub.clock.now, [intruder.keys["snapshot"]])
    intruder.sign(snapshot=60, timestamp=60)
    marks = device.marks()
    with pytest.raises(UntrustedError) as refusal:
        await device.trust.refresh()
    assert refusal.value.code == "bad_signature"
    assert device.marks()["targets"] == marks["targets"]


async def test_a_withdrawn_release_is_no_longer_installed(hub: Hub, device: Device) -> None:
    release = hub.release()
    await believes(device)
    hub.authority.change_targets({}, [release_target("chat", release.counter)])
    with pytest.raises(UntrustedError) as refusal:
        await device.trust.verified_release(hub.job(release))
    assert refusal.value.code == "not_released"


async def test_an_old_job_played_again_is_refused(hub: Hub, device: Device) -> None:
    release = hub.release()
    old, new = hub.signed(hub.job(release, 1)), hub.signed(hub.job(release, 2))
    await device.trust.open_job(old)
    await device.trust.open_job(new)
    assert (await device.trust.open_job(new)).version == 2  # the newest may come again
    before = device.state()
    with pytest.raises(UntrustedError) as refusal:
        await device.trust.open_job(old)
    assert refusal.value.code == "document_old"
    assert device.state() == before
    device.restart()
    with pytest.raises(UntrustedError):
        await device.trust.open_job(old)


async def test_another_devices_job_is_refused(hub: Hub, device: Device) -> None:
    job = hub.job(hub.release())
    stolen = msgspec.structs.replace(job, device="box-2", version=99)
    before = device.state()["trust_seen"]
    with pytest.raises(UntrustedError) as refusal:
        await device.trust.open_job(hub.signed(stolen))
    assert refusal.value.code == "wrong_device"
    assert device.state()["trust_seen"] == before
    assert (await device.trust.open_job(hub.signed(job))).version == 1


async def test_an_old_desired_twin_and_one_in_a_jobs_place_are_refused(hub: Hub, device: Device) -> None:
    def twin(version: int, kind: str = DESIRED_TYPE) -> bytes:
        return hub.director.sign(msgspec.json.encode(Desired(DEVICE, version)), kind)

    assert (await device.trust.open_desired(twin(5))).version == 5
    before = device.state()
    for wrong, code in (
        (twin(4), "document_old"),
        (twin(6, JOB_TYPE), "wrong_document"),
        (seal(b"[]", DESIRED_TYPE, [make_key()]), "bad_signature"),
        (hub.director.sign(b"[]", DESIRED_TYPE), "wrong_document"),
    ):
        with pytest.raises(UntrustedError) as refusal:
            await device.trust.open_desired(wrong)
        assert refusal.value.code == code
    assert device.state()["trust_seen"] == before["trust_seen"]
