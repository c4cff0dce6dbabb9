"""A config read and judged as a whole: names that exist, chains that end, formats that suit their use.

The models of `base.config` judge each key by itself; this judges them together, before any job starts.
"""

import difflib
import re
from collections.abc import Iterable, Iterator, Sequence
from glob import has_magic
from pathlib import Path
from urllib.parse import parse_qsl, urlsplit

from rwkvpipe.base.config import ADAPTERS, PipelineConfig, StageConfig
from rwkvpipe.base.errors import ConfigError
from rwkvpipe.base.sizes import FAMILIES
from rwkvpipe.base.strict import check, read_yaml

FORMATS = {"pretrain": ("text", "array", "binidx"), "sft": ("chat", "binidx"), "dpo": ("pairs",)}
FORMATS["grpo"] = ("question",)
SECRETS = re.compile("token|secret|passw|key|sig|auth|credential", re.I)  # in names of an address's query
TAKEN = ("plots", "log", "report.html")  # what else stands in results/<run>/
BEST = ".best"  # ends the name of a stage whose best weights are meant


def known(key: str, name: str, what: str, names: Iterable[str]) -> None:
    """Raise ConfigError unless `name` is one of `names`; the text offers the nearest."""
    names = list(names)
    if name not in names:
        near = difflib.get_close_matches(name, names, n=1)
        hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(names) or 'none'}"
        raise ConfigError(f"{key}: there is no {what} {name}; {hint}")


def _names(config: PipelineConfig) -> None:
    if config.run == "shared":
        raise ConfigError("run: shared is the folder of what runs share; choose another name")
    seen: set[str] = set()
    for stage in config.stages:
        if stage.name in seen:
            raise ConfigError(f"stages.{stage.name}.name: two stages are called {stage.name}; rename one")
        if stage.name in config.weights:
            raise ConfigError(f"stages.{stage.name}.name: an entry of weights is called {stage.name} too; rename one")
        seen.add(stage.name)
    for name in (*seen, *config.weights):
        if name.endswith(BEST) and name.removesuffix(BEST) in seen:
            other = name.removesuffix(BEST)
            raise ConfigError(f"{name}: means the best weights of stage {other}; choose another name")
    for key, names in (("stages", seen), ("weights", config.weights)):
        for name in names:
            if name in TAKEN:
                raise ConfigError(f"{key}.{name}: {name} stands in the run's folder already; choose another name")
    measured = any(entry.bench or entry.samples or entry.export for entry in config.weights.values())
    if not config.stages and not measured and not config.tokenizers:
        raise ConfigError("stages: nothing to do: no stage, no weights with bench, samples or export, no tokenizer")


def named(config: PipelineConfig, name: str) -> tuple[str, bool]:
    """The stage or entry of weights that a name means, and whether its best weights are meant."""
    if not name.endswith(BEST) or name in config.weights or any(other.name == name for other in config.stages):
        return name, False
    return name.removesuffix(BEST), True


def origin(config: PipelineConfig, stage: StageConfig) -> tuple[str | None, bool]:
    """The stage or entry of weights that a stage starts from, if from one, and whether its best weights are meant."""
    return (None, False) if stage.start is None else named(config, stage.start)


def _keeps(config: PipelineConfig, key: str, name: str) -> None:
    """Raise ConfigError unless a subject keeps its best weights, too."""
    if name in config.weights:
        raise ConfigError(f"{key}: {name} is an entry of weights, which has no other than its own; start from {name}")
    if not any(stage.name == name and stage.train.watch.best for stage in config.stages):
        how = "set train.watch.best and train.valid_every there"
        raise ConfigError(f"{key}: {name} keeps no best weights; {how}, or start from {name}, its last")


