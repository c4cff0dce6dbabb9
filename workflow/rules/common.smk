import atexit
import logging
import os
import shlex
import sys
from pathlib import Path

from snakemake.logging import logger
from snakemake_interface_executor_plugins.settings import ExecMode

# the package beside this workflow goes before an installed one, here and in the jobs
ROOT = Path(workflow.current_basedir.get_path_or_uri(secret_free=False)).parent.parent
if (ROOT / "rwkvpipe").is_dir() and str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from rwkvpipe import launch
from rwkvpipe.base import agree, runs
from rwkvpipe.base.errors import BAD_INPUT, ConfigError, PipeError, explain
from rwkvpipe.base.files import canonical
from rwkvpipe.base.tree import EXPORTED, any_of, destination
from rwkvpipe.plan import Plan, spec

launch.reachable(ROOT)
logging.raiseExceptions = False  # no traceback for each line that does not fit on a full disk
given = workflow.config_settings
used_as_module = workflow.modifier.skip_configfile
results = workflow.modifier.path_modifier.modify(workflow.modifier.pathvars.apply("<results>"))


# one line; an exception would bring Snakemake's own words with it
def refuse(error):
    sys.stderr.write(f"error: {explain(error)}\n")
    sys.exit(BAD_INPUT)


try:
    if set("{}") & set(str(ROOT)):
        raise ConfigError(f"{ROOT}: Snakemake takes braces in the path of a workflow for wildcards; rename the folder")
    kept = launch.kept_plan() if workflow.exec_mode != ExecMode.DEFAULT else {}
    # files given on the command line stand alone: config.yaml is not merged into them
    if used_as_module:
        settled = agree.parse(dict(config), "config")
    elif kept:
        settled = agree.parse(kept["config"], "the config as it was planned")
    else:
        settled = agree.load(given.configfiles or ["config.yaml"], dict(given.config))
    plan = Plan(settled, "<results>", kept.get("codes"))
    story = Plan(settled, str(results))
    absent = None if used_as_module else story.absent(Path(".snakemake"))
    if absent:
        raise ConfigError(f"{absent[0]}: there is no file {absent[1]}; paths count from the folder of the call")
    blocked = story.blocked()
    if blocked:
        raise ConfigError(f"{blocked}: results need a folder there, and this is none; move it away")
    judged = not used_as_module and workflow.exec_mode == ExecMode.DEFAULT and not {"--touch", "-t"} & set(sys.argv)
    unknown = story.unrecorded(Path(".snakemake")) if judged else None
    if unknown:
        raise ConfigError(
            f"{unknown}: .snakemake, which knows from what results are made, knows nothing of it; bring .snakemake"
            f" back, or remove {Path(unknown).parent}, or take all as it is: snakemake --touch --forceall --cores 1"
        )
    other = story.replaced(Path(".snakemake")) if judged else None
    if other:
        raise ConfigError(
            f"{other[0]}: {other[1]} is not the file that results were made from, but an older one, which Snakemake,"
            f" going by times, would not see; make its time new: touch {shlex.quote(other[1])}"
        )
except (PipeError, OSError) as error:
    refuse(error)

if not used_as_module:
    config.update(settled.model_dump(mode="json"))

devices = launch.pool()
if devices and "gpu" not in workflow.global_resources and workflow.global_resources["_nodes"].value is None:
    workflow.register_resource("gpu", len(devices))
if workflow.exec_mode == ExecMode.DEFAULT:
    logger.info(launch.describe(devices, workflow.global_resources))
    launch.pass_on_stops()
GPU = 1 if devices else 0
THREADS = {"bench": 1, "generate": 1}
ENDS = ("", "_lora", "_best", "_lora_best")
THREADS |= dict.fromkeys([f"{kind}{end}" for kind in ("pretrain", "sft", "dpo", "grpo") for end in ENDS], 2)
ENVIRONMENT = "../../envs/cuda.yaml" if devices else "../../envs/cpu.yaml"


wildcard_constraints:
    run=any_of([settled.run]),
    stage=any_of(plan.stages),
    subject=any_of(plan.subjects),
    weights=any_of(settled.weights),
    tokenizer=any_of(settled.tokenizers),
    corpus=any_of(settled.corpora),
    benchmark=any_of(settled.benchmarks),
    download=any_of(plan.downloads),


