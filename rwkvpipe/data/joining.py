"""Pairs joined by their indexes: tokens are moved or copied as bytes, nothing is encoded again.

A move empties each source from its end into the place that waits for it, so that the disk holds everything once, but
for a block. What is interrupted, by a kill or a power cut, goes on with the same call; until then every token is where
it was or where it belongs.
"""

import fcntl
import logging
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from rwkvpipe.base.errors import DataError
from rwkvpipe.base.files import atomic, naming, read_json, write_json
from rwkvpipe.base.pace import Pace
from rwkvpipe.base.sources import prefix_of
from rwkvpipe.data.binidx import Binidx, write_index
from rwkvpipe.data.marks import WEIGHT

log = logging.getLogger("rwkvpipe")

BLOCK = 16 << 20  # bytes that are on the disk twice while they are moved
EVERY = 16  # blocks between records of how far a copy is


@dataclass(frozen=True)
class Join:
    """What is joined into what: `sizes` are the bytes of the sources' .bin files, `width` those of a token.

    `mark` are those of a mark.
    """

    sources: tuple[str, ...]
    out: str
    move: bool
    masked: bool
    width: int
    sizes: tuple[int, ...]
    mark: int = 1

    @property
    def grows(self) -> bool:
        """Whether the first source is itself what the others are appended to."""
        return self.sources[0] == self.out

    def bytes(self, kind: str) -> list[int]:
        """Bytes of each source's file of a kind."""
        return [size // self.width * self.mark if kind == "mask" else size for size in self.sizes]


def same_kind(pairs: Sequence[Binidx]) -> None:
    """Raise DataError where pairs cannot lie in one: other dtypes, masks here and none there, other tokenizers."""
    first = pairs[0]
    for pair in pairs[1:]:
        if pair.dtype != first.dtype:
            raise DataError(
                f"{pair.prefix}: tokens of {pair.dtype}, those of {first.prefix} are {first.dtype}; pack both with the"
                " same tokenizer"
            )
        if pair.masked != first.masked:
            with_mask, without = (pair, first) if pair.masked else (first, pair)
            raise DataError(f"{without.prefix}: has no .mask, {with_mask.prefix} has one; join pairs that all have one")
    told = [(pair.prefix, tokenizer) for pair in pairs if (tokenizer := _tokenizer(pair))]
    for prefix, tokenizer in told:
        if tokenizer != told[0][1]:
            raise DataError(
                f"{prefix}: its corpus.json names another tokenizer than that of {told[0][0]}; pack both with one"
            )


def _tokenizer(pair: Binidx) -> object:
    """What a packed corpus says of its tokenizer; None of a pair from elsewhere."""
    card = Path(pair.prefix).with_name("corpus.json")
    if Path(pair.prefix).name not in ("train", "valid") or not card.is_file():
        return None
    found = read_json(card)
    return (found.get("tokenizer"), found.get("vocab_size")) if isinstance(found, dict) else None


def joined_index(path: Path, pairs: Sequence[Binidx]) -> None:
    """Write the index of pairs one after another into a temporary file."""
    ends, before = [np.zeros(1, np.int64)], 0
    for pair in pairs:
        ends.append(pair.ends[1:] + before)
        before += len(pair.sizes)
    write_index(path, pairs[0].dtype, np.concatenate([pair.sizes for pair in pairs]), np.concatenate(ends))


def _home(out: str) -> Path:
    return Path(out).with_name(f".{Path(out).name}.join")


@contextmanager
def _alone(home: Path, out: str) -> Iterator[None]:
    """Hold the folder of a join. Raises DataError where another process does."""
    with naming(home):
        home.mkdir(parents=True, exist_ok=True)
    handle = os.open(home, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DataError(f"{out}: is being joined by another process; wait for it") from None
        except OSError as error:
            log.debug("no locks here: %s", error)
        yield
    finally:
        os.close(handle)
        if home.is_dir() and not any(home.iterdir()):
            home.rmdir()


def _opened(sources: Sequence[str], out: str, move: bool) -> list[Binidx]:
    """The pairs, each checked. Raises DataError for what cannot be joined."""
    for number, source in enumerate(sources):
        if source in sources[:number] and move:
            raise DataError(f"{source}: stands twice, and could be moved once; leave one out, or copy")
        if number and source == out:
            raise DataError(f"{out}: pairs are appended to the first source; name it first")
    if sources[0] != out and any(Path(f"{out}.{kind}").exists() for kind in ("bin", "idx", "mask", "parts")):
        raise DataError(f"{out}: there already; name it first to append to it, or another to write")
    pairs = [Binidx(source) for source in sources]
    same_kind(pairs)
    if pairs[0].dtype.kind == "f":
        raise DataError(f"{pairs[0].prefix}: holds floats; pack the corpus again to have whole numbers")
    filled = [pair for pair in pairs if len(pair)]
    plain, wide = ([pair for pair in filled if (pair.marks == WEIGHT) == weighs] for weighs in (False, True))
    if plain and wide:
        raise DataError(
            f"{plain[0].prefix}: its .mask holds 0 and 1, that of {wide[0].prefix} weights; pack what both were made of"
            " into one, or let a stage have both as its data"
        )
    emptied = pairs if move else pairs[:1] if sources[0] == out else []
    for pair in emptied:
        for kind in ("bin", "idx", *(("mask",) if pair.masked else ())):
            file = Path(f"{pair.prefix}.{kind}")
            if pair.parts or file.is_symlink() or file.stat().st_nlink > 1:
                raise DataError(f"{file}: is a link to what lies elsewhere; name that, or copy")
    return pairs


def _plan(home: Path, sources: Sequence[str], out: str, move: bool) -> Join:
    """What is to be done, as it was planned by an interrupted call, or now. Raises DataError where they differ."""
    planned = home / "plan.json"
    if planned.is_file():
        found = read_json(planned)
        plan = Join(**{name: tuple(v) if isinstance(v, list) else v for name, v in found.items()})
        if (plan.sources, plan.out, plan.move) != (tuple(sources), out, move):
            words = f"{' '.join(plan.sources)} --out {plan.out}{' --move' if plan.move else ''}"
            raise DataError(f"{home}: an unfinished join; end it first: python -m rwkvpipe.join {words}")
        log.info("%s: going on with a join that was interrupted", out)
        return plan
    pairs = _opened(sources, out, move)
    sizes = tuple(len(pair) * pair.dtype.itemsize for pair in pairs)
    width, mark = pairs[0].dtype.itemsize, max(pair.marks.itemsize for pair in pairs)
    plan = Join(tuple(sources), out, move, pairs[0].masked, width, sizes, mark)
    for left in home.iterdir():
        left.unlink()
    with atomic(home / "idx") as part:
        joined_index(part, pairs)
    write_json(planned, asdict(plan))
    return plan


class _Target:
    """The file that the sources' bytes of one kind go to, as long as they are together."""

    def __init__(self, plan: Join, kind: str, home: Path):
        self.plan, self.kind, self.home = plan, kind, home
        self.final = Path(f"{plan.out}.{kind}")
        self.path = self.final if plan.grows else home / kind
        self.sizes = plan.bytes(kind)
        self.record = home / f"{kind}.json"

    def fill(self, tell: Callable[[int], None]) -> None:
        """Bring everything here, from where an interrupted call left off, and put the file in place."""
        if not self.plan.grows and not self.path.exists() and self.final.exists():
            return  # an interrupted call placed it
        first = int(self.plan.grows) or int(self.plan.move and self._taken())
        with naming(self.path), open(os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666), "rb+", buffering=0) as file:
            if os.fstat(file.fileno()).st_size != sum(self.sizes):
                os.ftruncate(file.fileno(), sum(self.sizes))
            _settle(self.path.parent)
            for number in range(first, len(self.sizes)):
                source = Path(f"{self.plan.sources[number]}.{self.kind}")
                at = sum(self.sizes[:number])
                if self.plan.move:
                    self._move(source, file.fileno(), at, tell)
                else:
                    self._copy(source, file.fileno(), (number, at), tell)
            os.fsync(file.fileno())
        if not self.plan.grows:
            os.replace(self.path, self.final)

    def _taken(self) -> bool:
        """Whether the first source's file is the target, renamed; where that cannot be, its bytes are moved."""
        source = Path(f"{self.plan.sources[0]}.{self.kind}")
        marked = self.record.with_suffix(".taken")
        if marked.exists() and self.path.exists():
            return True
        if self.path.exists() or not source.exists() or source.stat().st_dev != self.home.stat().st_dev:
            return False
        write_json(marked, True)  # a kill between the two leaves the mark without the target, which means nothing
        os.rename(source, self.path)
        return True

    def _move(self, source: Path, target: int, at: int, tell: Callable[[int], None]) -> None:
        """Move a file's bytes, the last ones first, each cut off where it came from when it is safe here."""
        with naming(source), open(os.open(source, os.O_RDWR), "rb+", buffering=0) as file:
            end = os.fstat(file.fileno()).st_size
            while end:
                start = max(0, end - BLOCK)
                _block(file.fileno(), start, end - start, target, at + start)
                os.fsync(target)
                os.ftruncate(file.fileno(), end := start)
                tell(BLOCK)

    def _copy(self, source: Path, target: int, place: tuple[int, int], tell: Callable[[int], None]) -> None:
        """Copy a file's bytes; now and then it is noted how far it is."""
        (number, at), size = place, self.sizes[place[0]]
        done = read_json(self.record) if self.record.is_file() else [0, 0]
        if done[0] > number:
            return
        begin = done[1] if done[0] == number else 0
        with naming(source), open(source, "rb", buffering=0) as file:
            for count, start in enumerate(range(begin, size, BLOCK), 1):
                _block(file.fileno(), start, min(BLOCK, size - start), target, at + start)
                tell(BLOCK)
                if count % EVERY == 0:
                    os.fsync(target)
                    write_json(self.record, [number, start + BLOCK])
        os.fsync(target)
        write_json(self.record, [number + 1, 0])


def _settle(folder: Path) -> None:
    """Have the names of a folder's files on disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _block(source: int, start: int, size: int, target: int, at: int) -> None:
    """Copy bytes from one open file to another. Raises DataError where there are fewer."""
    data = memoryview(os.pread(source, size, start))
    if len(data) != size:
        raise DataError(f"a file to be joined ends at byte {start + len(data)}; it changed meanwhile, look what did it")
    while data:
        done = os.pwrite(target, data, at)
        data, at = data[done:], at + done


def _fill(plan: Join, home: Path) -> None:
    """Bring all tokens and marks to where they belong, and say now and then how far it is."""
    kinds, done = ("mask", "bin") if plan.masked else ("bin",), 0
    pace = Pace(f"{plan.out}: joined", sum(sum(plan.bytes(kind)) for kind in kinds))

    def tell(more: int) -> None:
        nonlocal done
        done += more
        pace.at(done)

    for kind in kinds:
        _Target(plan, kind, home).fill(tell)


def join(sources: Sequence[str | Path], out: str | Path, *, move: bool = False) -> Binidx:
    """Make one pair at `out` of several, in their order, masks too; returns it.

    Where `out` is the first source the others are appended to it. With `move` the sources are used up; without they
    stay. Raises DataError in one line for pairs that do not go together.
    """
    names, to = [prefix_of(source) for source in sources], prefix_of(out)
    home = _home(to)
    with _alone(home, to):
        plan = _plan(home, names, to, move)
        if (home / "idx").exists():
            _fill(plan, home)
            os.replace(home / "idx", f"{to}.idx")
            _settle(Path(to).parent)
        for source in plan.sources if plan.move else ():
            for kind in ("bin", "mask", "idx") if source != to else ():
                Path(f"{source}.{kind}").unlink(missing_ok=True)
        for left in home.iterdir():
            if left.name != "plan.json":
                left.unlink()
        (home / "plan.json").unlink()
    return Binidx(to)


def forget(out: str | Path) -> None:
    """Throw away what an interrupted copy to `out` has left."""
    shutil.rmtree(_home(prefix_of(out)), ignore_errors=True)
