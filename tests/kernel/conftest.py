"""The GPU's kernels built for the host, in the place of a card's."""

import ctypes

import pytest

from rwkvpipe.base import compiler
from rwkvpipe.kernel import gpu

FLAGS = ("-std=c++17", "-O1", "-fPIC", "-shared", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", "-x", "c++")


@pytest.fixture(scope="session")
def host_library() -> ctypes.CDLL:
    """The sources of the GPU's kernels, compiled by a C++ compiler."""
    if compiler.command() is None or compiler.turned_off():
        pytest.skip("there is no C++ compiler to use here")
    name = f"gpu-on-host-{gpu.name(*FLAGS)}"
    return gpu.loaded(compiler.compiled(name, FLAGS, gpu.sources(), "the GPU's kernels for the host")[0])


@pytest.fixture
def on_host(host_library, monkeypatch):
    """Tensors on the CPU go where those on a card would go, to the same code."""
    monkeypatch.setattr(gpu, "at_hand", lambda device: (host_library, "built for the host"))
    yield host_library
    host_library.grid_order(0)
