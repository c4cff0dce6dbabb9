"""Questions to a plan, without Snakemake."""

import base64
import copy
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from rwkvpipe.base import records
from rwkvpipe.base.agree import load, parse
from rwkvpipe.base.config import CorpusConfig, Settings, check
from rwkvpipe.base.errors import ConfigError
from rwkvpipe.base.files import digest
from rwkvpipe.base.strict import read_yaml
from rwkvpipe.base.tree import destination
from rwkvpipe.plan import Plan, main, schema, spec

ROOT = Path(__file__).resolve().parents[1]
CONFIG = yaml.safe_load(
    """
run: demo
seed: 7
weights:
  given: {path: models/given.pth, tokenizer: bytes, bench: [bits]}
  far: {path: "https://example.org/a/far.pth", sha256: "DIGEST", tokenizer: bytes}
tokenizers:
  bytes: {kind: bytes}
  letters: {kind: trie, corpora: [sums, asked]}
  numbers: {kind: integer, size: 10}
corpora:
  sums: {synthetic: counting.documents, count: 100, tokenizer: letters}
  talks: {path: talks.jsonl, tokenizer: letters, format: chat}
  asked: {synthetic: counting.questions, count: 50, format: question, seed: 3}
  text: {path: "https://example.org/text.txt", tokenizer: bytes, valid_path: valid.txt}
  rows: {path: rows.npy, tokenizer: numbers, format: array}
benchmarks:
  free: {task: answer, synthetic: counting.questions}
  bits: {task: bits, path: valid.txt}
checkpoints: {every: 5}
stages:
  - {name: base, kind: pretrain, data: sums, model: {n_layer: 2, n_embd: 64}, train: {steps: 9}, bench: [free]}
  - {name: chat, kind: sft, data: talks, start: base, lora: {rank: 4}, train: {steps: 9, seed: 1}}
  - {name: reason, kind: grpo, data: asked, start: chat, lora: {rank: 4}, train: {steps: 9, batch: 4}}
  - {name: more, kind: pretrain, data: text, start: far, train: {steps: 9, ctx_len: 4096}}
""".replace("DIGEST", "0" * 64)
)


def changed(path: str, value) -> dict:
    """The config with one value set, or removed (None); stages are found by name."""
    config = copy.deepcopy(CONFIG)
    node = config
    *parts, last = path.split(".")
    for part in parts:
        node = next(s for s in node if s["name"] == part) if isinstance(node, list) else node.setdefault(part, {})
    if value is None:
        del node[last]
    else:
        node[last] = value
    return config


def error(config: dict) -> str:
    with pytest.raises(ConfigError) as caught:
        parse(config, "c.yaml")
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def plan() -> Plan:
    return Plan(parse(copy.deepcopy(CONFIG), "c.yaml"))


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("stages.chat.start", "bass", "stages.chat.start: there is no stage or entry of weights bass; did you"),
        ("stages.chat.start", "reason", "stages.chat.start: a circle: chat <- reason <- chat"),
        ("stages.chat.start", "chat", "a circle: chat <- chat"),
        ("stages.chat.start", "more", "stages.chat.start: more stands further down"),
        ("stages.chat.start", "bass.best", "stages.chat.start: there is no stage or entry of weights bass; did you"),
        ("stages.chat.start", "more.best", "stages.chat.start: more stands further down"),
        ("stages.chat.start", "base.best", "base keeps no best weights; set train.watch.best"),
        ("stages.chat.start", "given.best", "given is an entry of weights, which has no other than its own"),
        ("stages.more.name", "base.best", "base.best: means the best weights of stage base; choose another name"),
        ("stages.chat.name", "base", "two stages are called base"),
        ("stages.chat.name", "given", "an entry of weights is called given"),
        ("stages.base.data", "sum", "stages.base.data: there is no corpus sum; did you mean sums?"),
        ("stages.base.data", "talks", "pretrain learns from format text or array or binidx, talks is of format chat"),
        ("stages.chat.data", "sums", "sft learns from format chat"),
        ("stages.reason.data", "sums", "grpo learns from format question"),
        ("stages.more.data", "sums", "sums is made with tokenizer letters, but far speaks bytes"),
        ("stages.base.bench", ["fre"], "stages.base.bench: there is no benchmark fre; did you mean free?"),
        ("stages.base.bench", ["free", "free"], "a benchmark stands twice"),
        ("stages.base.train.valid_every", 5, "sums has no part held out"),
        ("stages.reason.rollout.sampling.temperature", 0, "makes all completions of a group equal"),
        ("stages.reason.rollout.sampling.max_tokens", 600, "leaves no room for the prompt"),
        ("corpora.rows.tokenizer", "bytes", "corpora.rows.tokenizer: format array holds numbers"),
        ("corpora.talks.tokenizer", "numbers", "corpora.talks.tokenizer: numbers knows numbers only"),
        ("corpora.sums.tokenizer", "leters", "corpora.sums.tokenizer: there is no tokenizer leters; did you mean"),
        ("weights.given.tokenizer", "x", "weights.given.tokenizer: there is no tokenizer x"),
        ("weights.given.bench", ["x"], "weights.given.bench: there is no benchmark x"),
        ("tokenizers.letters.corpora", ["x"], "tokenizers.letters.corpora: there is no corpus x"),
        ("tokenizers.letters.corpora", ["rows"], "rows holds numbers"),
        ("run", "shared", "run: shared is the folder"),
        ("stages.base.model.n_layer", 1, "stages.base.model.n_layer: initial values are defined for 2 layers or more"),
        ("stages.base.train.betas", [0.9, 1.0], "stages.base.train.betas.1: Input should be less than 1"),
        ("stages.chat.lora", {"targets": []}, "stages.chat.lora: targets and full are empty, so nothing would be"),
        ("hub", {"mirrors": ["ftp://x"]}, "hub.mirrors.0: String should match pattern '^https?://.'"),
        ("stages.base.name", "plots", "plots stands in the run's folder already"),
    ],
)
def test_a_config_that_does_not_fit_is_refused_by_key(path, value, message):
    assert message in error(changed(path, value))


