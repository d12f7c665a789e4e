"""Builds the part that installs releases from what the agent's room has."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path

from appliance.core.clock import Clock
from appliance.core.messaging import Link
from appliance.core.settings import Settings
from appliance.core.wishes import ModelVersions
from appliance.fleet.hub_source import HubBlocks
from appliance.fleet.journal import Journal
from appliance.fleet.part import Asking
from appliance.fleet.reported import box_facts
from appliance.fleet.staging import Box, Staging
from appliance.fleet.update_steps import Releases, Steps
from appliance.fleet.updates import Updates
from appliance.messaging.options import TlsFiles
from appliance.registry.versions import Registry


def build_updates(
    device: str,
    link: Link,
    journal: Journal,
    *,
    releases: Releases,
    asking: Asking,
    registry: Registry,
    versions: ModelVersions,
    settings: Settings,
    clock: Clock,
    tls: TlsFiles,
) -> Updates:
    """Return the part; it reads `job` and `blk`, and its `acknowledged` is to be told which reports the hub has.

    Args:
        device: Ours.
        link: To the hub.
        journal: Whose `floor` the releases are held against.
        releases: The signed repository.
        asking: Asks for the current job.
        registry: Where models go.
        versions: The model wishes.
        settings: With the cap of the bandwidth, and the folder of pieces.
        clock: For windows, pauses and expiry.
        tls: Of this box, for the hub's own files by HTTPS.
    """
    hub = HubBlocks(device, link, clock, lambda: settings.update_bytes_per_s)

    def folders() -> Sequence[Path]:
        return [settings.update_dir] if settings.update_dir is not None else []

    async def box() -> Box:
        facts = await asyncio.to_thread(box_facts, settings)
        return Box(facts["hardware"], facts["agent"], facts["memory"])

    steps = Steps(
        journal,
        releases=releases,
        staging=Staging(registry),
        versions=versions,
        hub=hub,
        blobs=registry.blobs,
        box=box,
        folders=folders,
        context=tls.context,
        clock=clock,
    )
    return Updates(device, link, journal, steps, hub=hub, releases=releases, asking=asking, clock=clock)
