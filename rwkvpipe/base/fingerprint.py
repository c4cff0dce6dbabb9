"""What code a step runs, as a short text that changes when, and only when, that code does.

Snakemake tracks the shell text of a rule, not the modules which that text starts. A rule with `fingerprint("sft")`
among its params becomes stale when the code of that verb, or of anything in the package that it imports, changes.
Comments, docstrings and layout do not count. What no import statement names is named by the module that uses it:
`TRACKED_FILES = ["../../cuda/wkv7.cu"]`, patterns relative to that module's folder. Those that are Python count as
imported, the others with all their bytes.
"""

import ast
import hashlib
from collections.abc import Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TRACKED = "TRACKED_FILES"
# where a node stands and how its names are used says nothing that its text does not
SKIPPED = frozenset({"ctx", "kind", "type_comment", "type_ignores"})


def _file(module: str, root: Path) -> Path | None:
    """The source of a module of the package, None for others' modules and for the package itself.

    The package's own `__init__` is left out: it starts whole runs from Python, no verb calls it.
    """
    top, _, rest = module.partition(".")
    if top != root.name or not rest:
        return None
    base = root.joinpath(*rest.split("."))
    for candidate in (base.with_suffix(".py"), base / "__init__.py"):
        if candidate.is_file():
            return candidate
    return None


def _idle(node: ast.AST) -> bool:
    # a text that stands alone is a docstring (of a module, class, function or attribute): it does nothing
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


def _tokens(node) -> Iterator[str]:
    """A syntax tree as texts that do not depend on layout or on the version of Python that read it."""
    if isinstance(node, ast.AST):
        yield type(node).__name__
        for name, value in ast.iter_fields(node):
            if value is None or value == [] or name in SKIPPED:
                continue  # newer Pythons add fields that are empty here
            yield name
            yield from _tokens(value)
        yield ")"
    elif isinstance(node, list):
        for item in node:
            if not _idle(item):
                yield from _tokens(item)
        yield "]"
    else:
        yield repr(node)


def _imported(node: ast.AST, package: str) -> list[str]:
    """Absolute names that an import statement may load; `from a import b` may mean the module a.b."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if not isinstance(node, ast.ImportFrom):
        return []
    base = node.module or ""
    if node.level:
        parts = package.split(".")
        above = parts[: len(parts) - node.level + 1]
        base = ".".join(above + ([base] if base else []))
    return [base, *(f"{base}.{alias.name}" for alias in node.names)]


def _tracked(tree: ast.Module, file: Path) -> list[Path]:
    """Files that the module's TRACKED_FILES names."""
    found = []
    for node in tree.body:
        if isinstance(node, ast.Assign) and any(isinstance(t, ast.Name) and t.id == TRACKED for t in node.targets):
            for pattern in ast.literal_eval(node.value):
                matches = sorted(file.parent.glob(pattern))
                if not matches:
                    raise LookupError(f"{file}:{node.lineno}: {TRACKED} names {pattern}, and there is no such file")
                found += matches
    return found


@cache
def _scan(module: str, root: Path) -> tuple[str, tuple[str, ...]]:
    """Digest of one module's own code, and the modules of the package that it imports."""
    file = _file(module, root)
    tree = ast.parse(file.read_bytes(), filename=str(file))
    package = module if file.name == "__init__.py" else module.rpartition(".")[0]
    names = {name for node in ast.walk(tree) for name in _imported(node, package)}
    # importing a.b.c runs the __init__ of a.b too
    parents = {".".join(parts[:n]) for parts in (name.split(".") for name in names) for n in range(2, len(parts))}
    digest = hashlib.sha256("\n".join(_tokens(tree)).encode())
    for extra in _tracked(tree, file):
        if extra.suffix == ".py":
            names.add(".".join((root.name, *extra.resolve().relative_to(root).with_suffix("").parts)))
        else:
            digest.update(extra.name.encode() + b"\0" + extra.read_bytes())
    return digest.hexdigest(), tuple(sorted(name for name in names | parents if _file(name, root) and name != module))


@cache
def modules(verb: str, root: Path = ROOT) -> dict[str, str]:
    """Every module of the package that `rwkvpipe.<verb>` loads, itself included, with the digest of its code."""
    start = f"{root.name}.{verb}"
    if _file(start, root) is None:
        raise LookupError(f"there is no verb {verb} (rwkvpipe/{verb}.py)")
    found: dict[str, str] = {}
    waiting = [start]
    while waiting:
        module = waiting.pop()
        if module not in found:
            found[module], imports = _scan(module, root)
            waiting += imports
    return found


def fingerprint(verb: str, root: Path = ROOT) -> str:
    """Code of a verb as `verb@digest`. Raises LookupError if there is no such verb."""
    text = "\n".join(f"{name} {digest}" for name, digest in sorted(modules(verb, root).items()))
    return f"{verb}@{hashlib.sha256(text.encode()).hexdigest()[:12]}"


def still(planned: str, root: Path = ROOT) -> bool:
    """Whether a verb's code is what `planned` (from `fingerprint`) says."""
    return fingerprint(planned.partition("@")[0], root) == planned
