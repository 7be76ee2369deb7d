"""Memory: which strided tensors share a byte with which others."""

from __future__ import annotations

import itertools
import math

import torch
from hotgraft.placement.memory import Taken
from hotgraft.placement.slots import find_slots
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn


@given(st.data())
def test_taken_parts_are_told_apart_to_the_byte(data: st.DataObject) -> None:
    """Slices, stepped, transposed, reinterpreted, of tensors that lie anywhere."""
    room = torch.zeros(400, dtype=torch.float32)
    taken, bytes_of = Taken(room.data_ptr() + 4 * data.draw(st.integers(-9, 9))), []

    def part() -> Tensor:
        shape = data.draw(st.lists(st.integers(1, 6), min_size=1, max_size=3))
        first = data.draw(st.integers(0, 150))
        cut = room[first : first + math.prod(shape)].view(shape)
        for dim, size in enumerate(shape):
            begin = data.draw(st.integers(0, size - 1))
            cut = cut.narrow(dim, begin, data.draw(st.integers(1, size - begin)))
            step = data.draw(st.sampled_from([1, 2, 3]))
            cut = cut[(slice(None),) * dim + (slice(None, None, step),)]
        kind = data.draw(st.sampled_from(["plain", "turned", "expanded", "halves"]))
        if kind == "turned":
            return cut.permute(*range(cut.dim())[::-1])
        if kind == "halves" and cut.stride(-1) == 1:
            return cut.view(torch.int16)[..., 1::2]
        return cut.expand(2, *cut.shape) if kind == "expanded" else cut

    def bytes_in(tensor: Tensor) -> set[int]:
        begin, width = tensor.data_ptr(), tensor.element_size()
        steps = [range(0, n * s * width or 1, s * width or 1)
                 for n, s in zip(tensor.shape, tensor.stride(), strict=True)]  # fmt: skip
        return {begin + sum(at) + i for at in itertools.product(*steps) for i in range(width)}

    for number in range(data.draw(st.integers(1, 10))):
        new = part()
        mine = bytes_in(new)
        met = [i for i, theirs in enumerate(bytes_of) if not mine.isdisjoint(theirs)]
        assert sorted(taken.touching(new)) == met
        taken.add(new, number)
        bytes_of.append(mine)


def test_thousands_of_slices_of_one_tensor_are_told_apart() -> None:
    whole = torch.zeros(64, 1000)
    model = nn.ParameterList([nn.Parameter(whole[:, i]) for i in range(1000)])
    slots = find_slots(model)
    assert {slot.home is slot for slot in slots.values()} == {True}
    assert {slot.rival for slot in slots.values()} == {None}
    model.append(nn.Parameter(whole))
    slots = find_slots(model)
    assert {slot.home.name for slot in slots.values()} == {"1000"}
    assert len(slots["1000"].views) == 1001
    model[-1] = nn.Parameter(whole.t())  # covers them, but is not contiguous
    assert None not in {slot.rival for slot in find_slots(model).values()}
