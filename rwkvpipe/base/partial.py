"""Results that are made row by row, kept as they come, so that a run that was stopped goes on where it was."""

import hashlib
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rwkvpipe.base.files import absent, append_line, canonical, digest, unmake, write_jsonl

log = logging.getLogger("rwkvpipe")


def mark(decides: Sequence[Any], tokenizer: str, files: Sequence[Path]) -> str:
    """What decides the answers, as one short text: settings and weights, a vocabulary, files that are read."""
    given = Path(tokenizer)
    folder = given.parent if given.suffix == ".json" else given
    words = [path for path in (folder / "tokenizer.json", folder / "vocab.txt", given) if path.is_file()]
    parts = [*decides, "" if words else tokenizer, *(digest(path) for path in (*files, *words))]
    return hashlib.sha256(canonical(parts).encode()).hexdigest()[:32]


class Partial:
    """Answers on their way to a file, in the order in which they come: a line that says to what, then one an answer."""

    def __init__(self, out: Path, mark: str):
        self.out, self.path, self.mark = out, out.with_name(f"{out.name}.part"), mark
        self.answers: dict[int, dict] = {}
        self.made = absent(*out.parents)

    def open(self, count: int) -> None:
        """Take over what an earlier run with the same mark left whole of `count` answers; begin anew otherwise."""
        rows = self._rows() if self.path.is_file() else []
        if rows and rows[0].get("mark") == self.mark:
            found = {row["row"]: row for row in rows[1:] if isinstance(row.get("row"), int)}
            self.answers = {row: answer for row, answer in found.items() if 1 <= row <= count}
        elif self.path.is_file():
            log.info("%s: answers of other weights, questions or settings; left out", self.path)
        # a torn last line must not join the next one
        write_jsonl(self.path, [{"mark": self.mark}, *self.answers.values()])

    def _rows(self) -> list[dict]:
        """Whole lines up to the first that is not: what follows that is not to be trusted."""
        rows = []
        for line in self.path.read_bytes().split(b"\n")[:-1]:
            try:
                row = json.loads(line)
            except ValueError:
                break
            if not isinstance(row, dict):
                break
            rows.append(row)
        return rows

    def add(self, answer: dict) -> None:
        """Keep one more answer."""
        append_line(self.path, answer)
        self.answers[answer["row"]] = answer

    def leave(self) -> None:
        """Something went wrong: a file without any answer does not stay, nor do folders that were made for it."""
        if not self.answers:
            self.path.unlink(missing_ok=True)
            unmake(self.made)

    def finish(self, fields: Sequence[str] | None = None) -> int:
        """Write all answers, or these fields of them, in the order of their rows; the partial file has served."""
        rows = [self.answers[row] for row in sorted(self.answers)]
        count = write_jsonl(self.out, ({name: row[name] for name in fields or row} for row in rows))
        self.path.unlink(missing_ok=True)
        return count
