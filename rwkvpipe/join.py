"""Join binidx pairs by their indexes: nothing is encoded again, and with --move the disk holds nothing twice.

python -m rwkvpipe.join part1 part2 --out all
"""

import logging

from rwkvpipe.base.errors import Parser, new_file, run
from rwkvpipe.data.joining import join

log = logging.getLogger("rwkvpipe")


def main(argv: list[str] | None = None) -> None:
    """Write one pair, which RWKV-LM reads, or append to one; what was interrupted goes on with the same command."""
    parser = Parser(prog="rwkvpipe.join", description=__doc__.splitlines()[0])
    parser.add_argument("pairs", nargs="+", help="pairs in their order, by what the names of their files share")
    parser.add_argument("--move", action="store_true", help="use the pairs up, so that little disk is needed")
    parser.add_argument("--out", required=True, type=new_file, help="the pair to write; the first one, to append to it")
    given = parser.parse_args(argv)
    made = join(given.pairs, given.out, move=given.move)
    log.info("%s: %d documents, %d tokens", made.prefix, len(made.ends) - 1, len(made))


if __name__ == "__main__":
    run(main)
