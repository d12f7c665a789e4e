"""The fleet's other end, a program of its own: devices, telemetry, signed releases and rollouts."""
