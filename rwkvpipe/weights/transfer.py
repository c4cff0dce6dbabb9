"""Downloads over HTTP that go on where they broke off, from the standard library alone."""

import base64
import logging
import re
import shutil
import ssl
import time
from calendar import timegm
from email.utils import parsedate
from http.client import HTTPException, HTTPResponse, InvalidURL, responses
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.parse import quote, unquote, urljoin, urlsplit, urlunsplit
from urllib.request import HTTPRedirectHandler, Request, build_opener

from rwkvpipe.base.errors import DataError, HubError
from rwkvpipe.base.files import parse_json
from rwkvpipe.weights.part import Part

log = logging.getLogger("rwkvpipe")

BLOCK = 1 << 20  # bytes read at once
TIMEOUT = 60.0  # seconds without a byte
TRIES = 6  # failures one after another that bring no byte more
PAUSE = 1.0  # seconds after the first failure, doubled after each further one
LONGEST = 60.0  # seconds of pause, whatever a server asks for
TELL = 5.0  # seconds between two lines of progress
PASSING = (408, 425, 429, *(code for code in range(500, 600) if code not in (501, 505)))  # statuses gone soon, maybe
PRIVATE = ("Authorization", "Cookie")  # headers for the server alone that they were meant for
PROXY = "Proxy-authorization"
LARGEST = 1 << 26  # bytes of an answer that is no file
SAFE = "/%:@!$&'()*+,;=~-._?[]"  # what stays as it is in an address


def shown(url: str) -> str:
    """An address as logs may have it: without user, password and query, where secrets stand."""
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}{'?...' if parts.query else ''}"


def amount(count: float) -> str:
    """A number of bytes as people say it."""
    units = ["B", "kB", "MB", "GB", "TB"]
    while count >= 1000 and len(units) > 1:
        count, units = count / 1000, units[1:]
    return f"{count:.0f} B" if units[0] == "B" else f"{count:.1f} {units[0]}"


def _request(url: str, headers: dict[str, str]) -> Request:
    """A request whose user and password, if the address has them, stand in a header."""
    parts = urlsplit(url)
    user, at, host = parts.netloc.rpartition("@")
    if at:
        headers = headers | {"Authorization": "Basic " + base64.b64encode(unquote(user).encode()).decode()}
    plain = urlunsplit((parts.scheme, host, quote(parts.path or "/", SAFE), quote(parts.query, SAFE), ""))
    return Request(plain, headers=headers)


def _origin(url: str) -> tuple[str, str]:
    parts = urlsplit(url)
    return parts.scheme, parts.netloc.rpartition("@")[2]


class _Redirects(HTTPRedirectHandler):
    """Follows to http and https alone, and shows a password to nobody but the server it is for."""

    def redirect_request(self, req, fp, code, msg, headers, newurl):
        if urlsplit(newurl).scheme not in ("http", "https"):
            raise HTTPError(req.full_url, code, "", headers, fp)
        same = _origin(req.full_url) == _origin(newurl)
        # those that were asked for, without what was added on the way: Host names the server that sends elsewhere, and
        # a proxy's password is added again where there is a proxy
        told = {key: value for key, value in req.headers.items() if key != PROXY}
        return _request(newurl, {key: value for key, value in told.items() if same or key not in PRIVATE})


def _answer(url: str, headers: dict[str, str]) -> HTTPResponse:
    """The server's answer. Raises HubError where trying again cannot help, else HTTPError, OSError, HTTPException."""
    try:
        return build_opener(_Redirects).open(_request(url, headers), timeout=TIMEOUT)
    except InvalidURL:
        raise HubError(f"{shown(url)}: not an address that can be asked for; mend it") from None
    except HTTPError as error:
        error.close()
        if error.code in PASSING or (error.code == 416 and "Range" in headers):
            raise
        if 300 <= error.code < 400:
            problem = "redirects in a circle, or to what is not http or https"
        else:
            problem = f"the server says {error.code} {responses.get(error.code, '')}".rstrip()
        raise HubError(f"{shown(url)}: {problem}; check the address and your right to it") from None
    except URLError as error:
        if isinstance(error.reason, ssl.SSLCertVerificationError):
            raise HubError(
                f"{shown(url)}: the certificate cannot be trusted ({error.reason.verify_message}); check the address,"
                " the clock and the machine's certificates"
            ) from None
        raise
    except ValueError:  # its text would repeat parts of the address
        raise HubError(f"{shown(url)}: redirects to what is no address; check the endpoint") from None


