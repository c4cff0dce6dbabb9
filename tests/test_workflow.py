"""The workflow on stand-in verbs: what runs, in which order, and what an edit makes stale."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
# runs before the verb's imports, so the real code is fingerprinted and never runs
STAND_IN = """
if __name__ == "__main__":
    import sys as _sys

    from rwkvpipe.stand_in import play

    _sys.exit(play(_sys.argv))
"""
PLAY = '''
"""Writes what a verb would write, at once or when its name is no more among the held ones."""

import json
import re
import time
from pathlib import Path

from rwkvpipe.base.errors import ConfigError, Parser

BESIDE = {
    "convert": ["config.json"], "merge": ["config.json"], "score": ["{stem}.samples.jsonl"],
    "vocab": ["vocab.txt"], "report": ["plots/scores.png", "plots/scores.csv"],
    "pack": [f"{half}.{part}" for half in ("train", "valid") for part in ("bin", "idx", "mask")],
    "plot": [f"{name}.png" for name in ("loss", "lr", "grad_norm", "throughput", "reward")] + ["metrics.csv"],
}
FOLDER = {"vocab": "tokenizer.json", "pack": "corpus.json", "plot": "metrics.csv"}


def play(argv):
    verb, words = Path(argv[0]).stem, argv[1:]
    out = Path(words[words.index("--out") + 1])
    try:
        Parser().parse_args(words[words.index("--code") :][:2] if "--code" in words else [])
    except ConfigError as error:
        raise SystemExit(f"error: {error}") from None
    with open("calls", "a") as file:
        file.write(f"{verb} {out}\\n")
    until = time.monotonic() + 300
    while Path("held", verb).exists() and time.monotonic() < until:
        time.sleep(0.05)
    if verb in FOLDER:
        out = out / FOLDER[verb]
    beside = BESIDE.get(verb, [])
    if verb in ("pretrain", "sft", "grpo"):
        beside = ["metrics.jsonl"] + (["config.json"] if out.name == "model.safetensors" else [])
        settings = next(Path(word) for word in words if word.endswith("settings.json")).read_text()
        if re.search(r'best\\W+true', settings):
            beside.append({"model": "best", "adapter": "best_adapter"}[out.stem] + ".safetensors")
    for path in [out, *(out.parent / name.format(stem=out.stem) for name in beside)]:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(words) + "\\n")
    if "Fail" in str(words):
        raise SystemExit("error: asked to fail")
'''
VERBS = [
    *("download", "convert", "questions", "vocab", "pack", "settings", "init", "pretrain", "sft", "grpo", "merge"),
    *("bench", "score", "generate", "plot", "report"),
]
CONFIG = """
run: demo
tokenizers:
  letters: {kind: trie, corpora: [stories]}
corpora:
  stories: {path: data/stories.txt, tokenizer: letters}
  talks: {path: data/talks.jsonl, tokenizer: letters, format: chat}
  sums: {synthetic: counting.questions, count: 100, format: question}
benchmarks:
  free: {task: answer, synthetic: counting.questions, limit: 10, prompt: "{question} is what in {run}?"}
  pick: {task: choice, path: data/pick.jsonl}
stages:
  - name: base
    kind: pretrain
    data: stories
    model: {n_layer: 2, n_embd: 64}
    train: {steps: 10, lr: 1e-3}  # learns
    bench: [free, pick]
    samples: {prompts: ["{stage}: 1+1="]}
  - name: chat
    kind: sft
    data: talks
    start: base
    lora: {rank: 4}
    train: {steps: 10, lr: 1e-4}
    bench: [free]
  - name: reason
    kind: grpo
    data: sums
    start: chat
    lora: {rank: 4}
    train: {steps: 10, lr: 1e-5}
    bench: [free]
