"""What a config comes to: which files there are, what each is made from, and what decides it.

Snakemake asks a `Plan` each time it parses the workflow, so nothing here needs torch. As a program it prints the
schema of config.yaml, for editors.

    python -m rwkvpipe.plan --schema > workflow/schemas/config.schema.yaml
"""

import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from os.path import normpath
from pathlib import Path

import yaml

from rwkvpipe.base import records
from rwkvpipe.base.agree import known, load, named
from rwkvpipe.base.config import CorpusConfig, DpoConfig, PipelineConfig, RolloutConfig, Settings
from rwkvpipe.base.errors import Parser, run
from rwkvpipe.base.files import canonical
from rwkvpipe.base.fingerprint import fingerprint
from rwkvpipe.base.records import means_one_of
from rwkvpipe.base.sources import pair_files
from rwkvpipe.base.strict import Strict
from rwkvpipe.base.tree import SPOKEN, Tree, local
from rwkvpipe.data.synthetic import SYNTHETIC
from rwkvpipe.tasks.registry import REWARDS

PROMPT = "User: {question}\n\nAssistant:"  # what grpo asks with, if the stage does not say
TOKENS_AT_ONCE = 16384  # of a micro batch, if the profile does not say


def check_names(config: PipelineConfig) -> None:
    """Raise ConfigError, naming the key, for a made corpus or a reward that there is none of."""
    for section in ("corpora", "benchmarks"):
        for name, entry in getattr(config, section).items():
            if entry.synthetic is not None:
                known(f"{section}.{name}.synthetic", entry.synthetic, "made corpus", SYNTHETIC)
    for stage in config.stages:
        if stage.rollout is not None:
            for name in stage.rollout.rewards:
                if ":" not in name:
                    known(f"stages.{stage.name}.rollout.reward", name, "reward", REWARDS)


def spec(model: Strict) -> str:
    """Settings as canonical JSON, every default filled in: equal settings give equal text."""
    return canonical(model.model_dump(mode="json"))


@dataclass(frozen=True)
class Step:
    """One job: its rule, what it works on, the files between it and others."""

    rule: str
    label: str
    reads: tuple[str, ...]
    writes: tuple[str, ...]
    timing: str | None = None

    @property
    def id(self) -> str:
        return f"{self.rule} {self.label}".strip()


