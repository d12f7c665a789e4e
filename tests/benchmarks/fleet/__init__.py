"""The fleet measured: a real broker, a real hub, real outboxes. Each module here is a command of its own."""