"""


class Run(subprocess.Popen):
    """Snakemake at work in a process group of its own; its two streams are one text."""

    def __init__(self, words: list[str], cwd: Path, env: dict[str, str]):
        self.text = tempfile.TemporaryFile()  # noqa: SIM115 - it lives as long as the process
        line = [sys.executable, "-m", "snakemake", "--nocolor", "--cores", "2", *words]
        super().__init__(
            line, cwd=cwd, env=env, stdout=self.text, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip

    def said(self) -> str:
        return os.pread(self.text.fileno(), 1 << 24, 0).decode()

    def until(self, reached: Callable[[], object]) -> None:
        """Wait for something that happens while it works."""
        end = time.monotonic() + 300
        while not reached():
            assert self.poll() is None and time.monotonic() < end, self.said()
            time.sleep(0.05)

    def ended(self) -> subprocess.CompletedProcess:
        self.wait(300)
        return subprocess.CompletedProcess(self.args, self.returncode, self.said())


class Work:
    """A copy of the project whose verbs write their files and do nothing else."""

    def __init__(self, path: Path):
        self.path = path

    @classmethod
    def make(cls, path: Path) -> "Work":
        ignore = shutil.ignore_patterns("__pycache__", ".snakemake", "results")
        for name in ("workflow", "profiles", "envs", "rwkvpipe"):
            shutil.copytree(ROOT / name, path / name, ignore=ignore)
        shutil.copy(ROOT / "Snakefile", path)
        (path / "rwkvpipe/stand_in.py").write_text(PLAY)
        for verb in VERBS:
            file = path / f"rwkvpipe/{verb}.py"
            text = file.read_text() if file.exists() else f'"""{verb}."""\n\nimport argparse\n'
            first = re.search(r"^(import|from) ", text, re.M).start()
            file.write_text(text[:first] + STAND_IN + "\n\n" + text[first:])
        (path / "data").mkdir()
        for name in ("stories.txt", "talks.jsonl", "pick.jsonl"):
            (path / "data" / name).write_text("{}\n")
        (path / "config.yaml").write_text(CONFIG)
        return cls(path)

    def copy(self, path: Path) -> "Work":
        shutil.copytree(self.path, path)  # times are kept
        return Work(path)

    def start(self, *words: str, cwd: Path | None = None, **env: str) -> Run:
        given = {name: value for name, value in os.environ.items() if not name.startswith(("SNAKEMAKE", "PYTHONPATH"))}
        return Run([*words], cwd or self.path, {**given, "RWKVPIPE_GPUS": "", **env})

    def call(self, *words: str, cwd: Path | None = None, **env: str) -> subprocess.CompletedProcess:
        """The same, to its end."""
        return self.start(*words, cwd=cwd, **env).ended()

    def hold(self, *verbs: str) -> None:
        """Keep these verbs, once started, from ending."""
        for verb in verbs:
            (self.path / "held" / verb).mkdir(parents=True)

    def release(self, *verbs: str) -> None:
        for verb in verbs:
            (self.path / "held" / verb).rmdir()

    def calls(self) -> list[str]:
        path = self.path / "calls"
        return path.read_text().splitlines() if path.exists() else []

    def run(self, *words: str, **env: str) -> str:
        done = self.call(*words, **env)
        assert done.returncode == 0, done.stdout
        return done.stdout

    def plan(self, *words: str) -> list[str]:
        """What a dry run would do, sorted: the rule, then the values of its wildcards but for the run's name."""
        text = self.run("-n", *words)
        jobs = []
        for block in re.split(r"\n(?=(?:local)?rule \w+:)", text)[1:]:
            rule = re.match(r"(?:local)?rule (\w+):", block)[1]
            wildcards = re.search(r"^    wildcards: (.*)$", block, re.M)
            values = dict(part.split("=") for part in wildcards[1].split(", ")) if wildcards else {}
            values.pop("run", None)
            if rule not in ("all", "default"):
                jobs.append(" ".join([rule, *values.values()]))
        return sorted(jobs)

    def edit(self, file: str, old: str, new: str) -> None:
        text = (self.path / file).read_text()
        assert old in text, f"{file} does not hold {old!r}"
        (self.path / file).write_text(text.replace(old, new, 1))


@pytest.fixture(scope="session")
def fresh(tmp_path_factory) -> Work:
    return Work.make(tmp_path_factory.mktemp("fresh") / "work")


