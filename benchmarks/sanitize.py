"""The GPU's kernels under NVIDIA's compute-sanitizer, on the card at hand: the small ones of the tests marked `gpu`.

Four of its tools, side by side: memory beyond a tensor or shared memory (each tensor is memory of its own then),
barriers that are missing between threads, barriers that not all threads reach, numbers that nobody wrote.
"""

import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import torch

from rwkvpipe.base import compiler

TOOLS = ("memcheck", "racecheck", "synccheck", "initcheck")
ROOT = Path(__file__).resolve().parents[1]
TESTS = ("-m", "gpu and not large", "tests/kernel")  # graphs are left out: they need PyTorch's own keeper of memory
WRONG = 9  # how it ends where a tool found something
LONGEST = 1800.0  # seconds for one tool
# the tests' own process, which loads PyTorch before it comes to the card; what PyTorch asks the driver in vain is no
# error, and ours are seen where kernels are started
HOW = ("--target-processes", "application-only", "--launch-timeout", "600", "--report-api-errors", "no")
OURS = ("--kernel-name", "kns=_Z3runI")  # `run` of cuda/launch.cuh, as the compiler calls it


def program() -> str | None:
    """The compute-sanitizer on the path, or beside nvcc."""
    nvcc = compiler.nvcc()
    beside = shutil.which(nvcc[0]) if nvcc else None
    return shutil.which("compute-sanitizer") or (
        shutil.which("compute-sanitizer", path=str(Path(beside).resolve().parent)) if beside else None
    )


def checked(sanitizer: str, tool: str) -> str:
    """What a tool finds: nothing wrong, or how much and where its first lines say."""
    ours = OURS if tool != "initcheck" else ()  # what others wrote is written, too
    command = [sanitizer, "--tool", tool, "--error-exitcode", str(WRONG), *HOW, *ours]
    command += [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *TESTS]
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    try:
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=LONGEST)
    except subprocess.TimeoutExpired:
        return "took too long"
    lines = done.stdout.strip().splitlines() or ["nothing was said"]
    if done.returncode == 0:
        return f"nothing wrong: {next((line for line in reversed(lines) if ' passed' in line), lines[-1])}"
    told = [line for line in lines if line.startswith("=========")]
    return f"ends with status {done.returncode}\n" + "\n".join([*told[:20], lines[-1]])


def run() -> int:
    """Run all tools and tell of each; 0 if none found anything, 2 where there is nothing to run them on."""
    sanitizer = program()
    if sanitizer is None or not torch.cuda.is_available():
        what = "no compute-sanitizer, which CUDA's toolkit has" if sanitizer is None else "no NVIDIA GPU"
        print(f"there is {what} here, so nothing was checked", file=sys.stderr)
        return 2
    print(f"on {torch.cuda.get_device_name()}", flush=True)
    wrong = 0
    with ThreadPoolExecutor(len(TOOLS)) as several:
        for tool, found in zip(TOOLS, several.map(partial(checked, sanitizer), TOOLS), strict=True):
            wrong |= not found.startswith("nothing wrong")
            print(f"{tool}: {found}", flush=True)
    return int(wrong)
