"""The house: layers point one way, files stay short, docs name what exists."""

import ast
import re
import tomllib
from importlib.metadata import distribution
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "python" / "hotgraft"
FOLDERS = ("python", "csrc", "triton_kernels", "tests", "bench")
SUFFIXES = {".py", ".pyi", ".cpp", ".h", ".c", ".cu", ".cuh"}
CODE = sorted(
    path
    for folder in FOLDERS
    for path in (ROOT / folder).rglob("*")
    if path.suffix in SUFFIXES and "__pycache__" not in path.parts
)
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])


def shown(path: Path) -> str:
    return str(path.relative_to(ROOT))


# ---- layers -----------------------------------------------------------------------------------

# A module imports only what stands further up, as long as it is imported itself. What a function
# imports when it runs is free.
LAYERS = [
    {"errors", "_native"},
    {"format", "pinned"},
    {"files"},
    {"graft"},
    {"kernels"},
    {"weights"},
    {"scope"},
    {"batches"},
    {"difference", "composition", "evaluation", "placement"},
    {"gate"},
    {"streams"},
    {"ledger"},
    {"composer", "blocks"},
    {"host"},
    {"library"},
    {"search", "train", "tasks", "serve"},
    {"hotgraft"},  # the package's own names
    {"checkpoint", "inspection"},
    {"arguments", "console"},
    {"doctor", "localize_command", "serve_command"},
    {"demo"},
    {"cli"},
]
LAYER_OF = {name: i for i, layer in enumerate(LAYERS) for name in layer}


def unit(path: Path) -> str:
    """A module of the package is a unit, and so is a subpackage."""
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def imports_of(source: str) -> set[str]:
    """The units that a module imports when it is imported."""
    found = set()

    def visit(statements: list[ast.stmt]) -> None:
        for node in statements:
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, "imports name their module in full"
                names = [node.module or ""]
                if node.module == "hotgraft":
                    names = [f"hotgraft.{alias.name}" for alias in node.names]
            else:
                names = []
            for name in names:
                head, _, rest = name.partition(".")
                if head == "hotgraft":
                    part = rest.partition(".")[0]
                    found.add(part if part in LAYER_OF else "hotgraft")
            checks_only = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
            functions = (ast.FunctionDef, ast.AsyncFunctionDef)
            if not isinstance(node, functions) and not checks_only:
                for field in ("body", "orelse", "finalbody", "handlers"):
                    visit([n for n in getattr(node, field, []) if isinstance(n, ast.AST)])

    visit(ast.parse(source).body)
    return found


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=shown)
def test_imports_point_one_way(path):
    here = unit(path)
    if here == "__init__":
        return  # the package itself gathers what is public
    assert here in LAYER_OF, f"give {here} its place in LAYERS"
    for imported in imports_of(path.read_text()) - {here}:
        assert LAYER_OF[imported] < LAYER_OF[here], f"{here} imports {imported}"


def test_imports_are_seen():
    source = """
import hotgraft.host
from hotgraft import kernels, diff
from hotgraft.placement.fit import fit
if TYPE_CHECKING:
    from hotgraft.cli import main
try:
    from hotgraft.demo import run
except ImportError:
    from hotgraft.doctor import look
def later():
    from hotgraft.ledger import Ledger
class A:
    from hotgraft.gate import Gate
"""
    seen = {"host", "kernels", "hotgraft", "placement", "demo", "doctor", "gate"}
    assert imports_of(source) == seen


NATIVE = sorted(p for p in CODE if p.is_relative_to(ROOT / "csrc"))
SYSTEM_HEADERS = {"immintrin.h", "pthread.h", "sched.h", "cuda_runtime.h"}


@pytest.mark.parametrize(
    "path", [p for p in NATIVE if "bindings" not in p.relative_to(ROOT).parts], ids=shown
)
def test_native_code_knows_no_framework(path):
    """Outside csrc/bindings: the standard library, the system, and our own headers."""
    for line in path.read_text().splitlines():
        include = re.match(r'\s*#\s*include\s*([<"])(.*?)[>"]', line)
        if include and include[1] == "<":
            assert re.fullmatch(r"[a-z_]+", include[2]) or include[2] in SYSTEM_HEADERS, line
        elif include:
            assert (ROOT / "csrc" / include[2]).is_file(), line
        assert not re.search(r"\b(py::|pybind11|PyObject|at::|torch::|c10::|DLTensor)", line), line


def test_native_code_is_all_there():
    listed = re.findall(r"csrc/[\w/]+\.(?:cpp|cu)", (ROOT / "CMakeLists.txt").read_text())
    assert set(listed) <= {shown(path) for path in NATIVE}
    assert {shown(p) for p in NATIVE if p.suffix == ".cpp"} <= set(listed)


# ---- files ------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", CODE, ids=shown)
def test_files_are_short_and_finished(path):
    text = path.read_text()
    assert text.count("\n") <= 500
    unfinished = re.search("|".join(["TO" + "DO", "FIX" + "ME", "XX" + "X"]), text)
    assert unfinished is None, unfinished


def test_no_test_is_expected_to_fail_or_run_again():
    for path in (ROOT / "tests").glob("*.py"):
        marks = re.findall(r"pytest\.(?:mark\.)?(skipif|xfail|flaky)\b", path.read_text())
        assert not marks, f"{path.name}: {marks}"


def test_nothing_installs_beside_hotgraft():
    """A top-level package `triton_kernels` is looked for by servers: ours must not be it."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    for installed, source in settings["tool"]["scikit-build"]["wheel"]["packages"].items():
        assert installed.split("/")[0] == "hotgraft"
        assert (ROOT / source).is_dir()
    names = {file.parts[0] for file in distribution("hotgraft").files or []}
    assert "triton_kernels" not in names


# ---- docs -------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", PAGES, ids=shown)
def test_docs_name_what_exists(page):
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.M | re.S)
    named = re.findall(rf"`((?:{'|'.join(FOLDERS)}|docs|\.ci)/[\w./*-]*)`", text)
    for name in named:
        assert list(ROOT.glob(name.rstrip("/"))), f"{page.name} names {name}"
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", text):
        if "://" not in target and not target.startswith("mailto:"):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"