@pytest.fixture(scope="session")
def finished(fresh, tmp_path_factory) -> Work:
    work = fresh.copy(tmp_path_factory.mktemp("finished") / "work")
    work.run()
    return work


@pytest.fixture
def done(finished, tmp_path) -> Work:
    return finished.copy(tmp_path / "work")


AFTER_CHAT = [
    "bench chat free", "bench reason free", "grpo_lora reason", "merge chat", "merge reason", "plot chat",
    "plot_grpo reason", "report", "score chat free", "score reason free", "sft_lora chat",
]  # fmt: skip
AFTER_BASE = sorted([
    *AFTER_CHAT, "bench base free", "bench base pick", "generate base", "plot base", "pretrain base",
    "score base free", "score base pick",
])  # fmt: skip


def test_everything_is_made_once(finished):
    words = json.loads((finished.path / "results/demo/report.html").read_text())
    assert "{question} is what in {run}?" in words[words.index("--spec") + 1]  # braces of a user's are no wildcards
    steps = json.loads(words[words.index("--spec") + 1])["steps"]
    assert not [step["timing"] for step in steps if step["timing"] and not (finished.path / step["timing"]).is_file()]
    assert finished.plan() == []


def test_a_comment_in_the_config_makes_nothing_stale(done):
    done.edit("config.yaml", "# learns", "# learns fast")
    assert done.plan() == []


def test_the_order_of_keys_makes_nothing_stale(done):
    value = yaml.safe_load((done.path / "config.yaml").read_text())
    value["stages"] = [dict(reversed(stage.items())) for stage in value["stages"]]
    (done.path / "config.yaml").write_text(yaml.safe_dump(dict(reversed(value.items())), sort_keys=False))
    assert done.plan() == []


def test_a_default_written_out_makes_nothing_stale(done):
    done.edit("config.yaml", "steps: 10, lr: 1e-3", "steps: 10, lr: 0.001, batch: 16")
    assert done.plan() == []


def test_a_learning_rate_makes_its_stage_and_descendants_stale(done):
    done.edit("config.yaml", "lr: 1e-4", "lr: 2e-4")
    assert done.plan() == sorted([*AFTER_CHAT, "settings chat"])


def test_the_learning_rate_of_the_first_stage_makes_all_stages_stale(done):
    # its initial weights are made again too, since they are made from the stage's settings
    done.edit("config.yaml", "lr: 1e-3", "lr: 2e-3")
    assert done.plan() == sorted([*AFTER_BASE, "settings base", "init base"])


MEASURED = "lr: 1e-4, valid_every: 5, watch: {best: true}}"


def best_weights(work: Work) -> None:
    """Let base and chat keep their best weights, and the stages after them start from these."""
    work.edit("config.yaml", "tokenizer: letters}", "tokenizer: letters, valid: 0.1}")
    work.edit("config.yaml", "format: chat}", "format: chat, valid: 0.1}")
    for rate in ("1e-3", "1e-4"):
        more = "valid_every: 5, watch: {best: true}"
        work.edit("config.yaml", f"steps: 10, lr: {rate}}}", f"steps: 10, lr: {rate}, {more}}}")
    work.edit("config.yaml", "start: base", "start: base.best")
    work.edit("config.yaml", "start: chat", "start: chat.best")


def test_a_stage_that_starts_from_the_best_weights_of_another_has_them_made(done):
    best_weights(done)
    done.edit("config.yaml", MEASURED, MEASURED + "\n    measure: [last, best]")
    planned = {*done.plan()}
    assert {"pretrain_best base", "sft_lora_best chat", "merge_best chat", "grpo_lora reason"} <= planned
    assert {"bench chat free", "bench chat.best free", "score chat.best free"} <= planned


