"""faiss, loaded when it is first needed, and always on one thread: with more it was slower."""

from __future__ import annotations

import ctypes
import mmap
from typing import Any

import numpy as np
import numpy.typing as npt

from appliance.retrieval.vectors.truth import Floats


def faiss() -> Any:
    """Return the library, with this thread's OpenMP held to one thread.

    OpenMP keeps that number for each thread by itself, so whoever is about to call faiss calls this first.
    """
    import faiss as library  # noqa: PLC0415 - it takes 0.2 s and 30 MB, which only a box with documents needs to spend

    library.omp_set_num_threads(1)
    return library


def return_memory() -> None:
    """Give the system what a large index left free: glibc keeps thousands of lists' blocks, 400 MB of a million."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # only glibc has it
    if trim is not None:
        trim(0)


def release_pages(mapped: npt.NDArray[np.uint8]) -> None:
    """Let pages of a file that is mapped to be read go, which are read again when they are needed.

    A store of a million keeps 400 MB resident otherwise while as much is made beside it.
    """
    advise = getattr(ctypes.CDLL(None), "madvise", None)
    if advise is not None and len(mapped):
        start = mapped.ctypes.data // mmap.PAGESIZE * mmap.PAGESIZE
        length = mapped.ctypes.data + len(mapped) - start
        advise(ctypes.c_void_p(start), ctypes.c_size_t(length), mmap.MADV_DONTNEED)


def inner_products(query: Floats, rows: Floats) -> Floats:
    """Return the inner product of a query, shape (dimension,), with each row, on this thread alone.

    NumPy would take as many threads as there are cores, beside the engines'.
    """
    query, rows = np.ascontiguousarray(query, np.float32), np.ascontiguousarray(rows, np.float32)
    assert query.shape == rows.shape[1:] or not len(rows), "faiss would read beyond"
    found = np.empty(len(rows), np.float32)
    if len(rows):
        library = faiss()
        pointers = (library.swig_ptr(each) for each in (found, query, rows))
        library.fvec_inner_products_ny(*pointers, rows.shape[1], len(rows))
    return found


def unit(vectors: Floats) -> Floats:
    """Return the rows scaled to length 1, float32 and contiguous; zeros stay zeros."""
    rows = np.ascontiguousarray(vectors, np.float32)
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    return np.asarray(np.divide(rows, lengths, out=np.zeros_like(rows), where=lengths > 0), np.float32)
