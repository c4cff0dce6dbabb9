"""The one door to files from outside: paths, file:// and http(s):// addresses, repositories of hubs; whole and checked.

    HF_ENDPOINT, HF_TOKEN, HF_HUB_OFFLINE        as Hugging Face's own programs take them
    MODELSCOPE_ENDPOINT, MODELSCOPE_API_TOKEN    the same of ModelScope

A token goes to the hub or the endpoint that the environment names, and nowhere else: not to mirrors of a config, not
behind a redirect, not into a log.
"""

import hashlib
import logging
import os
import re
import shutil
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from urllib.parse import unquote, urlsplit

from rwkvpipe.base.errors import HubError
from rwkvpipe.base.files import atomic, digest
from rwkvpipe.weights import dataset, repository
from rwkvpipe.weights.part import Part, written
from rwkvpipe.weights.repository import Repo, RepoFile
from rwkvpipe.weights.transfer import bring, shown

log = logging.getLogger("rwkvpipe")

AT_ONCE = 4  # files of a repository


def _kind(source: str) -> str:
    """`http` for what comes through the network, `path` for what lies here. Raises HubError for other addresses."""
    scheme, found, _ = source.partition("://")
    if not found:
        return "path"
    try:
        parts = urlsplit(source)
        host, _ = parts.hostname, parts.port
    except ValueError:  # its text would repeat parts of the address
        raise HubError(f"an address of {scheme} that cannot be read: host or port are wrong; mend it") from None
    if parts.scheme in ("http", "https"):
        if not host:
            raise HubError(f"{shown(source)}: an address without a host; mend it")
        return "http"
    if parts.scheme == "file" and host in (None, "localhost"):
        return "path"
    raise HubError(f"{shown(source)}: known are paths, file:///path, http:// and https://; fetch it by other means")


def _checked(path: Path, name: str, sha256: str | None) -> None:
    """Raise HubError unless the file has the digest that is wanted."""
    if sha256 is not None and (found := digest(path)) != sha256.lower():
        raise HubError(
            f"{name}: sha256 is {found}, wanted is {sha256.lower()}; the file was changed or damaged, nothing is kept:"
            " mend sha256 or the source"
        )


def _copy(source: Path, out: Path, sha256: str | None) -> None:
    if not source.is_file():
        what = "a folder; name one file" if source.is_dir() else "no such file; mend the path"
        raise HubError(f"{source}: {what}")
    try:
        source.open("rb").close()
    except OSError as error:
        raise HubError(f"{source}: cannot be read ({error.strerror}); mend its rights") from None
    with written(out), atomic(out) as part:
        shutil.copyfile(source, part)
        _checked(part, str(source), sha256)


def is_offline() -> bool:
    """Whether the environment forbids the network."""
    return os.environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "true", "yes", "on")


def _endpoints(repo: Repo, mirrors: Sequence[str]) -> list[tuple[str, dict[str, str]]]:
    """Where to ask for a repository, in this order, and what to tell there."""
    if repo.hub == "hf":
        first, token = os.environ.get("HF_ENDPOINT"), os.environ.get("HF_TOKEN", "").strip()
    else:
        first, token = os.environ.get("MODELSCOPE_ENDPOINT"), os.environ.get("MODELSCOPE_API_TOKEN", "").strip()
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    if token and repo.hub == "modelscope":
        headers["Cookie"] = f"m_session_id={token}"
    if not token.isprintable() or ";" in token:
        raise HubError("the token in the environment is no token: it holds what none does; set it again")
    for address in (first, *mirrors):
        if address and _kind(address) != "http":
            raise HubError(f"{shown(address)}: an endpoint is http:// or https://; mend it")
    # mirrors come first: whoever names one wants it asked
    places = [(mirror.rstrip("/"), {}) for mirror in mirrors]
    return [*places, ((first or repository.HUBS[repo.hub]).rstrip("/"), headers)]


def _anywhere(repo: Repo, mirrors: Sequence[str], use: Callable[[str, dict[str, str]], None]) -> None:
    """`use` an endpoint, the next one where that fails. Raises the last HubError."""
    places = _endpoints(repo, mirrors)
    for number, (endpoint, headers) in enumerate(places, 1):
        try:
            return use(endpoint, headers)
        except HubError as error:
            if number == len(places):
                raise
            log.info("%s; asking %s", error, shown(places[number][0]))


def listed(source: str, mirrors: Sequence[str] = ()) -> list[RepoFile]:
    """What a repository holds, as its hub says. Raises HubError."""
    found = repository.parse(source)
    if found is None:
        raise HubError(f"{shown(source)}: no repository; give hf://owner/name or modelscope://owner/name")
    rows: list[RepoFile] = []
    _anywhere(found[0], mirrors, lambda endpoint, headers: rows.extend(repository.files(found[0], endpoint, headers)))
    return sorted(rows, key=lambda file: file.path)


def _sound(path: Path, file: RepoFile, sha256: str | None = None) -> str | None:
    """What is wrong with a file, by the digest that is wanted and by what its hub says; None if nothing."""
    size = path.stat().st_size
    if file.size is not None and size != file.size:
        return f"has {size} bytes, the hub says {file.size}"
    for wanted in filter(None, (sha256, file.sha256)):
        if (found := digest(path)) != wanted.lower():
            return f"sha256 is {found}, wanted is {wanted.lower()}"
    if file.sha1 and not file.sha256:  # git names a file by its length and bytes
        found = hashlib.sha1(f"blob {size}\0".encode() + path.read_bytes(), usedforsecurity=False).hexdigest()
        if found != file.sha1:
            return f"git's digest is {found}, wanted is {file.sha1}"
    return None