@pytest.mark.slow
def test_the_best_weights_that_are_measured_too_are_stale_with_their_stage_and_train_nothing_anew(done):
    best_weights(done)
    done.run()
    done.edit("config.yaml", MEASURED, MEASURED + "\n    measure: [last, best]")
    first = ["bench chat.best free", "report", "score chat.best free"]
    assert done.plan() == first
    done.run()
    assert done.plan() == [] and (done.path / "results/demo/chat.best/bench/free.json").is_file()
    done.edit("config.yaml", "measure: [last, best]", "measure: [best]")
    assert done.plan() == ["report"]
    done.edit("config.yaml", "lr: 1e-4", "lr: 2e-4")
    planned = {*done.plan()}
    assert {"sft_lora_best chat", "merge_best chat", *first} <= planned and "bench chat free" not in planned


@pytest.mark.large
def test_the_best_weights_of_a_stage_are_followed_as_its_last_ones_are(done):
    best_weights(done)
    done.run()
    assert done.plan() == []
    calls = [line for line in done.calls() if line.endswith("/best.safetensors")]
    assert calls == ["merge results/demo/chat/best.safetensors"]
    done.edit("config.yaml", "lr: 1e-4", "lr: 2e-4")
    planned = {*done.plan()}
    assert {"sft_lora_best chat", "merge_best chat", "grpo_lora reason"} <= planned
    assert "pretrain_best base" not in planned
    done.edit("config.yaml", "lr: 2e-4", "lr: 1e-4")
    done.edit("config.yaml", "start: chat.best", "start: chat")
    after = ["bench reason free", "grpo_lora reason", "merge reason", "plot_grpo reason", "report", "score reason free"]
    assert done.plan() == after


def test_swapped_values_are_seen(done):
    done.edit("config.yaml", "steps: 10, lr: 1e-5", "steps: 10, warmup: 20, lr: 1e-5")
    done.run()
    done.edit("config.yaml", "steps: 10, warmup: 20", "steps: 20, warmup: 10")
    assert "grpo_lora reason" in done.plan()


def test_a_benchmark_added_runs_itself_alone(done):
    more = "  more: {task: answer, synthetic: counting.questions, limit: 5}\n"
    done.edit("config.yaml", "  pick: {", more + "  pick: {")
    done.edit("config.yaml", "bench: [free]\n  - name: reason", "bench: [free, more]\n  - name: reason")
    assert done.plan() == ["bench chat more", "questions more", "report", "score chat more"]


def test_a_stage_added_runs_itself_alone(done):
    with open(done.path / "config.yaml", "a") as file:
        file.write("  - {name: more, kind: sft, data: talks, start: base, train: {steps: 5}}\n")
    assert done.plan() == ["plot more", "report", "settings more", "sft more"]


def test_an_unused_entry_makes_nothing_stale(done):
    done.edit("config.yaml", "  talks:", "  spare: {path: data/spare.txt, tokenizer: letters}\n  talks:")
    assert done.plan() == []


def test_code_that_some_verbs_run_makes_only_their_steps_stale(done):
    (done.path / "rwkvpipe/train/policy.py").open("a").write("\nEXTRA = 1\n")
    after_grpo = ["bench reason free", "grpo_lora reason", "merge reason", "plot_grpo reason", "report"]
    assert done.plan() == sorted([*after_grpo, "score reason free"])


def test_comments_and_docstrings_of_code_make_nothing_stale(done):
    for file in ("rwkvpipe/train/loop.py", "rwkvpipe/base/files.py", "rwkvpipe/pretrain.py"):
        text = (done.path / file).read_text()
        (done.path / file).write_text(text.replace('"""', '"""Truly: ', 1) + "\n\n# a remark\n")
    assert done.plan() == []


def test_untracked_code_makes_nothing_stale(fresh, tmp_path):
    work = fresh.copy(tmp_path / "work")
    with open(work.path / "config.yaml", "a") as file:
        file.write("code_tracking: off\n")
    work.run()
    work.edit("rwkvpipe/pretrain.py", "if __name__ ==", "import math\n\nif __name__ ==")
    assert work.plan() == []


def test_a_changed_corpus_makes_what_is_learned_from_it_stale(done):
    with open(done.path / "data/talks.jsonl", "a") as file:
        file.write("{}\n")
    assert done.plan() == sorted([*AFTER_CHAT, "pack_masked talks"])


