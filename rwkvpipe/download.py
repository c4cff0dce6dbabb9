"""Fetch a file, or a hub's repository, whole and checked; what broke off goes on where it stopped.

python -m rwkvpipe.download hf://BlinkDL/rwkv7-g1/rwkv7-g1a-0.1b-20250728-ctx4096.pth --out model.pth
"""

import argparse
import sys
from pathlib import Path

from rwkvpipe.base.errors import HubError, Parser, run
from rwkvpipe.base.tree import remote, whole_repository
from rwkvpipe.weights import dataset, hub, repository
from rwkvpipe.weights.transfer import amount


def tell(given: argparse.Namespace) -> None:
    """Print the weights that a repository has, of a data set its rows, or the files that fit the patterns."""
    found = hub.listed(given.source, given.mirror)
    data = given.source.partition("://")[2].startswith("datasets/")
    shown = dataset.documents(found) if data else filter(repository.is_weights, found)
    wanted = repository.chosen(found, tuple(given.files)) if given.files else shown
    for file in wanted:
        size = "" if file.size is None else amount(file.size)
        sys.stdout.write(f"{file.path}  {size}  {file.sha256 or ''}".rstrip() + "\n")


def main(argv: list[str] | None = None) -> None:
    """Fetch one file, or the files of a repository into a folder, or list them."""
    parser = Parser(prog="rwkvpipe.download", description=__doc__.splitlines()[0])
    parser.add_argument(
        "source", help="a path, file://, http(s)://, hf:// or modelscope://owner/name[@revision][/file]"
    )
    parser.add_argument("--sha256", help="digest that the file must have, in hex")
    parser.add_argument("--files", action="append", default=[], metavar="PATTERN", help="of a repository: only these")
    parser.add_argument(
        "--mirror", action="append", default=[], metavar="URL", help="ask here for what hubs have first"
    )
    parser.add_argument("--offline", action="store_true", help="ask nobody: what is there will do")
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--list", action="store_true", help="list the weights of a repository")
    where.add_argument("--out", type=Path, help="the file to write, or a whole repository's folder")
    given = parser.parse_args(argv)
    offline = remote(given.source) and (given.offline or hub.is_offline())
    if offline and (given.list or not given.out.exists()):
        raise HubError(
            f"offline, and {given.out or 'the list of files'} is not here; fetch it where there is a network"
        )
    if given.list:
        tell(given)
    elif whole_repository(given.source):
        if not offline:
            hub.fetch_repository(given.source, given.out, patterns=given.files, mirrors=given.mirror)
    elif offline:
        hub.check(given.out, given.sha256)
    else:
        hub.fetch(given.source, given.out, given.sha256, mirrors=given.mirror)


if __name__ == "__main__":
    run(main)
