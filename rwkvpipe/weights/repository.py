"""Repositories of Hugging Face and ModelScope: what an address means, and what a hub says lies there.

`hf://owner/name/file`, `hf://owner/name@revision/file`, `hf://datasets/owner/name/file`, and the same of `modelscope://`;
without a file, the whole repository.
"""

import re
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import PurePosixPath
from urllib.parse import quote, urlencode

from rwkvpipe.base.errors import HubError
from rwkvpipe.weights.transfer import ask

HUBS = {"hf": "https://huggingface.co", "modelscope": "https://www.modelscope.cn"}
WEIGHTS = ("*.safetensors", "*.pth", "*.gguf", "*.bin", "*.pt")
# other forms of the same weights, of which one will do, the first that is there
FORMS = ("*.safetensors", "*.pth", "*.bin", "*.pt")
UNUSED = ("*.gguf", "*.onnx", "*.h5", "*.msgpack", "*.ot", "*.ckpt", ".*", "*/.*")
PAGE = 200  # files of a data set that ModelScope lists at once
PART = r"[A-Za-z0-9][A-Za-z0-9._-]*"


@dataclass(frozen=True)
class Repo:
    """A repository of a hub at a revision; `kind` is models or datasets."""

    hub: str
    kind: str
    name: str
    revision: str

    def listing(self, endpoint: str, folder: str, page: int = 1) -> str:
        """Address of the list of files: for Hugging Face of a folder's, else of all; of a data set's, a page."""
        if self.hub == "modelscope":
            asked = urlencode({"Revision": self.revision, "Recursive": "true"})
            if self.kind == "models":
                return f"{endpoint}/api/v1/models/{self.name}/repo/files?{asked}"
            asked += "&" + urlencode({"PageNumber": page, "PageSize": PAGE})
            return f"{endpoint}/api/v1/datasets/{self.name}/repo/tree?{asked}"
        path = f"/{quote(folder)}" if folder else ""
        asked = "" if folder else "?recursive=true"
        return f"{endpoint}/api/{self.kind}/{self.name}/tree/{quote(self.revision, safe='')}{path}{asked}"

    def address(self, endpoint: str, path: str) -> str:
        """Address of a file."""
        if self.hub == "modelscope":
            asked = urlencode({"Revision": self.revision, "FilePath": path})
            return f"{endpoint}/api/v1/{self.kind}/{self.name}/repo?{asked}"
        kind = "" if self.kind == "models" else f"{self.kind}/"
        return f"{endpoint}/{kind}{self.name}/resolve/{quote(self.revision, safe='')}/{quote(path)}"


@dataclass(frozen=True)
class RepoFile:
    """A file as its hub describes it: sha256, or for small ones of Hugging Face git's sha1."""

    path: str
    size: int | None
    sha256: str | None
    sha1: str | None


def parse(source: str) -> tuple[Repo, str] | None:
    """The repository that an address means, and the file in it ('' for all); None for other addresses.

    Raises HubError for an address of a hub that cannot be read.
    """
    hub, _, words = source.partition("://")
    if hub not in HUBS:
        return None
    kind = "models"
    if words.startswith("datasets/"):
        kind, words = "datasets", words.removeprefix("datasets/")
    found = re.fullmatch(rf"({PART}/{PART})(?:@([^/@]+))?(?:/(.*))?", words)
    if found is None or not _inside(found[3] or "x"):
        raise HubError(f"{source}: not {hub}://owner/name/file or owner/name@revision/file; mend it")
    revision = found[2] or ("master" if hub == "modelscope" else "main")
    return Repo(hub, kind, found[1], revision.replace("%2F", "/")), (found[3] or "").rstrip("/")


def _inside(path: str) -> bool:
    """Whether a path stays in the folder that it counts from."""
    parts = path.split("/")
    short = len(path.encode("utf-8", "replace")) < 2000 and all(len(p.encode("utf-8", "replace")) < 240 for p in parts)
    return short and path.isprintable() and "\\" not in path and not {"", ".", ".."} & {*parts[:-1], parts[-1] or "x"}


def _digest(value: object, letters: int) -> str | None:
    return value if isinstance(value, str) and re.fullmatch(rf"[0-9a-f]{{{letters}}}", value) else None


def _entry(row: dict, where: str) -> RepoFile | None:
    """One row of a hub's list; None for what is no file. Raises HubError for a path that leads out of the folder."""
    if row.get("type", row.get("Type")) not in ("file", "blob"):
        return None
    path, size = row.get("path", row.get("Path")), row.get("size", row.get("Size"))
    if not isinstance(path, str) or not path or path.endswith("/") or not _inside(path):
        raise HubError(f"{where}: lists a file called {str(path)[:60]!r}, which is no path inside it; do not use it")
    large = row.get("lfs") if isinstance(row.get("lfs"), dict) else None
    sha256 = _digest(large.get("oid") if large else row.get("Sha256"), 64)
    sha1 = None if large or "Path" in row else _digest(row.get("oid"), 40)
    return RepoFile(path, size if isinstance(size, int) else None, sha256, sha1)


def files(repo: Repo, endpoint: str, headers: dict[str, str], folder: str = "") -> list[RepoFile]:
    """What a hub says that a repository (for Hugging Face, a folder of it) holds. Raises HubError."""
    url: str | None = repo.listing(endpoint, folder)
    found: list[RepoFile] = []
    for page in range(2, 10_000):
        where = f"{repo.hub}://{repo.name}"
        value, url = ask(url, headers)
        data = value.get("Data") if isinstance(value, dict) else None
        rows = data.get("Files") if isinstance(data, dict) else value
        if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
            raise HubError(f"{where}: the hub's list of files is none; check the endpoint and the repository's name")
        found += [entry for row in rows if (entry := _entry(row, where))]
        if repo.hub == "modelscope" and repo.kind == "datasets" and len(rows) >= PAGE:
            url = repo.listing(endpoint, folder, page)
        if url is None:
            break
    return found


def chosen(found: list[RepoFile], patterns: tuple[str, ...]) -> list[RepoFile]:
    """The files that fit a pattern; of none given, the weights in one form and all that belongs to them."""
    if patterns:
        return [file for file in found if any(fnmatch(file.path, pattern) for pattern in patterns)]
    forms = [form for form in FORMS if any(fnmatch(file.path, form) for file in found)]
    left_out = (*UNUSED, *(form for form in FORMS if form not in forms[:1]))
    return [file for file in found if not any(fnmatch(file.path, pattern) for pattern in left_out)]


def is_weights(file: RepoFile) -> bool:
    """Whether a file's name is that of weights."""
    return any(fnmatch(PurePosixPath(file.path).name, pattern) for pattern in WEIGHTS)
