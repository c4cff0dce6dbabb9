"""What the GPU's kernels ask of a card, counted: what nvcc makes for one is run by the processor (benchmarks/ptx).

Nothing here is a time. Beside the counts stands what an H100 takes for each of them at least, if it does nothing else.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor

from benchmarks import registers
from benchmarks.ptx.card import Card, made
from benchmarks.ptx.memory import SECTOR
from rwkvpipe.base import compiler
from rwkvpipe.base.config import RwkvConfig
from rwkvpipe.infer import packed
from rwkvpipe.infer.decode_card import CardDecoder
from rwkvpipe.kernel import gpu, loss, passes
from rwkvpipe.model.family import build

REPORT = Path(__file__).resolve().parents[1] / "docs/gpu_counts.json"
# an H100 (SXM): multiprocessors, clock in Hz, warp instructions that each begins in a cycle, bytes of memory a second
UNITS, CLOCK, SCHEDULERS, BANDWIDTH = 132, 1.755e9, 4, 3.0e12
ROWS, T, HEADS, N = 8, 4096, 64, 64  # what the page times
SEGMENT = 64  # tokens: a state is kept in so many
TOKENS, WIDTH, IDS = 64, 512, 1 << 14  # of what is counted
ACROSS = 1024  # columns that a block meets at a time, where a token is written
NO_INSTRUCTIONS = ("wavefronts", "sectors")


@dataclass(frozen=True)
class Line:
    """What is counted for each of `of`: tokens of a head, or numbers."""

    name: str
    back: bool
    of: str
    instructions: float
    matrices: float
    wavefronts: float
    bytes: float
    barriers: float

    def least(self) -> tuple[float, float, float]:
        """Milliseconds of an H100 for what the page times: to begin instructions, for shared memory, for memory."""
        times = ROWS * T * HEADS * (1 if self.of == "token of a head" else N)
        cycles = 1e3 * times / UNITS / CLOCK
        return cycles * self.instructions / SCHEDULERS, cycles * self.wavefronts, 1e3 * times * self.bytes / BANDWIDTH


def draw(*shape: int) -> Tensor:
    """Numbers in bf16."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)).bfloat16()


def recurrence(which: str, tokens: int, back: bool) -> Callable[[], object]:
    """The forward of a head, or its backward alone."""
    x = [draw(1, tokens, 1, N) for _ in range(6)]
    x[1] = -0.5 - x[1].abs().float()  # as mixed precision gives it
    x[4], x[5] = 0.1 * x[4], 0.1 * x[5]
    x = [*(x if which == "wkv7" else [*x[:4], x[4][0, 0]]), torch.zeros(1, 1, N, N)]
    apply = (gpu.Wkv7 if which == "wkv7" else gpu.Wkv6).apply
    return _either(lambda: apply(True, *[each.requires_grad_() for each in x]), back)


