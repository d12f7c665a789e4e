"""MQTT 5 for the fleet's two ends: one connection that comes back by itself, and nothing of the library behind it."""