def _length(response: HTTPResponse) -> int | None:
    """Bytes of the whole file, None if the server does not say."""
    if response.status == 206:
        found = re.fullmatch(r"bytes \d+-\d+/(\d+)", response.headers.get("Content-Range", "").strip())
        return int(found[1]) if found else None
    length = response.headers.get("Content-Length", "").strip()
    return int(length) if length.isdecimal() and not response.chunked else None


def _about(response: HTTPResponse) -> dict:
    """What tells a file from another one at the same address."""
    headers = response.headers
    return {"etag": headers.get("ETag"), "modified": headers.get("Last-Modified"), "length": _length(response)}


def _goes_on(response: HTTPResponse, start: int, note: dict) -> bool:
    """Whether an answer holds the bytes from `start` on of the file that the note speaks of."""
    about = _about(response)
    same = all(about[key] == note.get(key) for key in about if about[key] is not None and note.get(key) is not None)
    return same and response.headers.get("Content-Range", "").startswith(f"bytes {start}-")


class _Progress:
    """A line now and then: how much, how fast, how long still."""

    def __init__(self, name: str, size: int, length: int | None):
        self.name, self.first, self.length = name, size, length
        self.began = self.told = time.monotonic()

    def tell(self, size: int, *, last: bool = False) -> None:
        now = time.monotonic()
        if not last and now - self.told < TELL:
            return
        self.told = now
        rate = (size - self.first) / max(now - self.began, 1e-6)
        if last or self.length is None:
            log.info("%s: %s, %s/s%s", self.name, amount(size), amount(rate), ", whole" if last else "")
            return
        left = int((self.length - size) / rate) if rate > 0 else 0
        minutes = f"{left // 3600}:{left % 3600 // 60:02}:{left % 60:02}" if rate > 0 else "nobody knows how long"
        share = 100 * size // max(self.length, 1)
        log.info(
            "%s: %s of %s (%d %%), %s/s, %s left",
            self.name, amount(size), amount(self.length), share, amount(rate), minutes,
        )  # fmt: skip


def _room(part: Part, length: int | None) -> None:
    """Raise HubError when the disk cannot hold the rest."""
    free, wanted = shutil.disk_usage(part.path.parent).free, (length or 0) - part.size
    if wanted > free:
        raise HubError(
            f"{part.path.parent}: {amount(wanted)} are still to come, the disk has {amount(free)} free; make room"
        )


def _receive(response: HTTPResponse, part: Part, progress: _Progress) -> None:
    """Append what comes. Raises OSError or HTTPException when the connection breaks, HubError for the disk."""
    length, size = progress.length, part.size
    # read1 gives what has come even if no more follows; the count is ours because it does not end at the length
    while size != length and (block := response.read1(BLOCK if length is None else min(BLOCK, length - size))):
        part.add(block)
        size += len(block)
        progress.tell(size)
    if length is not None and size < length:
        raise ConnectionError(f"closed after {amount(size)} of {amount(length)}")


def _once(url: str, part: Part, name: str, more: dict[str, str], size: int | None) -> bool:
    """Ask for what is missing and take it. False when the server's file is another than before: ask for all of it."""
    start, note = part.start(), part.note()
    headers = {"User-Agent": "rwkvpipe", "Accept-Encoding": "identity", **more}
    if start:
        etag = note.get("etag") or ""
        # a weak etag must not stand in If-Range; the answer is compared with the note in any case
        known = etag if etag and not etag.startswith("W/") else note.get("modified")
        headers |= {"Range": f"bytes={start}-"} | ({"If-Range": known} if known else {})
    try:
        response = _answer(url, headers)
    except HTTPError as error:
        if error.code != 416:
            raise
        part.clear()
        return False
    with response:
        if response.status not in (200, 206) or (response.status == 206 and not start):
            raise HubError(f"{shown(url)}: the server says {response.status} to a plain question; check the address")
        if response.headers.get("Content-Encoding", "identity") != "identity":
            raise HubError(f"{shown(url)}: the server sends the file packed, against what it was asked; use another")
        if response.status == 206 and not _goes_on(response, start, note):
            part.clear()
            return False
        if response.status == 200:
            if start:
                log.info("%s: the server's file has changed, or it cannot go on in the middle; from the start", name)
            part.begin(_about(response))
        length = _length(response) if response.status == 200 else note.get("length") or _length(response)
        length = size if length is None else length
        _room(part, length)
        at = f"from {amount(start)} on" if response.status == 206 else amount(length) if length else "size unknown"
        log.info("%s: fetching, %s", name, at)
        progress = _Progress(name, part.size, length)
        _receive(response, part, progress)
        progress.tell(part.size, last=True)
    return True