def test_a_touched_corpus_makes_nothing_stale(done):
    (done.path / "data/talks.jsonl").touch()
    assert done.plan() == []


def test_a_corpus_that_an_older_file_took_the_place_of_is_not_taken_for_read(done):
    corpus = done.path / "data/talks.jsonl"
    kept = corpus.read_bytes()
    corpus.write_bytes(kept + b"{}\n")
    os.utime(corpus, (9, 9))
    refused = done.call("-n")
    assert refused.returncode == 2 and "data/talks.jsonl is not the file that results were made from" in refused.stdout
    corpus.touch()
    assert done.plan() == sorted([*AFTER_CHAT, "pack_masked talks"])
    corpus.write_bytes(kept)
    os.utime(corpus, (9, 9))
    assert done.plan() == []


def test_knobs_make_nothing_stale(done):
    with open(done.path / "profiles/default/profile.yaml", "a") as file:
        file.write("set-resources:\n  pretrain:\n    micro_batch: 2\n  bench:\n    rows: 3\n")
    with open(done.path / "config.yaml", "a") as file:
        file.write("checkpoints: {every: 7}\n")
    assert done.plan("--set-threads", "pretrain=1") == []


def test_a_deleted_intermediate_is_made_again_only_when_needed(done):
    results = done.path / "results"
    shutil.rmtree(results / "shared/corpora/talks")
    (results / "demo/base/model.safetensors").unlink()
    (results / "demo/chat/bench/free.answers.jsonl").unlink()
    assert done.plan() == []
    done.edit("config.yaml", "lr: 1e-4", "lr: 2e-4")
    plan = done.plan()
    assert "pack_masked talks" in plan and "pretrain base" in plan and "pack stories" not in plan


def test_config_values_on_the_command_line_join_the_config(done):
    assert done.plan("--config", "seed=42") == []
    assert "pretrain base" in done.plan("--config", "seed=43")


def test_a_given_configfile_stands_alone(done):
    value = {**yaml.safe_load(CONFIG), "run": "alone", "stages": yaml.safe_load(CONFIG)["stages"][:1]}
    del value["benchmarks"], value["stages"][0]["bench"], value["corpora"]["sums"]
    (done.path / "alone.yaml").write_text(yaml.safe_dump(value))
    expected = ["generate base", "init base", "plot base", "pretrain base", "report", "settings base"]
    assert done.plan("--configfile", "alone.yaml") == expected
    assert not any("free" in job for job in done.plan("--configfile", "alone.yaml", "--config", "seed=7"))


def test_config_errors_are_one_line(fresh, tmp_path):
    def error(text: str) -> str:
        (tmp_path / "bad.yaml").write_text(text)
        done = fresh.call("-n", "--configfile", str(tmp_path / "bad.yaml"))
        assert done.returncode != 0 and "Traceback" not in done.stdout
        lines = [line for line in done.stdout.splitlines() if not line.startswith("Using workflow specific profile")]
        assert len(lines) == 1, done.stdout
        return lines[0]

    assert "stages.base.train.lrr: no such key; did you mean lr?" in error(CONFIG.replace("lr: 1e-3", "lrr: 1e-3"))
    assert "bad.yaml:3: the key run stands twice" in error("\nrun: a\nrun: b\n")
    assert "data/none.txt" in error(CONFIG.replace("data/stories.txt", "data/none.txt"))
    assert "stages.chat.start" in error(CONFIG.replace("start: base", "start: bass"))
    assert "there is no made corpus counting.question; did you mean counting.questions?" in error(
        CONFIG.replace("counting.questions, limit", "counting.question, limit")
    )
    assert "stages.reason.rollout.reward: there is no reward anwser; did you mean answer?" in error(
        CONFIG + "    rollout: {reward: anwser}\n"
    )


def test_a_workflow_in_a_folder_whose_name_has_braces_is_refused_in_one_line(fresh, tmp_path):
    refused = fresh.copy(tmp_path / "{work}").call("-n")
    assert refused.returncode == 2 and "Traceback" not in refused.stdout
    assert "takes braces in the path of a workflow for wildcards; rename the folder" in refused.stdout


