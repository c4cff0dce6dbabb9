"""The door of every job that may use a device: takes the device, then becomes the verb.

Snakemake counts GPUs but does not say which one a job may use. This locks one file for the device, names it in
CUDA_VISIBLE_DEVICES and replaces itself by the verb, which inherits the lock: the kernel frees it when the verb is
gone, however it went. Under a scheduler that gave devices already (SLURM and others) these stand. A second lock,
beside the file named by --out, lets only one process at a time work on a result.

    python -m rwkvpipe.launch 1 pretrain settings.json --model init.safetensors --data corpus --out model.safetensors
"""

import argparse
import hashlib
import logging
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping
from pathlib import Path

from rwkvpipe.base.agree import known
from rwkvpipe.base.crew import lead
from rwkvpipe.base.errors import ConfigError, Parser, Stopped, run
from rwkvpipe.base.files import canonical, read_json, write_json
from rwkvpipe.base.lock import claim, lock

log = logging.getLogger("rwkvpipe")

SCHEDULERS = ("SLURM_JOB_ID", "PBS_JOBID", "LSB_JOBID", "FLUX_JOB_ID", "KUBERNETES_SERVICE_HOST")
VERBS = sorted({file.stem for file in Path(__file__).parent.glob("*.py")} - {"__init__", "launch", "plan"})
CREWS = ("dpo", "grpo", "pretrain", "sft")  # verbs whose processes may be several
PLANNED = "RWKVPIPE_PLANNED"
THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
POLL = 0.5  # seconds between looks at devices that are all taken
# how long threads that are done wait awake for the others. Two programs that share the cores lose all but a fiftieth
# of their speed at GNU's default of 300,000, and none of it at this; alone, this costs some per cent
SPIN = "5000"
# A step of training frees all that it held. glibc would give it back to the system, and the next step ask for it again,
# page by page; and large pages are found faster: together 5 % of a small model's step. Blocks from 32 MB on go back
PAGES = "glibc.malloc.hugetlb=1:glibc.malloc.trim_threshold=2147483647:glibc.malloc.mmap_threshold=33554432"


def _listed() -> list[str]:
    """Devices as the driver lists them; a card cut into MIG slices counts as its slices."""
    try:
        text = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=60).stdout
    except (FileNotFoundError, PermissionError, subprocess.TimeoutExpired):
        return []
    cards: list[tuple[str, list[str]]] = []
    for line in text.splitlines():
        if card := re.match(r"GPU (\d+):", line):
            cards.append((card[1], []))
        elif (part := re.search(r"\(UUID:\s*(MIG-[^)\s]+)\)", line)) and cards:
            cards[-1][1].append(part[1])
    return [name for card, slices in cards for name in (slices or [card])]


def pool() -> list[str]:
    """Devices that this user may use here, spelled as CUDA_VISIBLE_DEVICES spells them.

    RWKVPIPE_GPUS counts before CUDA_VISIBLE_DEVICES, and that before what nvidia-smi lists; empty is the CPU.
    """
    for variable in ("RWKVPIPE_GPUS", "CUDA_VISIBLE_DEVICES"):
        if variable in os.environ:
            names = [name for name in re.split(r"[,\s]+", os.environ[variable]) if name]
            return names[: names.index("-1")] if "-1" in names else names  # CUDA stops reading at -1
    return _listed()


def describe(devices: list[str], limits: Mapping) -> str:
    """One line for the start of a run: the devices its jobs will use, under limits like `--resources gpu=0`."""
    if not devices:
        return "device: CPU (no GPU is visible)"
    if "gpu" in limits and not limits["gpu"].value:
        return "device: CPU (the resource gpu is limited to 0)"
    return f"device: GPU {', '.join(devices)}"


def scheduled() -> bool:
    """Whether a cluster's scheduler chose this process's devices."""
    return any(variable in os.environ for variable in SCHEDULERS)


def reachable(root: Path) -> None:
    """Let the jobs that this process starts find this interpreter and, where it lies in `root`, the package."""
    wanted = {"PATH": Path(sys.executable).parent}
    if (root / "rwkvpipe").is_dir():
        wanted["PYTHONPATH"] = root
    for variable, folder in wanted.items():
        others = [part for part in os.environ.get(variable, "").split(os.pathsep) if part and part != str(folder)]
        os.environ[variable] = os.pathsep.join([str(folder), *others])


def keep_plan(folder: Path, config: dict, codes: dict[str, str]) -> None:
    """Write down what this run was planned with, for the jobs that it starts, wherever and whenever they do.

    A job of a cluster parses the workflow when it starts: an edit made since must not change it under its old name.
    """
    value = {"config": config, "codes": codes}
    path = folder / f"{hashlib.sha256(canonical(value).encode()).hexdigest()[:16]}.json"
    write_json(path, value)
    os.environ[PLANNED] = str(path.resolve())


def kept_plan() -> dict:
    """What `keep_plan` of the process above this one wrote; nothing if it wrote nothing."""
    return read_json(os.environ[PLANNED]) if PLANNED in os.environ else {}


def _locks() -> Path:
    """The folder of device locks, shared by all users of the machine."""
    folder = Path(os.environ.get("RWKVPIPE_LOCKS") or Path(tempfile.gettempdir()) / "rwkvpipe-devices")
    if not folder.is_dir():
        folder.mkdir(parents=True, exist_ok=True)
        folder.chmod(0o1777)
    return folder


