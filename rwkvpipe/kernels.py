"""Compile the native kernels ahead of the jobs that use them, for every kind of vector unit of this machine's family.

The tokenizer's search is one of them. A job compiles what its processor can use when it needs it, which takes
seconds, and keeps it. This is for clusters: run it where there is a compiler, and nodes without one find the result,
if they share the user's cache folder or the folder that RWKVPIPE_KERNELS names.

    python -m rwkvpipe.kernels
"""

import logging

from rwkvpipe.base import compiler
from rwkvpipe.base.errors import ConfigError, Parser, run
from rwkvpipe.kernel import build
from rwkvpipe.tokenizer import native

log = logging.getLogger("rwkvpipe")


def main(argv: list[str] | None = None) -> None:
    """Compile what is not there yet, and name the files. Raises ConfigError where that fails."""
    Parser(prog="rwkvpipe.kernels", description=__doc__.splitlines()[0]).parse_args(argv)
    try:
        for level in build.levels():
            path, said = build.compiled(level)
            log.info("%s%s: %s (%s)", level, ", used here" if level == build.level() else "", path, said)
        path, said = native.compiled()
        log.info("tokenizer: %s (%s)", path, said)
    except compiler.FAILURES as error:
        raise ConfigError(f"the native kernels cannot be compiled: {compiler.reason(error)}") from None


if __name__ == "__main__":
    run(main)
