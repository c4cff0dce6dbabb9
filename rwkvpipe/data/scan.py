"""Texts out of lines of JSON in C++, compiled at first use: `cuda/rows.cc`, through ctypes."""

import ctypes
import logging
import platform
from functools import cache
from pathlib import Path

import numpy as np

from rwkvpipe.base import compiler

log = logging.getLogger("rwkvpipe")

SOURCE = Path(__file__).resolve().parents[1] / "cuda/rows.cc"
TRACKED_FILES = ["../cuda/rows.cc"]
FLAGS = ("-std=c++17", "-O3", "-fPIC", "-shared")
PIECE = 1 << 20  # bytes that are compared at a time
POINTER, SIZE = ctypes.c_void_p, ctypes.c_int64


@cache
def _library() -> ctypes.CDLL | None:
    """The library; None, said once, where there is none."""
    name = f"rows-{platform.machine()}-{compiler.short_digest(*FLAGS, SOURCE.read_bytes())}"
    try:
        if compiler.turned_off():
            raise OSError("RWKVPIPE_KERNELS turns it off")
        found = ctypes.CDLL(str(compiler.compiled(name, FLAGS, [SOURCE], "the reader of JSON lines")[0]))
    except compiler.FAILURES as error:
        log.info("JSON lines: read by Python, which takes longer (native: %s)", compiler.reason(error))
        return None
    found.rows_scan.restype, found.rows_scan.argtypes = SIZE, [POINTER, SIZE, ctypes.c_char_p, SIZE, POINTER]
    return found


def available() -> bool:
    """Whether lines are read in C++ here."""
    return _library() is not None


def scan(data: np.ndarray, key: bytes) -> np.ndarray:
    """Rows (n, 5) of lines of JSON, bytes (m,) that may be written to, without the blank ones.

    Of each: number of its line from 1, where the text under `key` starts and ends (its escapes are undone in its
    place), where the line starts and ends. What is no object with such a text for sure stays as it is, and its text
    starts and ends at -1.
    """
    pieces = (data[place : place + PIECE] for place in range(0, len(data), PIECE))
    rows = np.empty((sum(int(np.count_nonzero(piece == 10)) for piece in pieces) + 1, 5), dtype=np.int64)
    return rows[: _library().rows_scan(data.ctypes.data, len(data), key, len(key), rows.ctypes.data)]
