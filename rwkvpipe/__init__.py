"""Train, tune, align and measure RWKV-7 models: one config, one call.

>>> import rwkvpipe
>>> rwkvpipe.run("config.yaml")  # doctest: +SKIP
PosixPath('results/demo/report.html')
"""

import logging
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from rwkvpipe.base.errors import ConfigError, PipeError

SNAKEFILE = Path(__file__).resolve().parents[1] / "Snakefile"
log = logging.getLogger("rwkvpipe")


class RunError(PipeError):
    """A run stopped; the text is the line that says why."""


def run(
    config: str | Path | Mapping,
    *,
    targets: Sequence[str] = (),
    cores: int | None = None,
    directory: str | Path | None = None,
    options: Sequence[str] = (),
) -> Path:
    """Run a config (a file, or its content) with Snakemake and return the path of the report.

    Of a config that only makes tokenizers, it is the path of the first one.

    `targets` are files to make instead of all; `cores` are all if left out; paths in the config count from
    `directory`, which is the current one if left out; `options` are further words for Snakemake (`["--dry-run"]`).
    Snakemake's lines go to the logger `rwkvpipe`. Raises ConfigError or RunError in one line.
    """
    from rwkvpipe.base import agree, files, tree

    if not SNAKEFILE.is_file():
        raise ConfigError(f"{SNAKEFILE}: no workflow beside the package; install it with pip install -e CHECKOUT")
    with tempfile.TemporaryDirectory() as folder:
        if isinstance(config, Mapping):
            settled = agree.parse(dict(config), "config")
            file = Path(folder, "config.json")
            files.write_json(file, dict(config))
        else:
            file = Path(config).resolve()
            settled = agree.load([file])
        home = Path(directory or ".")
        words = ["--snakefile", str(SNAKEFILE), "--configfile", str(file), "--directory", str(home), "--nocolor"]
        words += ["--cores", str(cores or "all"), *options, "--", *targets]
        _follow([sys.executable, "-m", "snakemake", *words])
    return home / tree.Tree(settled).targets()[0]


def _follow(command: list[str]) -> None:
    """Run a command, its lines into the log. Raises RunError with the line that says why it failed."""
    lines = []
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        try:
            for line in process.stdout or ():
                lines.append(line.rstrip())
                log.info("%s", lines[-1])
        except KeyboardInterrupt:
            process.terminate()  # its jobs keep their work
            process.wait()
            raise
    if process.returncode:
        said = [line.partition("error: ")[2] for line in lines if "error: " in line]
        rest = [line.strip() for line in lines if line.strip()]
        raise RunError(said[-1] if said else rest[-1] if rest else f"snakemake left with status {process.returncode}")