@pytest.mark.parametrize("model", [{"head_size": 32}, {"family": "rwkv6"}])
def test_a_form_that_a_model_cannot_have_is_refused_before_it_is_trained(model):
    config = changed("stages.reason.export", ["hub", {"format": "hf"}])
    parse(copy.deepcopy(config), "c.yaml")
    config["stages"][0]["model"] |= model  # what reason leads back to
    assert "stages.reason.export: hf is for rwkv7 with heads of 64, this is rwkv" in error(config)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("stages.reason.rollout.reward", "anwser", ".reward: there is no reward anwser; did you mean answer?"),
        ("stages.reason.rollout.reward", {"my.py:f": 1, "my.pyf": 1}, "there is no reward my.pyf"),
        ("stages.reason.rollout.reward", "bits", "there is no reward bits; known: answer"),
        ("corpora.sums.synthetic", "counting.document", "corpora.sums.synthetic: there is no made corpus"),
        ("benchmarks.free.synthetic", "counting.exams", "benchmarks.free.synthetic: there is no made corpus"),
    ],
)
def test_a_plan_knows_the_names_of_rewards_and_made_corpora(path, value, message):
    with pytest.raises(ConfigError) as caught:
        Plan(parse(changed(path, value), "c.yaml"))
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_numbers_are_not_asked_in_words():
    config = changed("weights.given.bench", ["free"])
    config["weights"]["given"]["tokenizer"] = "numbers"
    assert "weights.given.bench: free asks in words" in error(config)


def test_a_config_that_does_nothing_is_refused():
    assert "nothing to do" in error({"run": "empty"})


def test_patterns_match_the_stages_of_a_kind_and_no_others(plan):
    assert re.fullmatch(plan.only("sft", lora=True), "chat")
    assert not re.fullmatch(plan.only("sft", lora=False), "chat")
    assert not re.fullmatch(plan.only("sft", lora=False), "")
    assert plan.only(fresh=True) == "base"
    assert set(plan.only("pretrain", "sft").split("|")) == {"base", "chat", "more"}


def test_settings_hold_what_decides_the_stage_and_nothing_else(plan):
    settings = plan.settings("base")
    check(Settings, settings, "settings")
    assert settings["seed"] == settings["train"]["seed"] == 7
    assert plan.settings("chat")["seed"] == 1
    assert not {"bench", "samples", "name", "start", "data"} & set(settings)
    assert plan.settings("reason")["prompt"] == "User: {question}\n\nAssistant:"
    assert plan.settings("reason")["rollout"]["samples"] == 8 and settings["rollout"] is None


def test_settings_do_not_change_with_benchmarks_or_checkpoints(plan):
    checkpoints = ("checkpoints.every", 1), ("checkpoints.keep", 9)
    for path, value in (("stages.base.bench", []), *checkpoints, ("stages.base.name", "first")):
        if path.endswith("name"):
            continue
        assert Plan(parse(changed(path, value), "c")).settings("base") == plan.settings("base")


def test_a_made_corpus_takes_the_run_s_seed(plan):
    assert check(CorpusConfig, yaml.safe_load(spec(plan.corpus("sums"))), "spec").seed == 7
    assert plan.corpus("asked").seed == 3
    assert plan.made("letters") == ["counting.documents:7:100", "counting.questions:3:50"]
    assert plan.seed("free") == 7 and plan.seed("bits") == 0


def test_stages_start_from_weights_of_stages_entries_or_nothing(plan):
    assert plan.start("base") == "results/demo/base/init.safetensors"
    assert plan.start("chat") == "results/demo/base/model.safetensors"
    assert plan.start("more") == "results/shared/weights/far/model.safetensors"
    assert plan.vocabulary("reason") == plan.tokenizer_files("letters")


def kept() -> dict:
    """The config, where base and chat keep their best weights, and stages start from them."""
    watched = {"steps": 9, "valid_every": 3, "watch": {"best": True}}
    config = changed("corpora.sums.valid", 0.1)
    config["corpora"]["talks"]["valid"] = 0.1
    base, chat, reason, _ = config["stages"]
    base["train"] = chat["train"] = watched
    chat["start"], reason["start"] = "base.best", "chat.best"
    return config


def test_a_stage_starts_from_the_best_weights_of_another():
    plan = Plan(parse(kept(), "c"))
    assert plan.start("chat") == "results/demo/base/best.safetensors"
    assert plan.vocabulary("reason") == plan.tokenizer_files("letters")
    steps = {step.id: step for step in plan.steps}
    assert steps["pretrain base"].writes[2:] == ("results/demo/base/best.safetensors",)
    best = steps["merge chat.best"]
    assert best.reads == (plan.start("chat"), "results/demo/chat/best_adapter.safetensors")
    assert best.writes == (plan.start("reason"),) == ("results/demo/chat/best.safetensors",)
    assert "results/demo/base/model.safetensors" in plan.targets()  # its last weights are an end of their own
    assert [plan.trainer(name) for name in plan.stages] == ["pretrain_best", "sft_lora_best", "grpo_lora", "pretrain"]
    assert plan.story()["subjects"][1]["start"] == "base.best"


