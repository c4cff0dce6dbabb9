"""One figure of a card, in a process of its own: `python -m benchmarks.card cuda op wkv7 8 4096 64`, and so on.

Prints a line of JSON. Whatever else is run beside it shares the card, so `python -m benchmarks gpu` asks one by one.
"""

import json
import sys
import time
from collections.abc import Callable
from statistics import median
from types import SimpleNamespace

import torch
from torch import Tensor

from benchmarks import outside
from rwkvpipe.base.config import RwkvConfig, TrainConfig
from rwkvpipe.data.batches import Batch
from rwkvpipe.infer.graph import graphs
from rwkvpipe.infer.packed import keep
from rwkvpipe.infer.reading import Reader
from rwkvpipe.kernel import gpu
from rwkvpipe.kernel.wkv5 import wkv5, wkv5_reference
from rwkvpipe.kernel.wkv6 import wkv6, wkv6_reference
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


def soft(w: Tensor) -> Tensor:
    """RWKV-7's clamp: at most -0.5, so that no decay is below 0.545."""
    return torch.nn.functional.logsigmoid(w) - 0.5


def drawn(operator: str, B: int, T: int, H: int, device: torch.device) -> list[Tensor]:
    """Inputs as a model makes them, in bf16, for heads of 64; of `raw` the decay is not clamped yet."""
    stream = torch.Generator(device).manual_seed(0)

    def draw() -> Tensor:
        return torch.randn(B, T, H, 64, generator=stream, device=device)

    r, k, v, w = (draw() for _ in range(4))
    found = [r, w[0, 0] - 2 if operator == "wkv5" else w - 2, k, v, draw()[0, 0]]
    if operator in ("wkv7", "raw"):
        kk = torch.nn.functional.normalize(draw(), dim=-1)
        found = [r, soft(w) if operator == "wkv7" else w, k, v, -kk, kk * torch.sigmoid(draw())]
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


FORMS: dict[str, Callable[..., Callable]] = {
    "wkv7": lambda: lambda *inputs: wkv7(*inputs)[0],
    "wkv6": lambda: lambda *inputs: wkv6(*inputs)[0],
    "wkv5": lambda: lambda *inputs: wkv5(*inputs)[0],
    "fla": _fla,
    "wind_chunked": _wind_chunked,
    "wind_stepping": _wind_stepping,
    "lm": lambda clone: outside.lm_operator("lm", clone),
    "lm_h100": lambda clone: outside.lm_operator("lm_h100", clone),
}
RAW = ("lm", "lm_h100")  # these clamp decays themselves
REFERENCES = {
    "raw": lambda r, w, *rest: wkv7_reference(r, soft(w), *rest),
    "wkv7": wkv7_reference,
    "wkv6": wkv6_reference,
    "wkv5": wkv5_reference,
}


def differs(form: Callable, device: torch.device, kind: str) -> float:
    """The largest RMS of errors of y and of gradients beside fp64, as a share of the tensor's."""
    inputs = drawn(kind, *CHECKED, device)
    wide = [x.detach().double().requires_grad_() for x in inputs]
    y, real = form(*inputs), REFERENCES[kind](*wide)[0]
    pull = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(device, torch.bfloat16)
    found = [y, *torch.autograd.grad(y, inputs, pull)]
    wanted = [real, *torch.autograd.grad(real, wide, pull.double())]
    pairs = [(x.detach().double(), z.detach()) for x, z in zip(found, wanted, strict=True)]
    return max(float((x - z).norm() / z.norm()) for x, z in pairs)


def operator(device: torch.device, name: str, *sizes: str) -> dict:
    """Forward and backward of a form, which is compared first. Raises SystemExit for a wrong one.

    sizes: B, T, H, and the folder of a clone where a form wants one.
    """
    form, kind = FORMS[name](*sizes[3:]), "raw" if name in RAW else name if name in REFERENCES else "wkv7"
    error = differs(form, device, kind)
    if not error < WORST:
        raise SystemExit(f"differs from the reference by {error:.1e}")
    inputs = drawn(kind, *map(int, sizes[:3]), device)
    pull = torch.ones_like(inputs[3])

    def forward() -> None:
        with torch.no_grad():
            form(*inputs)

    def both() -> None:
        torch.autograd.grad(form(*inputs), inputs, pull)

    ahead, whole = (median(seconds(device, run, 10)) for run in (forward, both))
    return {"forward_ms": 1e3 * ahead, "both_ms": 1e3 * whole, "error": error}


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


