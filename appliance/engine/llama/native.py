"""llama.cpp's C functions, each bound the way that suits how long it runs.

A call through `ctypes.CDLL` lets go of the GIL and takes it again, which under load costs tens of microseconds; through
`ctypes.PyDLL` it keeps the GIL and costs about two. So the few long calls (load, decode, tokenize) come from
llama-cpp-python's own binding, and the many short ones are bound here a second time, to the same library.
"""

from __future__ import annotations

import ctypes
import logging
from functools import cache
from typing import Any

import llama_cpp
import llama_cpp.llama_cpp as llama

__all__ = ["computes_on_gpu", "initialize", "llama", "llama_cpp_version", "short"]

LOGGER = logging.getLogger("appliance.llama_cpp")
_LEVELS = {3: logging.WARNING, 4: logging.ERROR}
"""ggml's log levels that matter; its "info" is a page at every load, so it counts as debug."""


class _ShortCalls:
    """The same functions as `llama`, without letting go of the GIL. Only for calls of a few microseconds."""

    def __init__(self) -> None:
        self._library = ctypes.PyDLL(llama._lib._name)  # noqa: SLF001  (the package publishes no other way to its path)

    def __getattr__(self, name: str) -> Any:
        declared = getattr(llama, name)
        function = getattr(self._library, name)
        function.argtypes, function.restype = declared.argtypes, declared.restype
        setattr(self, name, function)
        return function


short = _ShortCalls()


def _forward_log(level: int, text: bytes, _user_data: Any) -> None:
    LOGGER.log(_LEVELS.get(level, logging.DEBUG), "%s", text.decode("utf-8", "replace").rstrip())


_log_callback = llama.llama_log_callback(_forward_log)


@cache
def initialize() -> None:
    """Start llama.cpp once a process and send its log lines to ours."""
    llama.llama_log_set(_log_callback, None)
    llama.llama_backend_init()


def computes_on_gpu(gpu_layers: int) -> bool:
    """Return True if a model with so many layers there leaves the CPU to others while it computes."""
    return gpu_layers != 0 and bool(llama.llama_supports_gpu_offload())


def llama_cpp_version() -> str:
    """Return the version of the binding, which comes with one version of llama.cpp."""
    return str(llama_cpp.__version__)
