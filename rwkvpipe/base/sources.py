"""Which files a path means: a file, a folder's, a saved data set's, those of a glob, or a binidx pair."""

import glob
from pathlib import Path

from rwkvpipe.base.errors import ConfigError, DataError
from rwkvpipe.base.files import read_json

ABOUT = ("state.json", "dataset_info.json")  # what lies beside the data of a saved data set
PAIR = ("bin", "idx", "mask")


def _saved(folder: Path) -> list[str]:
    """The files of a data set that was saved to disk, in its order. Raises DataError for a list that is none."""
    state = read_json(folder / "state.json")
    listed = state.get("_data_files") if isinstance(state, dict) else None
    names = [each.get("filename") if isinstance(each, dict) else None for each in listed or ()]
    if not names or not all(isinstance(name, str) and Path(name).name == name for name in names):
        raise DataError(f"{folder}/state.json: no list of data files; save the data set again with save_to_disk")
    if state.get("_indices_data_files") or state.get("_indices_files"):
        raise DataError(
            f"{folder}/state.json: its rows are a choice of those in its files; save it again, after flatten_indices()"
        )
    absent = [name for name in names if not (folder / name).is_file()]
    if absent:
        raise DataError(f"{folder}/{absent[0]}: no such file, which state.json lists; copy the data set again")
    return [str(folder / name) for name in names]


def _folder(folder: Path) -> list[str]:
    if (folder / "dataset_dict.json").is_file():
        parts = sorted(part.name for part in folder.iterdir() if part.is_dir())
        raise ConfigError(f"{folder}: a data set of the parts {', '.join(parts)}; name one: {folder}/{parts[0]}")
    if (folder / "state.json").is_file():
        return _saved(folder)
    found = [path for path in folder.rglob("*") if path.is_file()]
    saved = {path.parent for path in found if path.name == "state.json"} - {folder}
    plain = [str(path) for path in found if not any(p.startswith(".") for p in path.relative_to(folder).parts)]
    beside = [str(place / file) for place in saved for file in ABOUT]
    return sorted(path for path in plain if path not in beside)


def prefix_of(path: str | Path) -> str:
    """The common part of a pair's names, whichever of its files is named."""
    path = str(path)
    return next((path.removesuffix(f".{part}") for part in PAIR if path.endswith(f".{part}")), path)


def pairs_of(path: str | Path) -> list[str]:
    """The pairs that a path means, by the common part of their names: one pair, a folder's, those of a glob.

    A path that means none stands for itself.
    """
    path = str(path)
    if Path(path).is_dir() and not Path(f"{path}.idx").is_file():
        inside = Path(path).rglob("*.idx")
        found = [str(each) for each in inside if not any(p.startswith(".") for p in each.relative_to(path).parts)]
    elif glob.has_magic(path) and not Path(f"{prefix_of(path)}.idx").is_file():
        found = [each for each in glob.glob(path, recursive=True) if Path(each).suffix.removeprefix(".") in PAIR]
    else:
        found = [path]
    return list(dict.fromkeys(sorted(map(prefix_of, found)))) or [path]


def pair_files(path: str | Path) -> list[str]:
    """The files of the binidx pairs that a path means."""
    found = []
    for prefix in pairs_of(path):
        found += [f"{prefix}.{part}" for part in PAIR if part != "mask" or Path(f"{prefix}.mask").is_file()]
    return found


def files_of(path: str | Path) -> list[str]:
    """Files that a path means, sorted by name; a path that means none as it stands.

    Folders are read with all below them but for hidden files; in a glob `**` stands for any folders. Raises
    ConfigError for a saved data set of several parts.
    """
    path = str(path)
    if Path(path).is_dir():
        return _folder(Path(path))
    if Path(path).exists() or not glob.has_magic(path):
        return [path]
    found = [file for each in sorted(glob.glob(path, recursive=True)) for file in files_of(each)]
    return list(dict.fromkeys(found)) or [path]  # ** finds folders and what is in them
