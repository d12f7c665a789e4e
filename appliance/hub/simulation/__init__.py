"""Thousands of simulated devices in one process, speaking the fleet's contract with a real hub over a real broker."""
