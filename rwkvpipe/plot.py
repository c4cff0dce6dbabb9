"""Draw how a training stage went: loss, learning rate, gradient norm, throughput, reward, and the numbers as CSV.

python -m rwkvpipe.plot results/demo/base/metrics.jsonl --out results/demo/base/plots
"""

import logging
from pathlib import Path

from rwkvpipe.base.errors import Parser, run
from rwkvpipe.base.files import write_text
from rwkvpipe.show.figures import curves, save
from rwkvpipe.show.metrics import read_metrics

log = logging.getLogger("rwkvpipe")


def main(argv: list[str] | None = None) -> None:
    """Write a PNG for each figure, and metrics.csv with every column."""
    parser = Parser(prog="rwkvpipe.plot", description=__doc__.splitlines()[0])
    parser.add_argument("metrics", help="metrics.jsonl")
    parser.add_argument("--out", required=True, help="folder for the figures")
    given = parser.parse_args(argv)
    metrics, folder = read_metrics(given.metrics), Path(given.out)
    figures = curves(metrics)
    for name, figure in figures.items():
        save(figure, folder / f"{name}.png")
    write_text(folder / "metrics.csv", metrics.csv())
    log.info("%s: %d figures of %d rows", folder, len(figures), len(metrics.rows))


if __name__ == "__main__":
    run(main)
