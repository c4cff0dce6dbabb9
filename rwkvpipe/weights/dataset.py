"""Which files of a hub's data set are its training data, where the address does not say."""

import re
from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import PurePosixPath

from rwkvpipe.weights.repository import RepoFile

# forms of the same rows, of which the first that is there will do; what else a saved data set needs
FORMS = (
    ("*.parquet",),
    ("*.arrow", "state.json", "*/state.json"),
    ("*.jsonl", "*.jsonl.gz", "*.jsonl.zst", "*.ndjson"),
    ("*.json", "*.json.gz", "*.json.zst"),
    ("*.npy", "*.npz"),
    ("*.txt", "*.txt.gz", "*.txt.zst"),
)
ABOUT = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "README.txt", "LICENSE.txt")
TRAIN = {"train", "training"}
OTHER = {"test", "testing", "valid", "validation", "val", "dev", "eval", "evaluation"}


def _words(file: RepoFile) -> set[str]:
    return set(re.findall("[a-z]+", file.path.lower()))


def fits(path: str, pattern: str) -> bool:
    """Whether a path fits a pattern, in which `**/` stands for any folders, or none."""
    return fnmatch(path, pattern) or fnmatch(path, pattern.replace("**/", ""))


def documents(found: Sequence[RepoFile], patterns: Sequence[str] = ()) -> list[RepoFile]:
    """The files that fit a pattern; of none given, those of rows, in one form, of the training part if parts are told.

    A part is told by a word in a path: train, test, validation and the like.
    """
    if patterns:
        return [file for file in found if any(fits(file.path, pattern) for pattern in patterns)]
    hidden = [file for file in found if any(part.startswith(".") for part in file.path.split("/"))]
    plain = [file for file in found if file not in hidden and PurePosixPath(file.path).name not in ABOUT]
    forms = ([file for file in plain if any(fnmatch(file.path, each) for each in form)] for form in FORMS)
    rows = next((form for form in forms if any(not file.path.endswith("state.json") for file in form)), [])
    train = [file for file in rows if TRAIN & _words(file)]
    return train or [file for file in rows if not OTHER & _words(file)] or rows
