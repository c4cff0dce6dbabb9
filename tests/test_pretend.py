"""A card that is none refuses what a card refuses, and what is marked `gpu` goes all its way on it."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from rwkvpipe.base import compiler

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
ROOT = Path(__file__).resolve().parents[1]
REFUSED = """
import torch
from tests import pretend

pretend.begin()
x, here = torch.ones(2, 3, device="cuda", requires_grad=True), torch.ones(2, 3)
assert x.is_cuda and x.cpu().device == here.device and (2 * x).sum().device == x.device and (x + here.cuda()).is_cuda
assert torch.equal(torch.autograd.grad((x * x).sum(), x)[0].cpu(), 2 * here)
graph, total = torch.cuda.CUDAGraph(), torch.zeros((), device="cuda")
with torch.cuda.graph(graph):
    total += (x.detach() * 2).sum()
assert total.item() == 0
graph.replay(), graph.replay()
assert total.item() == 24


def recorded(work):
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        work()


for refused in (
    lambda: x + here,
    lambda: x.detach().numpy(),
    lambda: torch.autograd.grad(x * 2, x, here),
    lambda: torch.rand(2, device="cuda", generator=torch.Generator()),
    lambda: torch.ones(2).normal_(generator=torch.Generator("cuda")),
    lambda: recorded(lambda: float(total)),
    lambda: recorded(lambda: here.cuda()),
    lambda: recorded(lambda: torch.tensor([1.0], device="cuda")),
    lambda: recorded(lambda: x[x > 0]),
    lambda: recorded(lambda: total.copy_(here.sum())),
):
    try:
        refused()
    except (RuntimeError, TypeError):
        continue
    raise SystemExit("not refused")
"""


def run(*words):
    return subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True)


def test_it_refuses_what_a_card_refuses():
    done = run("-c", REFUSED)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
@pytest.mark.skipif(compiler.command() is None or compiler.turned_off(), reason="there is no C++ compiler to use here")
def test_what_is_marked_gpu_goes_all_its_way():
    asked = ("-q", "-p", "tests.pretend", "-p", "no:cacheprovider", "-m", "gpu and not large")
    done = run("-m", "pytest", *asked, "tests/kernel", "tests/infer", "tests/train", "tests/test_benchmarks_gpu.py")
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout[-3000:]
