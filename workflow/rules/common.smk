import sys
from pathlib import Path

from snakemake.logging import logger
from snakemake_interface_executor_plugins.settings import ExecMode

# the package beside this workflow goes before an installed one, here and in the jobs
ROOT = Path(workflow.current_basedir.get_path_or_uri(secret_free=False)).parent.parent
if (ROOT / "rwkvpipe").is_dir() and str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from rwkvpipe import launch
from rwkvpipe.base import agree
from rwkvpipe.base.errors import BAD_INPUT, ConfigError, PipeError, explain
from rwkvpipe.base.files import canonical
from rwkvpipe.base.tree import any_of
from rwkvpipe.plan import Plan, spec

launch.reachable(ROOT)
given = workflow.config_settings
used_as_module = workflow.modifier.skip_configfile
results = workflow.modifier.path_modifier.modify(workflow.modifier.pathvars.apply("<results>"))

try:
    # files given on the command line stand alone: config.yaml is not merged into them
    if used_as_module:
        settled = agree.parse(dict(config), "config")
    else:
        settled = agree.load(given.configfiles or ["config.yaml"], dict(given.config))
    plan = Plan(settled, "<results>")
    story = Plan(settled, str(results))
    absent = None if used_as_module else story.absent()
    if absent:
        raise ConfigError(f"{absent[0]}: there is no file {absent[1]}")
    unknown = None if used_as_module or workflow.exec_mode != ExecMode.DEFAULT else story.unrecorded(Path(".snakemake"))
    if unknown and not {"--touch", "-t"} & set(sys.argv):
        raise ConfigError(
            f"{unknown}: .snakemake, which knows from what results are made, knows nothing of it; bring .snakemake back,"
            f" or remove {Path(unknown).parent}, or take all as it is: snakemake --touch --forceall --cores 1"
        )
except (PipeError, OSError) as error:
    # one line; an exception would bring Snakemake's own words with it
    sys.stderr.write(f"error: {explain(error)}\n")
    sys.exit(BAD_INPUT)

if not used_as_module:
    config.update(settled.model_dump(mode="json"))

devices = launch.pool()
if devices and "gpu" not in workflow.global_resources and workflow.global_resources["_nodes"].value is None:
    workflow.register_resource("gpu", len(devices))
if workflow.exec_mode == ExecMode.DEFAULT:
    logger.info(launch.describe(devices, workflow.global_resources))
    launch.pass_on_stops()
GPU = 1 if devices else 0
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


def tokenizer_folder(wildcards, input):
    return str(Path(list(input.tokenizer)[0]).parent)


def packed_folder(wildcards, input):
    return str(Path(list(input.data)[0]).parent)


def held_out(wildcards, input):
    return ["--valid", *input.valid] if input.valid else []


def digest_wanted(wildcards):
    sha256 = plan.downloads[wildcards.download].sha256
    return ["--sha256", sha256] if sha256 else []


def made_corpora(wildcards):
    return [word for made in plan.made(wildcards.tokenizer) for word in ("--synthetic", made)]


# a function of threads is not tracked by Snakemake: this setting decides no result
def save_every(wildcards, threads):
    return settled.checkpoints.every


def micro_batch(wildcards):
    return plan.micro_batch(wildcards.stage)
