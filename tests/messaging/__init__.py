"""Tests of the connection to the broker."""
