"""Files come whole or not at all, go on where they broke off, and no secret is told."""

import base64
import hashlib
import logging
import shutil
import threading
from collections import deque
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.error import HTTPError
from urllib.request import ProxyHandler

import pytest

from rwkvpipe.base.errors import HubError
from rwkvpipe.weights import part, transfer
from rwkvpipe.weights.hub import fetch

DATA = bytes(number * 7 % 251 for number in range(40_000))
OTHER = DATA[::-1] + b"longer"


class Server(ThreadingHTTPServer):
    """A server with one file that can be told to misbehave; `asked` is the Range of every request."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.data, self.etag, self.modified = DATA, '"one"', "Sat, 21 Nov 2026 00:00:00 GMT"
        self.ranges = self.length = self.mind_if_range = True
        self.cuts = deque()  # after how many bytes the next answers break off
        self.statuses = deque()  # what the next answers say instead
        self.headers: dict[str, str] = {}
        self.redirect = None
        self.asked, self.seen = [], []

    def url(self, path="/file.bin"):
        return f"http://127.0.0.1:{self.server_port}{path}"


class Handler(BaseHTTPRequestHandler):
    """Answers for Server."""

    def log_message(self, *words):
        """Quiet."""

    def do_GET(self):
        server = self.server
        server.asked.append(self.headers.get("Range"))
        server.seen.append(dict(self.headers) | {"path": self.path})
        if server.redirect and self.path != "/moved":
            return self.head(302, {"Location": server.redirect, "Content-Length": "0"})
        if server.statuses and (status := server.statuses.popleft()):
            return self.head(status, {"Content-Length": "0", **server.headers})
        asked = self.headers.get("Range") if server.ranges else None
        known = self.headers.get("If-Range")
        if server.mind_if_range and known not in (None, server.etag, server.modified):
            asked = None
        start = int(asked.removeprefix("bytes=").rstrip("-")) if asked else 0
        if start >= len(server.data) and asked:
            return self.head(416, {"Content-Range": f"bytes */{len(server.data)}", "Content-Length": "0"})
        body = server.data[start:]
        about = {"ETag": server.etag, "Last-Modified": server.modified, **server.headers}
        if server.length:
            about["Content-Length"] = str(len(body))
        if asked:
            about["Content-Range"] = f"bytes {start}-{len(server.data) - 1}/{len(server.data)}"
        self.head(206 if asked else 200, about)
        self.wfile.write(body[: server.cuts.popleft()] if server.cuts else body)

    def head(self, status, headers):
        self.send_response(status)
        for name, value in headers.items():
            if value is not None:
                self.send_header(name, value)
        self.end_headers()


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(transfer, "PAUSE", 0.001)
    with Server() as running:
        thread = threading.Thread(target=running.serve_forever, args=(0.01,))
        thread.start()
        yield running
        running.shutdown()
        thread.join()


def sha(data):
    return hashlib.sha256(data).hexdigest()


def refused(source, out, *words):
    """The one line with which a fetch is refused; nothing is in place then."""
    with pytest.raises(HubError) as caught:
        fetch(source, out, *words)
    assert "\n" not in str(caught.value) and not out.exists()
    return str(caught.value)


def only(folder):
    return [path.name for path in folder.iterdir()]


def test_a_path_and_its_address_are_copied(tmp_path):
    (tmp_path / "a b.bin").write_bytes(DATA)
    fetch(tmp_path / "a b.bin", tmp_path / "new/out", sha(DATA).upper())
    assert (tmp_path / "new/out").read_bytes() == DATA
    fetch((tmp_path / "a b.bin").as_uri(), tmp_path / "new/again")
    assert (tmp_path / "new/again").read_bytes() == DATA


def test_a_wrong_digest_leaves_nothing(tmp_path, server):
    (tmp_path / "in").mkdir()
    (tmp_path / "in/a").write_bytes(DATA)
    for source in (str(tmp_path / "in/a"), server.url()):
        line = refused(source, tmp_path / "out/a", "0" * 64)
        assert f"sha256 is {sha(DATA)}, wanted is {'0' * 64}" in line
        assert not (tmp_path / "out").exists() or only(tmp_path / "out") == []


@pytest.mark.parametrize(
    "source, problem",
    [
        ("gone.bin", "gone.bin: no such file"),
        (".", "a folder; name one file"),
        ("ftp://host/a", "known are paths"),
        ("file://host/a", "known are paths"),
        ("http:///a", "an address without a host"),
        ("http://user:secret@host:secret/a", "host or port are wrong"),
        ("http://[secret/a", "host or port are wrong"),
    ],
)
def test_what_is_no_source_is_named(tmp_path, monkeypatch, source, problem):
    monkeypatch.chdir(tmp_path)
    line = refused(source, tmp_path / "out")
    assert problem in line and "secret" not in line


def test_what_cannot_be_a_digest_or_a_place_is_refused(tmp_path):
    (tmp_path / "a").write_bytes(DATA)
    assert "64 hexadecimal digits" in refused(tmp_path / "a", tmp_path / "b", "abc")
    with pytest.raises(HubError, match="a folder; name the file to write"):
        fetch(tmp_path / "a", tmp_path)


def test_a_download_is_whole_and_leaves_nothing_beside_it(tmp_path, server, caplog):
    caplog.set_level(logging.INFO)
    fetch(server.url(), tmp_path / "out", sha(DATA))
    assert (tmp_path / "out").read_bytes() == DATA and only(tmp_path) == ["out"]
    assert server.asked == [None] and "40.0 kB" in caplog.text and "whole" in caplog.text


def test_a_broken_connection_goes_on_where_it_stopped(tmp_path, server, caplog):
    caplog.set_level(logging.INFO)
    server.cuts += [10_000, 0, 5_000]
    fetch(server.url(), tmp_path / "out", sha(DATA))
    assert server.asked == [None, "bytes=10000-", "bytes=10000-", "bytes=15000-"]
    assert "closed after 10.0 kB of 40.0 kB" in caplog.text


@pytest.mark.parametrize("etag", ['"one"', 'W/"one"', None])
def test_a_later_call_goes_on_too(tmp_path, server, monkeypatch, etag):
    monkeypatch.setattr(transfer, "TRIES", 1)
    server.etag = etag
    server.cuts += [10_000]
    assert "kept" in refused(server.url(), tmp_path / "out")
    assert sorted(only(tmp_path)) == [".out.part", ".out.part.json"]
    assert "127.0.0.1" not in (tmp_path / ".out.part.json").read_text()
    fetch(server.url(), tmp_path / "out")
    assert (tmp_path / "out").read_bytes() == DATA and only(tmp_path) == ["out"]
    assert server.asked == [None, "bytes=10000-"]
    assert server.seen[1]["If-Range"] == ('"one"' if etag == '"one"' else server.modified)


@pytest.mark.parametrize("data", [OTHER, OTHER[:5000]])
@pytest.mark.parametrize("mind_if_range", [True, False])
def test_a_changed_file_is_fetched_from_the_start(tmp_path, server, monkeypatch, data, mind_if_range):
    monkeypatch.setattr(transfer, "TRIES", 1)
    server.cuts += [10_000]
    refused(server.url(), tmp_path / "out")
    server.data, server.etag, server.mind_if_range = data, '"two"', mind_if_range
    fetch(server.url(), tmp_path / "out", sha(data))
    assert (tmp_path / "out").read_bytes() == data


def test_a_file_that_changes_only_in_size_is_noticed(tmp_path, server, monkeypatch):
    monkeypatch.setattr(transfer, "TRIES", 1)
    server.cuts += [10_000]
    refused(server.url(), tmp_path / "out")
    server.data = OTHER
    # the server claims that nothing has changed
    fetch(server.url(), tmp_path / "out")
    assert (tmp_path / "out").read_bytes() == OTHER


@pytest.mark.parametrize("how", [{"ranges": False}, {"etag": None, "modified": None}])
def test_servers_that_cannot_go_on_send_it_again(tmp_path, server, how):
    vars(server).update(how)
    server.cuts += [10_000]
    fetch(server.url(), tmp_path / "out")
    assert (tmp_path / "out").read_bytes() == DATA and len(server.asked) == 2


def test_a_part_of_another_address_is_not_gone_on_with(tmp_path, server, monkeypatch):
    monkeypatch.setattr(transfer, "TRIES", 1)
    server.cuts += [10_000]
    refused(server.url("/other"), tmp_path / "out")
    fetch(server.url(), tmp_path / "out")
    assert server.asked == [None, None]


@pytest.mark.parametrize("spoil", ["{", "[]", None])
def test_a_part_without_a_readable_note_is_not_gone_on_with(tmp_path, server, spoil):
    (tmp_path / ".out.part").write_bytes(b"x" * 100)
    if spoil:
        (tmp_path / ".out.part.json").write_text(spoil)
    fetch(server.url(), tmp_path / "out")
    assert (tmp_path / "out").read_bytes() == DATA and server.asked == [None]


def test_a_part_that_was_whole_already_is_checked_with_one_byte(tmp_path, server, monkeypatch):
    monkeypatch.setattr(part.Part, "finish", lambda *_: (_ for _ in ()).throw(HubError("killed here")))
    refused(server.url(), tmp_path / "out")
    monkeypatch.undo()
    fetch(server.url(), tmp_path / "out")
    assert server.asked == [None, f"bytes={len(DATA) - 1}-"] and (tmp_path / "out").read_bytes() == DATA


def test_an_empty_file_is_a_file(tmp_path, server):
    server.data = b""
    fetch(server.url(), tmp_path / "out")
    assert (tmp_path / "out").read_bytes() == b"" and only(tmp_path) == ["out"]


def test_a_file_of_unknown_size_is_taken_to_its_end(tmp_path, server):
    server.length = False
    fetch(server.url(), tmp_path / "out", sha(DATA))
    assert (tmp_path / "out").read_bytes() == DATA


def test_passing_troubles_are_waited_for_and_lasting_ones_named(tmp_path, server, monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    server.headers = {"Retry-After": "0"}
    server.statuses += [503, 429, 500]
    fetch(server.url(), tmp_path / "out")
    assert "the server says 503 Service Unavailable; again in 0 s" in caplog.text
    server.statuses += [404]
    assert "the server says 404 Not Found" in refused(server.url(), tmp_path / "b") and len(server.asked) == 5
    server.statuses += [503] * transfer.TRIES
    assert "503 Service Unavailable, 6 times" in refused(server.url(), tmp_path / "b")


@pytest.mark.parametrize(
    ("asked", "wait"),
    [("7", 7), ("Sat, 21 Nov 2026 00:00:30 GMT", 30), ("Fri, 20 Nov 2026 00:00:00 GMT", 1), ("3600", 60)]
    + [(odd, 1) for odd in ("", "soon", "-3", "1e9", "\u0663", "9" * 50)],
)
def test_a_server_says_when_to_ask_again_as_a_number_or_a_date(monkeypatch, asked, wait):
    monkeypatch.setattr(transfer.time, "time", lambda: 1795219200.0)
    error = HTTPError("http://a/b", 429, "", {"Retry-After": asked}, None)
    assert transfer._pause(error, 1) == wait


def test_nobody_there_is_said_after_some_tries(tmp_path, monkeypatch):
    monkeypatch.setattr(transfer, "PAUSE", 0.001)
    with Server() as gone:
        url = gone.url()
    assert "Connection refused, 6 times" in refused(url, tmp_path / "out")


def test_a_server_that_falls_silent_is_asked_again(tmp_path, server, monkeypatch):
    monkeypatch.setattr(transfer, "TIMEOUT", 0.05)
    monkeypatch.setattr(transfer, "TRIES", 2)
    monkeypatch.setattr(Handler, "do_GET", lambda self: threading.Event().wait(0.3))
    assert "no answer in time, 2 times" in refused(server.url(), tmp_path / "out")


def test_passwords_and_queries_are_used_but_never_told(tmp_path, server, monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(transfer, "TRIES", 2)
    url = server.url("/file.bin?token=hidden").replace("http://", "http://me:se%20cret@")
    server.cuts += [100]
    fetch(url, tmp_path / "out")
    assert server.seen[1]["Authorization"] == "Basic " + base64.b64encode(b"me:se cret").decode()
    assert server.seen[0]["path"] == "/file.bin?token=hidden"
    lines = [refused(url, tmp_path / "b", "0" * 64)]
    for statuses in ([403], [503, 503]):
        server.statuses += statuses
        lines.append(refused(url, tmp_path / "b"))
    for line in [*lines, caplog.text]:
        assert not any(secret in line for secret in ("hidden", "cret", "me:"))
    assert "/file.bin?..." in lines[0]


def test_redirects_are_followed_to_the_web_alone(tmp_path, server, monkeypatch):
    server.redirect = "/moved"
    fetch(server.url(), tmp_path / "out")
    assert (tmp_path / "out").read_bytes() == DATA
    for target in ("file:///etc/passwd", "ftp://127.0.0.1/x", server.url(), "data:,x"):
        server.redirect = target
        assert "redirects in a circle, or to what is not http" in refused(server.url(), tmp_path / "b")
    for target in ("http://[::1", "http://127.0.0.1:99999/x", "http://127.0.0.1:x/", "http://" + "a" * 70 + "/"):
        server.redirect = target
        monkeypatch.setattr(transfer, "TRIES", 1)
        assert "\n" not in refused(server.url(), tmp_path / "b")


def test_another_server_is_told_no_password_but_where_to_go_on(tmp_path, server):
    url = server.url().replace("http://", "http://me:secret@")
    server.redirect = server.url("/moved").replace("127.0.0.1", "localhost")
    server.cuts += [1000]
    fetch(url, tmp_path / "out")
    assert ["Authorization" in seen for seen in server.seen] == [True, False, True, False]
    assert server.asked[-1] == "bytes=1000-" and (tmp_path / "out").read_bytes() == DATA
    hosts = [f"{name}:{server.server_port}" for name in ("127.0.0.1", "localhost")]
    assert [seen["Host"] for seen in server.seen] == hosts * 2


def test_a_proxy_s_password_is_not_told_to_a_server_behind_a_redirect():
    request = transfer._request("http://127.0.0.1/a", {"Range": "bytes=1-"})
    ProxyHandler({}).proxy_open(request, "http://me:secret@proxy:1", "http")
    assert "Proxy-authorization" in request.headers
    moved = transfer._Redirects().redirect_request(request, None, 302, "", {}, "http://localhost/b")
    assert moved.headers == {"Range": "bytes=1-"}


def test_packed_answers_are_refused(tmp_path, server):
    server.headers = {"Content-Encoding": "gzip"}
    assert "sends the file packed" in refused(server.url(), tmp_path / "out")


def test_a_disk_without_room_is_named_before_and_while_writing(tmp_path, server, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    assert "40.0 kB are still to come, the disk has 1.0 kB free; make room" in refused(server.url(), tmp_path / "out")
    monkeypatch.undo()
    full = open("/dev/full", "ab", buffering=0)  # noqa: SIM115
    with full, pytest.raises(HubError, match=r"x: cannot be written \(No space left on device\)"), part.written("x"):
        full.write(b"x")


def test_a_place_that_cannot_be_written_is_named(tmp_path, server):
    (tmp_path / "file").write_bytes(DATA)
    for source in (server.url(), tmp_path / "file"):
        with pytest.raises(HubError, match=r"cannot be written \(.*\); make room or choose another place"):
            fetch(source, tmp_path / "file/out")


def test_two_processes_do_not_write_one_part(tmp_path, server):
    with part.Part(tmp_path / "out", server.url()):
        assert "another process is downloading" in refused(server.url(), tmp_path / "out")


def test_progress_says_how_much_how_fast_and_how_long(caplog, monkeypatch):
    caplog.set_level(logging.INFO)
    now = iter([0.0, 1.0, 10.0])
    monkeypatch.setattr(transfer.time, "monotonic", lambda: next(now))
    progress = transfer._Progress("a.bin", 0, 4_000_000)
    progress.tell(100)
    progress.tell(1_000_000)
    assert [record.message for record in caplog.records] == ["a.bin: 1.0 MB of 4.0 MB (25 %), 100.0 kB/s, 0:00:30 left"]
