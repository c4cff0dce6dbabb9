"""What comes out does not depend on how it is made: texts and log-likelihoods of one engine against another's.

A small model of each family, with random weights whose chances are as uneven as those of models that have learned.
"""

from collections.abc import Callable

import torch

from benchmarks.train import conditions
from rwkvpipe.base.config import RwkvConfig, SamplingConfig
from rwkvpipe.infer import prefix, reading
from rwkvpipe.infer.engine import Engine
from rwkvpipe.model.family import build
from rwkvpipe.tokenizer.byte import ByteTokenizer

FORMS = [("rwkv7", "fp32"), ("rwkv6", "fp32"), ("rwkv5", "fp32"), ("rwkv7", "bf16"), ("rwkv7", "int8")]
HEADER = "A header that all of them have, long enough that it is read once: "
PROMPTS = [f"{HEADER if n % 3 else ''}{'word ' * (n * 5 % 11)}{n}" for n in range(32)]
GREEDY = SamplingConfig(temperature=0.0, max_tokens=24, stop=("\n",))
DRAWN = SamplingConfig(top_p=0.9, presence=0.3, frequency=0.2, max_tokens=24, stop=("\n",), seed=3)
PAIRS = [(prompt, f" end {n % 5} and {n}") for n, prompt in enumerate(PROMPTS)]
# how it is made: rows at a time, order of the prompts, tokens of a chunk, whether headers are read once
WAYS = {
    "batch 7": (7, 1, 256, True),
    "batch 32": (32, 1, 256, True),
    "batch 7, other order": (7, -1, 256, True),
    "batch 32, chunks of 16": (32, 1, 16, True),
    "headers not shared": (7, 1, 256, False),
    "batch 3, refilled": (3, 1, 64, True),
}


def made(family: str) -> torch.nn.Module:
    """A model whose likeliest ids are likelier than the next by whole numbers."""
    model = build(RwkvConfig(family=family, n_layer=2, n_embd=64, head_size=32, vocab_size=257))
    model.initialise(1)
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for value in model.parameters():
            value.add_(torch.randn(value.shape, generator=draw) * 0.1)
        model.head.weight.mul_(3)
    return model.eval()


def texts(engine: Engine, sampling: SamplingConfig, numbers: list[int]) -> dict[int, list[int]]:
    """Ids by the prompt's number."""
    return {one.prompt: one.ids for one in engine.generate([PROMPTS[n] for n in numbers], sampling, numbers=numbers)}


def way(model: torch.nn.Module, kind: str, rows: int, step: int, chunk: int, shared: bool) -> dict:
    """All texts and log-likelihoods, made in one way."""
    kept = reading.CHUNK, prefix.SAVED
    reading.CHUNK, prefix.SAVED = chunk, prefix.SAVED if shared else 10**9
    try:
        engine, numbers = Engine(model, ByteTokenizer(1), rows, kind=kind), list(range(len(PROMPTS)))[::step]
        pairs = [PAIRS[n] for n in numbers]
        weighed = dict(zip(numbers, engine.loglikelihood(pairs), strict=True))
        return {"greedy": texts(engine, GREEDY, numbers), "drawn": texts(engine, DRAWN, numbers), "weighed": weighed}
    finally:
        reading.CHUNK, prefix.SAVED = kept


def killed(model: torch.nn.Module, kind: str) -> dict:
    """Some texts of one engine, and the others of a new one, as after a kill and a restart."""
    numbers, found = list(range(len(PROMPTS))), {}
    for name, sampling in (("greedy", GREEDY), ("drawn", DRAWN)):
        first = Engine(model, ByteTokenizer(1), 7, kind=kind).generate(PROMPTS, sampling)
        done = {one.prompt: one.ids for one, _ in zip(first, range(13), strict=False)}
        left = [n for n in numbers if n not in done]
        found[name] = done | texts(Engine(model, ByteTokenizer(1), 5, kind=kind), sampling, left)
    return found


def compare(found: dict, plain: dict) -> dict:
    """How many texts are equal, and how far log-likelihoods are apart."""
    equal = {name: sum(found[name][n] == ids for n, ids in plain[name].items()) for name in ("greedy", "drawn")}
    apart = [abs(found["weighed"][n] - value) for n, value in plain["weighed"].items()] if "weighed" in found else [0.0]
    return equal | {"apart": max(apart) if "weighed" in found else None}


def measure() -> dict:
    """Every way of every form beside one row at a time."""
    rows = []
    for family, kind in FORMS:
        model = made(family)
        plain = way(model, kind, 1, 1, 256, True)
        others: dict[str, Callable[[], dict]] = {
            name: lambda given=given: way(model, kind, *given)  # noqa: B023
            for name, given in WAYS.items()
        }
        others["stopped and resumed"] = lambda: killed(model, kind)  # noqa: B023
        for name, make in others.items():
            rows.append({"family": family, "kind": kind, "way": name, **compare(make(), plain)})
    tokens = sum(map(len, [*plain["greedy"].values(), *plain["drawn"].values()]))
    return {"what": "same", "texts": len(PROMPTS), "tokens": tokens, "rows": rows, **conditions()}


def table(found: dict) -> str:
    """The numbers for people: the worst of all families and weights in each way."""
    total, said = found["texts"] * len(FORMS), {}
    for row in found["rows"]:
        one = said.setdefault(row["way"], {"greedy": 0, "drawn": 0, "apart": []})
        one["greedy"] += row["greedy"]
        one["drawn"] += row["drawn"]
        one["apart"] += [] if row["apart"] is None else [row["apart"]]
    lines = ["| beside one row at a time | greedy texts equal | drawn texts equal | log-likelihoods apart, at most |"]
    lines.append("| --- | --- | --- | --- |")
    for name, one in said.items():
        apart = f"{max(one['apart']):.0e}" if one["apart"] else ""
        lines.append(f"| {name} | {one['greedy']} of {total} | {one['drawn']} of {total} | {apart} |")
    return "\n".join(lines)
