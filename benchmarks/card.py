"""One figure of a card, in a process of its own: `python -m benchmarks.card op ours 8 4096 64`, and so on.

Prints a line of JSON. Whatever else is run beside it shares the card, so `python -m benchmarks gpu` asks one by one.
"""

import json
import sys
import time
from collections.abc import Callable
from statistics import median

import torch
from torch import Tensor

from rwkvpipe.base.config import RwkvConfig, TrainConfig
from rwkvpipe.data.batches import Batch
from rwkvpipe.kernel.wkv5 import wkv5
from rwkvpipe.kernel.wkv6 import wkv6
from rwkvpipe.kernel.wkv7 import wkv7, wkv7_reference
from rwkvpipe.model.family import build
from rwkvpipe.train.loss import lm_losses
from rwkvpipe.train.optim import adamw

# bf16 operations a second with sparsity left out, 1e12 of them, as the makers' data sheets have it
PEAKS = {"H100": 989, "H200": 989, "B200": 2250, "A100": 312, "L40S": 362, "RTX 4090": 165, "RTX 5090": 209}
CHECKED = (1, 256, 2)  # B T H of what is compared before anything is timed
WORST = 2e-2  # RMS of an error of bf16 results, as a share of the tensor's


def seconds(device: torch.device, run: Callable, rounds: int, warm: int = 2) -> list[float]:
    """How long each of some runs takes, after some that do not count."""
    found = []
    for n in range(warm + rounds):
        if device.type == "cuda":
            torch.cuda.synchronize()
        begin = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize()
        found += [time.perf_counter() - begin] if n >= warm else []
    return found


def drawn(operator: str, B: int, T: int, H: int, device: torch.device) -> list[Tensor]:
    """Inputs as a model makes them, in bf16, for heads of 64."""
    stream = torch.Generator(device).manual_seed(0)

    def draw() -> Tensor:
        return torch.randn(B, T, H, 64, generator=stream, device=device)

    r, k, v, w = (draw() for _ in range(4))
    found = [r, w[0, 0] - 2 if operator == "wkv5" else w - 2, k, v, draw()[0, 0]]
    if operator == "wkv7":
        kk = torch.nn.functional.normalize(draw(), dim=-1)
        found = [r, torch.nn.functional.logsigmoid(w) - 0.5, k, v, -kk, kk * torch.sigmoid(draw())]
    return [x.bfloat16().requires_grad_() for x in found]


def _fla() -> Callable:
    from fla.ops.rwkv7 import chunk_rwkv7

    return lambda r, w, k, v, a, b: chunk_rwkv7(r=r, w=-torch.exp(w), k=k, v=v, a=a, b=b)[0]


def _wind_chunked() -> Callable:
    from wind_rwkv.rwkv7 import attn_chunked_cuda, load_chunked_cuda

    load_chunked_cuda(64)
    return lambda *inputs: attn_chunked_cuda(*inputs)[0]


def _wind_stepping() -> Callable:
    from wind_rwkv.rwkv7 import attn_backstepping_smallhead, load_backstepping_smallhead

    load_backstepping_smallhead(64)
    return lambda *inputs: attn_backstepping_smallhead(*inputs)[0]


FORMS: dict[str, Callable[[], Callable]] = {
    "wkv7": lambda: lambda *inputs: wkv7(*inputs)[0],
    "wkv6": lambda: lambda *inputs: wkv6(*inputs)[0],
    "wkv5": lambda: lambda *inputs: wkv5(*inputs)[0],
    "fla": _fla,
    "wind_chunked": _wind_chunked,
    "wind_stepping": _wind_stepping,
}


def differs(form: Callable, device: torch.device) -> float:
    """The largest RMS of errors of y and of gradients beside fp64, of RWKV-7, as a share of the tensor's."""
    inputs = drawn("wkv7", *CHECKED, device)
    wide = [x.detach().double().requires_grad_() for x in inputs]
    y, real = form(*inputs), wkv7_reference(*wide)[0]
    pull = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(device, torch.bfloat16)
    found = [y, *torch.autograd.grad(y, inputs, pull)]
    wanted = [real, *torch.autograd.grad(real, wide, pull.double())]
    pairs = [(x.detach().double(), z.detach()) for x, z in zip(found, wanted, strict=True)]
    return max(float((x - z).norm() / z.norm()) for x, z in pairs)


