"""Triton: what its kernels compile to, what breaks them, and where the backend refuses to run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from agreement import (
    Arena,
    OnDevice,
    Stretch,
    check_exchange,
    check_merge,
    check_moves,
    check_select,
)
from hotgraft.errors import BackendError
from hotgraft.format import DTYPES
from hotgraft.kernels import Pair, Source, available, resolve
from hotgraft.kernels import triton as backend_module
from hotgraft.kernels.device import TILE
from hotgraft.kernels.triton import TritonBackend, open_backend, why_not
from hotgraft.triton_kernels import merge, move, select, table, value

HERE = Path(__file__).parent
CPU = torch.device("cpu")


def run_compiled(*command: str, cache: Path | None = None) -> str:
    """What a Python program prints in which Triton compiles."""
    environment = os.environ | {"TRITON_INTERPRET": "0"}
    if cache is not None:
        environment["TRITON_CACHE_DIR"] = str(cache)
    done = subprocess.run(
        [sys.executable, *command], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


# ---- what the kernels compile to ----------------------------------------------------------------


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Every kernel, compiled for GPUs that need not be here."""
    cache = tmp_path_factory.mktemp("triton")
    found: list[dict[str, Any]] = json.loads(
        run_compiled(str(HERE / "triton_targets.py"), cache=cache)
    )
    return found


def on(built: list[dict[str, Any]], *kernels: str) -> list[dict[str, Any]]:
    """The NVIDIA builds of some kernels."""
    found = [b for b in built if b["kernel"] in kernels and "memory" in b]
    assert {b["kernel"] for b in found} == set(kernels)
    return found


def test_every_kernel_compiles_for_nvidia_and_amd(built):
    every = {
        name
        for module in (move, select, merge)
        for name in vars(module)
        if name.endswith("_kernel")
    }
    assert len(every) == 8
    for arch in ("90", "gfx942"):
        assert {b["kernel"] for b in built if b["arch"] == arch} == every
    assert all(b["binary"] > 1000 for b in built)


def test_moves_load_sixteen_bytes_at_a_time_and_spill_nothing(built):
    for b in on(built, "gather_kernel", "scatter_kernel", "compare_kernel"):
        assert (b["STACK"], b["LOCAL"]) == (0, 0), b
        assert "ld.global.v4.b32" in b["memory"], "positions"
        # 8 entries a thread: 8 bytes of single ones, 16 at a time of the others
        wide = {"8-bit": "v2.b32", "64-bit": "v2.b64"}.get(b["label"], "v4.b32")
        kind = "st" if b["kernel"] == "gather_kernel" else "ld"
        assert f"{kind}.global.{wide}" in b["memory"], b


def test_a_comparison_writes_only_where_something_differs(built):
    for b in on(built, "compare_kernel"):
        writes = [m for m in b["memory"] if m.startswith(("st.global", "atom", "red"))]
        assert writes == ["red.global.gpu.relaxed.add.u64", "red.global.gpu.relaxed.max.s64"]


def test_arithmetic_is_rounded_as_it_is_written(built):
    """To nearest, in fp64 for merges, nothing fused, subnormals kept."""
    arithmetic = on(
        built, "flag_kernel", "count_kernel", "score_kernel", "own_kernel", "resolve_kernel"
    )
    for b in arithmetic:
        for operation in b["arithmetic"]:
            assert not operation.startswith(("fma", "mad")), b
            assert "ftz" not in operation, b
            if operation.startswith(("add", "sub", "mul", "div")):
                assert ".rn." in operation, b
    for b in on(built, "own_kernel", "resolve_kernel"):
        assert b["LOCAL"] == 0
        assert not any(o.endswith("f32") and not o.startswith("cvt") for o in b["arithmetic"]), b
        assert ("div.rn.f64" in b["arithmetic"]) == (b["label"].split()[1] in ("mean", "sign"))


# ---- kernels broken on purpose ------------------------------------------------------------------


@triton.jit
def segment_of_the_first(segments, tiles, tile, entry):  # noqa: ARG001
    return tl.zeros_like(entry) + tl.load(tiles + tile)


@triton.jit
def base_of_the_first(segments, tiles, tile, entry):
    low = tl.load(tiles + tile).to(tl.int64)
    return tl.zeros_like(entry) + tl.load(segments + 3 * low)


@triton.jit
def entries_but_the_last(tile, n, FULL: tl.constexpr, TILE: tl.constexpr):  # noqa: ARG001, N803
    entry = tile.to(tl.int64) * TILE + tl.arange(0, TILE)
    return entry, entry < n - 1


@triton.jit
def encode_by_way_of_float(number, TYPE: tl.constexpr):  # noqa: ARG001, N803
    single = number.to(tl.float32).to(tl.int32, bitcast=True)
    up = ((single >> 16) & 1) + 0x7FFF
    return ((single + up) >> 16).to(tl.int16)


@triton.jit
def difference_without_weight(new, base, weight, TYPE: tl.constexpr):  # noqa: ARG001, N803
    return value.decode(new, TYPE).to(tl.float64) - base