def _stop_verbs(reader: int) -> None:
    """Wait for a stop signal, then tell every verb below this process, also those that still start, to stop."""
    import psutil  # Snakemake brings it; a job that only starts its verb need not load it

    while not {signal.SIGINT, signal.SIGTERM} & set(os.read(reader, 64)):
        pass
    told: set[int] = set()
    while True:
        for child in psutil.Process().children(recursive=True):
            try:
                if child.pid not in told and any(word.startswith("rwkvpipe.") for word in child.cmdline()):
                    told.add(child.pid)
                    child.terminate()
            except psutil.Error as error:  # it ended meanwhile
                log.debug("%s", error)
        time.sleep(POLL)


def pass_on_stops() -> None:
    """Let a stop signal that this process gets reach the verbs below it, which keep their work and end.

    Snakemake, told to stop by a signal to itself alone, waits for its jobs, however many days they take.
    """
    if threading.current_thread() is threading.main_thread():
        reader, writer = os.pipe()
        os.set_blocking(writer, False)
        signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        threading.Thread(target=_stop_verbs, args=(reader,), daemon=True).start()


def take(devices: list[str], count: int, locks: Path) -> list[str]:
    """Lock `count` of the devices and name them; jobs that wait are served in the order in which they came."""
    queue = lock(locks / "queue", waiting="other jobs wait for a device already")
    told, taken = False, []
    while True:
        for name in devices:
            if name not in taken and lock(locks / f"device-{re.sub('[^A-Za-z0-9_.-]', '_', name)}") is not None:
                taken.append(name)
            if len(taken) == count:
                os.close(queue)
                return taken
        if not told:
            log.info("devices are taken (of %s); waiting for %d", ", ".join(devices), count - len(taken))
            told = True
        time.sleep(POLL * random.uniform(0.5, 1.5))


def choose(count: int) -> dict[str, str]:
    """Environment that gives the verb its devices. Raises ConfigError where there are fewer."""
    if count == 0:
        log.info("device: CPU")
        return {"CUDA_VISIBLE_DEVICES": "", "RWKVPIPE_DEVICE": "cpu"}
    devices = pool()
    if devices and len(devices) < count:
        raise ConfigError(f"{count} GPUs asked for, and here are {len(devices)}; lower the resource gpu")
    if scheduled():
        log.info("device: GPU %s, given by the scheduler", ",".join(devices) or "of this node")
        return {"RWKVPIPE_DEVICE": "cuda"}
    if not devices:
        raise ConfigError("no GPU is visible here; set the resource gpu to 0 to run on the CPU")
    names = ",".join(take(devices, count, _locks()))
    log.info("device: GPU %s", names)
    order = os.environ.get("CUDA_DEVICE_ORDER", "PCI_BUS_ID")  # nvidia-smi's numbering
    return {"CUDA_VISIBLE_DEVICES": names, "CUDA_DEVICE_ORDER": order, "RWKVPIPE_DEVICE": "cuda"}


def surroundings(verb: str) -> dict[str, str]:
    """What C libraries read of the environment of a verb, unless the user has set it."""
    return {"GOMP_SPINCOUNT": SPIN} | ({"GLIBC_TUNABLES": PAGES} if verb in CREWS else {})


def main(argv=None) -> None:
    """Take what the job needs and become the verb; returns only by raising."""
    parser = Parser(prog="rwkvpipe.launch", description="Start a verb on a device.")
    parser.add_argument("count", type=int, choices=range(0, 1025), metavar="N", help="GPUs, or 0 for the CPU")
    parser.add_argument(
        "--ranks", type=int, default=1, help="processes that train together on the CPU; each GPU has one"
    )
    parser.add_argument(
        "--threads", type=int, help="threads to compute with; last digits depend on it where torch's products compute"
    )
    parser.add_argument("verb", help="a module of rwkvpipe")
    parser.add_argument("words", nargs=argparse.REMAINDER, metavar="...", help="the verb's own arguments")
    args = parser.parse_args(argv)
    known("the command line", args.verb, "verb", VERBS)
    ranks = max(args.count, args.ranks)
    if args.ranks < 1 or args.count and args.ranks not in (1, args.count):
        raise ConfigError(f"--ranks: {args.ranks} processes on {args.count} GPUs; each GPU has one, so leave it out")
    if ranks > 1 and args.verb not in CREWS:
        raise ConfigError(f"{args.verb} runs in one process; {', '.join(CREWS)} in several. Set gpu and ranks to 1")
    asked = os.getppid()
    claim(args.words)  # before the device: a job that waits here must not hold one
    if os.getppid() != asked:
        raise Stopped("whoever started this is gone, and the result was in work: left to whom starts it next")
    os.environ.update(choose(args.count))
    if args.threads is not None:
        os.environ.update(dict.fromkeys(THREADS, str(max(1, args.threads // ranks))))
    os.environ.update(surroundings(args.verb) | os.environ)
    sys.stderr.flush()
    words = [sys.executable, "-m", f"rwkvpipe.{args.verb}", *args.words]
    if ranks > 1:
        os._exit(lead(words, ranks))
    os.execv(sys.executable, words)


if __name__ == "__main__":
    run(main)
