"""The GPU's kernels built for the host, in the place of a card's."""

import ctypes
import math

import pytest
import torch

from benchmarks.ptx.card import Card, made
from rwkvpipe.base import compiler
from rwkvpipe.base.config import RwkvConfig
from rwkvpipe.kernel import gpu
from rwkvpipe.kernel.loss import Wanted
from rwkvpipe.model.family import build

FLAGS = ("-std=c++17", "-O1", "-fPIC", "-shared", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", "-x", "c++")


@pytest.fixture(scope="session")
def card() -> Card:
    """What nvcc makes of the GPU's kernels, on a card on paper."""
    if compiler.nvcc() is None or compiler.turned_off():
        pytest.skip("there is no nvcc to use here")
    card = Card(made())
    card.library.grid_order = lambda way: None  # threads of a card have no order
    return card


@pytest.fixture
def on_paper(card, monkeypatch):
    """Tensors on the CPU go where those on a card would go, to the code that nvcc made for one."""
    for name, value in card.names().items():  # taken out again in one order with what tests put there
        monkeypatch.setattr(gpu, name, value)
    return card


@pytest.fixture(scope="session")
def host_library(request) -> ctypes.CDLL:
    """The sources of the GPU's kernels, compiled by a C++ compiler; with --paper, by nvcc."""
    if request.config.getoption("--paper"):
        return request.getfixturevalue("card").library
    if compiler.command() is None or compiler.turned_off():
        pytest.skip("there is no C++ compiler to use here")
    name = f"gpu-on-host-{gpu.name(*FLAGS)}"
    return gpu.loaded(compiler.compiled(name, FLAGS, gpu.sources(), "the GPU's kernels for the host")[0])


@pytest.fixture
def on_host(request, host_library, monkeypatch):
    """Tensors on the CPU go where those on a card would go, to the same code."""
    if request.config.getoption("--paper"):
        request.getfixturevalue("on_paper")
        yield host_library
        return
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

    def empty(*shape, device=None, dtype=torch.float32):
        return room(None, shape[0] if isinstance(shape[0], tuple) else shape, dtype=dtype)

    def check(least):
        assert len(kept) >= least
        for whole in kept:
            assert whole[:guard].isnan().all() and whole[-guard:].isnan().all()

    monkeypatch.setattr(torch, "empty_like", room)
    monkeypatch.setattr(torch, "empty", empty)
    return check


@pytest.fixture(scope="session")
def drawn():
    """Makes what the head's loss is asked of."""

    def drawn(n, D, V, seed):
        """Positions of which some have no loss and some are padding, and a matrix; two logits of each are the same.

        Numbers are whole sixteenths, so that logits are exact: else sums in another order would tell those two apart.
        """
        stream = torch.Generator().manual_seed(seed)
        x, weight = 3 * torch.randn(n, D, generator=stream), torch.randn(V, D, generator=stream)
        x, weight = ((16 * values).round() / 16 for values in (x, weight))
        weight[-1] = weight[0]
        chosen = torch.randint(-2, V, (n,), generator=stream)
        real = (chosen >= 0) | (torch.rand(n, generator=stream) < 0.5)
        return x, weight, Wanted(chosen, real, 0.37, 0.02)

    return drawn


@pytest.fixture(scope="session")
def small_model():
    """Makes a small model of a family in which nothing is zero."""

    def small_model(family):
        model = build(RwkvConfig(family=family, n_layer=2, n_embd=64, head_size=32, vocab_size=30))
        model.initialise(0)
        with torch.no_grad():  # what starts at zero would hide a difference
            for n, x in enumerate(model.parameters()):
                x.add_(0.05 * torch.randn(x.shape, generator=torch.Generator().manual_seed(n)))
        return model

    return small_model