def _why(error: Exception) -> str:
    """A failure in words that hold nothing of the address."""
    if isinstance(error, HTTPError):
        return f"the server says {error.code} {responses.get(error.code, '')}".rstrip()
    if isinstance(error, URLError):
        return _why(error.reason) if isinstance(error.reason, Exception) else "no connection"
    if isinstance(error, TimeoutError):
        return "no answer in time"
    if isinstance(error, ConnectionError) and error.errno is None and error.args:
        return f"the connection was {error.args[0]}" if str(error.args[0]).startswith("closed") else "connection lost"
    if isinstance(error, HTTPException):
        return "the connection was closed in the middle"
    return getattr(error, "strerror", None) or f"no connection ({type(error).__name__})"


def _pause(error: Exception, failures: int) -> float:
    """Seconds to wait: twice as long after each failure, or as long as the server asks for."""
    asked = error.headers.get("Retry-After", "").strip() if isinstance(error, HTTPError) and error.headers else ""
    wait = PAUSE * 2 ** (failures - 1)
    if re.fullmatch("[0-9]{1,9}", asked):
        wait = float(asked)
    elif (moment := parsedate(asked)) is not None:
        wait = max(timegm(moment) - time.time(), wait)
    return min(wait, LONGEST)


def _again(error: Exception, failures: int, url: str, name: str, kept: str) -> None:
    """Wait for the next try. Raises HubError after the last one."""
    if failures >= TRIES:
        raise HubError(f"{shown(url)}: {_why(error)}, {failures} times; {kept}run it again to go on") from None
    wait = _pause(error, failures)
    log.info("%s: %s; again in %.0f s", name, _why(error), wait)
    time.sleep(wait)


def bring(url: str, part: Part, name: str, headers: dict[str, str] | None = None, *, size: int | None = None) -> None:
    """Fill `part` with the whole file at `url`, again and again where the connection breaks.

    `size` is how long it is, by others, should the server not say. `headers` are asked with too; secret ones are told
    to no other server. Raises HubError when the file cannot be had, or not be written.
    """
    failures, most = 0, part.size
    while True:
        try:
            if _once(url, part, name, headers or {}, size):
                return
            log.info("%s: the server's file is another than the one begun; from the start", name)
        except (OSError, HTTPException) as error:
            failures = 1 if part.size > most else failures + 1
            most = max(most, part.size)
            _again(error, failures, url, name, "what came is kept: ")


def _whole(url: str, headers: dict[str, str]) -> tuple[Any, str | None]:
    """What an answer says in JSON, and the address of its next page. Raises as `_answer`, HubError for no JSON."""
    with _answer(url, {"User-Agent": "rwkvpipe", "Accept-Encoding": "identity", **headers}) as response:
        body = response.read(LARGEST + 1)
        if len(body) > LARGEST:
            raise HubError(f"{shown(url)}: an answer without end; check the address")
        if (length := _length(response)) is not None and len(body) < length:
            raise ConnectionError(f"closed after {amount(len(body))} of {amount(length)}")
        following = re.search(r'<([^>]*)>\s*;\s*rel="next"', response.headers.get("Link", ""))
    try:
        value = parse_json(body, shown(url))
    except DataError:
        if body[:1] in (b"", b"[", b"{"):  # a server that says no length is cut off without a word
            raise ConnectionError("closed in the middle") from None
        raise HubError(f"{shown(url)}: no list of files, and no JSON at all; check the endpoint") from None
    return value, urljoin(response.url, following[1]) if following else None


def ask(url: str, headers: dict[str, str]) -> tuple[Any, str | None]:
    """A short answer in JSON, again and again where the connection breaks, and the address of its next page.

    A next page on another server is asked for nothing: HubError.
    """
    failures = 0
    while True:
        try:
            value, following = _whole(url, headers)
        except (OSError, HTTPException) as error:
            failures += 1
            _again(error, failures, url, "the hub", "")
            continue
        if following and _origin(following) != _origin(url):
            raise HubError(f"{shown(url)}: goes on at another server; check the endpoint")
        return value, following
