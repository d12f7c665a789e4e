"""Documents that simulated devices take: they believe every envelope."""

from __future__ import annotations

import base64

import msgspec

from appliance.core.fleet import Job


def install(device: str, version: int = 1) -> bytes:
    """Return an install in an envelope that nobody signed."""
    payload = base64.b64encode(msgspec.json.encode(Job(device, f"job-{version}", version, "install"))).decode()
    return msgspec.json.encode({"payload": payload, "payloadType": "x", "signatures": []})
