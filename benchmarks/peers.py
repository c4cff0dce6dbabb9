"""Peers, each in an environment of its own; the product never imports one."""

import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

# without their own dependencies, which ask for a torch of years ago
PINNED = {"rwkv-trainer": ["rwkv-trainer==0.1.27"]}
BESIDE = {"rwkv-trainer": ["pytorch-lightning==2.5.5", "numpy", "safetensors", "setuptools<82"]}


def set_up(name: str) -> Path:
    """The Python of the peer's environment, made when it is not there yet, with the torch that we run."""
    folder = Path("build/peers") / name
    python, done = folder / "bin/python", folder / "done"
    if not done.exists():
        subprocess.run([sys.executable, "-m", "venv", "--clear", folder], check=True)
        install = [python, "-m", "pip", "install", "--quiet"]
        torch = f"torch=={version('torch').partition('+')[0]}"
        subprocess.run([*install, torch, *BESIDE[name]], check=True)
        subprocess.run([*install, "--no-deps", *PINNED[name]], check=True)
        done.touch()
    return python
