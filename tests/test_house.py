"""The house checks itself: floors, sizes, writes, dead settings, names."""

import ast
import re
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
import yaml

from rwkvpipe.base import config as settings
from rwkvpipe.base.fingerprint import modules

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "rwkvpipe"
FILES = sorted(PACKAGE.rglob("*.py"))
FLOORS = {
    "base": 0,
    "tokenizer": 1,
    "kernel": 1,
    "tasks": 1,
    "show": 1,
    "data": 2,
    "model": 2,
    "weights": 3,
    "infer": 3,
    "train": 4,
    "web": 4,
    "verb": 5,
}
# programs that no rule starts by its own name
NO_RULE = {"inspect", "join", "launch", "plan", "serve"}
VERBS = {file.stem for file in PACKAGE.glob("*.py")} - {"__init__"}
# Snakemake waits for some of these each time it parses, the user for the others: a second of torch is too much
TORCH_FREE = ("plan", "launch", "settings", "download", "questions", "score", "plot", "report")
ENVIRONMENT = {"base/compiler.py", "base/crew.py", "base/lock.py", "launch.py", "train/dist.py", "weights/hub.py"}
ENVIRONMENT |= {"tokenizer/bpe.py"}  # the library tokenizers is told by the environment alone to keep to one core
HOMES = {
    "pydantic": ("base/",),
    "safetensors": ("weights/",),
    "gguf": ("weights/gguf.py",),
    "matplotlib": ("show/",),
    "tokenizers": ("tokenizer/",),
    "starlette": ("web/app.py",),
    "uvicorn": ("web/app.py",),
    "huggingface_hub": ("weights/hub.py",),
    "transformers": (),
    "datasets": (),
    "sklearn": (),
}
WRITERS = {"write_text", "write_bytes", "save_file", "savefig", "to_csv", "to_json", "tofile", "savez"}


def name(file: Path) -> str:
    return str(file.relative_to(PACKAGE))


@cache
def tree(file: Path) -> ast.Module:
    return ast.parse(file.read_text())


def each(*kinds: type, files: list[Path] = FILES) -> Iterator[tuple[str, ast.AST]]:
    for file in files:
        for node in ast.walk(tree(file)):
            if isinstance(node, kinds):
                yield f"{name(file)}:{node.lineno}", node


