"""The results tree of a config: where each thing lies, and which files it is read from."""

import hashlib
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from glob import has_magic
from pathlib import Path
from urllib.parse import unquote, urlsplit

from rwkvpipe.base.agree import BEST, agree, named, vocabulary
from rwkvpipe.base.config import ADAPTERS, ExportConfig, PipelineConfig, SamplesConfig, StageConfig, WeightsConfig
from rwkvpipe.base.sources import files_of, pair_files, pairs_of

TEMPLATES = ("chat_template.jinja", "tokenizer_config.json")  # where a hub's folder keeps a chat template
# what says that an export is whole: the file itself, or the last one of a folder
EXPORTED = {format: f"{format}/model.{format}" for format in ("safetensors", "pth", "gguf")}
EXPORTED |= {format: f"{format}/README.md" for format in ("hub", "hf", *ADAPTERS)}
HUBS = ("hf", "modelscope")  # schemes of addresses that hubs answer to
FIELDS = ("path", "valid_path")  # of a corpus
SPOKEN = ("grpo", "dpo")  # kinds of stages that read rows of words, not a packed corpus
PLOTS = ("loss", "lr", "grad_norm", "throughput")


def any_of(names: Iterable[str]) -> str:
    """Pattern that is exactly one of the names; of no names, one that nothing matches."""
    return "|".join(re.escape(name) for name in names) or "(?!)"


def destination(exported: str) -> str:
    """What an export is told to write: the file that says that it is done, or the folder that this is the last of."""
    return exported.removesuffix("/README.md")


def local(source: str) -> str:
    """A file:// address as the path it means; anything else as it stands."""
    return unquote(urlsplit(source).path) if source.startswith("file://") else source


def remote(source: str) -> bool:
    """Whether something comes through the network."""
    scheme, found, _ = source.partition("://")
    return bool(found) and scheme.lower() in ("http", "https", *HUBS)


def whole_repository(source: str) -> bool:
    """Whether an address is that of a hub's repository, or of a data set's files by a pattern, not of one file."""
    scheme, _, words = source.partition("://")
    name = words.removeprefix("datasets/").strip("/")
    return scheme in HUBS and (name.count("/") == 1 or (name != words and has_magic(name)))


def download_name(source: str) -> str:
    """File name of something fetched: its own, after a few letters that keep equal names of two places apart."""
    base = re.sub(r"[^A-Za-z0-9_.-]", "_", unquote(urlsplit(source).path).rstrip("/").rpartition("/")[2]) or "file"
    return f"{hashlib.sha256(source.encode()).hexdigest()[:8]}-{base}"


@dataclass(frozen=True)
class Download:
    """Something that is fetched before it is used."""

    source: str
    sha256: str | None
    files: tuple[str, ...] = ()


