"""Longest match in C++, compiled at first use: `cuda/trie.cc`, through ctypes."""

import ctypes
import logging
import platform
import sys
from collections.abc import Mapping
from functools import cache
from pathlib import Path

import numpy as np

from rwkvpipe.base import compiler

log = logging.getLogger("rwkvpipe")

SOURCE = Path(__file__).resolve().parents[1] / "cuda/trie.cc"
TRACKED_FILES = ["../cuda/trie.cc"]
FLAGS = ("-std=c++17", "-O3", "-fPIC", "-shared")
LARGEST = (1 << 22) - 1  # id that a cell holds
POINTER, SIZE = ctypes.c_void_p, ctypes.c_int64


def compiled() -> tuple[Path, str]:
    """The library, and the compiler's name; compiled now if need be. Raises one of `compiler.FAILURES`."""
    name = f"trie-{platform.machine()}-{compiler.short_digest(*FLAGS, SOURCE.read_bytes())}"
    return compiler.compiled(name, FLAGS, [SOURCE], "the native tokenizer")


@cache
def _loaded() -> tuple[ctypes.CDLL, ctypes.PyDLL] | None:
    """The library, without and with Python's lock held; None, said once, where there is none."""
    try:
        if compiler.turned_off():
            raise OSError("RWKVPIPE_KERNELS turns it off")
        path, _ = compiled()
        free, locked = ctypes.CDLL(str(path)), ctypes.PyDLL(str(path))
    except compiler.FAILURES as error:
        log.info("tokenizer: numpy looks for the longest match (native: %s)", compiler.reason(error))
        return None
    free.trie_new.restype, free.trie_new.argtypes = POINTER, [POINTER, POINTER, POINTER, SIZE]
    free.trie_free.restype, free.trie_free.argtypes = None, [POINTER]
    for encode in (free.trie_encode16, free.trie_encode32):
        encode.restype, encode.argtypes = SIZE, [POINTER, ctypes.c_char_p, SIZE, ctypes.POINTER(SIZE), SIZE, POINTER]
    for encode in (free.trie_all16, free.trie_all32):
        encode.restype, encode.argtypes = SIZE, [POINTER, POINTER, POINTER, POINTER, SIZE, SIZE, POINTER, POINTER]
    locked.trie_list.restype, locked.trie_list.argtypes = ctypes.py_object, [POINTER, SIZE, *[POINTER] * 4]
    return free, locked


class NativeTrie:
    """The engine of a vocabulary, `words` to ids; make one with `native`."""

    name = "native"

    def __init__(self, words: Mapping[bytes, int], libraries: tuple[ctypes.CDLL, ctypes.PyDLL]):
        self._free, self._locked = libraries
        entries = sorted(words.items())
        offsets = np.cumsum([0, *(len(word) for word, _ in entries)], dtype=np.int64)
        ids = np.array([number for _, number in entries], dtype=np.uint32)
        text = b"".join(word for word, _ in entries)
        self._trie = POINTER(self._free.trie_new(text, offsets.ctypes.data, ids.ctypes.data, len(entries)))
        top = int(ids.max(initial=0))
        self._small = top < 1 << 16
        self._encode = self._free.trie_encode16 if self._small else self._free.trie_encode32
        self._encode_all = self._free.trie_all16 if self._small else self._free.trie_all32
        self._numbers = None
        if self._small and sys.implementation.name == "cpython":
            # one object for each id: lists are made of these
            self._numbers = np.empty(top + 1, dtype=object)
            self._numbers[:] = range(top + 1)
            api = ctypes.pythonapi
            self._api = [ctypes.cast(f, POINTER) for f in (api.PyList_New, api.PyList_SetItem, api.Py_IncRef)]

    def __del__(self) -> None:
        if getattr(self, "_trie", None):
            self._free.trie_free(self._trie)

    def part(self, data: bytes, place: int, stop: int) -> tuple[np.ndarray, int]:
        """Ids (uint16, or int32 for large ones) of entries that begin from `place` to `stop`, and where the next one
        begins: before `stop` if none fits there."""
        at, stop = SIZE(place), min(stop, len(data))
        found = np.empty(max(stop - place, 0), dtype=np.uint16 if self._small else np.int32)
        count = self._encode(self._trie, data, len(data), ctypes.byref(at), stop, found.ctypes.data)
        return found[:count], at.value

    def encode_all(
        self, data: np.ndarray, starts: np.ndarray, ends: np.ndarray, last: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Ids of many texts in `data`, one after the other, `last` behind each, and how many each has (n,).

        -1 is a text in which nothing fits somewhere; its ids are left out.
        """
        found = np.empty(int((ends - starts).sum()) + len(starts), dtype=np.uint16 if self._small else np.int32)
        sizes = np.empty(len(starts), dtype=np.int64)
        places = [np.ascontiguousarray(each, dtype=np.int64) for each in (starts, ends)]
        count = self._encode_all(
            self._trie, data.ctypes.data, *(each.ctypes.data for each in places), len(starts), last,
            found.ctypes.data, sizes.ctypes.data,
        )  # fmt: skip
        return found[:count], sizes

    def listed(self, ids: np.ndarray) -> list[int]:
        """Ids as a list."""
        if self._numbers is None:
            return ids.tolist()
        return self._locked.trie_list(ids.ctypes.data, len(ids), self._numbers.ctypes.data, *self._api)


def native(words: Mapping[bytes, int]) -> NativeTrie | None:
    """The native engine of a vocabulary; None where it cannot be had."""
    libraries = _loaded() if max(words.values(), default=0) <= LARGEST else None
    return None if libraries is None else NativeTrie(words, libraries)