def test_the_best_weights_of_a_stage_are_measured_sampled_from_and_exported_beside_its_last_or_alone():
    config = kept()
    base, chat = config["stages"][:2]
    base |= {"bench": ["free"], "export": ["pth"], "measure": ["last", "best"]}
    chat |= {"bench": ["free"], "export": ["peft"], "measure": ["best"], "samples": {"prompts": ["a"]}}
    plan = Plan(parse(config, "c"))
    assert plan.subjects[:4] == ["base", "base.best", "chat", "chat.best"]
    steps, home = {step.id: step for step in plan.steps}, "results/demo"
    words, asked = plan.vocabulary("base"), "results/shared/benchmarks/free.jsonl"
    for name, weights in (("base", "base/model"), ("base.best", "base/best"), ("chat.best", "chat/best")):
        assert steps[f"bench {name} free"].reads == (f"{home}/{weights}.safetensors", *words, asked)
        assert steps[f"bench {name} free"].writes == (f"{home}/{name}/bench/free.answers.jsonl",)
        assert f"{home}/{name}/bench/free.json" in plan.evidence()
    assert steps["generate chat.best"].reads[0] == steps["merge chat.best"].writes[0] == plan.model("chat.best")
    assert steps["export chat.best peft"].reads[0] == f"{home}/chat/best_adapter.safetensors"
    assert steps["export base.best pth"].reads[0] == f"{home}/base/best.safetensors"
    assert {f"{home}/base.best/export/pth/model.pth", f"{home}/chat.best/export/peft/README.md"} <= set(plan.targets())
    assert not {"bench chat free", "generate chat", "export chat peft"} & set(steps)
    told = {subject["name"]: subject for subject in plan.story()["subjects"]}
    assert (told["chat.best"]["kind"], told["chat.best"]["start"]) == ("best", "chat")
    assert plan.exports("base.best")["pth/model.pth"].name == "demo-base.best"
    plain = copy.deepcopy(config)
    plain["stages"][0].pop("measure")
    assert Plan(parse(plain, "c")).settings("base") == plan.settings("base")
    for measure, problem in (
        (["best"], "measure: best weights are kept with train.watch.best"),
        ([], "measure: names last, best, or each of them once"),
        (["last", "last"], "measure: names last, best, or each of them once"),
    ):
        with pytest.raises(ConfigError, match=problem):
            parse(changed("stages.base.measure", measure), "c")
    config["stages"][1] |= {"bench": [], "export": [], "samples": None}
    with pytest.raises(ConfigError, match="measure says what bench, samples and export are about"):
        parse(config, "c")


def test_what_comes_from_outside_is_downloaded_and_local_files_are_not(plan):
    far = plan.checkpoint("far")
    assert re.fullmatch(r"results/shared/downloads/[0-9a-f]{8}-far\.pth", far)
    name = Path(far).name
    assert plan.downloads[name].sha256 == "0" * 64 and plan.origin(name) == []
    assert plan.checkpoint("given") == "models/given.pth"
    assert plan.fetched("file:///data/a%20b.txt") == "/data/a b.txt"
    assert plan.valid_file("text") == ["valid.txt"]


def test_a_local_file_with_a_digest_is_checked_on_its_way():
    plan = Plan(parse(changed("weights.given.sha256", "1" * 64), "c"))
    name = Path(plan.checkpoint("given")).name
    assert plan.origin(name) == ["models/given.pth"] and plan.downloads[name].sha256 == "1" * 64


def test_targets_are_the_report_and_the_last_weights(plan):
    assert plan.targets() == [
        "results/demo/report.html",
        "results/demo/reason/model.safetensors",
        "results/demo/more/model.safetensors",
    ]


def test_exports_are_targets_made_of_weights_vocabulary_and_scores():
    value = copy.deepcopy(CONFIG)
    value["stages"][0]["export"] = ["pth", {"format": "hub", "name": "sums"}]
    value["weights"]["far"]["export"] = ["gguf"]
    plan = Plan(parse(value, "config"))
    steps = {step.id: step for step in plan.steps}
    home, model = "results/demo/base", "results/demo/base/model.safetensors"
    words = plan.vocabulary("base")
    assert steps["export base pth"].writes == (f"{home}/export/pth/model.pth",)
    assert steps["export base pth"].reads == (model, *words)
    assert steps["export base hub"].reads == (model, *words, f"{home}/bench/free.json")
    far = "results/demo/far/export/gguf/model.gguf"
    assert {far, f"{home}/export/hub/README.md", f"{home}/export/pth/model.pth"} <= set(plan.targets())
    assert destination(far) == far and destination(f"{home}/export/hub/README.md") == f"{home}/export/hub"
    found = {spec.format: spec for spec in plan.exports("base").values()}
    assert (found["hub"].name, found["pth"].name) == ("sums", "demo-base")
    assert found["hub"].ctx_len == plan.stages["base"].train.ctx_len
    value["stages"][0]["export"] = ["hub", {"format": "hub"}]
    with pytest.raises(ConfigError, match=r"stages\.base\.export: a format stands twice"):
        parse(value, "config")


