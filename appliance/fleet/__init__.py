"""The box's door to its hub: identity, twin, commands, telemetry and signed model updates over MQTT."""