def _steps(device: torch.device, made: Callable[[int], Callable], length: int, numbers: int) -> dict:
    """What steps do with as many rows as fit: `made` gives one for so many. Raises SystemExit if none do."""
    for rows in (16, 8, 4, 2, 1):
        if device.type == "cuda":  # what was tried with more rows counts no more
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        try:
            took = median(seconds(device, made(rows), 4))
        except torch.cuda.OutOfMemoryError:
            continue
        rate = rows * length / took
        found = {"rows": rows, "tokens_per_second": rate}
        if device.type == "cuda":
            card = torch.cuda.get_device_name(device)
            peak = next((peak for known, peak in PEAKS.items() if known in card), None)
            found |= {"gigabytes": torch.cuda.max_memory_allocated() / 1e9}
            found |= {"mfu": 6 * numbers * rate / (peak * 1e12)} if peak else {}
        return found
    raise SystemExit("a single row does not fit")


def _counted(model: torch.nn.Module) -> int:
    """Numbers that a token is multiplied with."""
    return sum(x.numel() for x in model.parameters()) - model.emb.weight.numel()


def train(device: torch.device, name: str, length: str, blocks: str) -> dict:
    """Steps of training in bf16 with as many rows as fit; `blocks` are "kept", or computed "again" in the backward."""
    model = _model(name, device).train()
    model.recompute = blocks == "again"
    config = TrainConfig(steps=1000, lr=1e-4, ctx_len=int(length), batch=1, precision="bf16")
    optimizer = adamw(model, config)

    def made(rows: int) -> Callable:
        ids = torch.randint(model.config.vocab_size, (rows, int(length) + 1))
        losses, batch = lm_losses(rows, config), Batch(ids[:, :-1], ids[:, 1:])

        def step() -> None:
            model.zero_grad(set_to_none=True)
            for part in losses(model, batch):
                part.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip)
            optimizer.step()

        return step

    return _steps(device, made, int(length), _counted(model))


def train_lm(device: torch.device, name: str, length: str, clone: str) -> dict:
    """The same by RWKV-LM's model and kernels, which keep all for the backward."""
    config = _model(name, torch.device("meta")).config
    sizes = SimpleNamespace(n_layer=config.n_layer, n_embd=config.n_embd, dim_att=config.n_embd)
    sizes.vocab_size, sizes.dim_ffn, sizes.head_size = config.vocab_size, config.dim_ffn, config.head_size
    sizes.ctx_len, sizes.my_testing, sizes.grad_cp = int(length), "x070", 0
    model = outside.lm_model(sizes, clone)
    return _steps(device, lambda rows: outside.lm_step(model, rows, int(length)), int(length), _counted(model))


@torch.inference_mode()
def decode(device: torch.device, name: str, rows: str) -> dict:
    """A token of so many rows after another, and what share of the card's bandwidth its weights take."""
    model, ids = _model(name, device).eval(), torch.ones(int(rows), 1, dtype=torch.long, device=device)
    if device.type == "cuda":
        keep(model, "bf16")
    state, steps = model.start(int(rows), device), graphs(model)
    took = median(seconds(device, lambda: steps.step(ids[:, 0], state) if steps else model(ids, state), 20))
    weights = sum(x.nbytes for x in (*model.parameters(), *model.buffers())) - model.emb.weight.nbytes
    copied = torch.empty(1 << (28 if device.type == "cuda" else 20), device=device)
    bandwidth = 2 * copied.nbytes / median(seconds(device, copied.clone, 5))
    return {"tokens_per_second": int(rows) / took, "bandwidth_share": weights / took / bandwidth}


def albatross(device: torch.device, name: str, rows: str, clone: str) -> dict:
    """A token of so many rows after another by Albatross."""
    return outside.albatross(_model(name, torch.device("cpu")), int(rows), clone)


@torch.inference_mode()
def read(device: torch.device, name: str, length: str) -> dict:
    """A prompt of one row, on tensor cores, as the engine reads where matrices are in bf16."""
    model, ids = _model(name, device).eval(), torch.ones(1, int(length), dtype=torch.long, device=device)
    if device.type == "cuda":
        keep(model, "bf16")
    with gpu.roughly(True):
        return {"tokens_per_second": int(length) / median(seconds(device, lambda: model.features(ids), 5))}


def engine(device: torch.device, name: str, length: str) -> dict:
    """The same as the engine reads it: a chunk after the other, from no state to one."""
    model = _model(name, device).eval()
    if device.type == "cuda":
        keep(model, "bf16")
    reader, ids = Reader(model, 1), [1] * int(length)
    return {"tokens_per_second": int(length) / median(seconds(device, lambda: reader.read([ids]), 5))}


WHAT = {
    "op": operator,
    "train": train,
    "train_lm": train_lm,
    "decode": decode,
    "albatross": albatross,
    "read": read,
    "engine": engine,
}


def figure(device: str, what: str, *words: str) -> dict:
    """One figure, by its words."""
    return WHAT[what](torch.device(device), *words)


if __name__ == "__main__":
    print(json.dumps(figure(*sys.argv[1:])))