def check(path: Path, sha256: str | None) -> None:
    """Raise HubError unless a file that is here is one, and has the digest that is wanted."""
    if not path.is_file():
        raise HubError(f"{path}: no file; fetch it where there is a network")
    _checked(path, str(path), sha256)


def _get(repo: Repo, file: RepoFile, out: Path, place: tuple[str, dict[str, str]], sha256: str | None = None) -> None:
    """Put one file of a repository at `out`, unless it is there."""
    name = f"{repo.name}/{file.path}"
    if out.is_file() and _sound(out, file, sha256) is None:
        log.info("%s: there already", name)
        return
    endpoint, headers = place
    with Part(out, f"{repo} {file}") as part:  # the same file, from whichever mirror
        bring(repo.address(endpoint, file.path), part, name, headers, size=file.size)
        wrong = _sound(part.path, file, sha256)
        if wrong:
            part.discard()
            raise HubError(f"{name} of {shown(endpoint)}: {wrong}; the file was changed or damaged, nothing is kept")
        part.finish(out)


def _file_of(repo: Repo, path: str, out: Path, sha256: str | None, endpoint: str, headers: dict[str, str]) -> None:
    folder = path.rpartition("/")[0]
    found = [file for file in repository.files(repo, endpoint, headers, folder) if file.path == path]
    if not found:
        raise HubError(
            f"{repo.name} of {shown(endpoint)}: has no file {path} at {repo.revision}; see what it has: --list"
        )
    _get(repo, found[0], out, (endpoint, headers), sha256)


def _all_of(repo: Repo, patterns: tuple[str, ...], out: Path, endpoint: str, headers: dict[str, str]) -> None:
    choose, kind = (repository.chosen, "weights") if repo.kind == "models" else (dataset.documents, "data")
    found = choose(repository.files(repo, endpoint, headers), patterns)
    if not found:
        raise HubError(f"{repo.name} of {shown(endpoint)}: no file fits {' '.join(patterns) or f'any form of {kind}'}")
    # beside its place until all are there; what is there is kept
    coming = out if out.is_dir() else out.with_name(f".{out.name}.coming")
    pool = ThreadPoolExecutor(AT_ONCE)
    try:
        jobs = [pool.submit(_get, repo, file, coming / file.path, (endpoint, headers)) for file in found]
        for job in jobs:
            job.result()
    except HubError:
        pool.shutdown(cancel_futures=True)  # what has begun keeps what comes
        raise
    finally:
        pool.shutdown(wait=False, cancel_futures=True)  # who is stopped waits for none
    if coming != out:
        with written(out):
            coming.rename(out)
    log.info("%s: %d files of %s", out, len(found), repo.name)


def fetch_repository(source: str, out: Path, *, patterns: Sequence[str], mirrors: Sequence[str]) -> None:
    """Put the files of a repository that fit `patterns` into the folder `out`, several at once. Raises HubError.

    Of a data set the address may end in a pattern; without any its rows come, those of the training part if parts are
    told.
    """
    repo, pattern = repository.parse(source) or (None, "")
    if repo is None:
        raise HubError(f"{shown(source)}: no repository; give hf://owner/name or modelscope://owner/name")
    if out.is_file():
        raise HubError(f"{out}: a file; name the folder to write")
    wanted = (*patterns, *([pattern] if pattern else ()))
    _anywhere(repo, mirrors, partial(_all_of, repo, wanted, out))


def fetch(source: str | Path, out: str | Path, sha256: str | None = None, *, mirrors: Sequence[str] = ()) -> None:
    """Put the file at `source`, a path or an address, at `out`: whole, or not at all.

    A download that breaks off goes on where it stopped, now or when it is asked for again; what is there already and
    has its digest is not fetched again. With `sha256` (hex) the bytes are checked before they are put in place; those
    of a hub's file are checked by what the hub says in any case. `mirrors` of hubs are asked before the hub itself.
    Raises HubError in one line, without passwords and queries.
    """
    source, out = str(source), Path(out)
    if sha256 is not None and not re.fullmatch(r"[0-9a-fA-F]{64}", sha256):
        raise HubError(f"sha256: {sha256[:70]!r} is no digest; it has 64 hexadecimal digits")
    if out.is_dir():
        raise HubError(f"{out}: a folder; name the file to write")
    if (found := repository.parse(source)) is not None:
        if not found[1]:
            raise HubError(f"{source}: a whole repository; name a file of it, or a folder to write it to")
        return _anywhere(found[0], mirrors, partial(_file_of, *found, out, sha256))
    if _kind(source) == "path":
        _copy(Path(unquote(urlsplit(source).path) if source.startswith("file://") else source), out, sha256)
        log.info("%s: copied", out)
        return
    if sha256 is not None and out.is_file() and digest(out) == sha256.lower():
        log.info("%s: there already", out)
        return
    with Part(out, source) as part:
        bring(source, part, out.name)
        try:
            _checked(part.path, shown(source), sha256)
        except HubError:
            part.discard()
            raise
        part.finish(out)
    log.info("%s: fetched from %s", out, shown(source))
