"""The benches for a GPU, as far as they go without one: on the CPU, by a device that is played."""

from __future__ import annotations

import ctypes
import doctest
import importlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from hosts import use
from hotgraft import Host, attach
from hotgraft.kernels.device import Device, DeviceMerged, DeviceTable, Move
from simulated import Simulated

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # the bench is no package that is installed

from bench import cases, rows, shapes  # noqa: E402
from bench.cases import gpu_density  # noqa: E402
from bench.gpu import build, environment, floor, plots, preflight, tables, verbs, work  # noqa: E402
from bench.gpu import ways as how  # noqa: E402
from bench.gpu.lab import Lab  # noqa: E402
from bench.session import Session  # noqa: E402

Call = Callable[[], object]
CPU = torch.device("cpu")


class Played(Simulated):
    """A device's backend by the name of one that it is not, quick enough for thousands of cells."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def _scatter(self, moves: Any) -> None:
        for move in moves:
            for cells, values in _pieces(move):
                cells[:] = values

    def _gather(self, table: DeviceTable, values: Device) -> None:
        for cells, held in _pieces(Move(table, values)):
            held[:] = cells

    def _compare(self, table: DeviceTable, values: Device, report: Device) -> None:
        held = torch.zeros_like(values)
        self._gather(table, held)
        wrong = (held.view(torch.int16) != values.view(torch.int16)).nonzero()
        report[0] += len(wrong)
        if len(wrong):
            report[1] = max(int(report[1]), table.n_entries - int(wrong[0]))


class View:
    """Assigning to all of it writes the cells."""

    def __init__(self, cells: np.ndarray, at: np.ndarray) -> None:
        self.cells, self.at = cells, at

    def __setitem__(self, _: slice, values: np.ndarray) -> None:
        self.cells[self.at] = values

    def __array__(self, dtype: Any = None, copy: Any = None) -> np.ndarray:
        return self.cells[self.at]


def _pieces(move: Move) -> list[tuple[View, np.ndarray]]:
    found = []
    positions, values = move.table.positions.numpy(), move.values.numpy().view(np.uint16)
    for base, first, count in move.table.segments.tolist():
        at = positions[first : first + count]
        room = (ctypes.c_uint16 * (int(at[-1]) + 1)).from_address(base)
        cells = np.frombuffer(room, np.uint16)
        found.append((View(cells, at), values[first : first + count]))
    return found


class PlayedFloor:
    """The raw kernels, played."""

    def scatter(self, addresses: torch.Tensor, values: torch.Tensor, each: int) -> Call:
        assert each in floor.EACH

        def call() -> None:
            bits = values.view(torch.int16).numpy()
            for address, value in zip(addresses.tolist(), bits.tolist(), strict=True):
                ctypes.c_int16.from_address(address).value = value

        return call


class Stage(Lab):
    """A lab whose device is the CPU; it notes which samples were asked for."""

    device = CPU
    backends = {"cuda": None, "triton": None}  # noqa: RUF012
    floor: Any = PlayedFloor()

    def __init__(self, broken: str | None = None) -> None:
        self.broken = broken
        self.asked: set[str] = set()

    @staticmethod
    def why_not() -> str | None:
        return None

    def attach(self, model: torch.nn.Module, backend: str) -> Host:
        if backend == self.broken:
            raise RuntimeError("it does not work")
        host = attach(model, backend="reference")
        use(host, self.backend(backend))
        return host

    def backend(self, name: str) -> Any:
        return Played(name)

    def synchronize(self) -> None:
        return

    def device_us(self, call: Call, lead_us: float, cold: bool = False) -> float:
        assert lead_us >= 0
        self.asked.add("cold" if cold else "warm")
        begin = time.perf_counter_ns()
        call()
        return (time.perf_counter_ns() - begin) / 1000

    def free_bytes(self) -> int:
        return 1 << 40

    def release(self) -> None:
        return


def played(name: str, path: Path, lab: Lab) -> list[dict[str, Any]]:
    """The rows that a case leaves on a lab."""
    case = importlib.import_module(f"bench.cases.{name}")
    rows.start(path, played_environment())
    session = Session(path, path.parent, quick=True)
    case.measure(session, lab)
    return rows.read(path)[1]


def played_environment() -> dict[str, Any]:
    gpu = {"name": "A GPU", "memory_gib": 139.8, "l2_mib": 60.0, "driver": "1.2"}
    return {**environment.describe(quick=True), "gpu": gpu}


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    """The rows of every case."""
    folder = tmp_path_factory.mktemp("played")
    return {name: played(name, folder / f"{name}.jsonl", Stage()) for name in cases.ON_GPU}


# ---- the cases ----------------------------------------------------------------------------------


def test_every_case_measures_and_leaves_the_right_bits(found: dict[str, Any]) -> None:
    for name, of_case in found.items():
        assert of_case, name
        ours = [row for row in of_case if row["variant"].startswith("hotgraft")]
        assert {row["correct"] for row in ours} <= {True, None}, name
        assert {"hotgraft, cuda", "hotgraft, triton"} <= {
            ", ".join(row["variant"].split(", ")[:2]) for row in ours
        }


def test_the_switching_rows_hold_every_comparison(found: dict[str, Any]) -> None:
    mine = found["gpu_switch"]
    by_clock = {(row["parameters"].get("clock"), row["parameters"].get("caches")) for row in mine}
    assert {("device", "warm"), ("device", "cold"), ("call", "warm")} <= by_clock
    wanted = {how.INDEX_COPY, how.NAN_DENSE, how.LORA, how.DENSE, "floor, 1 a thread"}
    assert wanted <= {row["variant"] for row in mine if row["operation"] == "activate"}
    assert {row["parameters"]["patches"] for row in mine if row["operation"] == "A to B"} == {
        "disjoint",
        "overlapping",
    }
    exact = {row["variant"]: row["correct"] for row in mine if row["operation"] == "activate"}
    assert not exact.pop(how.LORA), "adding and subtracting does not lead back"
    assert all(exact.values())
    targets = {target["what"] for row in mine for target in row["targets"]}
    assert "device time over the floor's" in targets
    assert f"times faster than {how.NAN_DENSE}" in targets
    assert "us of the whole call" in targets
    assert "device time over CUDA's" in targets
    limits = {
        (row["operation"], target["limit"])
        for row in mine
        for target in row["targets"]
        if target["what"] == "us of the whole call"
    }
    assert {("activate", 40), ("A to B", 60)} <= limits


def test_loading_says_what_could_not_be_measured(found: dict[str, Any]) -> None:
    mine = {(row["operation"], row["variant"]): row for row in found["gpu_load"]}
    assert mine["file to live", "hotgraft, cuda, id verified"]["targets"]
    assert mine["merge", "hotgraft, cuda"]["targets"][0]["limit"] == 200
    unchecked = mine["file to live", "hotgraft, cuda, id not verified"]
    assert unchecked["samples"]


def test_a_backend_that_fails_stops_neither_the_other_nor_the_rows(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    with pytest.raises(RuntimeError, match="hotgraft, triton: it does not work"):
        played("gpu_scale", path, Stage(broken="triton"))
    left = rows.read(path)[1]
    (missing,) = {row["note"] for row in left if row["variant"] == "hotgraft, triton"}
    assert missing == "RuntimeError: it does not work"
    assert any(row["variant"] == "hotgraft, cuda" and row["samples"] for row in left)


def test_the_crossover_lies_between_its_neighbours() -> None:
    def row(variant: str, density: float, median: float) -> rows.Row:
        about = {"caches": "cold", "density": density}
        return rows.Row("gpu_density", "activate", variant, "", about, [median])

    every = [row("mine", d, us) for d, us in ((1e-4, 10.0), (1e-3, 100.0), (1e-2, 1000.0))]
    every += [row(how.DENSE, d, 300.0) for d in (1e-4, 1e-3, 1e-2)]
    (at,) = gpu_density.crossover(every, "mine").samples
    assert at == pytest.approx(3e-3, rel=0.01)
    assert (
        gpu_density.crossover(every[:2] + every[3:], "mine").note == "none between 0.0001 and 0.001"
    )
    assert gpu_density.crossover([], "mine").note == "not measured"


def test_wrong_bits_are_noticed_and_fail_the_run(tmp_path: Path) -> None:
    class Careless(Played):
        def _scatter(self, moves: Any) -> None:
            super()._scatter(moves)
            cells, _ = _pieces(moves[0])[0]
            cells.cells[1 + int(cells.at[-1]) // 2] ^= 1

    class Broken(Stage):
        def backend(self, name: str) -> Any:
            return Careless(name)

    with pytest.raises(RuntimeError, match="left wrong bits"):
        played("gpu_density", tmp_path / "rows.jsonl", Broken())


@pytest.mark.parametrize("name", cases.ON_GPU)
def test_without_a_gpu_a_row_says_not_measured(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Lab, "why_not", staticmethod(lambda: "none here"))
    path = tmp_path / "rows.jsonl"
    rows.start(path, environment.describe(quick=True))
    cases.named(name)(Session(path, tmp_path))
    (row,) = rows.read(path)[1]
    assert (row["case"], row["status"], row["note"]) == (name, "not measured", "none here")
    assert (row["samples"], row["median"]) == ([], None)


def test_the_command_takes_the_cases_by_name(tmp_path: Path) -> None:
    done = bench("run", "gpu_switch", "gpu_scale", "--results", tmp_path)
    assert done.returncode == 0, done.stderr
    (path,) = tmp_path.glob("*.jsonl")
    assert rows.GPU_MARK in path.name
    _, left = rows.read(path)
    assert [row["status"] for row in left] == ["not measured"] * 2


def bench(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "bench", *map(str, arguments)],
        cwd=ROOT, capture_output=True, text=True, check=False,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
    )  # fmt: skip


# ---- clocks ------------------------------------------------------------------------------------


class Event:
    """Notes when it is recorded; the first one is reached late only from the third try on."""

    notes: ClassVar[list[str]] = []

    def record(self) -> None:
        self.notes.append("event")

    def query(self) -> bool:
        return self.notes.count("event") < 6

    def elapsed_time(self, other: Event) -> float:
        assert isinstance(other, Event)
        return 0.25


def test_device_time_is_taken_behind_a_kernel_that_spins(monkeypatch: pytest.MonkeyPatch) -> None:
    notes = Event.notes
    notes.clear()
    monkeypatch.setattr("bench.gpu.lab._event", Event)
    monkeypatch.setattr("bench.gpu.lab._spin", lambda cycles: notes.append(f"spin {cycles}"))
    monkeypatch.setattr(Lab, "synchronize", lambda _: notes.append("wait"))
    monkeypatch.setattr(Lab, "_evict", lambda _: notes.append("evict"))
    lab = Lab()
    assert lab.device_us(lambda: notes.append("call"), 50, cold=True) == 250
    # Twice the events were reached before everything was enqueued: again, with a longer spin.
    spins = ["spin 400000", "spin 1200000", "spin 3600000"]
    assert notes == [
        note for spin in spins for note in ("wait", spin, "evict", "event", "call", "event", "wait")
    ]
    notes.clear()
    assert lab.call_us(lambda: notes.append("call")) >= 0
    assert lab.done_us(lambda: notes.append("call")) >= 0
    assert notes == ["wait", "call", "wait"] * 2


# ---- shapes and patches -------------------------------------------------------------------------


def test_the_shapes_have_the_parameters_of_llama_2() -> None:
    seven = 32 * (4 * 4096 * 4096 + 3 * 11008 * 4096)
    assert seven == 6_476_005_376 == shapes.SHAPES["7B"].parameters
    assert len(shapes.SHAPES["7B"].tensors) == 32 * 7
    seventy = 80 * (2 * 8192 * 8192 + 2 * 1024 * 8192 + 3 * 28672 * 8192)
    assert seventy == 68_451_041_280 == shapes.SHAPES["70B"].parameters
    assert shapes.entries_at(1e-4, shapes.SHAPES["7B"]) == 647_600


def test_patches_are_what_they_say() -> None:
    tensors = work.weights(shapes.SHAPES["small"], CPU)
    a, b = (shapes.graft(tensors, 20_000, seed) for seed in (1, 2))
    assert (a.mask & b.mask).nnz
    apart = work.disjoint(a, b)
    assert not (a.mask & apart.mask).nnz
    assert apart.nnz + (a.mask & b.mask).nnz == b.nnz
    patch = work.Patch.random(tensors, 0.01, seed=3)
    assert patch.entries == pytest.approx(0.01 * shapes.SHAPES["small"].parameters, rel=0.1)
    judge = work.Judge(tensors)
    assert judge.is_base(patch)
    step = how.index_copy_way(patch).steps
    step[how.ACTIVATE]()
    assert judge.holds(patch)
    assert not judge.is_base()
    next(iter(tensors.values())).view(-1)[int(patch.parts[0].indices[0]) + 1] += 1
    assert not judge.holds(patch), "a stray write"


def test_models_over_the_same_weights_count_their_writes_apart() -> None:
    tensors = work.weights(shapes.SHAPES["tiny"], CPU)
    one, other = work.model(tensors), work.model(tensors)
    for mine, theirs in zip(one.parameters(), other.parameters(), strict=True):
        before = theirs._version
        mine.add_(1)
        assert theirs._version == before
        assert theirs.data_ptr() == mine.data_ptr()


# ---- the floor, the verbs, the build ------------------------------------------------------------


def test_the_floor_compiles_where_there_is_a_compiler(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nvcc = floor.compiler() if shutil.which("nvcc") else None
    if nvcc:
        floor.build(tmp_path / "floor.so", (9, 0))
        assert hasattr(ctypes.CDLL(str(tmp_path / "floor.so")), "floor_scatter")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.delenv("NVCC", raising=False)
    with pytest.raises(FileNotFoundError, match="NVCC"):
        floor.build(tmp_path / "floor.so", (9, 0))


def test_every_verb_is_checked_against_the_reference() -> None:
    class Wrong(Simulated):
        def _gather(self, table: DeviceTable, values: Device) -> None:
            super()._gather(table, values)
            values[-1] ^= 1

        def _differing(self, base: Device, finetuned: Device, item_size: int) -> Device:
            return super()._differing(base, finetuned, item_size)[:-1]

        def _merge(self, *arguments: Any) -> DeviceMerged:
            found = super()._merge(*arguments)
            found.new[0] ^= 1
            return found

    noticed = verbs.check(Wrong())
    assert {"gather, 8 bytes", "difference, BF16", "merge sum, F32"} <= set(noticed)
    assert not any(said.startswith(("scatter", "exchange", "compare")) for said in noticed)


def test_missing_packages_are_told(tmp_path: Path) -> None:
    module = tmp_path / "test_it.py"
    module.write_text("import os, torch\nimport no_such_package\nfrom beside import that\n")
    assert preflight.missing(module, ["beside"]) == ["no_such_package"]


def test_the_build_insists_on_cuda_where_nvcc_is(monkeypatch: pytest.MonkeyPatch) -> None:
    for found, wanted in (("/somewhere/nvcc", "ON"), (None, "AUTO")):
        monkeypatch.setattr(build.shutil, "which", lambda _, found=found: found)
        assert build.definitions()[0] == f"HOTGRAFT_CUDA={wanted}"


# ---- the script ---------------------------------------------------------------------------------


def test_the_script_can_be_read_and_says_how_it_is_called() -> None:
    script = str(ROOT / "bench" / "gpu.sh")
    assert subprocess.run(["bash", "-n", script], check=False).returncode == 0
    done = subprocess.run([script], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "gpu.sh [--profile] OUT" in done.stderr


def test_the_script_goes_on_after_failures_and_tells(tmp_path: Path) -> None:
    """With a Python that fails at everything: every step is tried, and the summary comes last."""
    python = tmp_path / "python3"
    python.write_text("#!/bin/sh\nexit 3\n")
    python.chmod(0o755)
    out = tmp_path / "out"
    done = subprocess.run(
        [str(ROOT / "bench" / "gpu.sh"), str(out)],
        capture_output=True, text=True, check=False,
        env={"PATH": "/usr/bin:/bin", "PYTHON": str(python), "TMPDIR": str(tmp_path)},
    )  # fmt: skip
    assert done.returncode == 1, done.stderr
    summary = (out / "summary.txt").read_text()
    assert summary in done.stdout
    assert "SOMETHING FAILED" in summary
    for step in (
        "build",
        "pytest -m gpu",
        "memcheck, cuda",
        "racecheck, cuda",
        *(f"bench {c}" for c in cases.ON_GPU),
    ):
        assert step in summary, step
    assert (out / "log.txt").stat().st_size


# ---- tables and pictures ------------------------------------------------------------------------


def test_tables_and_pictures_come_from_the_rows(found: dict[str, Any], tmp_path: Path) -> None:
    every = [row for of_case in found.values() for row in of_case]
    text = tables.render(played_environment(), every)
    for heading in ("Switching on a GPU", "A to B on a GPU", "Loading and merging", "By density"):
        assert heading in text
    assert "One patch size on models" in text
    assert "| hotgraft, cuda |" in text
    assert "**Targets**" in text
    for line in text.splitlines():
        assert not line.startswith("|") or line.count("|") > 3
    short = tables.render(played_environment(), every, full=False)
    assert "By density" not in short
    drawn = plots.draw(tmp_path, played_environment(), every)
    assert [path.name for path in drawn] == ["gpu-switch.png", "gpu-density.png"]
    assert all(path.stat().st_size > 10_000 for path in drawn)


def test_without_rows_the_table_says_not_measured(tmp_path: Path) -> None:
    assert tables.render({}, []).startswith("**On a GPU**: not measured")
    row = {"note": "none here", "samples": []}
    assert "none here" in tables.render({}, [row])
    assert plots.draw(tmp_path, {"gpu": None}, []) == []


def test_the_table_command_has_a_section_on_gpus(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("<!-- bench:begin -->\n<!-- bench:end -->\n")
    done = bench("table", "--readme", page, "--page", page)
    assert done.returncode == 0, done.stderr
    assert "**On a GPU**" in page.read_text()


def test_rows_of_a_gpu_are_kept_apart(tmp_path: Path) -> None:
    cpu = tmp_path / "2026-01-01-amd.jsonl"
    names = ["2026-01-02-gpu-nvidia-h200.jsonl", "2026-01-03-gpu-none.jsonl"]
    for path in (cpu, *(tmp_path / name for name in names)):
        path.write_text(json.dumps({"kind": "environment"}) + "\n")
    assert rows.newest(tmp_path) == cpu
    assert rows.newest_gpu(tmp_path) == tmp_path / names[0]


@pytest.mark.parametrize("name", ["lab", "work", "preflight"])
def test_docstring_examples_run(name: str) -> None:
    result = doctest.testmod(importlib.import_module(f"bench.gpu.{name}"))
    assert result.failed == 0
    assert result.attempted
