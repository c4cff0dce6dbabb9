"""Peers that are no packages but clones: RWKV-LM's operator and training, Albatross's writing, called as they are.

A clone is fetched beside the project and named by its folder; its kernels are compiled by PyTorch at first use. Nothing
of theirs is in here but how it is called.
"""

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace

import torch
from torch import Tensor, nn

CHUNK = 16  # tokens between two states that RWKV-LM's operator keeps
LM = "RWKV-v7/train_temp"
FLAGS = ["-D_N_=64", f"-D_CHUNK_LEN_={CHUNK}", "--use_fast_math", "-O3", "--extra-device-vectorization"]
OPERATORS = {"lm": ("rwkv7_clampw", "rwkv7_clampw"), "lm_h100": ("rwkv7_clampw_v3", "rwkv7_clampw_v3_for_h100")}
ALBATROSS = "faster3a_2607/rwkv7_fast_v3a.py"


def lm_operator(which: str, clone: str) -> Callable[..., Tensor]:
    """RWKV-LM's operator, of bf16 r w k v a b (B, T, H, 64) with w before the soft clamp; T a multiple of 16."""
    from torch.utils.cpp_extension import load

    name, source = OPERATORS[which]
    folder = Path(clone, LM, "cuda")
    sources = [str(folder / f"{source}.cu"), str(folder / f"{name}.cpp")]
    load(name=name, sources=sources, is_python_module=False, extra_cuda_cflags=FLAGS)
    theirs = getattr(torch.ops, name)

    class Operator(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *inputs):
            B, T, H, N = inputs[0].shape
            y = torch.empty_like(inputs[3])
            states = torch.empty(B, H, T // CHUNK, N, N, device=y.device)
            products = torch.empty(B, T, H, N, device=y.device)
            theirs.forward(*inputs, y, states, products)
            ctx.save_for_backward(*inputs, states, products)
            return y

        @staticmethod
        def backward(ctx, dy):
            *inputs, states, products = ctx.saved_tensors
            found = [torch.empty_like(x) for x in inputs]
            theirs.backward(*inputs, dy.contiguous(), states, products, *found)
            return tuple(found)

    return Operator.apply


def _lightning() -> None:
    """What RWKV-LM's model asks pytorch-lightning for, where that is not installed: a class and three names."""
    try:
        import pytorch_lightning  # noqa: F401
    except ImportError:
        names = ("pytorch_lightning", "pytorch_lightning.utilities", "pytorch_lightning.strategies")
        whole, utilities, strategies = (ModuleType(name) for name in names)
        whole.LightningModule, strategies.DeepSpeedStrategy = nn.Module, type("DeepSpeedStrategy", (), {})
        utilities.rank_zero_info = utilities.rank_zero_only = print
        sys.modules.update(zip(names, (whole, utilities, strategies), strict=True))


def lm_model(sizes: SimpleNamespace, clone: str) -> nn.Module:
    """RWKV-LM's model in bf16 on the card, with all its kernels; the fused one of the H100 where there is one."""
    folder = Path(clone, LM).resolve()
    hopper = torch.cuda.get_device_capability()[0] == 9
    os.environ |= {"RWKV_MY_TESTING": "x070", "RWKV_JIT_ON": "1", "RWKV_HEAD_SIZE": "64", "RWKV_FLOAT_MODE": "bf16"}
    os.environ |= {"RWKV_CTXLEN": str(sizes.ctx_len), "RWKV_KERNEL": "@rwkv3" if hopper else ""}
    _lightning()
    os.chdir(folder)  # its kernels are found from there
    sys.path.insert(0, str(folder))
    from src.model import RWKV

    return RWKV(sizes).to("cuda", torch.bfloat16)


def lm_step(model: nn.Module, rows: int, length: int) -> Callable[[], None]:
    """A step of training: their loss and gradients, clipping, and PyTorch's fused AdamW in the place of DeepSpeed's."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.99), eps=1e-18, fused=True)
    ids = torch.randint(model.args.vocab_size, (rows, length + 1), device="cuda")
    batch = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        model.training_step(batch, 0).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    return step


def albatross(model: nn.Module, rows: int, clone: str, length: int = 1) -> dict:
    """Tokens a second that Albatross writes with our weights in fp16 (or reads, `length` of a row at a time)."""
    weights = {name: x.to("cpu", torch.float16) for name, x in model.state_dict().items()}
    for name in ("v0", "v1", "v2"):  # layer 0 of a released model has them, too, and nobody reads them
        weights[f"blocks.0.att.{name}"] = weights[f"blocks.1.att.{name}"]
    with tempfile.TemporaryDirectory() as folder:
        torch.save(weights, f"{folder}/model.pth")
        command = [sys.executable, str(Path(clone, ALBATROSS)), "--model", f"{folder}/model.pth"]
        done = subprocess.run([*command, "--cases", f"{rows}x{length}"], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit((done.stderr.strip().splitlines() or ["it says nothing"])[-1])
    return {"tokens_per_second": told(done.stdout)}


def told(said: str) -> float:
    """Tokens a second out of the last line of numbers that Albatross prints. Raises SystemExit without one."""
    lines = [line.split(",") for line in said.splitlines() if line.startswith("csv,")]
    if not lines:
        raise SystemExit("Albatross printed no numbers")
    return float(lines[-1][-1])
