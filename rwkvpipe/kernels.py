"""Compile the native kernels ahead of the jobs that use them, for every kind of vector unit of this machine's family.

The tokenizer's search is one of them. A job compiles what its processor can use when it needs it, which takes
seconds, and keeps it. This is for clusters: run it where there is a compiler, and nodes without one find the result,
if they share the user's cache folder or the folder that RWKVPIPE_KERNELS names. Kernels for NVIDIA's cards are made
where there is nvcc: for the cards of this machine, and for those that are named as nvcc does.

    python -m rwkvpipe.kernels --card sm_90
"""

import logging

import torch

from rwkvpipe.base import compiler
from rwkvpipe.base.errors import ConfigError, Parser, run
from rwkvpipe.kernel import build, gpu
from rwkvpipe.tokenizer import native

log = logging.getLogger("rwkvpipe")


def main(argv: list[str] | None = None) -> None:
    """Compile what is not there yet, and name the files. Raises ConfigError where that fails."""
    parser = Parser(prog="rwkvpipe.kernels", description=__doc__.splitlines()[0])
    parser.add_argument("--card", action="append", default=[], help="a kind of NVIDIA card, such as sm_90")
    given = parser.parse_args(argv)
    try:
        best = build.level()
        for level in build.levels():
            if level != best and not build.makes(level):
                log.warning("%s: the compiler does not know it; processors that have it use what is less", level)
                continue
            path, said = build.compiled(level)
            log.info("%s%s: %s (%s)", level, ", used here" if level == best else "", path, said)
        path, said = native.compiled()
        log.info("tokenizer: %s (%s)", path, said)
        for target in given.card:
            log.info("%s: %s (%s)", target, *gpu.compiled(target))
    except compiler.FAILURES as error:
        raise ConfigError(f"the native kernels cannot be compiled: {compiler.reason(error)}") from None
    for number in range(torch.cuda.device_count()):
        library, said = gpu.at_hand(torch.device("cuda", number))
        log.info("card %d: %s (%s)", number, "its kernels are there" if library else "it computes in PyTorch", said)


if __name__ == "__main__":
    run(main)
