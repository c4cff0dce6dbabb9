"""What matrices in fewer bits cost: the perplexity of real text under a model of bytes that has learned."""

import math
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.page import rows
from benchmarks.train import conditions
from rwkvpipe.infer.decode import decoder
from rwkvpipe.infer.packed import keep
from rwkvpipe.kernel.panels import KINDS
from rwkvpipe.weights import store

BYTES, TOGETHER = 32768, 64


def texts(file: Path) -> Tensor:
    """The first bytes of a text, as rows (TOGETHER, length) that follow one another; a byte is an id."""
    ids = torch.tensor(list(file.read_bytes()[:BYTES]))
    return ids[: len(ids) // TOGETHER * TOGETHER].view(TOGETHER, -1)


@torch.no_grad()
def nats(model: torch.nn.Module, ids: Tensor) -> dict[str, float]:
    """-log p of a byte, on average, by what reads (matrices opened again) and by what writes (a token at a time)."""
    targets, losses = ids[:, 1:], {}
    logits, _ = model(ids[:, :-1])
    losses["read"] = float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten()))
    step, state = decoder(model), model.start(len(ids))
    if step is not None:
        found = torch.stack([step.step(ids[:, t], state) for t in range(ids.shape[1] - 1)], 1)
        losses["written"] = float(torch.nn.functional.cross_entropy(found.flatten(0, 1), targets.flatten()))
    return losses


def measure(model: Path, text: Path) -> dict:
    """Perplexity of a text by what matrices are kept in."""
    ids, found = texts(text), {}
    for kind in KINDS:
        network = store.load_model(model)
        if network.config.vocab_size != 256:
            raise SystemExit(f"{model}: {network.config.vocab_size} ids; a model of the 256 bytes, please")
        keep(network, kind)
        network.eval()
        found[kind] = nats(network, ids)
    sizes = {"n_layer": network.config.n_layer, "n_embd": network.config.n_embd}
    case = {**sizes, "model": model.name, "text": text.name, "bytes": ids.numel(), "rows": len(ids)}
    return {"what": "perplexity", "case": case, "nats": found, **conditions()}


def table(found: dict) -> str:
    """The numbers for people."""
    body = []
    for kind, losses in found["nats"].items():
        more = math.exp(losses["read"] - found["nats"]["fp32"]["read"]) - 1
        said = [f"{math.exp(losses[way]):.3f}" if way in losses else "" for way in ("read", "written")]
        body.append([kind, *said, f"{100 * more:+.3f} %" if kind != "fp32" else ""])
    case = found["case"]
    head = [f"{case['n_layer']} layers of {case['n_embd']}, {case['bytes']:,} bytes", "perplexity of a byte, read"]
    return rows([*head, "written token by token", "more than in fp32"], body).rstrip("\n")
