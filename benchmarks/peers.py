"""Peers, each in an environment of its own; the product never imports one.

python -m benchmarks.peers rwkv rwkv7-hf

RWKV-LM is no package: its tests run where a clone of it lies in build/peers/RWKV-LM.
"""

import subprocess
import sys
import sysconfig
from importlib.metadata import version
from pathlib import Path

# rwkv-trainer, rwkvtune: without their own dependencies, which ask for a torch of years ago
PINNED = {
    "rwkv-trainer": ["rwkv-trainer==0.1.27"],
    "rwkvtune": ["rwkvtune==0.1.0"],
    "rwkv": ["rwkv==0.8.32"],
    "rwkv7-hf": ["rwkv7-hf==0.9.0", "transformers==5.23.0"],
    "peft": ["peft==0.21.2", "rwkv7-hf==0.9.0", "transformers==5.23.0"],
    "pyrwkv-tokenizer": ["pyrwkv-tokenizer==0.9.1"],  # beside our rwkv, which has the trie
    "data": ["datatrove==0.10.1", "megatron-core==0.16.1", "orjson", "regex"],
    "llama-cpp": ["llama-cpp-python==0.3.36"],  # compiles llama.cpp: some eight minutes of a core
    # flash-linear-attention, whose kernels triton's interpreter runs without a GPU
    "fla": ["flash-linear-attention==0.6.0", "triton==3.9.0", "einops==0.8.2", "transformers==5.23.0"],
}
BESIDE = {
    "rwkv-trainer": ["pytorch-lightning==2.5.5", "numpy", "safetensors", "setuptools<82"],
    "rwkvtune": ["lightning==2.5.5", "transformers==5.23.0", "datasets", "numpy", "safetensors"],
}
FOLDER = Path(__file__).resolve().parents[1] / "build/peers"
CHECKOUT = FOLDER / "RWKV-LM"


def python(name: str) -> Path | None:
    """The Python of a peer that has been set up; None for others."""
    folder = FOLDER / name
    return folder / "bin/python" if (folder / "done").exists() else None


def set_up(name: str) -> Path:
    """The Python of the peer's environment, made when it is not there yet, with the torch that we run."""
    folder = FOLDER / name
    if (found := python(name)) is not None:
        return found
    subprocess.run([sys.executable, "-m", "venv", "--clear", folder], check=True)
    install = [folder / "bin/python", "-m", "pip", "install", "--quiet"]
    if name in BESIDE:
        torch = f"torch=={version('torch').partition('+')[0]}"
        subprocess.run([*install, torch, *BESIDE[name]], check=True)
        subprocess.run([*install, "--no-deps", *PINNED[name]], check=True)
    else:  # what we have need not be fetched again; what the peer brings goes before it
        packages = sysconfig.get_path("purelib", vars={"base": str(folder), "platbase": str(folder)})
        Path(packages, "ours.pth").write_text(sysconfig.get_path("purelib") + "\n")
        subprocess.run([*install, *PINNED[name]], check=True)
    (folder / "done").touch()
    return folder / "bin/python"


if __name__ == "__main__":
    for name in sys.argv[1:]:
        sys.stdout.write(f"{name}: {set_up(name)}\n")