class Tree:
    """Paths of a run, beginning with `results`, which Snakemake may spell as a variable.

    Subjects are what can be measured: stages and entries of `weights`, by name, and `base.best`, of stage base.
    """

    def __init__(self, config: PipelineConfig, results: str = "results"):
        agree(config)
        self.config = config
        self.shared = f"{results}/shared"
        self.home = f"{results}/{config.run}"
        self.stages: dict[str, StageConfig] = {stage.name: stage for stage in config.stages}

    def only(self, *kinds: str, lora: bool | None = None, best: bool | None = None, fresh: bool | None = None) -> str:
        """Pattern of the stages of these kinds (of none named: all), from nothing or not.

        `lora`: whether what they learn lies beside the weights; `best`: whether they keep their best weights, too.
        """
        return any_of(
            name
            for name, stage in self.stages.items()
            if (not kinds or stage.kind in kinds)
            and lora in (None, stage.apart)
            and best in (None, stage.train.watch.best)
            and fresh in (None, stage.model is not None)
        )

    def corpora_of(self, *formats: str) -> str:
        """Pattern of the corpora of these formats."""
        return any_of(name for name, corpus in self.config.corpora.items() if corpus.format in formats)

    def tokenizers_of(self, *kinds: str) -> str:
        """Pattern of the tokenizers of these kinds."""
        return any_of(name for name, tokenizer in self.config.tokenizers.items() if tokenizer.kind in kinds)

    @cached_property
    def subjects(self) -> list[str]:
        """Stages, each with its best weights if these are measured, then the entries of weights that are."""
        weights = self.config.weights.items()
        stages = [[name, *[name + BEST] * ("best" in stage.measure)] for name, stage in self.stages.items()]
        return [*sum(stages, []), *(name for name, w in weights if w.bench or w.samples or w.export)]

    def _asked(self, subject: str) -> StageConfig | WeightsConfig | None:
        """Where it stands what is done with a subject, if anything is."""
        name, best = named(self.config, subject)
        if name in self.config.weights:
            return self.config.weights[name]
        return self.stages[name] if ("best" if best else "last") in self.stages[name].measure else None

    def bench(self, subject: str) -> tuple[str, ...]:
        """Benchmarks that measure a subject."""
        asked = self._asked(subject)
        return asked.bench if asked else ()

    def samples(self, subject: str) -> SamplesConfig | None:
        """What is sampled from a subject."""
        asked = self._asked(subject)
        return asked.samples if asked else None

    def prompts(self, subject: str) -> list[str]:
        """The file of prompts that a subject goes on from, if there is one."""
        asked = self.samples(subject)
        return [asked.path] if asked and asked.path else []

    def exports(self, subject: str) -> dict[str, ExportConfig]:
        """In which formats a subject is written for other programs, by the file that says that it is done."""
        stage, entry = self.stages.get(named(self.config, subject)[0]), self._asked(subject)
        length = stage.train.ctx_len if stage else None
        found = {}
        for asked in entry.export if entry else ():
            spec = ExportConfig(format=asked) if isinstance(asked, str) else asked
            filled = {"name": spec.name or f"{self.config.run}-{subject}", "ctx_len": spec.ctx_len or length}
            found[EXPORTED[spec.format]] = spec.model_copy(update=filled)
        return found

    def exported(self, subject: str) -> list[str]:
        """Files that say that a subject's exports are done."""
        return [f"{self.of(subject)}/export/{file}" for file in self.exports(subject)]

    def graded(self, subject: str, exported: str) -> list[str]:
        """The scores that the page of an exported folder tells."""
        return self.scores(subject) if exported.endswith("README.md") and not self._alone(exported) else []

    def _alone(self, exported: str) -> bool:
        """Whether an export is that of an adapter without its model."""
        return exported.partition("/")[0] in ADAPTERS

    def exported_from(self, subject: str, exported: str) -> str:
        """What an export is made from: the model, or the adapter."""
        name, best = named(self.config, subject)
        adapter = f"{self.of(name)}/{'best_' * best}adapter.safetensors"
        return adapter if self._alone(exported) else self.model(subject)

    def fetched(self, source: str, sha256: str | None = None) -> str:
        """Where something that comes from outside lies: local files where they are, others in downloads/."""
        source = local(source)
        return f"{self.shared}/downloads/{download_name(source)}" if remote(source) or sha256 else source

    @cached_property
    def downloads(self) -> dict[str, Download]:
        """What the download rule may be asked for, by file name."""
        config = self.config
        sources: list[tuple] = [(w.path, w.sha256, w.files) for w in config.weights.values()]
        sources += [(entry.path, None, ()) for entry in (*config.tokenizers.values(), *config.benchmarks.values())]
        sources += [(path, None, ()) for name in config.corpora for f in FIELDS for path in self._given(name, f)]
        wanted = [Download(local(source), sha256, files) for source, sha256, files in sources if source]
        return {download_name(d.source): d for d in wanted if remote(d.source) or d.sha256}

    def downloads_of(self, *, whole: bool) -> str:
        """Pattern of the downloads that are whole repositories, or of those that are files."""
        return any_of(name for name, d in self.downloads.items() if whole_repository(d.source) == whole)

    def origin(self, download: str) -> list[str]:
        """The local file that a download copies, if it is one."""
        source = self.downloads[download].source
        return [] if remote(source) else [source]

    def checkpoint(self, weights: str) -> str:
        """The file or folder that convert reads."""
        entry = self.config.weights[weights]
        return self.fetched(entry.path, entry.sha256)

    def adapter(self, weights: str) -> str | None:
        """The adapter that convert merges into them."""
        given = self.config.weights[weights].adapter
        return None if given is None else local(given)

    def merged_in(self, weights: str) -> list[str]:
        """Its files."""
        given = self.adapter(weights)
        if given is None or given.endswith(".safetensors"):
            return [] if given is None else [given]
        return [f"{given}/{name}" for name in ("adapter_config.json", "adapter_model.safetensors")]

    def corpus_source(self, name: str, field: str = "path") -> list[str]:
        """What a corpus is read from, as its step is told: a file, a folder, a glob; nothing for a made one."""
        return [self.fetched(path) for path in self._given(name, field)]

    def _given(self, name: str, field: str) -> list[str]:
        """The paths of a corpus as the config says them."""
        given = getattr(self.config.corpora[name], field) or ()
        return [given] if isinstance(given, str) else list(given)

    def corpus_file(self, name: str, field: str = "path") -> list[str]:
        """The files of a corpus as they came."""
        means = pair_files if self.config.corpora[name].format == "binidx" else files_of
        return [file for path in self._given(name, field) for file in self._files(path, means)]

    def _files(self, path: str, means: Callable[[str], list[str]]) -> list[str]:
        """The files of a path; what comes as a folder is one thing, whatever is in it when it has come."""
        source = self.fetched(path)
        return [source] if whole_repository(path) else means(source)

    def valid_file(self, name: str) -> list[str]:
        """The files of a corpus's own validation part."""
        return self.corpus_file(name, "valid_path")

    def template_file(self, name: str) -> list[str]:
        """The chat template that lays a corpus out."""
        path = self.config.corpora[name].template
        if path is None or not Path(path).is_dir():
            return [path] if path else []
        files = [f"{path}/{name}" for name in TEMPLATES if Path(path, name).is_file()]
        return files or [f"{path}/{TEMPLATES[0]}"]

    def benchmark_source(self, name: str) -> list[str]:
        """What a benchmark is read from: a file, a folder, a glob; nothing for a made one."""
        path = self.config.benchmarks[name].path
        return [self.fetched(path)] if path else []

    def benchmark_file(self, name: str) -> list[str]:
        """The files of a benchmark as they came."""
        path = self.config.benchmarks[name].path
        return self._files(path, files_of) if path else []

    def vocabulary_files(self, name: str) -> list[str]:
        """What a vocabulary is read or learned from."""
        entry = self.config.tokenizers[name]
        if entry.path:
            return [self.fetched(entry.path)]
        if entry.import_path:
            # a module that lies in the folder of the call, so that an edit of it makes the tokenizer stale
            source = Path(entry.import_path.partition(":")[0].replace(".", "/") + ".py")
            return [str(source)] if source.is_file() else []
        return [file for corpus in entry.corpora for file in self.corpus_file(corpus)]

    def tokenizer_files(self, name: str) -> list[str]:
        """The tokenizer's folder, file by file; tokenizer.json comes first."""
        folder = f"{self.shared}/tokenizers/{name}"
        beside = {"trie": ["vocab.txt"], "world": ["vocab.txt"], "bpe": ["bpe.json"]}
        words = beside.get(self.config.tokenizers[name].kind, [])
        return [f"{folder}/tokenizer.json", *(f"{folder}/{word}" for word in words)]

    def vocabulary(self, subject: str) -> list[str]:
        """Files of the tokenizer that a subject speaks."""
        return self.tokenizer_files(vocabulary(self.config, subject))

    def pack_form(self, name: str) -> str:
        """Which files a packed corpus has: plain (a pair), masked (with masks), spread (pairs that lie elsewhere)."""
        corpus = self.config.corpora[name]
        if corpus.format != "binidx":
            return "masked" if corpus.masked else "plain"
        halves = [[pair for path in self._given(name, field) for pair in pairs_of(path)] for field in FIELDS]
        if corpus.join == "link" and max(map(len, halves)) > 1:
            return "spread"
        return "masked" if all(Path(f"{pair}.mask").is_file() for half in halves for pair in half) else "plain"

    def packed_as(self, form: str) -> str:
        """Pattern of the corpora that are packed in a form."""
        packed = [name for name, corpus in self.config.corpora.items() if corpus.format != "question"]
        return any_of(name for name in packed if self.pack_form(name) == form)

    def packed(self, name: str) -> list[str]:
        """Files of a packed corpus, corpus.json first."""
        folder = f"{self.shared}/corpora/{name}"
        parts = {"plain": ("bin", "idx"), "masked": ("bin", "idx", "mask"), "spread": ("parts", "idx")}
        found = parts[self.pack_form(name)]
        return [f"{folder}/corpus.json", *(f"{folder}/{half}.{part}" for half in ("train", "valid") for part in found)]

    def data(self, stage: str) -> list[str]:
        """What a stage learns from: the packed corpora, or for grpo and dpo the rows."""
        names = list(self.stages[stage].shares)
        if self.stages[stage].kind in SPOKEN:
            return [f"{self.shared}/corpora/{name}.jsonl" for name in names]
        return [file for name in names for file in self.packed(name)]

    def judges(self, stage: str) -> list[str]:
        """Python files of the user's with a stage's rewards and hooks."""
        return list(self.stages[stage].rollout.files) if self.stages[stage].rollout else []

    def cards(self, stage: str) -> dict[str, str]:
        """What tells of each corpus that a stage learns from, by name."""
        return {name: self.packed(name)[0] for name in self.stages[stage].shares}

    def trainer(self, name: str) -> str:
        """The rule that trains a stage."""
        stage = self.stages[name]
        return stage.kind + "_lora" * stage.apart + "_best" * stage.train.watch.best

    def model(self, subject: str) -> str:
        """A subject's weights, adapters merged."""
        name, best = named(self.config, subject)
        folder = f"{self.shared}/weights/{name}" if name in self.config.weights else self.of(name)
        return f"{folder}/{'best' if best else 'model'}.safetensors"

    def start(self, stage: str) -> str:
        """The weights that a stage starts from."""
        start = self.stages[stage].start
        return f"{self.of(stage)}/init.safetensors" if start is None else self.model(start)

    def of(self, subject: str) -> str:
        """The folder of a subject's results in this run."""
        return f"{self.home}/{subject}"

    def plots(self, stage: str) -> list[str]:
        names = (*PLOTS, "reward") if self.stages[stage].kind == "grpo" else PLOTS
        return [f"{self.of(stage)}/plots/{name}.png" for name in names] + [f"{self.of(stage)}/plots/metrics.csv"]

    def scores(self, subject: str) -> list[str]:
        return [f"{self.of(subject)}/bench/{name}.json" for name in self.bench(subject)]

    def evidence(self) -> list[str]:
        """What the report is made from."""
        files = []
        for subject in self.subjects:
            if subject in self.stages:
                files += [f"{self.of(subject)}/settings.json", f"{self.of(subject)}/metrics.jsonl"]
                files += self.plots(subject)
                files += [] if self.stages[subject].kind in SPOKEN else self.cards(subject).values()
            files += self.scores(subject)
            files += [f"{self.of(subject)}/bench/{name}.samples.jsonl" for name in self.bench(subject)]
            files += [f"{self.of(subject)}/samples.jsonl"] if self.samples(subject) else []
        return list(dict.fromkeys(files))

    def targets(self) -> list[str]:
        """What a run is for: report, exports, weights that no further stage starts from; or else its tokenizers."""
        if not self.subjects:
            return [path for name in self.config.tokenizers for path in self.tokenizer_files(name)]
        used = {stage.start for stage in self.stages.values()}
        ends = [self.model(name) for name in self.stages if name not in used]
        return [f"{self.home}/report.html", *ends, *(path for name in self.subjects for path in self.exported(name))]

    def chart(self) -> list[str]:
        """The plot of all scores with its data, where anything is measured."""
        measured = any(self.bench(subject) for subject in self.subjects)
        return [f"{self.home}/plots/scores.png", f"{self.home}/plots/scores.csv"] if measured else []
