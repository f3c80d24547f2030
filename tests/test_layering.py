"""The house rules: imports run one way, files are short, requirements are used, nobody else's `dataset` gets in."""

import ast
import os
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

from common.files import ROOT

FOLDERS = ("common", "model", "inference", "tokenizer", "dataset", "trainer", "evaluation", "serve", "scripts")
PACKAGES = tuple(folder for folder in FOLDERS if (ROOT / folder).is_dir())
FILES = [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))] + list(ROOT.glob("eval_*.py"))
IDS = [path.relative_to(ROOT).as_posix() for path in FILES]

# the floors: who -> whom it may import
MAY_IMPORT = {
    "common": ("common",),
    "tokenizer": ("tokenizer", "common"),
    "model": ("model", "tokenizer", "common"),
    "dataset": ("dataset", "model", "tokenizer", "common"),
    "inference": ("inference", "model", "tokenizer", "common"),
    "trainer": ("trainer", "inference", "dataset", "model", "tokenizer", "common"),
    "evaluation": ("evaluation", "inference", "dataset", "model", "tokenizer", "common"),
    "serve": ("serve", "inference", "dataset", "model", "tokenizer", "common"),
    "scripts": ("scripts", "serve", "evaluation", "inference", "dataset", "model", "tokenizer", "common"),
    "eval_model": ("scripts", "evaluation", "inference", "dataset", "model", "tokenizer", "common"),
}
NEVER = ("transformers", "peft", "trl", "accelerate", "datasets")  # opponents and oracles, for tests and benchmarks
MODULE_OF = {"pyyaml": "yaml"}

BOOTSTRAP = """
if not __package__:  # run as a file: import from the repository, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])
"""


def name_of(path: Path) -> str:
    name = path.relative_to(ROOT).with_suffix("").as_posix().replace("/", ".")
    return name.removesuffix(".__init__")


def imported(tree: ast.AST) -> set[str]:
    """Dotted names that code imports, anywhere in it; of `from model import config`, both model and model.config."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"line {node.lineno}: imports are absolute here"
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


@cache
def imports(path: Path) -> set[str]:
    return imported(ast.parse(path.read_text(encoding="utf-8")))


def is_script(path: Path) -> bool:
    body = ast.parse(path.read_text(encoding="utf-8")).body
    return any(isinstance(node, ast.If) and ast.unparse(node.test) == "__name__ == '__main__'" for node in body)


MODULES = {name_of(path): path for path in FILES}
SCRIPTS = [path for path in FILES if path.parent != ROOT and path.name != "__main__.py" and is_script(path)]


def ours(path: Path) -> set[str]:
    """The modules of ours that this file imports anywhere: at its top, lazily, or under TYPE_CHECKING."""
    return {dotted for dotted in imports(path) if dotted in MODULES} - {name_of(path)}


@pytest.mark.parametrize("path", FILES, ids=IDS)
def test_imports_run_one_way(path):
    name = name_of(path)
    floor = name.partition(".")[0]
    for other in ours(path):
        assert other.partition(".")[0] in MAY_IMPORT[floor], f"{name} imports {other}, which stands above it"
        assert not other.startswith("trainer.train_"), f"{name} imports {other}: stages are programs, not parts"


def test_no_files_import_each_other():
    """In a circle of any length, none of the files can be read, tested or changed alone. What is taken away, again and
    again, is every file whose imports are gone already: a circle is what stays."""
    waiting = {name: ours(path) for name, path in MODULES.items()}
    while free := [name for name, others in waiting.items() if not others & waiting.keys()]:
        for name in free:
            del waiting[name]
    assert not waiting, "these import each other: " + ", ".join(
        f"{name} -> {', '.join(sorted(others & waiting.keys()))}" for name, others in waiting.items()
    )


@pytest.mark.parametrize("path", FILES, ids=IDS)
def test_what_is_imported_exists_and_is_ours_the_standard_librarys_or_required(path):
    for dotted in imports(path):
        first = dotted.partition(".")[0]
        assert first not in NEVER, f"{path}: {first} is no part of Sparrow"
        if first in PACKAGES:
            parent = dotted.rpartition(".")[0]
            assert dotted in MODULES or parent in MODULES, f"{path} imports {dotted}, which does not exist"


@pytest.mark.parametrize("path", FILES, ids=IDS)
def test_files_stay_short(path):
    lines = path.read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 400, f"{path} has {len(lines)} lines: what in it could stand alone?"


def test_every_requirement_is_used():
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    required = {re.split(r"[^\w-]", line)[0].lower() for line in lines if line and not line.startswith("#")}
    used = {dotted.partition(".")[0] for path in FILES for dotted in imports(path)}
    unused = {name for name in required if MODULE_OF.get(name, name) not in used}
    assert not unused, "a requirement that nobody imports"


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_every_script_puts_the_repository_first(path):
    before, found, _ = path.read_text(encoding="utf-8").partition(BOOTSTRAP)
    assert found, f"every script starts with these lines:{BOOTSTRAP}"
    early = [name for name in imported(ast.parse(before)) if name.partition(".")[0] in PACKAGES]
    assert not early, f"{early} imported before the repository is on the path"


@pytest.mark.parametrize("folder", [".", "trainer"])
def test_a_foreign_package_of_the_same_name_does_not_get_in(tmp_path, folder):
    """`dataset` is a package on PyPI, and `model` is in everybody's other clone on PYTHONPATH: once imported, theirs
    would fail far from the cause. Ours win, from the root and from trainer/."""
    for package in PACKAGES:
        decoy = tmp_path / "site-packages" / package / "__init__.py"
        decoy.parent.mkdir(parents=True)
        decoy.write_text(f"raise RuntimeError('the decoy {package} was imported')", encoding="utf-8")
    script = next(path for path in SCRIPTS if path.parent.name == "trainer")
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "site-packages")}
    here = {"cwd": ROOT / folder, "env": environment, "capture_output": True, "text": True, "encoding": "utf-8"}

    done = subprocess.run([sys.executable, os.path.relpath(script, ROOT / folder), "--help"], **here)
    assert done.returncode == 0 and "usage:" in done.stdout, done.stderr
    probe = f"import runpy; runpy.run_path({str(script)!r}); import dataset; print(dataset.__file__)"
    done = subprocess.run([sys.executable, "-c", probe], **here)
    assert done.stdout.strip() == str(ROOT / "dataset" / "__init__.py"), done.stderr


TESTS = sorted((ROOT / "tests").rglob("test_*.py"))


@pytest.mark.parametrize("path", TESTS, ids=lambda path: path.relative_to(ROOT / "tests").as_posix())
def test_test_files_do_not_import_each_other(path):
    """What two of them need belongs to tests/helpers/ or a conftest.py. Else a changed test breaks another file's."""
    names = {test.stem for test in TESTS}
    for dotted in imports(path):
        assert not names & set(dotted.split(".")), f"{path.name} imports {dotted}"
