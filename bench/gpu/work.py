"""The models and patches that are measured on a device, and whether they hold the right bits."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

import torch
from hotgraft import Graft
from hotgraft.graft import Entries

from bench import shapes

ITEM = torch.int16
"""What bf16 weights are compared and summed as."""


def weights(shape: shapes.Shape, device: torch.device, seed: int = 0) -> dict[str, torch.Tensor]:
    """Normally distributed bf16 weights on a device, each tensor in memory of its own."""
    generator = torch.Generator(device=device).manual_seed(seed)
    found = {}
    for name, size in shape.tensors.items():
        tensor = torch.empty(size, dtype=torch.bfloat16, device=device)
        found[name] = tensor.normal_(0, 0.02, generator=generator)
    return found


def model(tensors: dict[str, torch.Tensor]) -> shapes.Stack:
    """A model over these very weights, whose parameters count their writes by themselves."""
    return shapes.Stack({name: tensor.data for name, tensor in tensors.items()})


def trimmed(shape: shapes.Shape, free_bytes: int) -> shapes.Shape:
    """The shape with as many layers as fit into memory at two bytes a parameter.

    Example:
        >>> trimmed(shapes.SHAPES["70B"], 200 << 30).layers
        80
        >>> trimmed(shapes.SHAPES["70B"], 60 << 30).layers
        37
    """
    layer = 2 * shape.parameters // shape.layers
    return dataclasses.replace(shape, layers=max(1, min(shape.layers, free_bytes // layer)))


def disjoint(a: Graft, b: Graft) -> Graft:
    """`b` without the positions that `a` has too."""
    found = {}
    for name in b.names:
        entries = b[name]
        if name in a.names:
            keep = ~torch.isin(entries.indices, a[name].indices)
            indices, new, old, shape = entries
            entries = Entries(indices[keep], new[keep], old[keep], shape)
        found[name] = entries
    return Graft.from_entries(found)


@dataclasses.dataclass(frozen=True)
class Part:
    """One tensor's part of a patch, on the device."""

    flat: torch.Tensor
    indices: torch.Tensor
    """int64"""
    new: torch.Tensor
    old: torch.Tensor


class Patch:
    """Entries beside flat views of the tensors they go into, for whoever is no host.

    Args:
        parts: a part a tensor.
    """

    def __init__(self, parts: list[Part]) -> None:
        self.parts = parts

    @classmethod
    def of(cls, graft: Graft, tensors: dict[str, torch.Tensor]) -> Patch:
        """A graft's entries, on the tensors' device."""
        parts = []
        for name in graft.names:
            flat = tensors[name].data.view(-1)
            indices, new, old, _ = graft[name]
            parts.append(Part(flat, *(part.to(flat.device) for part in (indices, new, old))))
        return cls(parts)

    @classmethod
    def random(cls, tensors: dict[str, torch.Tensor], density: float, seed: int) -> Patch:
        """Each element with that probability; made on the tensors' device."""
        parts: list[Part] = []
        for tensor in tensors.values():
            flat = tensor.data.view(-1)
            generator = torch.Generator(device=flat.device).manual_seed(seed + len(parts))
            drawn = torch.rand(len(flat), generator=generator, device=flat.device)
            indices = (drawn < density).nonzero().view(-1)
            new = torch.empty(len(indices), dtype=flat.dtype, device=flat.device)
            if len(indices):
                parts.append(Part(flat, indices, new.normal_(generator=generator), flat[indices]))
        return cls(parts)

    @property
    def entries(self) -> int:
        """How many there are."""
        return sum(len(part.indices) for part in self.parts)

    @property
    def touched_bytes(self) -> int:
        """Bytes of the tensors that it writes to."""
        return sum(part.flat.nbytes for part in self.parts)

    @property
    def moved_bytes(self) -> int:
        """Bytes that writing it moves: positions and values read, cells written."""
        return self.entries * (4 + 2 + 2)

    def addresses(self) -> torch.Tensor:
        """int64: where each entry lies in memory."""
        each = [part.flat.data_ptr() + 2 * part.indices for part in self.parts]
        return torch.cat(each)

    def values(self, old: bool = False) -> torch.Tensor:
        """What goes there, in the same order."""
        return torch.cat([part.old if old else part.new for part in self.parts])

    def is_held(self, old: bool = False) -> bool:
        """Whether memory holds its new (or old) bits at its positions."""
        return all(
            torch.equal(part.flat[part.indices].view(ITEM), wanted.view(ITEM))
            for part in self.parts
            for wanted in [part.old if old else part.new]
        )

    def change(self) -> int:
        """By how much writing it changes `total`."""
        return sum(int(_sum(part.new)) - int(_sum(part.old)) for part in self.parts)


def total(tensors: Iterable[torch.Tensor]) -> int:
    """The sum of all items as integers: a stray write to any one of them changes it."""
    return sum(int(_sum(tensor)) for tensor in tensors)


def _sum(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view(ITEM).sum(dtype=torch.int64)


class Judge:
    """Knows what memory holds, and whether it does.

    Args:
        tensors: the weights by name, the base's bits.
    """

    def __init__(self, tensors: dict[str, torch.Tensor]) -> None:
        self._tensors = [tensor.data for tensor in tensors.values()]
        self._base = total(self._tensors)

    def is_base(self, *patches: Patch) -> bool:
        """Whether the base is there, its bits at the patches' positions looked at one by one."""
        return all(p.is_held(old=True) for p in patches) and total(self._tensors) == self._base

    def holds(self, patch: Patch) -> bool:
        """Whether the patch is there, and nothing else changed."""
        return patch.is_held() and total(self._tensors) == self._base + patch.change()