def _starts(config: PipelineConfig) -> None:
    """Each stage starts from weights or from a stage above it."""
    starts = {stage.name: origin(config, stage)[0] for stage in config.stages}
    done = set(config.weights)
    for stage in config.stages:
        key, (start, best) = f"stages.{stage.name}.start", origin(config, stage)
        if start is not None and start not in done:
            known(key, start, "stage or entry of weights", [*starts, *config.weights])
            chain = [stage.name]
            while (name := starts.get(chain[-1])) is not None and name not in chain:
                chain.append(name)
            if name is not None:
                raise ConfigError(f"{key}: a circle: {' <- '.join([*chain, name])}; one of them needs another start")
            raise ConfigError(f"{key}: {start} stands further down; move it above {stage.name}")
        if best:
            _keeps(config, key, start)
        done.add(stage.name)


def vocabulary(config: PipelineConfig, subject: str) -> str:
    """Name of the tokenizer of a stage or of an entry of weights; a stage has that of what it starts from."""
    subject, _ = named(config, subject)
    if subject in config.weights:
        return config.weights[subject].tokenizer
    stage = next(stage for stage in config.stages if stage.name == subject)
    start, _ = origin(config, stage)
    if start is not None:
        return vocabulary(config, start)
    return config.corpora[next(iter(stage.shares))].tokenizer or ""


def _sources(config: PipelineConfig) -> None:
    """Tokenizers and corpora name each other rightly."""
    for name, tokenizer in config.tokenizers.items():
        for corpus in tokenizer.corpora:
            known(f"tokenizers.{name}.corpora", corpus, "corpus", config.corpora)
            format = config.corpora[corpus].format
            if tokenizer.kind == "integer" and (format != "array" or config.corpora[corpus].synthetic):
                raise ConfigError(
                    f"tokenizers.{name}.corpora: {corpus} is of format {format}; numbers are in format array"
                )
            if tokenizer.kind != "integer" and format in ("array", "binidx"):
                raise ConfigError(f"tokenizers.{name}.corpora: {corpus} holds numbers and has no characters")
    for name, weights in config.weights.items():
        known(f"weights.{name}.tokenizer", weights.tokenizer, "tokenizer", config.tokenizers)
    for name, corpus in config.corpora.items():
        if corpus.tokenizer is None:
            continue
        known(f"corpora.{name}.tokenizer", corpus.tokenizer, "tokenizer", config.tokenizers)
        kind = config.tokenizers[corpus.tokenizer].kind
        if corpus.format == "array" and kind != "integer":
            raise ConfigError(
                f"corpora.{name}.tokenizer: format array holds numbers and needs one of kind integer,"
                f" {corpus.tokenizer} is of kind {kind}"
            )
        if corpus.format == "chat" and kind == "integer":
            raise ConfigError(
                f"corpora.{name}.tokenizer: {corpus.tokenizer} knows numbers only (kind integer),"
                " turns of talk need one that knows letters"
            )


def _data(config: PipelineConfig, stage: StageConfig) -> None:
    """A stage's corpora exist, suit its kind and speak its vocabulary."""
    key = f"stages.{stage.name}.data"
    for name in stage.shares:
        known(key, name, "corpus", config.corpora)
        corpus = config.corpora[name]
        if corpus.format not in FORMATS[stage.kind]:
            raise ConfigError(
                f"{key}: {stage.kind} learns from format {' or '.join(FORMATS[stage.kind])},"
                f" {name} is of format {corpus.format}"
            )
        own = vocabulary(config, stage.name)
        if corpus.tokenizer not in (None, own):
            other = f"{stage.start} speaks" if stage.start else f"{next(iter(stage.shares))} with"
            raise ConfigError(
                f"{key}: {name} is made with tokenizer {corpus.tokenizer}, but {other}"
                f" {own}; weights keep the vocabulary they were trained with"
            )
    found = [config.corpora[name] for name in stage.shares]
    if stage.train.valid_every and not any(corpus.valid or corpus.valid_path for corpus in found):
        raise ConfigError(
            f"stages.{stage.name}.train.valid_every: {' and '.join(stage.shares)} has no part held out;"
            " give the corpus valid or valid_path"
        )


