"""Converting a checkpoint of a released size takes less memory than the checkpoint."""

import shutil
import subprocess
import sys

import pytest
import torch

from rwkvpipe.base.config import RwkvConfig
from rwkvpipe.model.family import build
from rwkvpipe.weights.pth import write_pth
from rwkvpipe.weights.tensors import Tensors, write_sharded

# memory of its own and mapped files together, as the system counts the most there ever was
MEASURE = """
import json, resource, sys
from rwkvpipe import {verb}
{verb}.main(sys.argv[1:])
print(json.dumps(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024))
"""
SIZES = RwkvConfig(n_layer=24, n_embd=2048, vocab_size=65536, d_decay=96, d_aaa=96, d_mv=64, d_gate=256)


def made_up() -> Tensors:
    """A model of 1.5 billion bf16 numbers that are made when they are asked for."""
    with torch.device("meta"):
        like = {name: value.bfloat16() for name, value in build(SIZES).state_dict().items()}
    stream = torch.Generator().manual_seed(1)

    def load(name: str) -> torch.Tensor:
        return torch.rand(like[name].shape, generator=stream, dtype=torch.bfloat16)

    return Tensors(like, load)


@pytest.mark.large
@pytest.mark.parametrize("kind", ["pth", "shards"])
def test_converting_takes_no_more_memory_than_the_largest_file(tmp_path, kind):
    if shutil.disk_usage(tmp_path).free < 12e9:
        pytest.skip("needs 12 GB of disk")
    tensors, given = made_up(), tmp_path / "given"
    given.mkdir()
    if kind == "pth":
        write_pth(given / "model.pth", tensors)
        largest = (given / "model.pth").stat().st_size
    else:
        write_sharded(given, tensors, 10**9)
        largest = max(file.stat().st_size for file in given.glob("*.safetensors"))
    calls = {"convert": ["--out", "model.safetensors"]}
    outs = {"pth": "m.pth", "gguf": "m.gguf", "hf": "hf"}
    calls |= {f"export {to}": ["--to", to, "--out", out] for to, out in outs.items()}
    found = {}
    for call, (*words, out) in calls.items():
        where = tmp_path / "out" / out
        code = MEASURE.format(verb=call.split()[0])
        ended = subprocess.run([sys.executable, "-c", code, given, *words, where], capture_output=True, text=True)
        assert ended.returncode == 0, ended.stderr
        found[call] = int(ended.stdout) / largest
        shutil.rmtree(tmp_path / "out")
    sys.stdout.write(f"largest file {largest / 1e9:.2f} GB; most memory by its size: {found}\n")
    assert max(found.values()) < 1.2, found
