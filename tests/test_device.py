"""What the device backends share: tables, one upload, one launch a switch, sets composed there."""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Iterator
from typing import Any

import factories
import numpy as np
import pytest
import torch
from agreement import Arena, Stretch, check_select
from hosts import Workshop, contents, holds, single, use, versions
from hotgraft import attach
from hotgraft.errors import (
    BackendError,
    BaseMismatchError,
    DeviceMemoryError,
    HostChangedError,
    HotgraftError,
    OverlapError,
)
from hotgraft.format import DTYPES
from hotgraft.kernels import Pair, Part, Source
from hotgraft.kernels.device import TILE, Move, tiles_of
from simulated import CPU, Simulated


@pytest.fixture
def device() -> Simulated:
    return Simulated()


class There(Workshop):
    """A workshop whose skills are loaded on a simulated device."""

    def __init__(self) -> None:
        super().__init__()
        self.device = Simulated()
        for name in ("a", "b"):
            self.host.unload(name)
        use(self.host, self.device)
        self.host.load(self.a, name="a")
        self.host.load(self.b, name="b")
        self.device.launches.clear()


@pytest.fixture
def there() -> Iterator[There]:
    shop = There()
    yield shop
    shop.host.detach(force=True)
    assert shop.is_base()


# ---- tables ------------------------------------------------------------------------------------


