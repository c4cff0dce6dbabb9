"""What a report is made from: the story that the plan tells, and the files it names, read and checked."""

import math
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from rwkvpipe.base.config import Settings
from rwkvpipe.base.errors import DataError
from rwkvpipe.base.files import read_json, read_jsonl
from rwkvpipe.base.strict import Strict, check, check_json
from rwkvpipe.show.metrics import Metrics, read_metrics

ANSI = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")


class Subject(Strict):
    """Something that was trained, or measured as it came, and where its files are.

    Of kind best are the weights of the lowest held-out loss of the stage that is its `start`.
    """

    name: str
    kind: Literal["pretrain", "sft", "dpo", "grpo", "weights", "best"]
    data: str | None = None
    start: str | None = None
    lora: bool = False
    state: bool = False
    folder: str
    bench: tuple[str, ...] = ()
    samples: str | None = None
    metrics: str | None = None
    settings: str | None = None
    corpus: str | None = None
    mix: dict[str, str] = {}
    """Of several corpora: what tells of each, by its name and share."""

    @property
    def trained(self) -> bool:
        """Whether it is a stage."""
        return self.kind not in ("weights", "best")


class Job(Strict):
    """A step of the run, the steps whose files it reads, and the file that holds its time."""

    id: str
    rule: str
    label: str = ""
    needs: tuple[str, ...] = ()
    timing: str | None = None


class Story(Strict):
    """What the plan tells the report."""

    run: str
    config: dict[str, Any]
    subjects: tuple[Subject, ...]
    steps: tuple[Job, ...] = ()
    software: dict[str, Any] = {}


@dataclass(frozen=True)
class Score:
    """What a subject reached on a benchmark, with its 95 % interval."""

    subject: str
    benchmark: str
    task: str
    n: int
    score: float
    low: float
    high: float
    better: str
    chance: float | None = None

    @property
    def share(self) -> bool:
        """Whether it is a share of questions, shown in percent."""
        return self.task != "bits"

    def text(self, value: float) -> str:
        """A value on this benchmark's scale."""
        return f"{100 * value:.1f} %" if self.share else f"{value:.3f}"

    @property
    def between(self) -> str:
        """Its interval in words."""
        return f"{self.text(self.low).removesuffix(' %')} to {self.text(self.high)}"


@dataclass(frozen=True)
class Timing:
    """Seconds of a job and the most memory it held, in megabytes."""

    seconds: float
    megabytes: float | None


def read_story(text: str) -> Story:
    """The story out of a command line, weights that were given before what was made. Raises ConfigError."""
    story = check_json(Story, text, "--spec")
    way = sorted(story.subjects, key=lambda subject: subject.kind != "weights")
    return story.model_copy(update={"subjects": tuple(way)})


def _there(path: str | None) -> bool:
    return path is not None and Path(path).is_file()


def _object(path: str) -> dict:
    value = read_json(path)
    if not isinstance(value, dict):
        raise DataError(f"{path}:1: a JSON object is needed, this is a {type(value).__name__}")
    return value


def _number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _finite(path: str, value: dict, name: str) -> float:
    number = value.get(name)
    if not _number(number):
        raise DataError(f"{path}: {name} is {number!r:.40}, a finite number is needed; score the benchmark again")
    return number


@dataclass(frozen=True)
class Evidence:
    """The files of a run, read when they are asked for; a file that is not there gives nothing."""

    story: Story

    def settings(self, subject: Subject) -> Settings | None:
        """What a stage was asked to do. Raises DataError and ConfigError, naming the file."""
        return check(Settings, _object(subject.settings), subject.settings) if _there(subject.settings) else None

    def metrics(self, subject: Subject) -> Metrics | None:
        """How its training went."""
        return read_metrics(subject.metrics) if _there(subject.metrics) else None

    def corpus(self, subject: Subject) -> dict:
        """Facts about what it learned from; of several corpora, how much they hold together."""
        if not subject.mix:
            return _object(subject.corpus) if _there(subject.corpus) else {}
        parts = [each.get("train") for each in self.corpora(subject).values()]
        known = [part for part in parts if isinstance(part, dict)]
        return {name: sum(part.get(name, 0) for part in known) for name in ("documents", "tokens") if known}

    def corpora(self, subject: Subject) -> dict[str, dict]:
        """Facts about each corpus that it learned from, by name."""
        cards = subject.mix or {"The corpus": subject.corpus}
        return {name: _object(path) for name, path in cards.items() if _there(path)}

    def samples(self, subject: Subject) -> list[dict]:
        """Texts it wrote."""
        return list(read_jsonl(subject.samples)) if _there(subject.samples) else []

    def graded(self, subject: Subject, benchmark: str) -> list[dict]:
        """Graded answers to a benchmark."""
        path = f"{subject.folder}/bench/{benchmark}.samples.jsonl"
        return list(read_jsonl(path)) if _there(path) else []

    @cached_property
    def scores(self) -> list[Score]:
        """All scores, subject by subject. Raises DataError where one is no number."""
        found = []
        for subject in self.story.subjects:
            for name in subject.bench:
                path = f"{subject.folder}/bench/{name}.json"
                if not _there(path):
                    continue
                value = _object(path)
                task = str(self.benchmark(name).get("task") or value.get("task", "answer"))
                better = str(value.get("better", "lower" if task == "bits" else "higher"))
                score, low, high = (_finite(path, value, key) for key in ("score", "low", "high"))
                n = int(_finite(path, value, "n"))
                if not low - 1e-9 <= score <= high + 1e-9:
                    raise DataError(f"{path}: score {score} is outside its interval {low} to {high}; score it again")
                chance = _finite(path, value, "chance") if "chance" in value else None
                found.append(Score(subject.name, name, task, n, score, low, high, better, chance))
        return found

    @cached_property
    def benchmarks(self) -> list[str]:
        """Benchmarks that have a score, in the order in which they are first used."""
        return list(dict.fromkeys(score.benchmark for score in self.scores))

    def benchmark(self, name: str) -> dict:
        """A benchmark's entry in the config."""
        return self.entry("benchmarks", name)

    def source(self, corpus: str | None) -> dict:
        """A corpus's entry in the config."""
        return self.entry("corpora", corpus)

    def entry(self, section: str, name: str | None) -> dict:
        """An entry of a section of the config; empty where there is none."""
        entries = self.story.config.get(section)
        entry = entries.get(name) if isinstance(entries, dict) else None
        return entry if isinstance(entry, dict) else {}

    @cached_property
    def timings(self) -> dict[str, Timing]:
        """Time and memory of the jobs that were measured, by id."""
        found = {}
        for job in self.story.steps:
            if not _there(job.timing):
                continue
            last = next(reversed(list(read_jsonl(job.timing))), {})
            # Snakemake writes NA for what it had no time to measure
            if _number(last.get("s")):
                memory = last.get("max_rss")
                found[job.id] = Timing(last["s"], memory if _number(memory) else None)
        return found

    def said(self, subject: Subject, pattern: str) -> re.Match | None:
        """The last match of a pattern in the log of a subject's training, or of its first measurement."""
        rules = (subject.kind,) if subject.trained else ("bench", "generate")
        for job in self.story.steps:
            if job.rule in rules and job.label.split(" ")[0] == subject.name and job.timing:
                path = Path(job.timing).with_suffix(".log")
                if path.is_file():
                    text = ANSI.sub("", path.read_text(encoding="utf-8", errors="replace"))
                    matches = list(re.finditer(pattern, text, re.M))
                    return matches[-1] if matches else None
        return None
