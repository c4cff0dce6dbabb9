"""Tell a whole run on one page: data, settings, curves, scores, samples, steps and how to make it again.

python -m rwkvpipe.report --spec '{"run":"demo","config":{"run":"demo"},"subjects":[]}' --out results/demo/report.html
"""

import logging
from pathlib import Path

from rwkvpipe.base.errors import Parser, new_file, run
from rwkvpipe.base.files import write_text
from rwkvpipe.show import scores
from rwkvpipe.show.evidence import Evidence, read_story
from rwkvpipe.show.figures import save
from rwkvpipe.show.page import page

log = logging.getLogger("rwkvpipe")


def main(argv: list[str] | None = None) -> None:
    """Write the page, and plots/scores.png and .csv beside it where anything is measured."""
    parser = Parser(prog="rwkvpipe.report", description=__doc__.splitlines()[0])
    parser.add_argument("--spec", required=True, help="what the plan tells of the run, as JSON")
    parser.add_argument("--out", required=True, type=new_file, help="report.html")
    given = parser.parse_args(argv)
    evidence = Evidence(read_story(given.spec))
    text, plots = page(evidence), Path(given.out).parent / "plots"
    if evidence.scores:
        save(scores.figure(evidence), plots / "scores.png")
        write_text(plots / "scores.csv", scores.csv(evidence))
    write_text(given.out, text)
    log.info("%s: %s bytes", given.out, f"{len(text):,}")


if __name__ == "__main__":
    run(main)
