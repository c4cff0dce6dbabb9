"""Repositories of hubs are listed, fetched whole and checked, whatever the network and the hub do."""

import hashlib
import json
import logging
import threading
from collections import Counter, deque
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

import pytest

from rwkvpipe import download
from rwkvpipe.base.errors import HubError
from rwkvpipe.weights import dataset, hub, repository, transfer

FILES = {
    "config.json": b'{"n_layer": 2}',
    "model-00001-of-00002.safetensors": bytes(range(256)) * 100,
    "model-00002-of-00002.safetensors": b"second" * 3000,
    "model.pth": b"old form" * 50,
    "sub dir/note.txt": b"hello",
    ".gitattributes": b"*.pth lfs",
}
SECRET = "hf_verysecret"


class Hub(ThreadingHTTPServer):
    """Hugging Face and ModelScope in small; can be told to misbehave."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files, self.seen, self.asked = dict(FILES), [], Counter()
        self.rows: dict[str, bytes] = {}  # of a data set
        self.cuts, self.list_cuts, self.statuses, self.lengths = deque(), deque(), deque(), True
        self.wrong, self.longer, self.elsewhere, self.pages = set(), 0, None, False
        self.extra, self.most, self.busy = [], 0, 0
        self.lock = threading.Lock()

    def url(self, host="127.0.0.1"):
        return f"http://{host}:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    """Answers for Hub."""

    def log_message(self, *words):
        """Quiet."""

    def do_GET(self):
        server, parts = self.server, urlsplit(self.path)
        path, asked = unquote(parts.path), parse_qs(parts.query)
        with server.lock:
            server.seen.append((path, dict(self.headers)))
            server.asked[path] += 1
            if server.statuses and (status := server.statuses.popleft()):
                return self.tell(b"", status)
        if path.startswith("/api/models/o/n/tree/main"):
            folder = path.removeprefix("/api/models/o/n/tree/main").strip("/")
            rows = [self.hf(name, data) for name, data in server.files.items() if name.startswith(folder)]
            return self.page([{"type": "directory", "path": "sub dir"}, *rows, *server.extra], asked)
        if path == "/api/v1/models/o/n/repo/files" and asked["Revision"] == ["master"]:
            rows = [self.ms(name, data) for name, data in server.files.items()]
            return self.tell(json.dumps({"Code": 200, "Data": {"Files": rows}}).encode())
        if path == "/api/v1/models/o/n/repo":
            return self.file(asked["FilePath"][0])
        if path.startswith("/o/n/resolve/main/"):
            name = path.removeprefix("/o/n/resolve/main/")
            if server.elsewhere:
                return self.tell(b"", 302, {"Location": f"{server.elsewhere}/moved/{name.replace(' ', '%20')}"})
            return self.file(name)
        if path.startswith("/api/datasets/o/d/tree/main"):
            folder = path.removeprefix("/api/datasets/o/d/tree/main").strip("/")
            rows = [self.hf(name, data) for name, data in server.rows.items() if name.startswith(folder)]
            return self.page(rows, asked)
        if path == "/api/v1/datasets/o/d/repo/tree" and asked["Recursive"] == ["true"]:
            size, page = int(asked["PageSize"][0]), int(asked["PageNumber"][0])
            rows = [self.ms(name, data) for name, data in server.rows.items()]
            return self.tell(
                json.dumps({"Code": 200, "Data": {"Files": rows[(page - 1) * size : page * size]}}).encode()
            )
        if path == "/api/v1/datasets/o/d/repo":
            return self.file(asked["FilePath"][0])
        if path.startswith("/datasets/o/d/resolve/main/"):
            return self.file(path.removeprefix("/datasets/o/d/resolve/main/"))
        if path.startswith("/moved/"):
            return self.file(path.removeprefix("/moved/"))
        self.tell(b"", 404)

    def hf(self, name, data):
        row = {"type": "file", "path": name, "size": len(data)}
        if name.endswith((".safetensors", ".pth")):
            return row | {"oid": "0" * 40, "lfs": {"oid": hashlib.sha256(data).hexdigest(), "size": len(data)}}
        return row | {"oid": hashlib.sha1(f"blob {len(data)}\0".encode() + data).hexdigest()}

    def ms(self, name, data):
        return {"Type": "blob", "Path": name, "Size": len(data), "Sha256": hashlib.sha256(data).hexdigest()}

    def page(self, rows, asked):
        if not self.server.pages:
            cut = self.server.list_cuts.popleft() if self.server.list_cuts else None
            return self.tell(json.dumps(rows).encode(), cut=cut)
        number = int(asked.get("cursor", ["0"])[0])
        following = f"{self.server.url()}{self.path.partition('?')[0]}?recursive=true&cursor={number + 1}"
        link = {"Link": f'<{following}>; rel="next"'} if number + 1 < len(rows) else {}
        self.tell(json.dumps(rows[number : number + 1]).encode(), 200, link)

    def file(self, name):
        server = self.server
        if name not in server.files | server.rows:
            return self.tell(b"", 404)
        data = (server.files | server.rows)[name]
        if name in server.wrong:
            data = data[:-1] + b"?"
        with server.lock:
            server.busy += 1
            server.most = max(server.most, server.busy)
            cut = server.cuts.popleft() if server.cuts else None
        threading.Event().wait(0.02)
        start = int((self.headers.get("Range") or "bytes=0-").removeprefix("bytes=").rstrip("-"))
        about = {"ETag": '"x"'}
        if start:
            about["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        self.tell(data[start:], 206 if start else 200, about, cut)
        with server.lock:
            server.busy -= 1

    def tell(self, body, status=200, headers=None, cut=None):
        self.send_response(status)
        if self.server.lengths:
            self.send_header("Content-Length", str(len(body) + self.server.longer))
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body[:cut])


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(transfer, "PAUSE", 0.001)
    for name in ("HF_TOKEN", "HF_HUB_OFFLINE", "MODELSCOPE_API_TOKEN", "MODELSCOPE_ENDPOINT"):
        monkeypatch.delenv(name, raising=False)
    with Hub() as running:
        monkeypatch.setenv("HF_ENDPOINT", running.url())
        thread = threading.Thread(target=running.serve_forever, args=(0.01,))
        thread.start()
        yield running
        running.shutdown()
        thread.join()


def get(source, out, *words):
    download.main([source, "--out", str(out), *words])
    return out


def held(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_file_is_fetched_and_checked_by_what_the_hub_says(server, tmp_path):
    assert get("hf://o/n/model.pth", tmp_path / "m.pth").read_bytes() == FILES["model.pth"]
    assert get("hf://o/n@main/sub dir/note.txt", tmp_path / "n").read_bytes() == b"hello"


@pytest.mark.parametrize("name", ["model.pth", "config.json"])
def test_wrong_bytes_are_refused_and_not_kept(server, tmp_path, name):
    server.wrong.add(name)
    with pytest.raises(HubError, match="digest is|sha256 is"):
        get(f"hf://o/n/{name}", tmp_path / "m")
    assert list(tmp_path.iterdir()) == []


def test_a_length_that_is_a_lie_is_no_whole_file(server, tmp_path, monkeypatch):
    monkeypatch.setattr(transfer, "TRIES", 2)
    server.longer = 10
    with pytest.raises(HubError, match="closed"):
        get("hf://o/n/model.pth", tmp_path / "m")
    assert not (tmp_path / "m").exists()


def test_a_list_that_lies_about_a_size_is_noticed(server, tmp_path, monkeypatch):
    monkeypatch.setattr(Handler, "hf", lambda self, name, data: {"type": "file", "path": name, "size": len(data) + 1})
    with pytest.raises(HubError, match="has 400 bytes, the hub says 401"):
        get("hf://o/n/model.pth", tmp_path / "m")


def test_a_repository_comes_with_one_form_of_weights_several_files_at_once(server, tmp_path):
    found = held(get("hf://o/n", tmp_path / "all"))
    assert found == {k: v for k, v in FILES.items() if k not in ("model.pth", ".gitattributes")}
    assert server.most > 1


def test_patterns_choose_the_files(server, tmp_path):
    found = held(get("hf://o/n", tmp_path / "some", "--files", "*.pth", "--files", "config.json"))
    assert set(found) == {"model.pth", "config.json"}
    with pytest.raises(HubError, match="no file fits"):
        get("hf://o/n", tmp_path / "none", "--files", "*.gguf")


def test_a_repository_that_broke_off_goes_on_and_is_never_half_there(server, tmp_path, monkeypatch):
    monkeypatch.setattr(transfer, "TRIES", 1)
    server.cuts += [5] * 4
    with pytest.raises(HubError, match="run it again to go on"):
        get("hf://o/n", tmp_path / "all")
    assert not (tmp_path / "all").exists()
    assert "config.json" in held(get("hf://o/n", tmp_path / "all"))
    assert [path.name for path in tmp_path.iterdir()] == ["all"]


def test_a_broken_connection_goes_on_where_it_stopped(server, tmp_path):
    server.cuts += [1000]
    get("hf://o/n/model-00001-of-00002.safetensors", tmp_path / "m")
    assert [headers.get("Range") for _, headers in server.seen if "Range" in headers] == ["bytes=1000-"]


def test_what_breaks_off_where_no_length_is_said_is_noticed_and_gone_on_with(server, tmp_path):
    server.lengths = False
    server.list_cuts += [0, 30]
    server.cuts += [700, 0]
    name = "model-00001-of-00002.safetensors"
    assert get(f"hf://o/n/{name}", tmp_path / "m").read_bytes() == FILES[name]
    ranges = [headers.get("Range") for path, headers in server.seen if "resolve" in path]
    assert ranges == [None, "bytes=700-", "bytes=700-"]


def test_what_is_there_is_not_fetched_again_and_what_is_damaged_is(server, tmp_path):
    for source, out in (("hf://o/n", tmp_path / "all"), ("hf://o/n/model.pth", tmp_path / "m")):
        get(source, out)
        before = {path: count for path, count in server.asked.items() if "resolve" in path}
        get(source, out)
        assert {path: count for path, count in server.asked.items() if "resolve" in path} == before
    (tmp_path / "all/config.json").write_bytes(b'{"n_layer": 3}')
    get("hf://o/n", tmp_path / "all")
    assert (tmp_path / "all/config.json").read_bytes() == FILES["config.json"]


@pytest.mark.parametrize("said", ["flag", "HF_HUB_OFFLINE"])
def test_offline_nobody_is_asked(server, tmp_path, monkeypatch, said):
    words = ["--offline"] if said == "flag" else []
    get("hf://o/n/model.pth", tmp_path / "m")
    get("hf://o/n", tmp_path / "all")
    if not words:
        monkeypatch.setenv(said, "1")
    count = len(server.seen)
    get("hf://o/n/model.pth", tmp_path / "m", *words)
    get("hf://o/n", tmp_path / "all", *words)
    for source in ("hf://o/n/config.json", "hf://o/n", f"{server.url()}/x"):
        with pytest.raises(HubError, match="offline, and .* is not here"):
            get(source, tmp_path / "gone", *words)
    with pytest.raises(HubError, match="sha256 is"):
        get("hf://o/n/model.pth", tmp_path / "m", "--sha256", "0" * 64, *words)
    assert len(server.seen) == count


def test_the_weights_are_listed(server, capsys):
    server.pages = True
    download.main(["hf://o/n", "--list"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == sorted(name for name in FILES if name.endswith(("pth", "tensors")))
    assert lines[-1].split()[-1] == hashlib.sha256(FILES["model.pth"]).hexdigest()
    download.main(["hf://o/n", "--list", "--files", "*.json"])
    assert capsys.readouterr().out.startswith("config.json  14 B")


def page_of(broken):
    """Lists of files as they are, but a web page from one server."""
    page = Handler.page
    return lambda self, *words: self.tell(b"<html>") if self.server is broken else page(self, *words)


def test_a_mirror_is_asked_first_and_the_hub_after_it(server, tmp_path, monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    monkeypatch.setenv("HF_TOKEN", SECRET)
    with Hub() as mirror:
        thread = threading.Thread(target=mirror.serve_forever, args=(0.01,))
        thread.start()
        get("hf://o/n/model.pth", tmp_path / "m", "--mirror", mirror.url() + "/")
        assert server.seen == [] and len(mirror.seen) == 2
        assert not any("Authorization" in headers for _, headers in mirror.seen)
        mirror.files.clear()
        get("hf://o/n/config.json", tmp_path / "c", "--mirror", mirror.url())
        assert len(server.seen) == 2 and "asking http://127.0.0.1" in caplog.text
        monkeypatch.setattr(Handler, "page", page_of(mirror))
        get("hf://o/n/model.pth", tmp_path / "again", "--mirror", mirror.url())
        assert (tmp_path / "again").read_bytes() == FILES["model.pth"]
        mirror.shutdown()
        thread.join()


def test_a_token_goes_to_its_hub_alone_and_is_never_told(server, tmp_path, monkeypatch, caplog):
    caplog.set_level(logging.DEBUG)
    monkeypatch.setenv("HF_TOKEN", SECRET)
    server.elsewhere = server.url("localhost")
    get("hf://o/n/model.pth", tmp_path / "m")
    by_path = {path: headers.get("Authorization") for path, headers in server.seen}
    assert by_path["/o/n/resolve/main/model.pth"] == f"Bearer {SECRET}" and by_path["/moved/model.pth"] is None
    server.statuses += [403]
    with pytest.raises(HubError) as caught:
        get("hf://o/n/config.json", tmp_path / "c")
    server.cuts += [0] * 20
    with pytest.raises(HubError) as broken:
        get("hf://o/n/config.json", tmp_path / "c")
    kept = "".join(path.read_text(errors="replace") for path in tmp_path.iterdir())
    assert SECRET not in f"{caught.value} {broken.value} {caplog.text} {kept}"


def test_modelscope_is_a_hub_too(server, tmp_path, monkeypatch):
    monkeypatch.setenv("MODELSCOPE_ENDPOINT", server.url())
    monkeypatch.setenv("MODELSCOPE_API_TOKEN", SECRET)
    assert get("modelscope://o/n/sub dir/note.txt", tmp_path / "n").read_bytes() == b"hello"
    assert "model.pth" not in held(get("modelscope://o/n", tmp_path / "all"))
    assert all(headers["Cookie"] == f"m_session_id={SECRET}" for _, headers in server.seen)
    server.wrong.add("model.pth")
    with pytest.raises(HubError, match="sha256 is"):
        get("modelscope://o/n/model.pth", tmp_path / "m")


@pytest.mark.parametrize("page", [1, 2, 200])
def test_modelscope_has_data_sets_listed_page_by_page(server, tmp_path, monkeypatch, page):
    monkeypatch.setenv("MODELSCOPE_ENDPOINT", server.url())
    monkeypatch.setattr(repository, "PAGE", page)
    server.rows = {f"data/train-{n}.jsonl": b'{"text": "a"}\n' * n for n in range(1, 5)} | {"data/test-0.jsonl": b""}
    train = {name: data for name, data in server.rows.items() if "train" in name}
    assert held(get("modelscope://datasets/o/d", tmp_path / "all")) == train
    one = get("modelscope://datasets/o/d/data/train-3.jsonl", tmp_path / "one")
    assert one.read_bytes() == server.rows["data/train-3.jsonl"]


LONG = ["x" * 300, "a/" * 2000 + "b"]


@pytest.mark.parametrize("path", ["../evil", "/etc/x", "a/../../b", "a\\b", "a//b", "a/", 7, *LONG])
def test_a_hub_cannot_write_outside_the_folder(server, tmp_path, path):
    server.extra = [{"type": "file", "path": path, "size": 1, "oid": "0" * 40}]
    with pytest.raises(HubError, match="no path inside it"):
        get("hf://o/n", tmp_path / "all")


@pytest.mark.parametrize("body", [b"<html>", b"{}", b"[3]", b'{"Data": {}}', b'{"Data": null}', b'{"Data": []}'])
def test_a_list_that_is_none_is_refused(server, tmp_path, monkeypatch, body):
    monkeypatch.setattr(Handler, "page", lambda self, rows, asked: self.tell(body))
    monkeypatch.setattr(transfer, "TRIES", 2)
    with pytest.raises(HubError, match="list of") as caught:
        get("hf://o/n/model.pth", tmp_path / "m")
    assert "\n" not in str(caught.value)


def test_what_a_repository_has_not_is_named(server, tmp_path):
    with pytest.raises(HubError, match="has no file gone.pth at main; see what it has: --list"):
        get("hf://o/n/gone.pth", tmp_path / "m")
    with pytest.raises(HubError, match="404 Not Found"):
        get("hf://o/other/gone.pth", tmp_path / "m")


def test_passing_troubles_of_the_list_are_waited_for(server, tmp_path):
    server.statuses += [503, 500, 522]
    get("hf://o/n/model.pth", tmp_path / "m")


@pytest.mark.parametrize("source", ["hf://o", "hf://o/n@/x", "hf://o/n/../x", "hf:///n/x", "hf://o/n//x"])
def test_addresses_that_cannot_be_read_are_named(source):
    with pytest.raises(HubError, match="mend it"):
        repository.parse(source)


def test_addresses_mean_repositories():
    found, path = repository.parse("hf://datasets/o/n@v1/a/b.parquet")
    assert (found.kind, found.name, found.revision, path) == ("datasets", "o/n", "v1", "a/b.parquet")
    assert found.address("https://h", path) == "https://h/datasets/o/n/resolve/v1/a/b.parquet"
    assert repository.parse("https://o/n") is None and hub.is_offline() in (True, False)


def rows(*texts):
    return "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()


def test_a_data_set_comes_by_its_training_part_or_by_a_pattern(server, tmp_path, monkeypatch):
    train = {f"data/train-0000{n}-of-00002.jsonl": rows(f"train {n}") for n in range(2)}
    other = {"data/test-00000.jsonl": rows("test"), "more/x.jsonl": rows("x"), "top.jsonl": rows("top")}
    server.rows = train | other | {"README.md": b"# words", "dataset_infos.json": b"{}", ".gitattributes": b"x"}
    assert held(get("hf://datasets/o/d", tmp_path / "a")) == train
    assert held(get("hf://datasets/o/d@main/data/*.jsonl", tmp_path / "b")).keys() == {*train, "data/test-00000.jsonl"}
    assert held(get("hf://datasets/o/d/**/*.jsonl", tmp_path / "c")).keys() == {*train, *other}
    with pytest.raises(HubError, match="o/d of .*: no file fits none/"):
        get("hf://datasets/o/d/none/*", tmp_path / "d")
    assert not (tmp_path / "d").exists()
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    get("hf://datasets/o/d", tmp_path / "a")
    with pytest.raises(HubError, match="offline, and .*e is not here"):
        get("hf://datasets/o/d", tmp_path / "e")


def test_of_a_data_set_a_damaged_file_is_named_and_a_mirror_asked(server, tmp_path, monkeypatch):
    server.rows = {"train.parquet": b"PAR1" * 900}
    server.wrong = {"train.parquet"}
    with pytest.raises(HubError, match="o/d/train.parquet of .*: git's digest is"):
        get("hf://datasets/o/d", tmp_path / "a")
    assert not (tmp_path / "a").exists()
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    server.wrong = set()
    assert held(get("hf://datasets/o/d", tmp_path / "a", "--mirror", server.url())) == server.rows


def test_a_data_set_is_listed_by_its_rows(server, capsys):
    server.rows = {"train.jsonl": rows("a"), "README.md": b"# words"}
    download.main(["hf://datasets/o/d", "--list"])
    assert capsys.readouterr().out.split()[0] == "train.jsonl"


def test_the_rows_of_a_fetched_data_set_are_packed(server, tmp_path):
    from rwkvpipe import pack
    from rwkvpipe.data.binidx import Binidx

    server.rows = {"data/train-1.jsonl": rows("b"), "data/train-0.jsonl": rows("a"), "data/valid-0.jsonl": rows("no")}
    get("hf://datasets/o/d", tmp_path / "got")
    spec = json.dumps({"path": "hf://datasets/o/d", "tokenizer": "b"})
    pack.main([str(tmp_path / "got"), "--spec", spec, "--tokenizer", "bytes", "--out", str(tmp_path / "out")])
    assert Binidx(tmp_path / "out/train").tokens(0, 2).tolist() == [97, 98]


@pytest.mark.parametrize(
    ("files", "chosen"),
    [
        (["a.parquet", "a.jsonl"], ["a.parquet"]),
        (["test.jsonl", "validation.jsonl"], ["test.jsonl", "validation.jsonl"]),
        (["part-1.jsonl", "dev.jsonl"], ["part-1.jsonl"]),
        (["training/a.json.gz", "eval/a.json.gz"], ["training/a.json.gz"]),
        (["train/data-0.arrow", "train/state.json", "train/dataset_info.json", "dataset_dict.json", "test/data-0.arrow",
          "test/state.json"], ["train/data-0.arrow", "train/state.json"]),
        (["constrained.txt", "latest.txt", "README.txt"], ["constrained.txt", "latest.txt"]),
        (["README.md", "image.png"], []),
    ],
)  # fmt: skip
def test_training_rows_are_told_by_names(files, chosen):
    found = [repository.RepoFile(path, 1, None, None) for path in files]
    assert [file.path for file in dataset.documents(found)] == chosen
