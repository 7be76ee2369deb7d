"""Every Python block in the README and docs runs, in order, in an empty folder."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = ["README.md", *(f"docs/{p.name}" for p in sorted((ROOT / "docs").glob("*.md")))]


def blocks(page: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", (ROOT / page).read_text(), re.M | re.S)


def test_the_readme_has_an_example() -> None:
    assert len(blocks("README.md")) >= 1


ELSEWHERE = "docs/vllm.md"  # tests/serving runs it, in vLLM's environment


@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p) and p != ELSEWHERE])
def test_blocks_run(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {"__name__": page}
    for number, block in enumerate(blocks(page), 1):
        exec(compile(block, f"{page}, block {number}", "exec"), namespace)


def test_docstring_examples_run() -> None:
    import doctest
    import importlib
    import importlib.util
    import pkgutil

    import hotgraft

    tried = 0
    has_vllm = importlib.util.find_spec("vllm") is not None
    folder = Path(hotgraft.__file__).parent  # __path__ has more where the install is editable
    for module in pkgutil.walk_packages([str(folder)], "hotgraft."):
        if ".demo" in module.name or module.name.endswith(("_native", "triton_kernels")):
            continue
        if ".serve.vllm." in module.name and not has_vllm:
            continue  # tests/serving runs these, where vLLM is
        result = doctest.testmod(importlib.import_module(module.name))
        assert result.failed == 0, module.name
        tried += result.attempted
    assert tried > 20
