"""Hosts on a GPU: streams, CUDA graphs, the compiler, memory. `pytest -m gpu`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import factories
import pytest
import torch
from hosts import contents, holds, single
from hotgraft import Entries, Graft, Host, attach, pinned
from hotgraft.errors import BackendError, GateError, HostChangedError
from hotgraft.format import BLOCK
from torch import nn

pytestmark = pytest.mark.gpu  # the one that wants two GPUs is marked two_gpus besides

WIDTH = 512
DELAY = 20_000_000
"""GPU cycles, some 10 ms: long enough for what does not wait to overtake."""


@pytest.fixture(params=["cuda", "triton"])
def backend(request: pytest.FixtureRequest) -> str:
    """Each that runs on a GPU."""
    name: str = request.param
    return name


class Wide(nn.Module):
    """Its output says which weights it saw: each row's sum."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(WIDTH, WIDTH, dtype=torch.bfloat16))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.weight.float() @ x


def patches(model: Wide) -> tuple[Graft, Graft]:
    """Two grafts that write the same cells, one a row: row sums become 1 + WIDTH and 2 + WIDTH."""
    base = model.weight.detach().cpu()
    at = list(range(0, WIDTH * WIDTH, WIDTH + 1))
    two, three = ([value] * len(at) for value in (2.0, 3.0))
    return single("weight", base, at, two), single("weight", base, at, three)


@pytest.fixture
def wide(backend: str) -> Iterator[tuple[Wide, Host]]:
    model = Wide().cuda()
    before = contents(model)
    host = attach(model, backend=backend)
    a, b = patches(model)
    host.load(a, name="a")
    host.load(b, name="b")
    yield model, host
    torch.cuda.synchronize()
    if host._remove_gates:
        host.detach(force=True)
    assert holds(model, before)


def x() -> torch.Tensor:
    return torch.ones(WIDTH, device="cuda")


def rows(y: torch.Tensor) -> set[float]:
    """What the rows' sums are, less those of ones."""
    return {value - WIDTH for value in y.tolist()}


def test_switches_are_seen_by_the_next_pass(wide: tuple[Wide, Host]) -> None:
    model, host = wide
    for names, wanted in (((), 0.0), (("a",), 1.0), (("b",), 2.0), (("a",), 1.0), ((), 0.0)):
        host.activate(*names)
        assert rows(model(x())) == {wanted}
        host.verify()


