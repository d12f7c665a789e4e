"""Tests of the fleet: the broker, and its two ends against each other over it."""