def test_micro_batches_have_a_bounded_number_of_tokens(plan):
    assert plan.micro_batch("base") == 16 and plan.micro_batch("more") == 4
    assert plan.micro_batch("reason") == 32  # 4 prompts, 8 completions each
    assert Plan(parse(changed("stages.more.train.ctx_len", 99999), "c")).micro_batch("more") == 1


def test_every_file_read_is_made_by_an_earlier_step_or_comes_from_outside(plan):
    made: set[str] = set()
    for step in plan.steps:
        outside = [path for path in step.reads if path not in made]
        assert all(not path.startswith("results/") for path in outside), (step.id, outside)
        made |= set(step.writes)
    assert set(plan.targets()) <= made
    assert len({step.id for step in plan.steps}) == len(plan.steps)


def test_the_story_tells_subjects_and_steps(plan):
    story = plan.story()
    assert set(story) == {"run", "config", "subjects", "steps", "software"}
    base = story["subjects"][0]
    assert base["folder"] == "results/demo/base" and base["bench"] == ["free"] and base["lora"] is False
    assert base["corpus"] == "results/shared/corpora/sums/corpus.json"
    assert [subject["name"] for subject in story["subjects"]] == ["base", "chat", "reason", "more", "given"]
    assert story["subjects"][2]["corpus"] is None and story["subjects"][4]["kind"] == "weights"
    steps = {step["id"]: step for step in story["steps"]}
    assert set(steps["sft chat"]["needs"]) == {"settings chat", "pretrain base", "pack talks"}
    assert steps["bench base free"]["timing"] == "results/demo/base/log/bench-free.jsonl"
    assert all(need in steps for step in steps.values() for need in step["needs"])


def test_the_story_s_config_is_a_config_without_what_is_unused(plan):
    told = plan.story()["config"]
    assert "rows" not in told["corpora"] and "checkpoints" not in told and told["seed"] == 7
    assert Plan(parse(told, "told")).settings("reason") == plan.settings("reason")


def test_a_file_that_is_missing_is_found_before_anything_runs(plan, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert plan.absent() == ("weights.given.path", "models/given.pth")
    for name in ("models/given.pth", "talks.jsonl", "valid.txt"):
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).touch()
    assert plan.absent() is None


def test_a_finished_run_does_not_need_its_sources(plan, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in plan.targets():
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).touch()
    assert plan.absent() is None


def test_what_was_made_from_another_file_needs_the_one_that_the_config_names(plan, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in (*plan.targets(), *(path for step in plan.steps for path in step.writes)):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).touch()
    (step,) = (step for step in plan.steps if step.id == "pack talks")
    record = tmp_path / ".snakemake" / "metadata" / base64.urlsafe_b64encode(step.writes[0].encode()).decode()
    record.parent.mkdir(parents=True)
    record.write_text(json.dumps({"input": list(step.reads)}))
    assert plan.absent(tmp_path / ".snakemake") is None
    record.write_text(json.dumps({"input": ["others.jsonl"]}))
    assert plan.absent(tmp_path / ".snakemake") == ("corpora.talks.path", "talks.jsonl")
    Path("talks.jsonl").touch()
    assert plan.absent(tmp_path / ".snakemake") is None  # Snakemake makes it anew
    Path("talks.jsonl").unlink()
    for text in ("no record", "[]", '{"input": 3}'):
        record.write_text(text)
        assert plan.absent(tmp_path / ".snakemake") is None