def _model(config: PipelineConfig, stage: StageConfig) -> None:
    """What a stage is asked for suits its model, as far as the config tells that."""
    first: StageConfig | None = stage
    while first is not None and first.model is None:
        start = origin(config, first)[0]
        first = next((other for other in config.stages if other.name == start), None)
    if first is None:
        return
    model = first.model
    if model.n_layer < 2:
        raise ConfigError(f"stages.{first.name}.model.n_layer: initial values are defined for 2 layers or more")
    if stage.state and "time_state" not in FAMILIES[model.family]:
        raise ConfigError(f"stages.{stage.name}.state: {model.family} has no initial states; tune it with lora")
    formats = [asked if isinstance(asked, str) else asked.format for asked in stage.export]
    if "hf" in formats and (model.head_size != 64 or model.family != "rwkv7"):
        told = f"this is {model.family} with heads of {model.head_size}; use pth, hub or gguf"
        raise ConfigError(f"stages.{stage.name}.export: hf is for rwkv7 with heads of 64, {told}")


def _rollout(stage: StageConfig) -> None:
    if stage.rollout is None:
        return
    key, sampling = f"stages.{stage.name}.rollout.sampling", stage.rollout.sampling
    if sampling.temperature == 0 or sampling.top_k == 1:
        raise ConfigError(
            f"{key}: the likeliest token alone makes all completions of a group equal, so nothing"
            " is learned; raise temperature (and top_k)"
        )
    if stage.rollout.sync is not None and stage.apart:
        raise ConfigError(
            f"stages.{stage.name}.rollout.sync: the start of an adapter is the model without it, which cannot move;"
            " leave it out, or train the model whole"
        )
    if sampling.max_tokens >= stage.train.ctx_len:
        raise ConfigError(
            f"{key}.max_tokens: {sampling.max_tokens} leaves no room for the prompt in"
            f" train.ctx_len {stage.train.ctx_len}"
        )


def _measures(config: PipelineConfig) -> None:
    """Benchmarks exist, come once each, and suit the vocabulary of what they measure."""
    for key, name, entry in [
        *((f"stages.{stage.name}", stage.name, stage) for stage in config.stages),
        *((f"weights.{name}", name, weights) for name, weights in config.weights.items()),
    ]:
        tokenizer = vocabulary(config, name)
        for benchmark in entry.bench:
            known(f"{key}.bench", benchmark, "benchmark", config.benchmarks)
            task = config.benchmarks[benchmark].task
            if config.tokenizers[tokenizer].kind == "integer" and task != "bits":
                raise ConfigError(
                    f"{key}.bench: {benchmark} asks in words (task {task}), {tokenizer} knows numbers"
                    " only; measure it by a benchmark of task bits"
                )
        if len(set(entry.bench)) != len(entry.bench):
            raise ConfigError(f"{key}.bench: a benchmark stands twice; remove one")
        formats = [asked if isinstance(asked, str) else asked.format for asked in entry.export]
        if len(set(formats)) != len(formats):
            raise ConfigError(f"{key}.export: a format stands twice; remove one")
        alone = [format for format in formats if format in ADAPTERS]
        if alone and getattr(entry, "lora", None) is None:
            raise ConfigError(f"{key}.export: {alone[0]} is the form of an adapter, which only a stage with lora has")


def _paths(config: PipelineConfig) -> Iterator[tuple[str, str, str, str]]:
    """(section, name, field, path) of all that comes from somewhere."""
    for section in ("weights", "tokenizers", "corpora", "benchmarks"):
        for name, entry in getattr(config, section).items():
            for field in ("path", "valid_path"):
                given = getattr(entry, field, None) or ()
                for source in (given,) if isinstance(given, str) else given:
                    yield section, name, field, source