def operator(device: torch.device, name: str, *sizes: str) -> dict:
    """Forward and backward of a form, which of RWKV-7 is compared first. Raises SystemExit for a wrong one."""
    form, family = FORMS[name](), name if name in ("wkv6", "wkv5") else "wkv7"
    error = differs(form, device) if family == "wkv7" else 0.0
    if not error < WORST:
        raise SystemExit(f"differs from the reference by {error:.1e}")
    inputs = drawn(family, *map(int, sizes), device)
    pull = torch.ones_like(inputs[3])

    def forward() -> None:
        with torch.no_grad():
            form(*inputs)

    def both() -> None:
        torch.autograd.grad(form(*inputs), inputs, pull)

    ahead, whole = (median(seconds(device, run, 10)) for run in (forward, both))
    return {"forward_ms": 1e3 * ahead, "both_ms": 1e3 * whole, **({"error": error} if family == "wkv7" else {})}


def _model(name: str, device: torch.device) -> torch.nn.Module:
    """A released size, or `3x128`: layers and width."""
    sizes = {"preset": name}
    if "-" not in name:
        layers, width = map(int, name.split("x"))
        sizes = {"n_layer": layers, "n_embd": width, "vocab_size": 500}
    with device:
        model = build(RwkvConfig(**sizes))
    draw = torch.Generator(device).manual_seed(0)
    with torch.no_grad():  # a model's own first values take minutes
        for name, x in model.named_parameters():
            x.normal_(0.0, x.shape[-1] ** -0.5 if x.squeeze().dim() > 1 else 0.1, generator=draw)
            x.add_(float("ln" in name and "weight" in name))
    return model


def train(device: torch.device, name: str, length: str) -> dict:
    """Steps of training in bf16, blocks computed again in the backward, with as many rows as fit."""
    model = _model(name, device).train()
    model.recompute = True
    config = TrainConfig(steps=1000, lr=1e-4, ctx_len=int(length), batch=1, precision="bf16")
    optimizer = adamw(model, config)
    for rows in (16, 8, 4, 2, 1):
        ids = torch.randint(model.config.vocab_size, (rows, int(length) + 1))
        losses, batch = lm_losses(rows, config), Batch(ids[:, :-1], ids[:, 1:])

        def step(losses=losses, batch=batch) -> None:
            model.zero_grad(set_to_none=True)
            for part in losses(model, batch):
                part.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip)
            optimizer.step()

        try:
            took = median(seconds(device, step, 4))
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
            continue
        rate = rows * int(length) / took
        numbers = sum(x.numel() for x in model.parameters()) - model.emb.weight.numel()
        found = {"rows": rows, "tokens_per_second": rate, "loss_tokens": rows * int(length)}
        if device.type == "cuda":
            card = torch.cuda.get_device_name(device)
            peak = next((peak for known, peak in PEAKS.items() if known in card), None)
            found |= {"gigabytes": torch.cuda.max_memory_allocated() / 1e9}
            found |= {"mfu": 6 * numbers * rate / (peak * 1e12)} if peak else {}
        return found
    raise SystemExit("a single row does not fit")


@torch.inference_mode()
def decode(device: torch.device, name: str, rows: str) -> dict:
    """A token of so many rows after another, and what share of the card's bandwidth its weights take."""
    model, ids = _model(name, device).eval(), torch.ones(int(rows), 1, dtype=torch.long, device=device)
    state = model(ids)[1]
    took = median(seconds(device, lambda: model(ids, state), 20))
    weights = sum(x.numel() * x.element_size() for x in model.parameters()) - model.emb.weight.nbytes
    copied = torch.empty(1 << (28 if device.type == "cuda" else 20), device=device)
    bandwidth = 2 * copied.nbytes / median(seconds(device, copied.clone, 5))
    return {"tokens_per_second": int(rows) / took, "bandwidth_share": weights / took / bandwidth}


@torch.inference_mode()
def read(device: torch.device, name: str, length: str) -> dict:
    """A prompt of one row."""
    model, ids = _model(name, device).eval(), torch.ones(1, int(length), dtype=torch.long, device=device)
    return {"tokens_per_second": int(length) / median(seconds(device, lambda: model.features(ids), 5))}


WHAT = {"op": operator, "train": train, "decode": decode, "read": read}


def figure(device: str, what: str, *words: str) -> dict:
    """One figure, by its words."""
    return WHAT[what](torch.device(device), *words)


if __name__ == "__main__":
    print(json.dumps(figure("cuda", *sys.argv[1:])))