def test_broken_yaml_is_named_by_line(done):
    (done.path / "config.yaml").write_text("run: demo\nstages: [\n")
    text = done.call("-n").stdout
    assert "config.yaml:3: not YAML" in text and "Traceback" not in text


def test_one_line_says_the_device(fresh):
    assert "device: CPU (no GPU is visible)" in fresh.run("-n")
    text = fresh.run("-n", RWKVPIPE_GPUS="3")
    assert "device: GPU 3" in text and "gpu=1" in text
    assert "limited to 0" in fresh.run("-n", "--resources", "gpu=0", RWKVPIPE_GPUS="3")


@pytest.mark.slow
def test_another_workflow_can_use_this_one(fresh, tmp_path):
    (tmp_path / "data").mkdir()
    for name in ("stories.txt", "talks.jsonl", "pick.jsonl"):
        (tmp_path / "data" / name).write_text("{}\n")
    (tmp_path / "Snakefile").write_text(f'''
module rwkv:
    snakefile: "{fresh.path}/workflow/Snakefile"
    config: config["rwkv"]
    pathvars: results="made"


use rule * from rwkv as rwkv_*


rule all:
    default_target: True
    input: rules.rwkv_all.input
''')
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"rwkv": yaml.safe_load(CONFIG)}))
    done = fresh.call("--configfile", "config.yaml", cwd=tmp_path)
    assert done.returncode == 0, done.stdout
    assert (tmp_path / "made/demo/report.html").is_file() and not (tmp_path / "results").exists()
    words = json.loads((tmp_path / "made/demo/report.html").read_text())
    story = json.loads(words[words.index("--spec") + 1])
    assert story["subjects"][0]["folder"] == "made/demo/base"


def test_the_rules_agree_with_the_plan_about_files(fresh):
    """Each step of the plan's graph is a job of Snakemake's, and the other way round."""
    sys_path_plan = subprocess.run(
        [sys.executable, "-m", "rwkvpipe.plan", "--check", "config.yaml"],
        cwd=fresh.path, capture_output=True, text=True, check=True,
    )  # fmt: skip
    merged = re.compile(r"^(\w+?)_(?:lora|masked|spread|trie|corpus|grpo)\b")
    assert sorted(merged.sub(r"\1", job) for job in fresh.plan()) == sorted(sys_path_plan.stdout.splitlines())


def test_snakemakes_own_report_has_captions(finished, tmp_path):
    finished.copy(tmp_path / "work").run("--report", "page.html")
    text = (tmp_path / "work/page.html").read_text()
    assert "How stage base went" in text