def test_a_file_where_results_need_a_folder_is_found(plan, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert plan.blocked() is None
    Path("results/demo").mkdir(parents=True)
    Path("results/demo/base").touch()
    assert plan.blocked() == Path("results/demo/base")
    Path("results/demo/base").unlink()
    assert plan.blocked() is None
    Path("results/demo").rmdir()
    Path("results/demo").symlink_to("nowhere")
    assert plan.blocked() == Path("results/demo")


def test_an_older_file_in_the_place_of_one_that_was_read_is_found(plan, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    store, source = tmp_path / ".snakemake", Path("talks.jsonl")
    (step,) = (step for step in plan.steps if step.id == "pack talks")
    source.write_text("first")
    record = store / "metadata" / base64.urlsafe_b64encode(step.writes[0].encode()).decode()
    record.parent.mkdir(parents=True)
    told = {"input": list(step.reads), "starttime": 0, "input_checksums": {str(source): f"sha256:{digest(source)}"}}
    record.write_text(json.dumps(told))
    assert plan.replaced(store) is None  # nothing is made yet
    Path(step.writes[0]).parent.mkdir(parents=True)
    Path(step.writes[0]).touch()
    source.write_text("other")
    os.utime(source, (9, 9))
    assert plan.replaced(store) == ("corpora.talks.path", "talks.jsonl")
    source.touch()
    os.utime(step.writes[0], (9, 9))
    assert plan.replaced(store) is None  # Snakemake sees it by its time
    os.utime(step.writes[0])
    source.write_text("first")
    os.utime(source, (9, 9))
    assert plan.replaced(store) is None  # what was read
    source.write_text("other")
    os.utime(source, (9, 9))
    assert plan.replaced(store) == ("corpora.talks.path", "talks.jsonl")
    letters = "results/shared/tokenizers/bytes/tokenizer.json"
    assert records.replaced(store, step.writes[0], ["talks.jsonl", letters]) == "talks.jsonl"
    Path("new.jsonl").touch()
    both = {**told, "input_checksums": {**told["input_checksums"], "new.jsonl": "sha256:0"}}
    record.write_text(json.dumps(both))
    os.utime("new.jsonl", (2e9, 2e9))
    assert records.replaced(store, step.writes[0], ["talks.jsonl", "new.jsonl"]) is None  # all is made anew
    for text in ("no record", "[]", json.dumps({**told, "starttime": 1e12}), json.dumps({**told, "starttime": None})):
        record.write_text(text)
        assert plan.replaced(store) is None


@pytest.mark.parametrize(
    ("path", "made", "known"),
    [
        ("shards/*.jsonl", "shards/1.jsonl", True),
        ("shards/*.jsonl", "talks.jsonl", False),
        ("shards", "shards/1.jsonl", True),
        ("shards", "shards2/1.jsonl", False),
        ("./shards//1.jsonl", "shards/1.jsonl", True),
        ("shards/[1].jsonl", "shards/[1].jsonl", True),
    ],
)
def test_what_was_made_of_the_files_of_a_folder_or_glob_does_not_need_them(tmp_path, monkeypatch, path, made, known):
    monkeypatch.chdir(tmp_path)
    plan = Plan(parse(changed("corpora.talks.path", path), "c.yaml"))
    for name in (*plan.targets(), *(path for step in plan.steps for path in step.writes)):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).touch()
    (step,) = (step for step in plan.steps if step.id == "pack talks")
    record = tmp_path / ".snakemake" / "metadata" / base64.urlsafe_b64encode(step.writes[0].encode()).decode()
    record.parent.mkdir(parents=True)
    record.write_text(json.dumps({"input": ["results/shared/tokenizers/bytes/tokenizer.json", made]}))
    found = plan.absent(tmp_path / ".snakemake")
    assert found == (None if known else ("corpora.talks.path", path))
    assert not known or plan._key(made) == "corpora.talks.path"


def test_later_files_and_values_go_over_earlier_ones(tmp_path):
    (tmp_path / "a.yaml").write_text(yaml.safe_dump(CONFIG))
    (tmp_path / "b.yaml").write_text("seed: 8\nbenchmarks: {bits: {limit: 3}}\n")
    config = load([tmp_path / "a.yaml", tmp_path / "b.yaml"], {"run": "other"})
    assert (config.run, config.seed, config.benchmarks["bits"].limit) == ("other", 8, 3)
    assert config.benchmarks["bits"].path == "valid.txt"


# each list holds the one before nine times
LAUGHS = "x0: &x0 [a]\n" + "".join(f"x{n + 1}: &x{n + 1} [{', '.join([f'*x{n}'] * 9)}]\n" for n in range(8))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [", "c.yaml:1: not YAML"),
        ("a: 1\na: 2", "c.yaml:2: the key a stands twice"),
        ("- 1", "a mapping of keys"),
        ("a: &a {b: *a}", r"c.yaml:1: the aliases ... stand for more than"),
        ("a: &a {b: 1}\nc:\n  <<: *a\n  <<: *a", "c.yaml:4: the key << stands twice"),
        (LAUGHS, r"c.yaml:7: the aliases ... stand for more than"),
    ],
)
def test_broken_files_are_named_by_line(tmp_path, text, message):
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(ConfigError, match=message):
        load([tmp_path / "c.yaml"])
    with pytest.raises(ConfigError, match="none.yaml: no such file"):
        load([tmp_path / "none.yaml"])


def test_merge_keys_stand_for_the_keys_of_another_mapping(tmp_path):
    text = """
        b: {x: &inner {<<: &deep {k: 0, m: 7}, k: 1}}
        c: {<<: *inner, m: 8}
        d: {<<: [*inner, {n: 3, k: 9}]}
        a: *deep
    """
    (tmp_path / "c.yaml").write_text(text)
    inner = {"k": 1, "m": 7}
    assert read_yaml(tmp_path / "c.yaml") == {
        "b": {"x": inner}, "c": {"k": 1, "m": 8}, "d": {**inner, "n": 3}, "a": {"k": 0, "m": 7},
    }  # fmt: skip


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: &a {b: 1}\nc:\n  <<: *a\n  d: 1\n  d: 2\n", r"c.yaml:5: the key d stands twice"),
        ("bias: {5: 1, 5: 2}", "c.yaml:1: the key 5 stands twice"),
        ("a: 1\nb: &b\n- *b\n", "c.yaml:2: the aliases .* more than 1,000,000 values"),
        ("\n".join(["a0: &a0 [1]", *(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 30))]),
         r"c.yaml:\d+: the aliases"),
    ],
)  # fmt: skip
def test_keys_twice_and_aliases_without_end_are_refused(tmp_path, text, message):
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(ConfigError, match=message):
        read_yaml(tmp_path / "c.yaml")


def test_what_an_alias_brings_may_be_given_otherwise(tmp_path):
    config = tmp_path / "c.yaml"
    shared = "- {name: base, kind: pretrain, data: sums, model: &size {n_layer: 2, n_embd: 64}, train: {steps: 1}}"
    other = "- {name: more, kind: pretrain, data: sums, model: {<<: *size, n_layer: 3}, train: {steps: 1}}"
    rest = {key: CONFIG[key] for key in ("run", "tokenizers", "corpora")}
    config.write_text(yaml.safe_dump(rest) + f"stages:\n{shared}\n{other}\n")
    assert [(stage.model.n_layer, stage.model.n_embd) for stage in load([config]).stages] == [(2, 64), (3, 64)]


