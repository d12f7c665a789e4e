"""The room of native inference: one thread a loaded model, which owns every native handle."""