def _addresses(config: PipelineConfig) -> None:
    """No path is taken for an option, and no address has a secret in it: both stand in commands, logs and reports."""
    for section, name, field, source in _paths(config):
        key = f"{section}.{name}.{field}"
        if source.startswith("-"):
            raise ConfigError(f"{key}: {source} would be taken for an option, as it begins with -; write ./{source}")
        if "://" not in source:
            continue
        try:
            parts = urlsplit(source)
            asked = [word for word, _ in parse_qsl(parts.query, keep_blank_values=True)]
        except ValueError:  # its text would repeat parts of the address
            raise ConfigError(f"{key}: an address that cannot be read; mend it") from None
        if "@" in parts.netloc or any(map(SECRETS.search, asked)):
            raise ConfigError(
                f"{key}: an address with a password or a token, which logs and reports would show; fetch the"
                " file with python -m rwkvpipe.download ADDRESS --out FILE, and give FILE"
            )


def _repositories(config: PipelineConfig) -> None:
    """Weights may be a whole repository, corpora and benchmarks a data set; patterns and digests have their places."""
    for section, name, field, source in _paths(config):
        scheme, _, words = source.partition("://")
        hub = scheme in ("hf", "modelscope")
        data = hub and words.startswith("datasets/") and section in ("corpora", "benchmarks")
        parts = words.removeprefix("datasets/").strip("/").split("/")
        key, entry = f"{section}.{name}", getattr(config, section)[name]
        if hub and (len(parts) < 2 or not all(parts)):
            raise ConfigError(f"{key}.{field}: not {scheme}://owner/name/file; mend it")
        whole = hub and len(parts) == 2
        if whole and not data and (section != "weights" or entry.sha256):
            raise ConfigError(f"{key}.{field}: a whole repository; name the file in it that is meant")
        if hub and not data and has_magic(words):
            raise ConfigError(
                f"{key}.{field}: a pattern of files is for data sets, {scheme}://datasets/owner/name/pattern"
            )
        if field == "path" and getattr(entry, "files", ()) and not whole:
            raise ConfigError(f"{key}.files: path names no whole repository; leave files out")


def agree(config: PipelineConfig) -> None:
    """Raise ConfigError, naming the key, where parts of a config do not fit each other."""
    _addresses(config)
    _repositories(config)
    _names(config)
    _starts(config)
    if config.memory.shard and not config.stages:
        raise ConfigError("memory.shard: cuts models that are trained, and there are no stages; leave it out")
    _sources(config)
    for stage in config.stages:
        _data(config, stage)
        _rollout(stage)
        _model(config, stage)
    _measures(config)


def _merge(lower: dict, upper: dict) -> dict:
    """Two mappings as one; where both say something, `upper` does."""
    both = dict(lower)
    for key, value in upper.items():
        both[key] = _merge(both[key], value) if isinstance(value, dict) and isinstance(both.get(key), dict) else value
    return both


def load(files: Sequence[str | Path], overrides: dict | None = None) -> PipelineConfig:
    """Read config files, later ones over earlier ones, then `overrides` (from --config) over them all.

    Raises ConfigError in one line: file, key or line, what to do.
    """
    value: dict = {}
    for file in files:
        if not Path(file).is_file():
            raise ConfigError(f"{file}: no such file; go to the folder that holds it, or give --configfile FILE")
        found = read_yaml(file)
        if not isinstance(found, dict):
            raise ConfigError(f"{file}: a mapping of keys is needed (run, tokenizers, corpora, stages, ...)")
        value = _merge(value, found)
    where = ", ".join(str(file) for file in files) or "config"
    return parse(_merge(value, overrides or {}), f"{where} with --config" if overrides else where)


def parse(value: dict, where: str) -> PipelineConfig:
    """A checked config out of plain values. Raises ConfigError naming `where` and the key."""
    config = check(PipelineConfig, value, where)
    try:
        agree(config)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None
    return config