def test_switching_code_tracking_off_is_a_bare_word():
    assert Plan(parse({**CONFIG, "code_tracking": False}, "c")).code("settings") == "off"


def test_the_schema_file_is_fresh():
    file = ROOT / "workflow/schemas/config.schema.yaml"
    assert file.read_text() == schema(), f"{file} is stale: python -m rwkvpipe.plan --schema > {file.relative_to(ROOT)}"


def test_the_program_prints_schema_and_jobs(capsys, tmp_path):
    main(["--schema"])
    assert capsys.readouterr().out == schema()
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(CONFIG))
    main(["--check", str(tmp_path / "c.yaml")])
    assert "pretrain base\n" in capsys.readouterr().out


def test_planning_does_not_load_torch():
    code = "import sys, rwkvpipe.plan, rwkvpipe.launch; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_a_config_of_tokenizers_alone_makes_them_and_nothing_else():
    config = {
        "run": "words",
        "tokenizers": {
            "w": {"kind": "world"},
            "b": {"kind": "bpe", "corpora": ["mine"], "vocab_size": 500},
            "o": {"kind": "own", "import_path": "a.b:C"},
        },
        "corpora": {"mine": {"path": "mine.jsonl", "tokenizer": "b"}},
    }
    plan = Plan(parse(config, "config"))
    shared = "results/shared/tokenizers"
    assert plan.targets() == [
        *(f"{shared}/w/{name}" for name in ("tokenizer.json", "vocab.txt")),
        *(f"{shared}/b/{name}" for name in ("tokenizer.json", "bpe.json")),
        f"{shared}/o/tokenizer.json",
    ]
    assert [step.rule for step in plan.steps] == ["vocab"] * 3
    assert plan.vocabulary_files("b") == ["mine.jsonl"]


def test_the_file_of_a_user_s_class_and_a_chat_template_are_read(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = {
        "run": "r",
        "tokenizers": {"o": {"kind": "own", "import_path": "a.b:C"}},
        "corpora": {"c": {"path": "c.jsonl", "tokenizer": "o", "format": "chat", "template": "hub"}},
    }
    plan = Plan(parse(config, "config"))
    assert plan.vocabulary_files("o") == [] and plan.template_file("c") == ["hub"]
    (tmp_path / "a").mkdir()
    (tmp_path / "a/b.py").touch()
    (tmp_path / "hub").mkdir()
    assert plan.vocabulary_files("o") == ["a/b.py"] and plan.template_file("c") == ["hub/chat_template.jinja"]
    (tmp_path / "hub/tokenizer_config.json").touch()
    assert plan.template_file("c") == ["hub/tokenizer_config.json"]


HUB = {
    "run": "r",
    "tokenizers": {"w": {"kind": "world"}},
    "weights": {
        "one": {"path": "hf://o/n@v1/a.pth", "tokenizer": "w", "samples": {"prompts": ["x"]}},
        "all": {"path": "modelscope://o/n", "files": ["*.json"], "tokenizer": "w", "samples": {"prompts": ["x"]}},
    },
}


def test_what_a_hub_has_is_a_download_of_a_file_or_of_a_folder():
    plan = Plan(parse(HUB | {"hub": {"mirrors": ["https://m"], "offline": True}}, "config"))
    one, whole = sorted(plan.downloads, key=lambda name: not name.endswith("-a.pth"))
    assert whole.endswith("-n") and plan.downloads[whole].files == ("*.json",)
    assert re.fullmatch(plan.downloads_of(whole=False), one) and not re.fullmatch(plan.downloads_of(whole=True), one)
    assert re.fullmatch(plan.downloads_of(whole=True), whole) and plan.origin(whole) == []
    assert plan.checkpoint("all") == f"results/shared/downloads/{whole}"
    assert "hub" not in plan.story()["config"]


@pytest.mark.parametrize(
    "weights, problem",
    [
        ({"path": "hf://o/n", "sha256": "0" * 64}, "weights.one.path: a whole repository; name the file"),
        ({"path": "hf://o"}, "weights.one.path: not hf://owner/name/file"),
        ({"path": "hf://o//x"}, "weights.one.path: not hf://owner/name/file"),
        ({"path": "hf://o/n/a.pth", "files": ["*"]}, "weights.one.files: path names no whole repository"),
        ({"path": "a.pth", "files": ["*"]}, "weights.one.files: path names no whole repository"),
    ],
)
def test_addresses_of_hubs_that_do_not_do_are_named(weights, problem):
    entry = {"one": weights | {"tokenizer": "w", "samples": {"prompts": ["x"]}}}
    with pytest.raises(ConfigError, match=problem):
        Plan(parse(HUB | {"weights": entry}, "config"))


def test_only_weights_are_whole_repositories():
    with pytest.raises(ConfigError, match="tokenizers.t.path: a whole repository"):
        Plan(parse(HUB | {"tokenizers": {**HUB["tokenizers"], "t": {"kind": "trie", "path": "hf://o/n"}}}, "config"))


def test_a_data_set_of_a_hub_is_fetched_as_a_folder():
    config = changed("corpora.text.path", "hf://datasets/o/n@v1/data/*.parquet")
    config["benchmarks"]["bits"]["path"] = "modelscope://datasets/o/n"
    plan = Plan(parse(config, "c.yaml"))
    folder = plan.fetched("hf://datasets/o/n@v1/data/*.parquet")
    assert plan.corpus_file("text") == plan.corpus_source("text") == [folder]
    assert plan.benchmark_file("bits") == [plan.fetched("modelscope://datasets/o/n")] != [folder]
    assert re.fullmatch(plan.downloads_of(whole=True), folder.rpartition("/")[2])
    assert "hf" not in folder.rpartition("/")[2]


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("weights.given.path", "hf://o/n/*.pth", "a pattern of files is for data sets"),
        ("corpora.text.path", "hf://o/n", "corpora.text.path: a whole repository; name the file"),
        ("tokenizers.letters", {"kind": "bpe", "path": "hf://datasets/o/n"}, "a whole repository; name the file"),
        ("corpora.text", {"path": ["a", "b"], "tokenizer": "bytes"}, "a list of paths, belong to format binidx"),
        ("corpora.text.path", "-a.txt", "-a.txt would be taken for an option, as it begins with -; write ./-a.txt"),
        ("corpora.text.path", 5, "corpora.text.path: Input should be a valid string (got 5)"),
    ],
)
def test_paths_that_cannot_be_are_refused(path, value, message):
    assert message in error(changed(path, value))


