"""The contract between a box and its hub: topics, documents and limits, version 1.

`up` is what a device writes, `dn` what it reads. The broker lets a device write and read its own branch only. Every
document is JSON unless it says otherwise, and is checked against its structure here before anything looks into it;
fields that a reader does not know are left alone, so that either end may be the newer one.

Over 400 lines because the whole contract stands in one place.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from msgspec import Meta, Struct

ROOT = "ea/1"
HUB_TOPIC = f"{ROOT}/all/hub"
CLAIM_REQUEST = f"{ROOT}/claim/req"
"""Followed by `/` and a random id that the device makes up; the answer comes to `CLAIM_ANSWER/<id>`."""
CLAIM_ANSWER = f"{ROOT}/claim/res"

LARGEST_DOCUMENT_BYTES = 64 * 1024
LARGEST_BATCH_BYTES = 64 * 1024
BLOCK_BYTES = 64 * 1024
PIECE_BYTES = 1024 * 1024
WILL_DELAY_S = 60
BATCH_EXPIRY_S = 600
"""Of a batch of telemetry; by what is left of it the hub sees for how long the broker kept it."""
CLOCK_TOLERANCE_S = 300

DEVICE_ID = re.compile(r"[a-z0-9][a-z0-9._-]{0,62}")
"""A device's id is its certificate's common name, its user name and its client id at the broker."""

DeviceId = Annotated[str, Meta(pattern=r"^[a-z0-9][a-z0-9._-]{0,62}$")]
Name = Annotated[str, Meta(pattern=r"^[a-z0-9][a-z0-9._-]{0,127}$")]
Digest = Annotated[str, Meta(pattern=r"^[0-9a-f]{64}$")]
Count = Annotated[int, Meta(ge=0, le=2**53)]
Text = Annotated[str, Meta(max_length=2000)]
UpKind = Literal["state", "rep", "job", "res", "req", "tm", "blk"]
DownKind = Literal["des", "job", "cmd", "res", "ack", "blk"]


def up(device: str, kind: UpKind, *rest: str) -> str:
    """Return the topic on which a device writes."""
    return "/".join((ROOT, "up", device, kind, *rest))


def down(device: str, kind: DownKind) -> str:
    """Return the topic from which a device reads."""
    return f"{ROOT}/dn/{device}/{kind}"


class DeviceState(Struct, frozen=True, forbid_unknown_fields=False):
    """`up/<dev>/state`, retained, and the Will.

    Attributes:
        epoch: Counts the device's sessions and never goes back; a state of an older epoch is ignored. Two devices that
            push each other off with one identity show in it.
        status: `lost` is only ever said by the Will.
        at: Unix seconds by the device's clock when the session began.
        agent: Version of the program.
        instance: Made up once by each installation; another one under the same id is a clone.
    """

    epoch: Count
    status: Literal["online", "lost", "stopping"]
    at: float
    agent: str
    instance: str


class Reported(Struct, frozen=True):
    """`up/<dev>/rep`, retained: the reported twin.

    Attributes:
        version: Rises with each report of this device.
        desired_version: Of the desired twin that was applied last, 0 for none.
        refused: Names of desired settings that were not applied, each with the reason.
        settings: What is in force of what can be desired.
        models: What runs and what is there.
        pending: Names of settings whose desired value takes effect at the next start.
        facts: Hardware class, memory, disk, operating system, agent version.
    """

    version: Count
    desired_version: Count
    settings: dict[str, Any] = {}
    refused: dict[str, str] = {}
    pending: list[str] = []
    models: list[ReportedModel] = []
    facts: dict[str, Any] = {}


class ReportedModel(Struct, frozen=True):
    """A registered model: `active` is the version that its short name means, `trial` one that is being tried."""

    name: str
    version: str
    kind: str
    digest: str
    loaded: bool
    status: Literal["present", "trial", "active"] = "present"


class Desired(Struct, frozen=True):
    """`dn/<dev>/des`, retained, in an envelope that the hub signed: the desired twin, always whole.

    Attributes:
        device: Whose it is: another device's is refused.
        version: An older one than was applied is refused.
        settings: Values by name.
        telemetry: Seconds between rows by stream; 0 is off.
        models: Model wishes: the version that each name should mean; only versions that are there.
    """

    device: DeviceId
    version: Count
    settings: dict[str, Any] = {}
    telemetry: dict[str, float] = {}
    models: dict[str, str] = {}


class Job(Struct, frozen=True):
    """`dn/<dev>/job`, retained, in an envelope that the hub's director key signed: the one current job of a device.

    The device accepts an `install` only if `target`, `length`, `digest` and `counter` are those of a release in the
    signed repository.

    Attributes:
        device: Whose it is: another device's is refused.
        id: Of the job; reports name it.
        version: Rises with each job of the device; an older one than was seen is refused.
        action: `install` a release; `cancel` what is under way; `recall` goes back to the version before.
        target: Path of the release document in the repository.
        length: Bytes of the release document.
        digest: SHA-256 of the release document.
        counter: The release counter of the model, which never falls.
        expires: Unix seconds after which transient failures are retried no more.
        not_before: Unix seconds before which nothing is fetched.
        force: Try a release again that failed its trial here.
        mirrors: Base URLs where pieces may be had by HTTPS range or on the local network.
        files: Base URL where the hub itself offers pieces by HTTPS range, "" if it does not: both ends show
            certificates of the fleet's authority.
        trial_s: Length of the soak in seconds.
        trial_requests: Requests that the soak takes at least, if there are so many.
    """

    device: DeviceId
    id: Name
    version: Count
    action: Literal["install", "cancel", "recall"]
    target: Annotated[str, Meta(max_length=500)] = ""
    length: Count = 0
    digest: str = ""
    counter: Count = 0
    expires: float = 0.0
    not_before: float = 0.0
    force: bool = False
    mirrors: tuple[str, ...] = ()
    trial_s: float = 600.0
    trial_requests: Count = 0
    files: Annotated[str, Meta(max_length=500)] = ""


JobState = Literal[
    "seen",
    "verified",
    "reserved",
    "fetching",
    "fetched",
    "staged",
    "testing",
    "trial",
    "confirmed",
    "rolled_back",
    "failed",
    "rejected",
    "canceled",
]
FINAL_STATES: frozenset[str] = frozenset({"confirmed", "rolled_back", "failed", "rejected", "canceled"})


class JobReport(Struct, frozen=True):
    """`up/<dev>/job/<id>`: one step of a job, from the device's journal; sent again until the hub acknowledged it.

    Attributes:
        job: The job's id.
        version: The job's version.
        attempt: Counts from 1; a forced repetition is a new one.
        sequence: Rises within the device's journal; the hub keeps each only once.
        state: Where the job stands.
        percent: Of the fetch, 0 to 100.
        code: Stable slug of what went wrong, or "".
        detail: The same for a person.
        at: Unix seconds by the device's clock.
    """

    job: Name
    version: Count
    attempt: Count
    sequence: Count
    state: JobState
    percent: Annotated[int, Meta(ge=0, le=100)] = 0
    code: Annotated[str, Meta(max_length=100)] = ""
    detail: Text = ""
    at: float = 0.0


class Command(Struct, frozen=True):
    """`dn/<dev>/cmd`, never retained; the answer goes to `up/<dev>/res` with the same correlation data.

    Attributes:
        id: A repeated id is answered from memory and never acts twice.
        name: `ping`, `diagnostics`, `log_tail`, `restart`, `load`, `unload` or `twin`.
        arguments: As the command wants them.
        expires: Unix seconds after which it is refused.
    """

    id: Name
    name: Annotated[str, Meta(max_length=64)]
    arguments: dict[str, Any] = {}
    expires: float = 0.0


class CommandResult(Struct, frozen=True):
    """`up/<dev>/res`: what became of a command; `code` and `detail` say why it failed."""

    id: str
    ok: bool
    result: dict[str, Any] = {}
    code: str = ""
    detail: str = ""


class Question(Struct, frozen=True):
    """`up/<dev>/req`: the device asks; the answer goes to `dn/<dev>/res` with the same correlation data.

    Attributes:
        kind: `time`; `file` (bytes of a file of the signed repository); `job`; `desired`; `renew` (a certificate).
        path: Of a `file`.
        offset: Of a `file`.
        body: PEM of the certificate request of a `renew`.
    """

    kind: Literal["time", "file", "job", "desired", "renew"]
    path: Annotated[str, Meta(max_length=500)] = ""
    offset: Count = 0
    body: Annotated[str, Meta(max_length=16_384)] = ""


class Answer(Struct, frozen=True):
    """`dn/<dev>/res`, as MessagePack: the answer to a question.

    Attributes:
        ok: False if it was refused, see `code` and `detail`.
        data: At most `BLOCK_BYTES` of a file from `offset` on; a document; a certificate chain as PEM.
        total: Length of the whole file.
        now: Unix seconds by the hub's clock.
        code: Stable slug, such as `not_found`, `not_approved`.
    """

    ok: bool
    data: bytes = b""
    total: int = 0
    now: float = 0.0
    code: str = ""
    detail: str = ""


class BlockRequest(Struct, frozen=True):
    """`up/<dev>/blk`, as MessagePack: blocks of a model file that the device lacks, at most a window of them.

    Attributes:
        digest: SHA-256 of the model file.
        first: Index of the first block that the bits speak of, in units of `BLOCK_BYTES`.
        missing: Bit i, the lowest of byte 0 first, is set if block `first + i` is wanted.
        sent: Milliseconds by the device's monotonic clock; comes back in each block, to time the round trip.
    """

    digest: Digest
    first: Count
    missing: Annotated[bytes, Meta(max_length=16)]
    sent: Count = 0


class Block(Struct, frozen=True):
    """`dn/<dev>/blk`, as MessagePack: one block; without data it says why there is none.

    Attributes:
        digest: SHA-256 of the model file.
        index: In units of `BLOCK_BYTES`.
        data: The last block of a file may be shorter.
        sent: From the request.
        code: `gone` if the hub has no such file, else "".
    """

    digest: Digest
    index: Count
    data: Annotated[bytes, Meta(max_length=BLOCK_BYTES)] = b""
    sent: Count = 0
    code: str = ""


Stream = Literal["alarm", "job", "health", "metric", "sample"]

STREAMS: tuple[Stream, ...] = ("alarm", "job", "health", "metric", "sample")
"""Classes of telemetry, the most important first; each is a stream of its own with its own sequence."""


class TelemetryRow(Struct, frozen=True):
    """One fact.

    Attributes:
        sequence: Rises by one within stream and boot; what is missing is told by a row of the kind `gap`.
        at: Unix seconds by the device's clock.
        kind: What it is, for example `resources`, `serving`, `models`, `gap`.
        body: Numbers, strings and lists; never the text of a prompt or an answer.
    """

    sequence: Count
    at: float
    kind: Annotated[str, Meta(max_length=64)]
    body: dict[str, Any]


class TelemetryBatch(Struct, frozen=True):
    """`up/<dev>/tm/<stream>`, as zstd over JSON, at most `LARGEST_BATCH_BYTES` compressed and sixteen times that plain.

    Attributes:
        stream: As in the topic.
        boot: Rises with each start of the device's program; sequences begin anew with each.
        first: Sequence of the first row.
        last: Sequence of the last row.
        rows: In order, without holes.
    """

    stream: Stream
    boot: Count
    first: Count
    last: Count
    rows: list[TelemetryRow]


class TelemetryAck(Struct, frozen=True):
    """`dn/<dev>/ack`: the hub has committed rows of a stream (or job reports, as the stream `job` of the boot 0).

    Attributes:
        stream: As in the batch.
        boot: As in the batch; 0 for job reports, telemetry's boots begin at 1.
        up_to: The last sequence that it speaks of.
        first: The first one: the newest health goes before the history, so what is older may not have come yet. 0 for
            job reports, whose acknowledgement is for all that came before.
        refused: Stable slug of why the hub will never take these rows, or "" for rows that it has.
    """

    stream: Stream
    boot: Count
    up_to: Count
    first: Count = 0
    refused: Annotated[str, Meta(max_length=100)] = ""


class HubState(Struct, frozen=True):
    """`all/hub`, retained, and the hub's Will.

    Attributes:
        status: Whether it is there.
        at: Unix seconds by its clock.
        hold_off_s: It falls behind: each device sends no telemetry for a random share of so many seconds. What the
            broker had kept says nothing of this.
    """

    status: Literal["up", "down"]
    at: float
    hold_off_s: float = 0.0


class Claim(Struct, frozen=True):
    """`claim/req/<id>`: a new box asks for an identity with its claim certificate.

    Attributes:
        token: Which claim it has: all claim certificates have one name, so the broker cannot tell.
        device: The id that it wants.
        request: PEM of the certificate request, whose common name is that id.
        instance: As in `DeviceState`.
        facts: For the operator who approves.
    """

    token: Annotated[str, Meta(max_length=128)]
    device: DeviceId
    request: Annotated[str, Meta(max_length=16_384)]
    instance: Annotated[str, Meta(max_length=64)]
    facts: dict[str, Any] = {}


class ClaimAnswer(Struct, frozen=True):
    """`claim/res/<id>`: the certificate, or why there is none (yet)."""

    status: Literal["issued", "waiting", "refused"]
    certificate: str = ""
    detail: str = ""


class ClaimBundle(Struct, frozen=True):
    """The file that an operator carries to a new box; whoever has it may ask for an identity.

    Attributes:
        token: Which claim it is, and the proof: a secret as much as the key.
        credentials: PEM of the key and the certificate of claims.
        authority: PEM of the hub's certificate authority.
        host: Where the broker listens.
        port: Its port.
        root: The first root metadata (TUF) of the signed repository, as text.
        expires: Unix seconds after which the claim is worth nothing.
    """

    token: Annotated[str, Meta(min_length=1, max_length=128)]
    credentials: Annotated[str, Meta(min_length=1, max_length=32_768)]
    authority: Annotated[str, Meta(min_length=1, max_length=32_768)]
    host: Annotated[str, Meta(min_length=1, max_length=255)]
    port: Annotated[int, Meta(ge=1, le=65_535)]
    root: Annotated[str, Meta(max_length=524_288)] = ""
    expires: float = 0.0
