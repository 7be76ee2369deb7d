"""Views and regions: which elements a slice has, and which slices an element is in."""

from __future__ import annotations

from collections.abc import Iterable

import hotgraft
import numpy as np
import pytest
import torch
from hotgraft.placement import Region, View, trace
from hotgraft.placement.regions import Regions
from hotgraft.weights import open_weights
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn


@given(st.data())
def test_views_find_what_torch_indexes(data: st.DataObject) -> None:
    """Offsets of a sliced and permuted view lead to its indices and back; others are outside."""
    shape = data.draw(st.lists(st.integers(1, 4), min_size=1, max_size=4))
    whole = torch.arange(int(np.prod(shape))).view(shape)
    cut = whole
    for dim, size in enumerate(shape):
        first = data.draw(st.integers(0, size - 1))
        cut = cut.narrow(dim, first, data.draw(st.integers(1, size - first)))
        if data.draw(st.booleans()):
            cut = cut[(slice(None),) * dim + (slice(None, None, 2),)]
    cut = cut.permute(data.draw(st.permutations(range(len(shape)))))
    view = View.of(cut)
    every = np.arange(whole.numel())
    inside, indices = view.find(every)
    assert set(every[inside]) == set(cut.flatten().tolist())
    assert np.array_equal(view.offsets(indices, int(inside.sum())), every[inside])
    assert cut.squeeze()[tuple(map(torch.from_numpy, indices))].flatten().tolist() == list(
        every[inside]
    )
    assert torch.equal(view.within(whole.view(-1)), cut.squeeze())
    assert view.end == int(cut.max()) + 1


@given(st.data())
def test_regions_find_what_each_view_finds(data: st.DataObject) -> None:
    """Slices, stepped, transposed, crosswise, shifted by a part of a size, and the same again."""
    whole = torch.arange(12 * 10 * 4).view(12, 10, 4)
    regions = []
    for number in range(data.draw(st.integers(1, 12))):
        cut = whole
        for dim, size in enumerate(whole.shape):
            length = data.draw(st.integers(1, size))
            first = data.draw(st.integers(0, size - length))
            cut = cut.narrow(dim, first, length)
            step = data.draw(st.sampled_from([1, 1, 2, 3]))
            cut = cut[(slice(None),) * dim + (slice(None, None, step),)]
        source = View.of(cut.permute(data.draw(st.permutations(range(3)))))
        if data.draw(st.booleans()):  # as no slice lies: over the end of a row
            source = View(data.draw(st.integers(0, 400)), (2, 8), (10, 1))
        target = View.of(torch.empty(source.shape))._replace(offset=1000 * number)
        regions.append(Region(data.draw(st.sampled_from("ab")), source, target))
        for other in range(data.draw(st.integers(0, 3))):
            moved = source._replace(offset=data.draw(st.integers(0, 30)))
            regions.append(Region("a", moved, target._replace(offset=-1000 * (other + 1))))
    where = np.flatnonzero(np.array(data.draw(st.lists(st.booleans(), min_size=480, max_size=480))))
    found = {
        (slot, int(where[entry]), int(offset))
        for family in Regions.families(regions)
        for slot, entries, offsets in family.find(where)
        for entry, offset in zip(entries, offsets, strict=True)
    }
    wanted = set()
    for region in regions:
        inside, indices = region.source.find(where)
        offsets = region.target.offsets(indices, int(inside.sum()))
        wanted |= {
            (region.slot, int(w), int(o)) for w, o in zip(where[inside], offsets, strict=True)
        }
    assert found == wanted


def test_single_elements_in_several_places_are_all_found() -> None:
    """A scale that a loader copies into two parameters, and a vector that it copies one by one."""
    model = nn.ParameterDict(
        {name: torch.zeros(size) for name, size in zip("abv", (1, 1, 3), strict=True)}
    )

    def load(weights: Iterable[tuple[str, Tensor]]) -> None:
        for name, tensor in weights:
            if name == "scale":
                model["a"].data.copy_(tensor)
                model["b"].data.copy_(tensor)
            for i in range(3 if name == "v" else 0):
                model["v"].data[i].copy_(tensor[i])

    state = {"scale": torch.ones(1), "v": torch.arange(3.0)}
    load(state.items())
    with open_weights(state) as weights:
        found = trace(model, load, weights.specs)
        found.verify(weights)
    tuned = {name: tensor + 1 for name, tensor in state.items()}
    placed, which = found.place(hotgraft.diff(state, tuned), model)
    assert which.all()
    assert {name: placed[name].indices.tolist() for name in placed.names} == {
        "a": [0], "b": [0], "v": [0, 1, 2]
    }  # fmt: skip


@pytest.mark.parametrize("way", ["columns", "rows", "steps", "both"])
def test_thousands_of_regions_are_searched_together(way: str) -> None:
    count = 1024
    state = {"w": torch.randn(16, count, 2) if way == "both" else torch.randn(2 * count, 8)}
    if way in {"columns", "steps"}:
        state = {"w": state["w"].t().contiguous()}
    model = nn.ParameterDict({"w": torch.zeros_like(state["w"])})
    order = torch.randperm(count).tolist()

    def cut(tensor: Tensor, i: int) -> Tensor:
        if way == "both":
            return tensor[i % 4 * 4 : i % 4 * 4 + 4, i // 4 * 4 : i // 4 * 4 + 4]
        if way == "steps":
            return tensor[:, i::count]
        return tensor.narrow(int(way == "columns"), 2 * i, 2)

    def load(weights: Iterable[tuple[str, Tensor]]) -> None:
        for _, tensor in weights:
            for i, j in enumerate(order):
                cut(model["w"].data, i).copy_(cut(tensor, j))

    load(state.items())
    with open_weights(state) as weights:
        found = trace(model, load, weights.specs)
        found.verify(weights)
    assert len(found.regions["w"]) == count
    assert len(found._found["w"]) == 1
    other = {"w": state["w"] + (torch.rand(state["w"].shape) < 0.4)}
    placed, which = found.place(hotgraft.diff(state, other), model)
    assert which.all()
    host = hotgraft.attach(model)
    host.load(placed, name="tuned")
    host.activate("tuned")
    live = model["w"].detach().clone()
    load(other.items())
    assert torch.equal(model["w"], live)