def imports(file: Path) -> set[str]:
    """Everything a file imports, absolute, `from a import b` as both a and a.b."""
    found = set()
    for node in ast.walk(tree(file)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{name(file)}: relative import"
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def room(module: str) -> str:
    parts = module.split(".")
    return parts[1] if len(parts) > 1 and parts[1] in FLOORS else "verb"


def ours(module: str) -> Path | None:
    base = ROOT.joinpath(*module.split("."))
    return next((file for file in (base.with_suffix(".py"), base / "__init__.py") if file.is_file()), None)


@pytest.mark.parametrize("file", FILES, ids=name)
def test_modules_import_only_from_lower_floors(file):
    here = room("rwkvpipe." + ".".join(file.relative_to(PACKAGE).with_suffix("").parts))
    for module in imports(file):
        if module.startswith("rwkvpipe.") and ours(module) not in (None, file):
            there = room(module)
            if file == PACKAGE / "__init__.py":
                assert there == "base", f"{module}: the package's own entry knows the base only"
            elif here == "verb":
                assert there != "verb" or module.count(".") > 1, f"{module}: programs do not import each other"
            else:
                assert FLOORS[there] < FLOORS[here] or there == here, f"{module} stands above {here}, or beside it"


def test_no_module_imports_itself_in_a_circle():
    edges = {file: {ours(m) for m in imports(file) if m.startswith("rwkvpipe.")} - {None, file} for file in FILES}
    state: dict[Path, int] = {}

    def visit(file: Path, path: tuple[Path, ...]) -> None:
        assert state.get(file) != 1, " -> ".join(map(name, (*path, file)))
        if file not in state:
            state[file] = 1
            for other in sorted(edges.get(file, ())):
                visit(other, (*path, file))
            state[file] = 2

    for file in FILES:
        visit(file, ())


@pytest.mark.parametrize("verb", [verb for verb in TORCH_FREE if verb in VERBS])
def test_these_verbs_start_without_torch(verb):
    for module in modules(verb):
        assert not {"torch", "safetensors.torch"} & imports(ours(module)), module


def test_libraries_live_at_home():
    for file in FILES:
        for module in imports(file):
            homes = HOMES.get(module.split(".")[0])
            assert homes is None or name(file).startswith(homes or ("-",)), f"{name(file)} imports {module}"


@pytest.mark.parametrize("file", FILES, ids=name)
def test_files_have_at_most_400_lines(file):
    assert len(file.read_text().splitlines()) <= 400


def test_functions_have_at_most_60_lines_and_6_parameters():
    for where, node in each(ast.FunctionDef, ast.AsyncFunctionDef):
        assert node.end_lineno - node.lineno < 60, f"{where}: {node.name} has over 60 lines"
        given = [a.arg for a in [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs] if a.arg != "self"]
        # the operators of kernel/ take what their formulas name
        assert len(given) <= 6 or where.startswith("kernel/"), f"{where}: {node.name} has {len(given)} parameters"


def test_rules_are_short():
    for file in sorted((ROOT / "workflow").rglob("*.smk")):
        for rule in re.split(r"\n(?=(?:use )?rule )", file.read_text())[1:]:
            body = re.split(r"\n\n\n", rule)[0]
            lines = [line for line in body.splitlines() if line.strip()]
            assert len(lines) <= 32, f"{file.name}: {lines[0]} has {len(lines)} lines"


def test_files_are_written_whole():
    """Whoever writes a file does it through base/files.py, or into the temporary path that its `atomic` gives."""
    for file in FILES:
        text = file.read_text()
        if name(file) == "base/files.py" or re.search(r"\batomic\b", text):
            continue
        imported = imports(file)
        for where, node in each(ast.Call, files=[file]):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            ours_own = isinstance(node.func, ast.Name) and f"rwkvpipe.base.files.{called}" in imported
            assert called not in WRITERS or ours_own, f"{where}: {called} outside base/files.py"
            if called == "open":
                words = [ast.unparse(value) for value in [*node.args, *(k.value for k in node.keywords)]]
                assert not any(re.fullmatch(r"'[rbt]*[wxa+][bt+]*'", word) for word in words), f"{where}: writes"


def test_only_the_edges_read_the_environment():
    for where, node in each(ast.Attribute):
        if isinstance(node.value, ast.Name) and node.value.id == "os" and node.attr in ("environ", "getenv", "putenv"):
            assert where.split(":")[0] in ENVIRONMENT, f"{where}: reads the environment"


def test_errors_are_caught_by_their_narrowest_name():
    for where, node in each(ast.ExceptHandler):
        if where.startswith(("tokenizer/bpe.py:", "tokenizer/own.py:", "train/own.py:")):
            continue  # the library tokenizers raises nothing narrower, and code of the user's anything
        names = [n.id for n in ast.walk(node.type or ast.Constant(0)) if isinstance(n, ast.Name)]
        assert node.type is not None and not {"Exception", "BaseException"} & set(names), f"{where}: catches everything"
        assert not all(isinstance(line, ast.Pass) for line in node.body), f"{where}: swallows an error"


def test_library_code_does_not_print_or_evaluate():
    for where, node in each(ast.Call):
        called = getattr(node.func, "id", "")
        assert called not in ("eval", "exec", "__import__"), where
        assert called != "print" or where.split(":")[0] in ("inspect.py", "generate.py"), f"{where}: prints"
        whole = ast.unparse(node.func)
        assert not whole.startswith("pickle."), f"{where}: unpickles"
        assert whole != "torch.load" or "weights_only=True" in ast.unparse(node), where


def test_there_is_no_unfinished_work():
    words = re.compile(r"\b(TODO|FIXME|XXX|NotImplementedError)\b")
    for file in FILES:
        assert not words.search(file.read_text()), name(file)


def test_everything_public_says_what_it_is():
    for file in FILES:
        body = tree(file).body
        assert not body or ast.get_docstring(tree(file)), f"{name(file)} has no docstring"
        for node in body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
                assert ast.get_docstring(node), f"{name(file)}: {node.name} has no docstring"


@pytest.mark.parametrize("verb", sorted(VERBS))
def test_verbs_look_alike(verb):
    module = tree(PACKAGE / f"{verb}.py")
    assert any(isinstance(node, ast.FunctionDef) and node.name == "main" for node in module.body)
    example = ast.get_docstring(module).strip().split("\n\n")[-1]
    assert re.search(rf"python -m rwkvpipe\.(launch \d )?{verb}\b", example), "no runnable example at the end"
    assert (ROOT / f"tests/test_{verb}.py").is_file(), "no test"


def test_every_setting_is_read_somewhere():
    models = [m for m in vars(settings).values() if isinstance(m, type) and issubclass(m, settings.Strict)]
    fields = {field for model in models for field in model.model_fields}
    read = set(re.findall(r"\.(\w+)\b", "".join(f.read_text() for f in (ROOT / "workflow").rglob("*.smk"))))
    for file in FILES:
        if name(file) not in ("base/config.py", "base/corpus.py", "base/tuning.py", "base/vocabulary.py"):
            for node in ast.walk(tree(file)):
                if isinstance(node, ast.Attribute):
                    read.add(node.attr)
                elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                    read.add(node.value)
    assert not fields - read, f"settings that nothing reads: {sorted(fields - read)}"


def test_rules_bear_their_verb_s_names():
    rules = {}
    for file in (ROOT / "workflow").rglob("*.smk"):
        for block in re.split(r"^(?=(?:use )?rule )", file.read_text(), flags=re.M)[1:]:
            rule = re.match(r"(?:use rule \w+ as|rule) (\w+)", block)[1]
            rules[rule] = re.findall(r"python -m rwkvpipe\.(?:launch [^\"]*?\{resources\.gpu\} )?(\w+)", block)
    for rule, called in rules.items():
        assert rule.split("_")[0] in VERBS, f"rule {rule} is no verb"
        assert called in ([], [rule]), f"rule {rule} runs {called}"
    assert {verb for verb in VERBS - NO_RULE} == set(rules) & VERBS


def test_pins_agree():
    pins = dict(line.split("==") for line in (ROOT / "envs/constraints.txt").read_text().splitlines() if "==" in line)
    pins = {key.lower(): version for key, version in pins.items()}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for wanted in project["dependencies"] + project["optional-dependencies"]["test"]:
        assert re.match(r"[\w-]+", wanted)[0].lower() in pins, f"{wanted} is not pinned"
    for file in ("cpu", "cuda"):
        environment = yaml.safe_load((ROOT / f"envs/{file}.yaml").read_text())
        for pin in environment["dependencies"][-1]["pip"]:
            key, version = pin.split("==")
            assert pins[key] == version, f"envs/{file}.yaml: {pin}"
