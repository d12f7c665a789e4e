"""llama.cpp's C functions, each bound the way that suits how long it runs.

A call through `ctypes.CDLL` lets go of the GIL and takes it again, which under load costs tens of microseconds; through
`ctypes.PyDLL` it keeps the GIL and costs about two. So the few long calls (load, decode, tokenize) come from
llama-cpp-python's own binding, and the many short ones are bound here a second time, to the same library.

Its threads meet some hundred times a token. GCC's OpenMP lets those that came first spin for 300,000 rounds, 15 ms,
before they sleep; beside one busy program on the same cores that makes a token take 20 times as long as it must, since
they burn the very time that the last one needs. So they spin for microseconds here, unless the operator says otherwise.
"""

from __future__ import annotations

import ctypes
import logging
import os
import platform
from functools import cache
from typing import Any

SPIN_ROUNDS = 1500
"""How long a thread spins at a barrier before it sleeps, some 80 us: with 1,000 rounds an undisturbed token takes no
longer than with 300,000, with 600 a fifth more. A round is a `pause` on x86; elsewhere it is next to nothing."""

if platform.machine() == "x86_64" and not {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & os.environ.keys():
    # Read once, when the library is loaded. With two models there are more threads than cores; by the policy they spin
    # for 1,000 rounds even then, and not for 100, with which each of the models takes three times as long.
    os.environ |= {"GOMP_SPINCOUNT": str(SPIN_ROUNDS), "OMP_WAIT_POLICY": "active"}

import llama_cpp  # noqa: E402
import llama_cpp.llama_cpp as llama  # noqa: E402

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
