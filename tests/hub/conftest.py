"""Fixtures of the hub's tests."""

from __future__ import annotations

from tests.fleet.broker import broker

__all__ = ["broker"]