class Plan(Tree):
    """Questions to a config: what decides each result, which jobs there are, what the report tells.

    Raises ConfigError for names that `base.agree` cannot know: those of rewards and of made corpora.
    """

    def __init__(self, config: PipelineConfig, results: str = "results", codes: dict[str, str] | None = None):
        super().__init__(config, results)
        check_names(config)
        self.codes = dict(codes or {})
        """Fingerprints of code as they were planned, or as they were first asked for."""

    # what decides a result

    def code(self, verb: str) -> str:
        """Fingerprint of a verb's code, or `off` where the config says that code is not tracked."""
        if self.config.code_tracking == "off":
            return "off"
        return self.codes.setdefault(verb, fingerprint(verb))

    def settings(self, name: str) -> dict:
        """What a stage is asked to do, everything filled in; nothing about later steps, hardware or its name."""
        stage = self.stages[name]
        seed = self.config.seed if stage.train.seed is None else stage.train.seed
        values = {
            "kind": stage.kind,
            "seed": seed,
            "model": stage.model,
            "lora": stage.lora,
            "state": stage.state,
            "mix": tuple(stage.shares.values()) if len(stage.shares) > 1 else (),
            "train": stage.train.model_copy(update={"seed": seed}),
        }
        if stage.kind == "dpo":
            values |= {"dpo": stage.dpo or DpoConfig()}
        if stage.kind == "grpo":
            values |= {"rollout": stage.rollout or RolloutConfig(), "prompt": stage.prompt or PROMPT}
        return Settings(**values).model_dump(mode="json")

    def corpus(self, name: str) -> CorpusConfig:
        """A corpus with its seed filled in."""
        corpus = self.config.corpora[name]
        if corpus.synthetic is not None and corpus.seed is None:
            return corpus.model_copy(update={"seed": self.config.seed})
        return corpus

    def seed(self, name: str) -> int:
        """Seed of a made benchmark; 0 for a given one, which no seed changes."""
        return self.config.seed if self.config.benchmarks[name].synthetic else 0

    def made(self, tokenizer: str) -> list[str]:
        """Made corpora that a vocabulary is learned from, as `name:seed:count`."""
        corpora = [self.corpus(name) for name in self.config.tokenizers[tokenizer].corpora]
        return [f"{c.synthetic}:{c.seed}:{c.count}" for c in corpora if c.synthetic]

    # hardware: decides nothing

    def micro_batch(self, name: str) -> int:
        """Rows at once that should fit anywhere; the profile may say better."""
        stage = self.stages[name]
        of_one = {"grpo": (stage.rollout or RolloutConfig()).samples, "dpo": 2}
        rows = stage.train.batch * of_one.get(stage.kind, 1)
        return max(1, min(rows, TOKENS_AT_ONCE // stage.train.ctx_len))

    # the graph

    @cached_property
    def used(self) -> dict[str, list[str]]:
        """Names of the entries of each section that the run needs."""
        stages, config = self.stages.values(), self.config
        starts = {stage.start for stage in stages}
        weights = [name for name in config.weights if name in starts or name in self.subjects]
        corpora = list(dict.fromkeys(name for stage in stages for name in stage.shares))
        tokenizers = {config.weights[name].tokenizer for name in weights}
        tokenizers |= {config.corpora[name].tokenizer for name in corpora}
        return {
            "weights": weights,
            "tokenizers": [name for name in config.tokenizers if name in tokenizers or not self.subjects],
            "corpora": corpora,
            "benchmarks": list(dict.fromkeys(name for subject in self.subjects for name in self.bench(subject))),
        }

    @cached_property
    def steps(self) -> list[Step]:
        """Every job of the run, each after those whose files it reads."""
        found = [*self._shared_steps(), *(step for name in self.stages for step in self._stage_steps(name))]
        found += [step for subject in self.subjects for step in self._measuring_steps(subject)]
        read = {path for step in found for path in step.reads}
        fetches = [
            Step("download", name, tuple(self.origin(name)), (path,), f"{self.shared}/log/download-{name}.jsonl")
            for name in self.downloads
            if (path := f"{self.shared}/downloads/{name}") in read
        ]
        if not self.subjects:  # tokenizers alone
            return [*fetches, *found]
        page, timing = f"{self.home}/report.html", f"{self.home}/log/report.jsonl"
        return [*fetches, *found, Step("report", "", tuple(self.evidence()), (page,), timing)]

    def _shared_steps(self) -> Iterator[Step]:
        shared = self.shared
        for name in self.used["weights"]:
            reads = (self.checkpoint(name), *self.merged_in(name))
            timing = f"{shared}/log/convert-{name}.jsonl"
            yield Step("convert", name, reads, (f"{shared}/weights/{name}/model.safetensors",), timing)
        for name in self.used["tokenizers"]:
            reads, writes = tuple(self.vocabulary_files(name)), tuple(self.tokenizer_files(name))
            yield Step("vocab", name, reads, writes, f"{shared}/log/vocab-{name}.jsonl")
        for name in self.used["corpora"]:
            files, tokenizer = self.corpus_file(name) + self.valid_file(name), self.config.corpora[name].tokenizer
            files += self.template_file(name)
            if tokenizer is None:
                timing = f"{shared}/log/questions-corpus-{name}.jsonl"
                yield Step("questions", name, tuple(files), (f"{shared}/corpora/{name}.jsonl",), timing)
            else:
                files += self.tokenizer_files(tokenizer)
                yield Step("pack", name, tuple(files), tuple(self.packed(name)), f"{shared}/log/pack-{name}.jsonl")
        for name in self.used["benchmarks"]:
            reads, timing = tuple(self.benchmark_file(name)), f"{shared}/log/questions-{name}.jsonl"
            yield Step("questions", name, reads, (f"{shared}/benchmarks/{name}.jsonl",), timing)

    def _stage_steps(self, name: str) -> Iterator[Step]:
        stage, home, log = self.stages[name], self.of(name), f"{self.of(name)}/log"
        settings, metrics = f"{home}/settings.json", f"{home}/metrics.jsonl"
        yield Step("settings", name, (), (settings,))
        if stage.model is not None:
            yield Step("init", name, (settings, *self.vocabulary(name)), (self.start(name),), f"{log}/init.jsonl")
        weights = f"{home}/adapter.safetensors" if stage.apart else self.model(name)
        reads = (settings, self.start(name), *self.data(name), *(self.vocabulary(name) if stage.kind in SPOKEN else ()))
        reads += tuple(self.judges(name))
        kept = (f"{home}/best_adapter.safetensors" if stage.apart else f"{home}/best.safetensors",)
        made = (weights, metrics, *(kept if stage.train.watch.best else ()))
        yield Step(stage.kind, name, reads, made, f"{log}/{stage.kind}.jsonl")
        if stage.apart:
            yield Step("merge", name, (self.start(name), weights), (self.model(name),), f"{log}/merge.jsonl")
        best = f"{home}/best.safetensors"
        if stage.apart and (f"{name}.best" in self.subjects or any(self.start(s) == best for s in self.stages)):
            yield Step("merge", f"{name}.best", (self.start(name), *kept), (best,), f"{log}/merge-best.jsonl")
        yield Step("plot", name, (metrics,), tuple(self.plots(name)), f"{log}/plot.jsonl")

    def _measuring_steps(self, subject: str) -> Iterator[Step]:
        home, log = self.of(subject), f"{self.of(subject)}/log"
        speaker = (self.model(subject), *self.vocabulary(subject))
        for name in self.bench(subject):
            questions, answers = f"{self.shared}/benchmarks/{name}.jsonl", f"{home}/bench/{name}.answers.jsonl"
            label, graded = f"{subject} {name}", f"{home}/bench/{name}.samples.jsonl"
            yield Step("bench", label, (*speaker, questions), (answers,), f"{log}/bench-{name}.jsonl")
            scores = (f"{home}/bench/{name}.json", graded)
            yield Step("score", label, (answers, questions), scores, f"{log}/score-{name}.jsonl")
        if self.samples(subject):
            yield Step("generate", subject, speaker, (f"{home}/samples.jsonl",), f"{log}/generate.jsonl")
        for file, asked in self.exports(subject).items():
            source = self.exported_from(subject, file)
            reads = (source, *self.vocabulary(subject), *self.graded(subject, file))
            made, timing = f"{home}/export/{file}", f"{log}/export/{file}.jsonl"
            yield Step("export", f"{subject} {asked.format}", reads, (made,), timing)

    def things(self) -> dict[str, set[str]]:
        """What runs share, by names that fit into one folder, with the files of each."""
        made = [step.writes for step in self.steps if step.writes[0].startswith(f"{self.shared}/")]
        return {files[0].removeprefix(f"{self.shared}/").replace("/", "-"): set(files) for files in made}

    def absent(self, store: Path | None = None) -> tuple[str, str] | None:
        """Key and path of a local file that a step is going to read and that is not there; None if there is none.

        What is made already does not need its sources, unless Snakemake's folder `store` knows that it was made from
        others: it would be taken for what the config asks for.
        """
        made = {path for step in self.steps for path in step.writes}
        finished = all(Path(path).exists() for path in self.targets())
        for step in self.steps:
            there = finished or all(Path(path).exists() for path in step.writes)
            for path in step.reads:
                if path in made or Path(path).exists():
                    continue
                if not there or (store is not None and records.of_others(store, step.writes, path)):
                    return self._key(path), path
        return None

    def blocked(self) -> Path | None:
        """What stands where results need a folder, and is none."""
        folders = {folder for step in self.steps for path in step.writes for folder in Path(path).parents}
        return next((path for path in sorted(folders) if os.path.lexists(path) and not path.is_dir()), None)

    def replaced(self, store: Path) -> tuple[str, str] | None:
        """Key and path of a local file that took the place of the one that results were made from; None if none did.

        Snakemake, whose folder `store` is, does not see it where the new one is older than the results.
        """
        made = {path for step in self.steps for path in step.writes}
        for step in self.steps:
            outside = [path for path in step.reads if path not in made]
            path = records.replaced(store, step.writes[0], outside) if outside else None
            if path is not None:
                return self._key(path), path
        return None

    def unrecorded(self, store: Path) -> str | None:
        """A stage's settings of which Snakemake's folder `store` does not know how they were made; None without any.

        Snakemake takes such results for fresh, whatever the config says by now.
        """
        if (store / "metadata.db").exists():
            return None
        for path in (path for step in self.steps if step.rule == "settings" for path in step.writes):
            name = records.name(path)
            known = len(name) > 200 or any((store / kind / name).exists() for kind in ("metadata", "incomplete"))
            if Path(path).exists() and not known:
                return path
        return None

    def _key(self, path: str) -> str:
        """The key of the config that names a local file."""
        for section in ("weights", "tokenizers", "corpora", "benchmarks"):
            for name, entry in getattr(self.config, section).items():
                for field in ("path", "valid_path", "template"):
                    given = getattr(entry, field, None) or ()
                    for each in (given,) if isinstance(given, str) else given:
                        if path in (local(each), *pair_files(each)) or means_one_of(local(each), [normpath(path)]):
                            return f"{section}.{name}.{field}"
        for name in self.config.weights:
            if path in self.merged_in(name):
                return f"weights.{name}.adapter"
        for name in self.stages:
            if path in self.judges(name):
                return f"stages.{name}.rollout.{self.stages[name].rollout.files[path]}"
        return "config"

    # the report

    def story(self) -> dict:
        """What the report tells: the config without what decides nothing, the subjects, the jobs and their files."""
        maker = {path: step.id for step in self.steps for path in step.writes}
        return {
            "run": self.config.run,
            "config": self._deciding(),
            "subjects": [self._subject(name) for name in self.subjects],
            "steps": [
                {
                    "id": step.id,
                    "rule": step.rule,
                    "label": step.label,
                    "needs": list(dict.fromkeys(maker[path] for path in step.reads if path in maker)),
                    "timing": step.timing,
                }
                for step in self.steps
            ],
            "software": {},
        }

    def _deciding(self) -> dict:
        """The config as one would write it: no defaults but the seed, no unused entries, no knobs."""
        knobs = {"checkpoints", "hub", "code_tracking", "memory", "track"}
        value = self.config.model_dump(mode="json", exclude_defaults=True, exclude=knobs)
        used = {section: set(names) for section, names in self.used.items()}
        # a vocabulary may be learned from corpora that no stage reads
        used["corpora"] |= {corpus for name in used["tokenizers"] for corpus in self.config.tokenizers[name].corpora}
        used["tokenizers"] |= {self.config.corpora[name].tokenizer for name in used["corpora"]}
        for section, names in used.items():
            if section in value:
                value[section] = {name: entry for name, entry in value[section].items() if name in names}
        return {"seed": self.config.seed, **value}

    def _subject(self, name: str) -> dict:
        stage, folder = self.stages.get(name), self.of(name)
        own, best = named(self.config, name)
        trained = stage is not None and stage.kind not in SPOKEN
        shares = stage.shares if stage else {}
        parts = {name: f"{name} ({weight / sum(shares.values()):.1%})" for name, weight in shares.items()}
        return {
            "name": name,
            "kind": stage.kind if stage else "best" if best else "weights",
            "data": next(iter(shares)) if len(shares) == 1 else ", ".join(parts.values()) or None,
            "start": stage.start if stage else own if best else None,
            "lora": bool(stage and stage.lora),
            "state": bool(stage and stage.state),
            "folder": folder,
            "bench": list(self.bench(name)),
            "samples": f"{folder}/samples.jsonl" if self.samples(name) else None,
            "metrics": f"{folder}/metrics.jsonl" if stage else None,
            "settings": f"{folder}/settings.json" if stage else None,
            "corpus": self.packed(stage.data)[0] if trained and len(shares) == 1 else None,
            "mix": {parts[n]: f for n, f in self.cards(name).items()} if trained and len(shares) > 1 else {},
        }


def schema() -> str:
    """The schema of config.yaml, made from the settings' models, as YAML."""
    described = {"$schema": "https://json-schema.org/draft/2020-12/schema", **PipelineConfig.model_json_schema()}
    return "# made by: python -m rwkvpipe.plan --schema\n" + yaml.safe_dump(described, sort_keys=False, width=100)


def main(argv: list[str] | None = None) -> None:
    """Print the schema, or read a config and say what it comes to."""
    parser = Parser(prog="rwkvpipe.plan", description=__doc__.splitlines()[0])
    asked = parser.add_mutually_exclusive_group(required=True)
    asked.add_argument("--schema", action="store_true", help="print the schema of config.yaml")
    asked.add_argument("--check", metavar="CONFIG", help="read a config and list its jobs")
    given = parser.parse_args(argv)
    if given.schema:
        sys.stdout.write(schema())
    else:
        sys.stdout.write("\n".join(step.id for step in Plan(load([given.check])).steps) + "\n")


if __name__ == "__main__":
    run(main)
