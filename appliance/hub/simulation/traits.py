"""What the simulated devices are told to do, and what makes each of them different: the same for the same seed."""

from __future__ import annotations

from dataclasses import dataclass
from hashlib import blake2b

HARDWARE = ("orin-nano", "orin-nx", "x86")


@dataclass(frozen=True, slots=True)
class Scenario:
    """How a simulated fleet behaves. Shares are of the devices, from 0 to 1.

    Attributes:
        seed: Another one picks other devices for each share.
        batch_every_s: Seconds between batches of telemetry of a device, 0 for none; spread evenly over the devices.
        rows: Of a batch.
        job_s: Seconds that a job takes from its sight to its end.
        failing: Share whose installs fail their self-test.
        lost: Share that goes silent in the middle of an install, for good.
        slow: Share whose jobs take ten times as long.
        duplicating: Share that sends every report and batch twice.
        retry_s: Seconds after which what the hub has not acknowledged is sent again.
        hardware: Hardware classes, taken by turns.
    """

    seed: int = 0
    batch_every_s: float = 60.0
    rows: int = 6
    job_s: float = 30.0
    failing: float = 0.0
    lost: float = 0.0
    slow: float = 0.0
    duplicating: float = 0.0
    retry_s: float = 30.0
    hardware: tuple[str, ...] = HARDWARE


@dataclass(frozen=True, slots=True)
class Traits:
    """What makes one device different; `phase` from 0 to 1 is where in the interval its batches are due."""

    hardware: str
    phase: float
    failing: bool = False
    lost: bool = False
    slow: bool = False
    duplicating: bool = False


def traits_of(scenario: Scenario, device: str) -> Traits:
    """Return a device's traits."""
    return Traits(
        hardware=scenario.hardware[int(_fraction(scenario, device, "hardware") * len(scenario.hardware))],
        phase=_fraction(scenario, device, "phase"),
        failing=_fraction(scenario, device, "failing") < scenario.failing,
        lost=_fraction(scenario, device, "lost") < scenario.lost,
        slow=_fraction(scenario, device, "slow") < scenario.slow,
        duplicating=_fraction(scenario, device, "duplicating") < scenario.duplicating,
    )


def _fraction(scenario: Scenario, device: str, of: str) -> float:
    """Return a number from 0 up to 1 that looks random."""
    digest = blake2b(f"{scenario.seed}/{device}/{of}".encode(), digest_size=8).digest()
    return int.from_bytes(digest) / 2**64