def test_a_pass_on_another_stream_sees_one_set_of_weights(wide: tuple[Wide, Host]) -> None:
    model, host = wide
    side, given = torch.cuda.Stream(), x()
    torch.cuda.synchronize()
    seen = []
    for turn in range(20):
        host.activate("ab"[turn % 2])
        with torch.cuda.stream(side):
            torch.cuda._sleep(DELAY // 10)
            seen.append((turn % 2 + 1.0, model(given)))  # still to run when the next switch is made
    torch.cuda.synchronize()
    for wanted, y in seen:
        assert rows(y) == {wanted}


def test_commits_go_to_the_stream_that_was_given(backend: str) -> None:
    model, stream = Wide().cuda(), torch.cuda.Stream()
    host = attach(model, backend=backend, stream=stream)
    a, _ = patches(model)
    host.load(a, name="a")
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(DELAY)
    host.activate("a")
    assert not stream.query()  # enqueued behind the delay, and nobody waited for it
    assert rows(model(x())) == {1.0}  # though a pass on another stream does
    host.detach(force=True)
    assert holds(model, {"weight": torch.ones(WIDTH, WIDTH, dtype=torch.bfloat16)})


def test_a_graph_captured_before_a_switch_replays_with_the_new_weights(
    wide: tuple[Wide, Host],
) -> None:
    model, host = wide
    given = x()
    warm = torch.cuda.Stream()
    warm.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(warm):
        model(given)
    torch.cuda.current_stream().wait_stream(warm)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = model(given)
    for names, wanted in ((("a",), 1.0), (("b",), 2.0), ((), 0.0)):
        host.activate(*names)
        graph.replay()
        assert rows(y) == {wanted}


def test_no_switch_load_or_check_while_a_graph_is_captured(wide: tuple[Wide, Host]) -> None:
    model, host = wide
    a, _ = patches(model)
    given = x()
    model(given)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = model(given)
        with pytest.raises(GateError, match="the switch would become part of the graph"):
            host.activate("a")
        with pytest.raises(GateError, match="a check would become part of the graph"):
            host.verify()
        with pytest.raises(GateError, match="loading would become part of the graph"):
            host.load(a, name="c")
    graph.replay()
    assert rows(y) == {0.0}
    host.activate("a")
    graph.replay()
    assert rows(y) == {1.0}


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_a_compiled_model_runs_with_the_new_weights(wide: tuple[Wide, Host], mode: str) -> None:
    model, host = wide
    host.detach()
    compiled = torch.compile(model, mode=mode)
    host = attach(compiled, backend=host._backend.name)
    a, b = patches(model)
    host.load(a, name="a")
    host.load(b, name="b")
    with torch.no_grad():
        for _ in range(3):
            for names, wanted in (((), 0.0), (("a",), 1.0), (("b",), 2.0)):
                host.activate(*names)
                assert rows(compiled(x()).clone()) == {wanted}
    host.detach(force=True)


def test_resident_skills_are_composed_on_the_device(
    wide: tuple[Wide, Host], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, host = wide
    monkeypatch.setattr("hotgraft.composer.compose", None)  # the host's way
    host.activate("a", "b", policy="sum")
    assert rows(model(x())) == {3.0}
    host.activate("a", "b", policy="mean", weights=[1.0, 0.5])
    assert rows(model(x())) == {1.0}
    host.activate("a", "b", policy="priority")
    assert rows(model(x())) == {2.0}


def test_a_model_that_moved_is_found_before_a_write(wide: tuple[Wide, Host]) -> None:
    model, host = wide
    kept = model.weight.data
    model.weight.data = kept.clone()
    with pytest.raises(HostChangedError, match="the storage of 'weight' was moved"):
        host.activate("a")
    assert rows(model(x())) == {0.0}
    model.weight.data = kept


def test_a_skill_that_does_not_fit_the_memory_is_not_loaded(wide: tuple[Wide, Host]) -> None:
    _, host = wide
    c = factories.graft_on({"weight": torch.ones(WIDTH, WIDTH, dtype=torch.bfloat16)}, seed=3)
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(torch.cuda.memory_reserved() / total)

    def load_many() -> None:
        for i in range(10_000):
            host.load(c, name=f"c{i}", allow_nonfinite=True)

    try:
        with pytest.raises(BackendError, match=r"cuda:0 has no room for [0-9,]+ bytes"):
            load_many()
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    loaded = [name for name in host.skills if name.startswith("c")]
    assert len(loaded) < 10_000
    host.verify()


def test_a_graft_in_pinned_memory_is_copied_from_there(
    backend: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Wide().cuda()
    base, (a, _) = contents(model), patches(model)
    a.save(tmp_path / "a.graft.safetensors")
    graft = Graft.load(tmp_path / "a.graft.safetensors", pin=True)
    assert all(pinned.bytes_of(array) is not None for array in graft.groups["BF16"])
    copied: list[bool] = []
    find = pinned.bytes_of
    monkeypatch.setattr(
        pinned, "bytes_of", lambda array: copied.append((found := find(array)) is not None) or found
    )
    host = attach(model, backend=backend)
    host.load(graft, name="a")
    assert sum(copied) == 3
    host.activate("a")
    assert rows(model(x())) == {1.0}
    host.detach(force=True)
    assert holds(model, base)


def test_positions_in_the_second_block_of_a_tensor(backend: str) -> None:
    model = nn.Module()
    model.register_buffer("big", torch.zeros(BLOCK + 10, dtype=torch.int8, device="cuda"))
    host = attach(model, backend=backend)
    at = [0, BLOCK - 1, BLOCK, BLOCK + 9]
    held = model.big[torch.tensor(at, device="cuda")]
    assert held.tolist() == [0, 0, 0, 0]
    new = torch.tensor([1, 2, 3, 4], dtype=torch.int8)
    entries = Entries(torch.tensor(at), new, held.cpu(), (BLOCK + 10,))
    host.load(Graft.from_entries({"big": entries}), name="far")
    host.activate("far")
    assert model.big[torch.tensor(at, device="cuda")].tolist() == [1, 2, 3, 4]
    assert int(model.big.count_nonzero()) == 4
    host.deactivate()
    assert int(model.big.count_nonzero()) == 0


def test_weights_on_the_cpu_and_on_a_gpu_have_a_table_each() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].cuda()
    base = contents(model)
    graft = factories.graft_on(base, seed=1, share=0.5)
    host = attach(model)
    host.load(graft, name="a")
    assert len(host.skills["a"].plan.launches) == 2
    host.activate("a")
    assert holds(model, factories.grafted(base, graft))
    host.deactivate()
    assert holds(model, base)


@pytest.mark.two_gpus
def test_every_gpu_has_a_table_of_its_own(backend: str) -> None:
    model = nn.Sequential(*(nn.Linear(8, 8).to(f"cuda:{i % 2}") for i in range(4)))
    base = contents(model)
    graft = factories.graft_on(base, seed=1, share=0.5)
    host = attach(model, backend=backend)
    host.load(graft, name="a")
    assert {launch.device.index for launch in host.skills["a"].plan.launches} == {0, 1}
    host.activate("a")
    assert holds(model, factories.grafted(base, graft))
    host.deactivate()
    assert holds(model, base)


def test_a_stream_of_a_model_on_the_cpu_is_refused() -> None:
    with pytest.raises(BackendError, match="weights are on no CUDA device"):
        attach(nn.Linear(2, 2), stream=torch.cuda.Stream())


def test_a_cpu_backend_is_refused_for_weights_on_a_gpu() -> None:
    with pytest.raises(BackendError, match="works in the CPU's memory"):
        attach(nn.Linear(2, 2).cuda(), backend="cpu")