def test_a_stage_learns_from_several_corpora_by_weights():
    config = changed("stages.base.data", {"sums": 3, "more": 1.5})
    config["corpora"]["more"] = config["corpora"]["sums"] | {"count": 7}
    plan = Plan(parse(config, "c.yaml"))
    assert plan.settings("base")["mix"] == [1.5, 3.0]  # by name: the order in which they are written decides nothing
    assert plan.data("base") == plan.packed("more") + plan.packed("sums")
    assert plan.used["corpora"][:2] == ["more", "sums"]
    told = plan._subject("base")
    assert told["data"] == "more (33.3%), sums (66.7%)" and told["corpus"] is None and len(told["mix"]) == 2
    assert {"results/shared/corpora/more/corpus.json", "results/shared/corpora/sums/corpus.json"} < set(plan.evidence())
    assert Plan(parse(changed("stages.base.data", {"sums": 3}), "c.yaml")).settings("base")["mix"] == []


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("stages.base.data", {"sums": 0}, "stages.base.data.sums: Input should be greater than 0 (got 0)"),
        ("stages.base.data", {"sums": "x"}, "stages.base.data.sums: Input should be a valid number"),
        ("stages.base.data", {}, "stages.base: data: names no corpus"),
        ("stages.base.data", 5, "stages.base.data: Input should be a valid string (got 5)"),
        ("stages.base.data", ["sums", "text"], "stages.base.data: a mapping of keys is needed, this is list"),
        ("stages.base.data", {"sums": 1, "smus": 1}, "stages.base.data: there is no corpus smus; did you mean sums?"),
        ("stages.base.data", {"sums": 1, "text": 1e-4}, "a weight is less than a thousandth of all"),
        ("stages.base.data", {"sums": 1, "talks": 1}, "pretrain learns from format text or array"),
        ("stages.base.data", {"sums": 1, "text": 1}, "text is made with tokenizer bytes, but sums with letters"),
        ("stages.reason.data", {"asked": 1, "sums": 1}, "grpo learns from one corpus; put them into one"),
        ("stages.chat.train", {"steps": 9, "order": "magic"}, "magic reads a stream of tokens, in pretrain"),
        ("stages.chat.train", {"steps": 9, "rows": "stream"}, "train.rows: stream knows no answers"),
        ("stages.reason.train", {"steps": 9, "rows": "packed"}, "train.rows belongs to pretrain and sft"),
        ("stages.base.train", {"tokens": 9, "rows": "documents"}, "rows of documents differ in length; give epochs"),
        ("stages.base.train", {"steps": 9, "order": "magic", "rows": "documents"}, "order magic reads one stream"),
    ],
)
def test_corpora_that_cannot_be_mixed_are_refused(path, value, message):
    assert message in error(changed(path, value))


LIKED = {"path": "pairs.jsonl", "format": "pairs"}


def with_stage(**more) -> dict:
    config = changed("corpora.liked", LIKED)
    config["stages"].append(
        {"name": "polite", "kind": "dpo", "data": "liked", "start": "chat", "train": {"steps": 3}} | more
    )
    return config


