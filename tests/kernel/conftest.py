"""The GPU's kernels built for the host, in the place of a card's."""

import ctypes
import math

import pytest
import torch

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


@pytest.fixture
def guards(monkeypatch):
    """Memory that the operators ask for lies between numbers that are none; to be called when they are done."""
    guard, kept = 64, []

    def room(like, *given, **kwargs):
        shape = given[0] if given else like.shape
        kind = kwargs.get("dtype", getattr(like, "dtype", torch.float32))
        whole = torch.full((guard + math.prod(shape) + guard,), torch.nan, dtype=kind)
        kept.append(whole)
        return whole[guard:-guard].view(shape)

    def empty(*shape, device=None):
        return room(None, shape[0] if isinstance(shape[0], tuple) else shape)

    def check(least):
        assert len(kept) >= least
        for whole in kept:
            assert whole[:guard].isnan().all() and whole[-guard:].isnan().all()

    monkeypatch.setattr(torch, "empty_like", room)
    monkeypatch.setattr(torch, "empty", empty)
    return check
