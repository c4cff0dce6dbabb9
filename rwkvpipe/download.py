"""Fetch a file from a path or an address, whole and checked; what broke off goes on where it stopped.

python -m rwkvpipe.download https://example.org/model.pth --out model.pth
"""

from rwkvpipe.base.errors import Parser, new_file, run
from rwkvpipe.weights.hub import fetch


def main(argv: list[str] | None = None) -> None:
    """Fetch one file."""
    parser = Parser(prog="rwkvpipe.download", description=__doc__.splitlines()[0])
    parser.add_argument("source", help="a path, or an address of file://, http:// or https://")
    parser.add_argument("--sha256", help="digest that the file must have, in hex")
    parser.add_argument("--out", required=True, type=new_file, help="the file to write")
    given = parser.parse_args(argv)
    fetch(given.source, given.out, given.sha256)


if __name__ == "__main__":
    run(main)
