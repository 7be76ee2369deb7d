"""Pinned memory: grafts that are read into it are copied to a device from there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import factories
import numpy as np
import pytest
import torch
from hosts import contents, holds, use
from hotgraft import Graft, attach, pinned
from hotgraft.kernels import Part
from libraries import Place
from simulated import Simulated
from torch import nn


@pytest.fixture
def pretended(monkeypatch: pytest.MonkeyPatch) -> None:
    """A system that has pinned memory: what is asked for as such is taken for it."""
    given: list[torch.Tensor] = []
    plain = torch.empty

    def empty(*size: int, pin_memory: bool = False, **more: Any) -> torch.Tensor:
        found = plain(*size, **more)
        if pin_memory:
            given.append(found)
        return found

    def is_pinned(tensor: torch.Tensor) -> bool:
        storages = [known.untyped_storage().data_ptr() for known in given]
        return tensor.untyped_storage().data_ptr() in storages

    monkeypatch.setattr(torch, "empty", empty)
    monkeypatch.setattr(torch.Tensor, "is_pinned", is_pinned)


def part(item_size: int, count: int, *, pin: bool) -> Part:
    bits = np.dtype(f"u{item_size}")
    arrays = []
    for dtype in (np.dtype(np.int32), bits, bits):
        memory = pinned.empty(16 + count * dtype.itemsize) if pin else np.empty(1024, np.uint8)
        array = memory[16 : 16 + count * dtype.itemsize].view(dtype)
        array[:] = np.arange(count) + len(arrays)
        arrays.append(array)
    return Part(np.array([[64, 0, count]], np.int64), *arrays, item_size)


@pytest.mark.usefixtures("pretended")
def test_pinned_arrays_and_others_are_uploaded_in_one_buffer() -> None:
    device = Simulated()
    parts = [part(2, 5, pin=True), part(4, 3, pin=False), part(8, 7, pin=True)]
    assert [pinned.bytes_of(each.new) is not None for each in parts] == [True, False, True]
    assert pinned.bytes_of(parts[0].new[::2]) is None
    others = torch.empty(8, dtype=torch.int32, pin_memory=True)
    assert pinned.bytes_of(others.numpy()) is None
    storages = set()
    for given, (table, new, old) in zip(parts, device.prepare(parts), strict=True):
        for tensor in (table.segments, table.tiles, table.positions, new, old):
            storages.add(tensor.untyped_storage().data_ptr())
            assert tensor.data_ptr() % 16 == 0
        assert table.segments.tolist() == given.segments.tolist()
        assert table.positions.tolist() == given.positions.tolist()
        assert device.read(new, given.new.dtype).tolist() == given.new.tolist()
        assert device.read(old, given.old.dtype).tolist() == given.old.tolist()
    assert len(storages) == 1


@pytest.mark.usefixtures("pretended")
@pytest.mark.parametrize("pin", [True, False])
def test_a_graft_is_read_into_pinned_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pin: bool
) -> None:
    model = nn.Linear(8, 8).bfloat16()
    base = contents(model)
    made = factories.graft_on(base, share=0.5)
    made.save(tmp_path / "a.graft.safetensors")
    graft = Graft.load(tmp_path / "a.graft.safetensors", pin=pin)
    assert graft == made
    for mine, theirs in zip(graft.groups["BF16"], made.groups["BF16"], strict=True):
        assert mine.tolist() == theirs.tolist()
        there = pinned.bytes_of(mine)
        assert (there is not None) is pin
        assert there is None or there.numpy().tobytes() == mine.tobytes()
    looked: list[bool] = []
    find = pinned.bytes_of

    def noted(array: Any) -> torch.Tensor | None:
        found = find(array)
        looked.append(found is not None)
        return found

    monkeypatch.setattr(pinned, "bytes_of", noted)
    host = attach(model)
    use(host, Simulated())
    host.load(graft, name="a")
    assert sum(looked) == 3 * pin  # positions, new and old go as they are, tables do not
    host.activate("a")
    assert holds(model, factories.grafted(base, made))
    host.detach(force=True)
    assert holds(model, base)


@pytest.mark.usefixtures("pretended")
@pytest.mark.parametrize("memory", [0, 1 << 20])
def test_a_library_that_keeps_grafts_in_memory_pins_them(tmp_path: Path, memory: int) -> None:
    place = Place(tmp_path)
    with place.library(memory=memory) as library, library.using("a"):
        found = pinned.bytes_of(place.host.skills["a"].plan.graft.groups["F32"].new)
        assert (found is not None) is bool(memory)
        assert holds(place.model, place.weights("a"))


def test_memory_is_plain_where_none_can_be_pinned(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> torch.Tensor:
        raise RuntimeError("pinned memory needs an accelerator")

    monkeypatch.setattr(torch, "empty", refuse)
    memory = pinned.empty(24)
    assert (memory.dtype, memory.nbytes, memory.flags.writeable) == (np.uint8, 24, True)
    assert pinned.bytes_of(memory) is None
    assert pinned.bytes_of(np.frombuffer(b"1234", np.int16)) is None