def test_tiles_name_the_segment_of_each_tiles_first_entry() -> None:
    counts = [1, TILE - 1, 1, 5 * TILE, 3, 2 * TILE]
    firsts = np.cumsum([0, *counts[:-1]])
    segments = np.stack([np.zeros(6, np.int64), firsts, counts], 1).astype(np.int64)
    tiles = tiles_of(segments, sum(counts))
    for t, segment in enumerate(tiles[:-1]):
        first, count = segments[segment, 1:]
        assert first <= t * TILE < first + count
    assert (tiles[-1], len(tiles)) == (5, -(-sum(counts) // TILE) + 1)


def test_everything_is_uploaded_in_one_buffer_at_multiples_of_16_bytes(device: Simulated) -> None:
    parts = [
        Part(
            np.array([[size * 64, 0, n]], np.int64),
            np.arange(n, dtype=np.int32),
            *(np.arange(n, dtype=f"u{size}") + i for i in (1, 2)),
            size,
        )
        for size, n in ((1, 5), (2, 3), (8, 7))
    ]
    loaded = device.prepare(parts)
    storages = set()
    for part, (table, new, old) in zip(parts, loaded, strict=True):
        for tensor in (table.segments, table.tiles, table.positions, new, old):
            storages.add(tensor.untyped_storage().data_ptr())
            assert tensor.data_ptr() % 16 == 0
        assert table.segments.tolist() == part.segments.tolist()
        assert table.positions.tolist() == part.positions.tolist()
        assert device.read(new, part.new.dtype).tolist() == part.new.tolist()
        assert device.read(old, part.old.dtype).tolist() == part.old.tolist()
        assert (table.n_segments, table.n_entries) == (1, len(part.positions))
    assert len(storages) == 1


@pytest.mark.parametrize(
    ("segments", "size", "message"),
    [
        ([[64, 0, 2]], 4, "segments must cover the positions exactly"),
        ([[64, 0, 2], [64, 2, 0], [64, 2, 1]], 4, "none empty"),
        ([[64, 0, 2], [64, 1, 1]], 4, "in order"),
        ([[64, 0, 3]], 3, "item_size must be 1, 2, 4 or 8"),
        ([], 4, r"segments must be int64\[n > 0\]"),
    ],
)
def test_a_table_that_does_not_fit_is_refused(
    device: Simulated, segments: Any, size: int, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        device.table(np.array(segments, np.int64), np.arange(3, dtype=np.int32), size)


def test_a_cell_between_two_items_is_refused(device: Simulated) -> None:
    with pytest.raises(BackendError, match="segment 1 begins at 0x42, no multiple of its items' 4"):
        device.table(np.array([[64, 0, 1], [66, 1, 2]]), np.arange(3, dtype=np.int32), 4)


def test_values_of_another_length_or_type_are_refused(device: Simulated) -> None:
    arena = Arena([Stretch(9, [1, 4])], 4)
    table = arena.table(device)
    for wrong in (torch.zeros(7, dtype=torch.uint8), torch.zeros(2, dtype=torch.int32)):
        for verb in (device.gather, device.scatter, device.compare):
            with pytest.raises(ValueError, match="values must be 2 items of 4 bytes, as uint8"):
                verb(table, wrong)
    with pytest.raises(BackendError, match="values are on meta, the table on cpu"):
        device.gather(table, torch.zeros(8, dtype=torch.uint8, device="meta"))


def out_of_memory(*_: Any, **__: Any) -> Any:
    raise torch.OutOfMemoryError("CUDA out of memory")


def test_a_device_without_room_is_named(device: Simulated, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "empty", out_of_memory)
    with pytest.raises(DeviceMemoryError, match=r"cpu has no room for \d+ bytes: unload a"):
        device.table(np.array([[64, 0, 1]]), np.zeros(1, np.int32), 4)


def test_kept_sets_make_room_for_a_new_one(there: There, monkeypatch: pytest.MonkeyPatch) -> None:
    there.host.activate("a", "b", policy="priority")
    merge, tries = there.device._merge, []

    def tight(*arguments: Any) -> Any:
        tries.append(len(there.host._composer))
        return out_of_memory() if len(tries) == 1 else merge(*arguments)

    monkeypatch.setattr(there.device, "_merge", tight)
    there.host.activate("b", "a", policy="priority")
    assert tries == [1, 0, 0, 0]  # three item sizes, once the kept set is gone
    assert holds(there.model, factories.grafted(there.with_b, there.a))
    there.host.deactivate()
    monkeypatch.setattr(there.device, "_merge", out_of_memory)
    with pytest.raises(DeviceMemoryError, match="no room for a merge"):
        there.host.activate("a", "b", policy="priority")


def test_a_load_that_finds_no_room_changes_nothing(
    there: There, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> Any:
        raise DeviceMemoryError("cuda:0 has no room for 12 bytes")

    there.host.activate("a")
    monkeypatch.setattr(there.device, "prepare", full)
    before = versions(there.model)
    with pytest.raises(DeviceMemoryError, match="no room"):
        there.host.load(there.b, name="again")
    assert set(there.host.skills) == {"a", "b"}
    assert (versions(there.model), there.is_a()) == (before, True)


def test_compare_names_the_first_that_differs(device: Simulated) -> None:
    arena = Arena([Stretch(9, [1, 4, 6])], 2)
    table = arena.table(device)
    held = device.values(np.zeros(3, np.uint16))
    device.gather(table, held)
    assert device.compare(table, held) == (0, -1)
    held[2:] ^= 1
    assert device.compare(table, held) == (2, 1)


@pytest.mark.parametrize("k", [None, 1, 4, 900])
def test_select_agrees(device: Simulated, k: int | None) -> None:
    pairs = [
        Pair(*(factories.tensor(kind, (n,), seed) for seed in (n, n + 1)), DTYPES[kind])
        for kind, n in (("BF16", 40), ("F32", 9), ("I8", 70))
    ]
    check_select(device, pairs, k)


# ---- hosts -------------------------------------------------------------------------------------


def test_a_host_on_a_device_goes_there_and_back(there: There) -> None:
    host = there.host
    before = versions(there.model)
    host.activate("a")
    assert there.is_a()
    host.activate("b")
    assert there.is_b()
    assert versions(there.model) != before
    host.verify()
    host.deactivate()
    assert there.is_base()


def test_one_launch_writes_an_item_size(there: There) -> None:
    there.host.activate("a")
    assert there.device.launches == ["scatter 1"] * 3  # item sizes 2, 4 and 8
    there.device.launches.clear()
    there.host.activate("b")
    assert there.device.launches == ["scatter 1"] * 6  # they overlap: out, then in


def test_skills_that_share_no_cell_are_exchanged_in_one_launch() -> None:
    shop = There()
    weight = shop.base["first.weight"]
    shop.host.load(single("first.weight", weight, [0, 2, 4], [5, 6, 7]), name="even")
    shop.host.load(single("first.weight", weight, [1, 3, 9], [8, 9, 1]), name="odd")
    shop.host.load(single("first.weight", weight, [3, 4], [2, 3]), name="both")
    with_odd = contents(shop.model)
    with_odd["first.weight"].view(-1)[[1, 3, 9]] = torch.tensor([8.0, 9.0, 1.0])
    for _ in range(2):
        shop.host.activate("even")
        shop.device.launches.clear()
        shop.host.activate("odd")
        assert shop.device.launches == ["scatter 2"]
        assert holds(shop.model, with_odd)
        shop.host.activate("both")
        assert shop.device.launches == ["scatter 2", "scatter 1", "scatter 1"]
    shop.host.deactivate()
    assert shop.is_base()


@pytest.mark.parametrize("policy", ["priority", "sum", "mean", "sign"])
def test_sets_are_composed_where_they_are(there: There, policy: str) -> None:
    if policy != "priority":  # integers know no arithmetic
        for name, graft in (("a", there.a), ("b", there.b)):
            floats = {n: graft[n] for n in graft.names if n != "step"}
            there.host.load(type(graft).from_entries(floats), name=name, replace=True)
    names = ("a", "b")
    weights = None if policy == "priority" else [1.0, 0.5]
    plain = attach(type(there.model)(), backend="reference")
    for name in names:
        plain.load(there.host.skills[name].plan.graft, name=name)
    plain.activate(*names, policy=policy, weights=weights)
    there.device.launches.clear()
    there.host.activate(*names, policy=policy, weights=weights)
    merges = there.device.launches.count("merge")
    assert merges == len(there.host.skills["a"].plan.launches)
    assert holds(there.model, contents(plain._model))
    live = there.host._ledger.live.plan
    assert live is not None
    assert not live.at_hand
    assert live.nnz == plain._ledger.live.plan.nnz
    assert live.graft == plain._ledger.live.plan.graft  # fetched from the device
    there.host.verify()
    there.host.activate("a")
    assert holds(there.model, factories.grafted(there.base, there.host.skills["a"].plan.graft))
    there.device.launches.clear()
    there.host.activate(*names, policy=policy, weights=weights)
    assert "merge" not in there.device.launches  # the plan was kept


def test_a_set_that_cannot_be_composed_changes_nothing(there: There) -> None:
    there.host.activate("a")
    with pytest.raises(OverlapError, match="a and b on"):
        there.host.activate("a", "b")
    assert there.is_a()
    assert there.host.active == ("a",)


def test_strided_parameters_are_composed_on_the_host() -> None:
    model = torch.nn.Linear(6, 5)
    model.weight = torch.nn.Parameter(model.weight.detach().t().contiguous().t())
    base = contents(model)
    host = attach(model)
    device = Simulated()
    use(host, device)
    a, b = (factories.graft_on(base, seed=s, share=0.5) for s in (1, 2))
    host.load(a, name="a")
    host.load(b, name="b")
    host.activate("a", "b", policy="priority")
    live = host._ledger.live.plan
    assert live is not None
    assert live.at_hand
    assert holds(model, factories.grafted(factories.grafted(base, a), b))
    host.deactivate()
    assert holds(model, base)


def test_a_wrong_base_is_found_on_the_device(there: There) -> None:
    c = factories.graft_on(there.base, seed=5, share=0.3)
    there.model.first.weight.data.view(torch.int32).view(-1)[int(c["first.weight"].indices[0])] ^= 1
    with pytest.raises(BaseMismatchError, match=r"'first.weight', position .* found bits 0x"):
        there.host.load(c, name="c")
    there.model.first.weight.data.copy_(there.base["first.weight"])


def test_a_write_by_others_is_found_by_verify(there: There) -> None:
    there.host.activate("a")
    at = int(there.a["first.weight"].indices[0])
    there.model.first.weight.data.view(torch.int32).view(-1)[at] ^= 1
    with pytest.raises(HostChangedError, match=r"'first.weight', position \d"):
        there.host.verify()
    there.model.first.weight.data.view(-1)[at] = there.a["first.weight"].new[0]


def test_the_device_of_a_host_is_the_simulated_one(there: There) -> None:
    assert set(there.host._backends) == {CPU}
    launch = there.host.skills["a"].plan.launches[0]
    assert launch.new.dtype == torch.uint8
    assert there.host.skills["a"].nbytes > there.a.nnz * 8


def test_a_range_beyond_its_source_is_refused(device: Simulated) -> None:
    group = [np.zeros(3, np.int32), *(np.zeros(3, np.uint16) for _ in range(2))]
    for span in ([1, 3], [-1, 2], [0, -1]):
        with pytest.raises(ValueError, match="a range reaches beyond its source"):
            device.merge([Source(*group, 1.0)], np.array([[span]]), DTYPES["BF16"], "refuse", [0])


def test_every_allocation_of_a_launch_outlives_it_on_another_stream(
    there: There, monkeypatch: pytest.MonkeyPatch
) -> None:
    there.host.activate("a", "b", policy="priority")
    kept: set[int] = set()
    monkeypatch.setattr(
        torch.Tensor, "record_stream", lambda t, _: kept.add(t.untyped_storage().data_ptr())
    )
    another = types.SimpleNamespace(cuda_stream=7)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: another)
    monkeypatch.setattr(there.device, "device", torch.device("cuda", 0))
    plan = there.host._ledger.live.plan
    assert plan is not None
    for launch in plan.launches:
        kept.clear()
        there.device._keep(Move(launch.table, launch.old))
        tensors = (launch.table.segments, launch.table.tiles, launch.table.positions, launch.old)
        assert kept == {t.untyped_storage().data_ptr() for t in tensors}
        kept.clear()
        same = dataclasses.replace(launch.table, stream=7)
        there.device._keep(Move(same, launch.old))
        assert not kept  # the allocator knows the order of its own stream
    monkeypatch.setattr(there.device, "device", CPU)


def test_a_set_composed_over_two_devices_names_positions_rightly() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.Linear(5, 4))
    base = contents(model)
    host = attach(model)
    use(host, Simulated())
    a, b = (factories.graft_on(base, seed=s, share=0.5) for s in (1, 2))
    for name, graft in (("a", a), ("b", b)):
        host.load(graft, name=name, allow_nonfinite=True)
    host.activate("a", "b", policy="priority")
    plan = host._ledger.live.plan
    assert plan is not None
    (launch,) = plan.launches
    half = len(launch.rows) // 2  # as if the later tensors lay on another device
    first = launch.rows[half].first
    other = launch._replace(
        rows=tuple(row._replace(first=row.first - first) for row in launch.rows[half:])
    )
    for entry in range(sum(row.count for row in other.rows)):
        assert plan.locate(other, entry) == plan.locate(launch, first + entry)
    host.detach(force=True)


def test_a_set_whose_skill_is_unloaded_meanwhile_is_not_kept(
    there: There, monkeypatch: pytest.MonkeyPatch
) -> None:
    merge = there.device._merge

    def slowly(*arguments: Any) -> Any:
        if "b" in there.host.skills:
            there.host.unload("b")
        return merge(*arguments)

    monkeypatch.setattr(there.device, "_merge", slowly)
    with pytest.raises(KeyError, match="'b' was unloaded or replaced meanwhile"):
        there.host.activate("a", "b", policy="priority")
    assert len(there.host._composer) == 0


def test_a_host_whose_device_fails_for_good_can_be_detached(monkeypatch: Any) -> None:
    shop = There()

    def sticky(_: Any) -> None:
        raise RuntimeError("an illegal memory access was encountered")

    shop.host.activate("a")
    monkeypatch.setattr(shop.device, "_scatter", sticky)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        shop.host.deactivate()
    with pytest.raises(HotgraftError, match=r"detached, but the way back failed .*illegal"):
        shop.host.detach(force=True)
    assert "forward" not in vars(shop.model)


def test_the_bytes_of_a_skill_count_each_array_once(there: There) -> None:
    plain = Workshop().host.skills["a"]
    skill = there.host.skills["a"]
    host_bytes = sum(a.nbytes for g in there.a.groups.values() for a in g)
    tables = sum(launch.table.nbytes for launch in skill.plan.launches)
    values = sum(launch.new.nbytes + launch.old.nbytes for launch in skill.plan.launches)
    assert skill.nbytes == host_bytes + tables + values
    segments = sum(launch.segments.nbytes for launch in plain.plan.launches)
    assert plain.nbytes == host_bytes + segments