def around(name: str, back: bool) -> Callable[[], object]:
    """One of the passes around a recurrence, forward, or its backward alone."""
    rows = [torch.ones(1, 1, WIDTH) for _ in range(6)]
    x = [draw(1, TOKENS, WIDTH).requires_grad_() for _ in range(5)]
    heads = [draw(1, TOKENS, WIDTH // N, N).requires_grad_() for _ in range(4)]
    last = draw(1, WIDTH)
    calls = {
        "six mixes": lambda: passes.Mix.apply(torch.bfloat16, x[0], last, *[row.bfloat16() for row in rows]),
        "values' way": lambda: passes.Lean.apply(*x[:3], rows[0]),
        "decay, keys, rates": lambda: passes.Prepare.apply(WIDTH // N, *x[:3], *rows[:4]),
        "norm, bonus, gate": lambda: passes.Finish.apply(
            1e-5, *heads, x[4], rows[0].view(-1, N), rows[1].flatten(), rows[2].flatten()
        ),
        "squared ReLU": lambda: passes.Square.apply(x[0]),
    }
    return _either(calls[name], back)


AROUND = ("six mixes", "values' way", "decay, keys, rates", "norm, bonus, gate", "squared ReLU")


def _either(call: Callable[[], object], back: bool) -> Callable[[], object]:
    if not back:
        return call
    found = call()
    found = found if isinstance(found, tuple) else (found,)
    return lambda: torch.autograd.backward(found, [torch.ones_like(y) for y in found])


def losses() -> Tensor:
    """The loss of one row of logits, which become their gradient."""
    wanted = loss.Wanted(torch.tensor([1]), torch.ones(1), 1.0, 0.1)
    return loss._gradients(draw(1, IDS), wanted, slice(0, 1))


def token(card: Card, kind: str) -> tuple[Counter[str], int]:
    """What matrices in bf16 or int8, ACROSS wide, ask for as a token of one row is written, and how many numbers they
    have."""
    low = dict.fromkeys(("d_decay", "d_aaa", "d_mv", "d_gate"), 4)
    model = build(RwkvConfig(n_layer=1, n_embd=ACROSS, head_size=N, vocab_size=4, dim_ffn=4, **low))
    with mock.patch.object(packed, "on_card", lambda weight: True):
        packed.keep(model, kind)
    decoder = CardDecoder(model)
    counted(card, lambda: decoder.few(torch.tensor([1]), model.start(1), torch.empty(1, 4)))
    seconds = 3 * 4 * ACROSS  # of low ranks, which heads multiply
    found = next(counts for name, counts in card.counts.items() if "Few" in name)
    return found, sum(x.numel() for x in decoder.matrices) - seconds


def counted(card: Card, run: Callable[[], object]) -> Counter[str]:
    """All that is counted while something runs."""
    card.counts.clear()
    run()
    return sum(card.counts.values(), Counter())


def _line(name: str, back: bool, of: str, counts: Counter[str], times: int) -> Line:
    begun = sum(count for what, count in counts.items() if what not in NO_INSTRUCTIONS)
    found = (begun, counts["mma"], counts["wavefronts"], SECTOR * counts["sectors"], counts["bar"])
    return Line(name, back, of, *(round(each / times, 4) for each in found))


def _recurrences(card: Card) -> list[Line]:
    found = []
    for which, name in (("wkv7", "RWKV-7"), ("wkv6", "RWKV-6")):
        for way in ("on tensor cores", "token by token"):
            plain = mock.patch.object(gpu, "way", lambda operator, v: (operator, 1))
            for back in (False, True):
                with plain if way == "token by token" else mock.patch.object(gpu, "_parts", lambda operator, v: 1):
                    one, two = (counted(card, recurrence(which, n * SEGMENT, back)) for n in (1, 2))
                two.subtract(one)  # what begins and ends a row is in both
                found.append(_line(f"{name} {way}", back, "token of a head", two, SEGMENT))
    return found


def measure(target: str = "sm_90a") -> dict:
    """Counts for each token of a head, or each number. Raises SystemExit without nvcc."""
    if compiler.nvcc() is None:
        raise SystemExit("there is no nvcc")
    card = Card(made(target))
    with card.computes():
        lines = _recurrences(card)
        for name in AROUND:
            for back in (False, True):
                lines.append(_line(name, back, "number", counted(card, around(name, back)), TOKENS * WIDTH))
        lines.append(_line("loss and its gradient", True, "number", counted(card, losses), IDS))
        with torch.inference_mode():
            for kind in ("bf16", "int8"):
                name = f"matrices in {kind} times a token of one row"
                lines.append(_line(name, False, "number", *token(card, kind)))
    said = compiler.version(compiler.nvcc())
    return {"what": "counts", "sources": gpu.name(), "target": target, "nvcc": said, "lines": [vars(x) for x in lines]}


def write(found: dict) -> None:
    """Keep a report where the page finds it."""
    registers.keep(REPORT, found, "lines")


def table(found: dict) -> str:
    """The numbers for people."""
    head = ["for each token of a head, or number", "warp instructions", "matrix products", "wavefronts", "bytes"]
    head += ["barriers", "ms at least: instructions", "shared memory", "memory"]
    lines = [f"| {' | '.join(head)} |", f"|{' --- |' * len(head)}"]
    for line in (Line(**each) for each in found["lines"]):
        one = "one row" in line.name
        name = line.name + ("" if one or "gradient" in line.name else f", {'backward' if line.back else 'forward'}")
        numbers = (line.instructions, line.matrices, line.wavefronts, line.bytes, line.barriers)
        said = [f"{x:,.0f}" if x >= 100 else f"{x:.3g}" for x in numbers]
        least = ["" if one or "loss" in line.name else f"{x:.2f}" for x in line.least()]
        lines.append(f"| {name} | {' | '.join([*said, *least])} |")
    return "\n".join(lines)