def claim_results():
    wanted = {str(file) for job in workflow.dag.jobs for file in (*job.input, *job.output)}
    things = {name: files for name, files in story.things().items() if files & wanted}
    waiting = list(workflow.dag.needrun_jobs())
    jobs = {name: [job for job in waiting if files & set(map(str, job.output))] for name, files in things.items()}
    made = {name: making for name, making in jobs.items() if making}
    try:
        claims = runs.Claims(Path(story.shared, ".locks"))
        if not runs.begin(claims, settled.run, things, made, logger.info):
            os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])  # plan again
        launch.keep_plan(Path(".snakemake", "rwkvpipe"), settled.model_dump(mode="json"), plan.codes)
    except (PipeError, OSError) as error:
        refuse(error)
    runs.hand_over(claims, made, workflow.dag.finished)
    runs.tell(running, logger.info)


# steps with their logs, as people call them
def logs_of(jobs):
    single = [job for found in list(jobs) for job in getattr(found, "jobs", [found])]
    words = {job: [value for name, value in job.wildcards.items() if name != "run"] for job in single}
    return {" ".join([job.rule.name, *words[job]]): next(map(str, job.log), None) for job in single}


# after Snakemake's own last words, which name no step
def tell_failures():
    lines = [runs.failure(*step) + "\n" for step in sorted(logs_of(workflow.scheduler.failed).items())]
    atexit.register(sys.stderr.writelines, lines)


def running():
    jobs = list(workflow.scheduler.running) if workflow.scheduler else []
    return {step: file for step, file in logs_of(jobs).items() if file}


def tokenizer_folder(wildcards, input):
    return str(Path(list(input.tokenizer)[0]).parent)


def packed_folders(wildcards, input):
    return [str(Path(file).parent) for file in input.data if Path(file).name == "corpus.json"]


def held_out(wildcards, input):
    source = sources(input.valid, plan.corpus_source(wildcards.corpus, "valid_path"))
    return ["--valid", *source] if source else []


# a folder or a glob of many files is named as the config does: a command line has an end; so are pairs, whose files
# are two
def sources(files, given):
    return list(files) if len(files) < 2 else given


def corpus_source(wildcards, input):
    return sources(input.file, plan.corpus_source(wildcards.corpus))


def benchmark_source(wildcards, input):
    return sources(input.file, plan.benchmark_source(wildcards.benchmark))


def digest_wanted(wildcards):
    wanted = plan.downloads[wildcards.download]
    return (["--sha256", wanted.sha256] if wanted.sha256 else []) + [f"--files={pattern}" for pattern in wanted.files]


# a function of threads is not tracked: where a file is fetched from decides no result
def hub_asked(wildcards, threads):
    return [f"--mirror={mirror}" for mirror in settled.hub.mirrors] + ["--offline"] * settled.hub.offline


def made_corpora(wildcards):
    return [word for made in plan.made(wildcards.tokenizer) for word in ("--synthetic", made)]


# how many threads a sum is divided among decides its last digits, so jobs compute with as many as their rule asks
# for, also where --cores leaves them fewer; a function of threads is not tracked by Snakemake
def computing(rule):
    given = workflow.resource_settings.overwrite_threads.get(workflow.modifier.modify_rulename(rule), THREADS[rule])
    given = getattr(given, "value", given)
    return lambda wildcards, threads: given if isinstance(given, int) else threads


def training(rule):
    threads_of = {name: computing(name) for name in (f"{rule}{end}" for end in ENDS)}
    return lambda wildcards, threads: threads_of[plan.trainer(wildcards.stage)](wildcards, threads)


def adapter_given(wildcards):
    adapter = plan.adapter(wildcards.weights)
    return [] if adapter is None else ["--adapter", adapter]


# a function of threads is not tracked by Snakemake: these settings decide no result
def knobs(wildcards, threads):
    words = ["--save-every", settled.checkpoints.every, "--keep", settled.checkpoints.keep]
    words += [word for name in settled.track for word in ("--track", name)]
    words += ["--recompute"] if settled.memory.recompute else []
    return [*words, *(["--shard", settled.memory.shard] if settled.memory.shard else [])]


def micro_batch(wildcards):
    return plan.micro_batch(wildcards.stage)
