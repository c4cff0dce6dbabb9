"""The one door to files from outside: paths, file:// and http(s):// addresses, whole and checked."""

import logging
import re
import shutil
from pathlib import Path
from urllib.parse import unquote, urlsplit

from rwkvpipe.base.errors import HubError
from rwkvpipe.base.files import atomic, digest
from rwkvpipe.weights.part import Part, written
from rwkvpipe.weights.transfer import bring, shown

log = logging.getLogger("rwkvpipe")


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


def fetch(source: str | Path, out: str | Path, sha256: str | None = None) -> None:
    """Put the file at `source`, a path or an address, at `out`: whole, or not at all.

    A download that breaks off goes on where it stopped, now or when it is asked for again. With `sha256` (hex) the
    bytes are checked before they are put in place. Raises HubError in one line, without passwords and queries.
    """
    source, out = str(source), Path(out)
    if sha256 is not None and not re.fullmatch(r"[0-9a-fA-F]{64}", sha256):
        raise HubError(f"sha256: {sha256[:70]!r} is no digest; it has 64 hexadecimal digits")
    if out.is_dir():
        raise HubError(f"{out}: a folder; name the file to write")
    if _kind(source) == "path":
        _copy(Path(unquote(urlsplit(source).path) if source.startswith("file://") else source), out, sha256)
        log.info("%s: copied", out)
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