def test_preferences_states_and_files_of_rewards_are_parts_of_the_plan():
    plan = Plan(parse(with_stage(lora={"kind": "disha"}), "c.yaml"), "results")
    steps = {step.id: step for step in plan.steps}
    rows = "results/shared/corpora/liked.jsonl"
    assert steps["questions liked"].reads == ("pairs.jsonl",) and steps["questions liked"].writes == (rows,)
    assert {rows, "results/demo/chat/model.safetensors"} < set(steps["dpo polite"].reads)
    assert steps["dpo polite"].writes[0] == "results/demo/polite/adapter.safetensors" and "merge polite" in steps
    assert plan.settings("polite")["dpo"] == {"beta": 0.1, "loss": "sigmoid", "smoothing": 0.0}
    assert plan.micro_batch("polite") == 32
    config = with_stage()
    config["stages"][1] |= {"lora": None, "state": True}
    tuned = Plan(parse(config, "c.yaml"), "results")
    assert "merge chat" in {step.id for step in tuned.steps} and tuned.settings("chat")["state"]
    judged = Plan(
        parse(changed("stages.reason.rollout", {"reward": {"answer": 1, "my.py:f": -0.5}}), "c.yaml"), "results"
    )
    assert "my.py" in {step.id: step for step in judged.steps}["grpo reason"].reads
    assert judged._key("my.py") == "stages.reason.rollout.reward"


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"data": "asked"}, "stages.polite.data: dpo learns from format pairs, asked is of format question"),
        ({"kind": "sft"}, "sft learns from format chat"),
        ({"kind": "sft", "dpo": {}}, "dpo belongs to kind dpo, this is sft"),
        ({"state": True, "lora": {}}, "state trains the initial states alone"),
        ({"lora": {"dropout": 0.1}}, "lora.dropout: dpo compares a model with itself"),
        ({"train": {"batch": 3}}, "stages.polite.train: give one of steps, epochs and tokens"),
        ({"train": {"steps": 3, "epochs": 1}}, "give one of steps, epochs and tokens"),
        ({"train": {"tokens": 3}}, "train.tokens belongs to pretrain: rows of dpo differ in length; give epochs"),
        ({"train": {"steps": 3, "chunk": 8}}, "train.chunk belongs to pretrain and sft: dpo scores answers whole"),
        ({"train": {"steps": 3, "l2_wrap": 0.5}}, "train.l2_wrap belongs to pretrain and sft"),
        ({"train": {"steps": 3, "valid_every": 5}}, "train.valid_every belongs to pretrain and sft"),
        ({"dpo": {"loss": "ipo", "smoothing": 0.1}}, "smoothing belongs to loss sigmoid"),
        ({"dpo": {"smoothing": 0.5}}, "stages.polite.dpo.smoothing"),
        ({"kind": "grpo", "data": "asked", "rollout": {"part": 4}}, "part belongs to loss bnpo, this is dapo"),
        (
            {"kind": "grpo", "data": "asked", "rollout": {"kl": "k1"}},
            "kl k1 estimates a divergence that beta 0 leaves out",
        ),
        ({"kind": "grpo", "data": "asked", "rollout": {"reward": {}}}, "reward: names none"),
        ({"kind": "grpo", "data": "asked", "rollout": {"reward": "my.txt:f"}}, "rollout.reward"),
    ],
)
def test_what_does_nothing_in_a_kind_of_stage_is_refused(more, message):
    assert message in error(with_stage(**more))


def test_states_are_refused_where_the_family_has_none():
    config = changed("stages.base.model", {"family": "rwkv5", "n_layer": 2, "n_embd": 64})
    config["stages"][1] |= {"lora": None, "state": True}
    assert "stages.chat.state: rwkv5 has no initial states" in error(config)


def test_an_adapter_is_exported_without_its_model():
    config = with_stage(lora={"kind": "pissa"}, export=["peft", "hub"])
    steps = {step.id: step for step in Plan(parse(config, "c.yaml"), "results").steps}
    assert steps["export polite peft"].reads[0] == "results/demo/polite/adapter.safetensors"
    assert steps["export polite peft"].writes == ("results/demo/polite/export/peft/README.md",)
    assert steps["export polite hub"].reads[0] == "results/demo/polite/model.safetensors"
    assert "export: peft_hf is the form of an adapter" in error(with_stage(state=True, export=["peft_hf"]))
    asked = [{"format": "peft", "shard_bytes": 9}]
    said = "stages.polite.export.0: shard_bytes belongs to formats hub and hf, this is peft"
    assert said in error(with_stage(lora={}, export=asked))
    assert "stages.polite.export.0: Input should be 'safetensors'" in error(with_stage(export=["peff"]))
    reward = {"kind": "grpo", "data": "asked", "rollout": {"reward": "my.txt:f"}}
    assert "stages.polite.rollout.reward: String should match" in error(with_stage(**reward))


def test_models_of_every_kind_may_be_cut_and_that_is_refused_where_none_is_trained():
    asked = with_stage(kind="dpo", data="pairs") | {"memory": {"shard": "weights"}}
    asked["corpora"] = asked["corpora"] | {"pairs": {"path": "p.jsonl", "format": "pairs"}}
    asked["stages"] = [{**asked["stages"][-1], "start": "given"}]
    asked["weights"] = {"given": {"path": "m.safetensors", "tokenizer": "letters"}}
    parse(asked, "c.yaml")
    assert "memory.shard: cuts models that are trained, and there are no stages" in error(asked | {"stages": []})


def test_a_file_of_prompts_is_an_input_of_the_samples_made_from_it():
    config = {**CONFIG, "stages": [{**CONFIG["stages"][0], "samples": {"path": "asked.jsonl"}}, *CONFIG["stages"][1:]]}
    found = Plan(parse(config, "c.yaml"))
    assert found.prompts("base") == ["asked.jsonl"]
    assert found.prompts("chat") == []
    assert found.samples("base").path == "asked.jsonl"


@pytest.mark.parametrize("samples", [{}, {"path": "a.txt", "prompts": ["b"]}])
def test_samples_have_prompts_or_a_file_of_them(samples):
    config = {**CONFIG, "stages": [{**CONFIG["stages"][0], "samples": samples}, *CONFIG["stages"][1:]]}
    with pytest.raises(ConfigError, match="give one of prompts and path"):
        Plan(parse(config, "c.yaml"))


def test_a_pass_over_several_corpora_is_refused():
    config = changed("stages.base.data", {"sums": 1, "more": 1})
    config["corpora"]["more"] = config["corpora"]["sums"]
    config["stages"][0]["train"] = {"epochs": 2}
    assert "train.epochs: several corpora are passed at different times" in error(config)