@triton.jit
def score_of_bits(a, b, TYPE: tl.constexpr):  # noqa: ARG001, N803
    return tl.abs(a.to(tl.int64) - b.to(tl.int64))


def judged() -> OnDevice:
    return OnDevice(open_backend(CPU))


CROSSING = [Stretch(TILE - 3, range(TILE - 3)), Stretch(9, [1, 4, 8]), Stretch(40, range(40))]


@pytest.mark.parametrize(
    ("module", "name", "broken"),
    [
        (move, "base_of", base_of_the_first),
        (table, "segment_of", segment_of_the_first),
        (move, "_entries", entries_but_the_last),
    ],
)
def test_broken_moves_are_caught(module, name, broken, monkeypatch):
    check_moves(judged(), Arena(CROSSING, 4))
    monkeypatch.setattr(module, name, broken)
    with pytest.raises(AssertionError):
        check_moves(judged(), Arena(CROSSING, 4))


def test_a_second_move_left_out_is_caught(monkeypatch):
    check_exchange(judged(), CROSSING, 4)
    scatter = TritonBackend._scatter
    monkeypatch.setattr(TritonBackend, "_scatter", lambda self, moves: scatter(self, moves[:1]))
    with pytest.raises(AssertionError):
        check_exchange(judged(), CROSSING, 4)


def two_sources() -> tuple[Any, ...]:
    """Their sum is just above the middle of two bf16 values; by way of float it is not."""
    where, base = np.zeros(1, np.int32), np.array([0x3F80], np.uint16)
    sources = [Source(where, base + 1, base, weight) for weight in (0.5, 2.0**-33)]
    return sources, np.array([[[0, 1], [0, 1]]]), DTYPES["BF16"], "sum", [0, 1]


@pytest.mark.parametrize(
    ("name", "broken"),
    [
        ("encode", encode_by_way_of_float),
        ("_difference", difference_without_weight),
        ("segment_of", segment_of_the_first),
    ],
)
def test_broken_merging_is_caught(name, broken, monkeypatch):
    check_merge(judged(), *two_sources())
    monkeypatch.setattr(merge, name, broken)
    with pytest.raises(AssertionError):
        check_merge(judged(), *two_sources())


def test_broken_selection_is_caught(monkeypatch):
    pairs = [Pair(torch.zeros(5), torch.tensor([1.0, -2.0, 0.5, -0.0, 0.0]), DTYPES["F32"])]
    check_select(judged(), pairs, 2)
    with monkeypatch.context() as patch:
        patch.setattr(select, "score", score_of_bits)
        with pytest.raises(AssertionError):
            check_select(judged(), pairs, 2)
    collect = select.collect

    def beside(*arguments):
        positions, scores = collect(*arguments)
        return positions + 1, scores

    monkeypatch.setattr(select, "collect", beside)
    with pytest.raises(AssertionError):
        check_select(judged(), pairs, 2)


# ---- where it runs ------------------------------------------------------------------------------


def test_it_runs_on_the_cpu_only_under_the_interpreter():
    assert why_not() is None
    assert resolve("triton", "cpu").name == "triton"
    with pytest.raises(BackendError, match="TRITON_INTERPRET is set"):
        open_backend(torch.device("cuda"))
    said = run_compiled(
        "-c",
        "import torch\n"
        "torch.cuda.is_available = lambda: True\n"
        "from hotgraft.kernels.triton import open_backend\n"
        "try:\n    open_backend(torch.device('cpu'))\n"
        "except Exception as error:\n    print(type(error).__name__, error)\n",
    )
    assert said.startswith("BackendError backend 'triton': it runs on the CPU only with"), said


def test_it_says_that_there_is_no_gpu():
    said = run_compiled(
        "-c",
        "import torch\n"
        "torch.cuda.is_available = lambda: False\n"
        "from hotgraft.kernels.triton import why_not\n"
        "print(why_not())\n",
    )
    assert said.startswith("Triton finds no GPU here; with TRITON_INTERPRET=1"), said


def test_it_says_that_triton_is_not_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    assert "pip install 'hotgraft[triton]'" in str(available()["triton"])
    with pytest.raises(BackendError, match="Triton does not load"):
        resolve("triton", "cpu")


def test_importing_the_package_imports_no_triton():
    said = run_compiled(
        "-c",
        "import sys, hotgraft.cli, hotgraft.kernels.triton, hotgraft.kernels.native_cpu\n"
        "print([name for name in sys.modules if name.partition('.')[0] == 'triton'])\n",
    )
    assert said.strip() == "[]"


def test_triton_is_tritons_own():
    assert backend_module.__name__ == "hotgraft.kernels.triton"
    assert Path(triton.__file__).parts[-2:] == ("triton", "__init__.py")
    assert not Path(triton.__file__).is_relative_to(Path(backend_module.__file__).parents[1])


def test_a_tile_is_the_same_everywhere():
    assert table.TILE == TILE