def test_lint_and_format_are_clean(fresh):
    assert "Congratulations" in fresh.run("--lint")
    files = ["Snakefile", *map(str, sorted(Path("workflow").rglob("Snakefile"))), "workflow"]
    done = subprocess.run(
        [sys.executable, "-m", "snakefmt", "--check", *files], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def python(work: Work, code: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=work.path, env={**os.environ, "RWKVPIPE_GPUS": ""}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip


@pytest.mark.slow
def test_one_call_from_python_runs_a_config(fresh, tmp_path):
    work = fresh.copy(tmp_path / "work")
    call = "import rwkvpipe, yaml; print(rwkvpipe.run(yaml.safe_load(open('config.yaml')), cores=2))"
    done = python(work, call)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "results/demo/report.html" and (work.path / done.stdout.strip()).is_file()


def test_one_call_from_python_raises_the_line_that_says_why(fresh, tmp_path):
    work = fresh.copy(tmp_path / "work")
    work.edit("config.yaml", "1+1=", "Fail")
    attempt = "try:\n    rwkvpipe.run({}, cores=2{})\nexcept rwkvpipe.PipeError as error:\n    print(error)"
    call = "import rwkvpipe\n" + attempt
    target = ", targets=['results/demo/base/samples.jsonl']"
    said = python(work, call.format("'config.yaml'", target)).stdout
    assert said == "generate base: asked to fail; its log is results/demo/base/log/generate.log\n"
    assert "run: Field required" in python(work, call.format("{'seed': 1}", "")).stdout


def test_an_edit_can_be_accepted_without_running(done):
    (done.path / "rwkvpipe/train/policy.py").open("a").write("\nEXTRA = 1\n")
    done.run("--touch")
    assert done.plan() == []


@pytest.mark.slow
def test_results_whose_records_are_gone_are_not_taken_for_fresh(done):
    shutil.rmtree(done.path / ".snakemake")
    done.edit("config.yaml", "lr: 1e-4", "lr: 2e-4")
    refused = done.call("-n")
    assert refused.returncode == 2 and "settings.json: .snakemake, which knows" in refused.stdout
    done.run("--touch", "--forceall")
    assert done.plan() == []


def test_a_failed_step_says_why_and_leaves_no_result(fresh, tmp_path):
    work = fresh.copy(tmp_path / "work")
    work.edit("config.yaml", "1+1=", "Fail")
    done = work.call("results/demo/base/samples.jsonl")
    assert done.returncode == 1 and "error: asked to fail" in done.stdout
    assert not (work.path / "results/demo/base/samples.jsonl").exists()
    assert (work.path / "results/demo/base/model.safetensors").exists()


BASE = "pretrain results/demo/base/model.safetensors"
SHARED = ["tokenizers/letters", "corpora/stories", "corpora/talks", "corpora/sums.jsonl", "benchmarks/free.jsonl"]


def other_run(work: Work, old: str = "run: demo", new: str = "run: demo") -> None:
    """A config of another name, the same but for one edit."""
    assert old in CONFIG
    (work.path / "other.yaml").write_text(CONFIG.replace(old, new).replace("run: demo", "run: other"))


@pytest.mark.slow
def test_two_runs_at_once_make_what_they_share_once(fresh, tmp_path):
    work = fresh.copy(tmp_path / "work")
    other_run(work, "lr: 1e-4", "lr: 5e-4")
    work.hold("vocab", "pretrain")
    # a held step takes two cores, and what both share is made beside it
    one, two = work.start("--cores", "8"), work.start("--configfile", "other.yaml", "--cores", "8")
    one.until(lambda: "is made by another run (process" in one.said() + two.said())
    work.release("vocab")
    for process, run in ((one, "demo"), (two, "other")):  # they go side by side once it is made
        process.until(lambda run=run: f"pretrain results/{run}/base/model.safetensors" in work.calls())
    work.release("pretrain")
    said = [one.ended(), two.ended()]
    assert [done.returncode for done in said] == [0, 0], said[0].stdout + said[1].stdout
    calls = work.calls()
    for made in SHARED:
        assert sum(call.endswith(f"results/shared/{made}") for call in calls) == 1, (made, calls)
    assert work.plan() == [] and work.plan("--configfile", "other.yaml") == []


@pytest.mark.slow
def test_a_run_in_work_is_not_begun_again_and_no_kill_locks_it(fresh, tmp_path):
    work = fresh.copy(tmp_path / "work")
    work.hold("pretrain")
    first = work.start()
    first.until(lambda: BASE in work.calls())
    second = work.call()
    assert second.returncode == 2, second.stdout
    last = second.stdout.strip().splitlines()[-1]
    assert last.startswith(f"error: run demo: another snakemake works on it (process {first.pid}); wait for its end")
    os.killpg(first.pid, signal.SIGKILL)
    first.ended()
    work.release("pretrain")
    work.run()  # no --unlock, no --rerun-incomplete
    assert work.plan() == []


@pytest.mark.slow
def test_nothing_is_made_anew_under_a_run_that_reads_it(fresh, tmp_path):
    work = fresh.copy(tmp_path / "work")
    other_run(work, "path: data/stories.txt,", "path: data/stories.txt, valid: 0.5,")
    work.hold("pretrain")
    first = work.start()
    first.until(lambda: BASE in work.calls())
    second = work.start("--configfile", "other.yaml")
    second.until(lambda: "would be made anew, and another run uses it as it is" in second.said())
    work.release("pretrain")
    one, two = first.ended(), second.ended()
    assert one.returncode == two.returncode == 0, one.stdout + two.stdout
    calls, packed = work.calls(), "pack results/shared/corpora/stories"
    assert calls.count(packed) == 2 and calls[calls.index("report results/demo/report.html") :].count(packed) == 1


@pytest.mark.slow
def test_an_edit_of_the_config_while_jobs_wait_changes_the_next_run_only(fresh, tmp_path):
    work = fresh.copy(tmp_path / "work")
    work.hold("pretrain")
    process = work.start()
    process.until(lambda: BASE in work.calls())
    work.edit("config.yaml", "lr: 1e-4", "lr: 2e-4")
    work.release("pretrain")
    done = process.ended()
    assert done.returncode == 0, done.stdout
    assert '\\"lr\\":0.0001' in (work.path / "results/demo/chat/settings.json").read_text()
    assert work.plan() == sorted([*AFTER_CHAT, "settings chat"])


@pytest.mark.slow
def test_code_that_changed_while_jobs_waited_is_not_run_under_its_old_name(fresh, tmp_path):
    work = fresh.copy(tmp_path / "work")
    work.hold("pretrain")
    process = work.start()
    process.until(lambda: BASE in work.calls())
    work.edit("rwkvpipe/score.py", "if __name__ ==", "EXTRA = 1\n\nif __name__ ==")
    work.release("pretrain")
    done = process.ended()
    refused = "the code of score changed after this job was planned; run snakemake again"
    assert done.returncode == 1 and f"error: score base free: {refused}" in done.stdout
    assert not (work.path / "results/demo/base/bench/free.json").exists()
    assert work.plan() == ["report", *sorted(job for job in AFTER_BASE if job.startswith("score"))]
    work.run()
    assert work.plan() == []


def test_a_job_of_a_cluster_does_what_was_planned(done):
    """It parses the workflow again when it starts, as here, after an edit."""
    kept = max((done.path / ".snakemake/rwkvpipe").glob("*.json"))
    done.edit("config.yaml", "lr: 1e-4", "lr: 2e-4")
    words = ["--mode", "remote", "--force", "--allowed-rules", "settings"]
    words += ["--target-jobs", "settings:run=demo,stage=chat"]
    for given, rate in (({"RWKVPIPE_PLANNED": str(kept)}, "0.0001"), ({}, "0.0002")):
        done.run(*words, "--nolock", **given)
        assert f'\\"lr\\":{rate}' in (done.path / "results/demo/chat/settings.json").read_text()


@pytest.mark.slow
def test_one_failing_branch_does_not_stop_the_others_and_is_named_last(fresh, tmp_path):
    work = fresh.copy(tmp_path / "work")
    work.edit("config.yaml", "1+1=", "Fail")
    done = work.call()
    assert done.returncode == 1
    log = "results/demo/base/log/generate.log"
    assert done.stdout.strip().splitlines()[-1] == f"error: generate base: asked to fail; its log is {log}"
    assert work.plan() == ["generate base", "report"]


@pytest.mark.slow
def test_single_targets_make_what_they_need_and_summaries_tell(fresh, tmp_path):
    work = fresh.copy(tmp_path / "work")
    needed = ["init base", "merge chat", "pack stories", "pack_masked talks", "pretrain base", "settings base"]
    target = "results/demo/chat/model.safetensors"
    assert work.plan(target) == sorted([*needed, "settings chat", "sft_lora chat", "vocab_trie letters"])
    work.run(target)
    rows = [line.split("\t") for line in work.run("--summary").splitlines() if line.startswith("results/")]
    states = {row[0]: row[-1] for row in rows}
    assert states[target] == "no update" and states["results/demo/report.html"] == "update pending"
    assert work.plan("--rerun-incomplete", target) == []


def test_a_dry_run_names_the_trainings_that_changed_code_would_make_anew(done):
    (done.path / "rwkvpipe/train/policy.py").open("a").write("\nEXTRA = 1\n")
    job = re.search(r"\nrule grpo_lora:.*?\n\n", done.run("-n"), re.S)[0]
    assert re.search(r"reason: .*Params have changed.*now: .*'?grpo@", job, re.S), job
