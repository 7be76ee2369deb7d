"""Which test modules cannot be imported here, for want of which packages.

`python -m bench.gpu.preflight` prints an `--ignore` for each on stdout, and the reason on stderr.
"""

from __future__ import annotations

import ast
import importlib.util
import sys
from collections.abc import Iterable
from pathlib import Path

TESTS = Path(__file__).resolve().parents[2] / "tests"


def wanted(source: str) -> set[str]:
    """The top-level packages that a module imports when it is imported.

    Example:
        >>> sorted(wanted("import a.b\\nfrom c import d\\ndef f():\\n    import e"))
        ['a', 'c']
    """
    found = set()
    for node in ast.parse(source).body:
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module.partition(".")[0])
    return found


def missing(path: Path, beside: Iterable[str]) -> list[str]:
    """The packages that a test module wants and that are not here.

    Args:
        path: the module.
        beside: names of modules in the tests' folder.
    """
    names = wanted(path.read_text()) - set(beside) - set(sys.stdlib_module_names)
    return sorted(name for name in names if importlib.util.find_spec(name) is None)


def main() -> None:
    """Print what to ignore, and why."""
    beside = [path.stem for path in TESTS.glob("*.py")]
    for path in sorted(TESTS.glob("test_*.py")):
        lacking = missing(path, beside)
        if lacking:
            name = path.relative_to(TESTS.parent)
            print(f"--ignore={name}")
            print(f"left out: {name}, for want of {', '.join(lacking)}", file=sys.stderr)


if __name__ == "__main__":
    main()
