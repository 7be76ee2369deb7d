"""The models and patches that are measured: decoder-like stacks of linear layers, random data."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import numpy.typing as npt
import torch
from hotgraft import Graft
from hotgraft.graft import Entries

LAYERS = 28
_TILE = 4_194_301  # a prime, so that tensors do not start alike


@dataclasses.dataclass(frozen=True)
class Shape:
    """A stack of layers: q and o (hidden x hidden), k and v (kv x hidden), and the three of an MLP.

    Example:
        >>> SHAPES["1.3B"].parameters
        1310195712
    """

    name: str
    hidden: int
    kv: int
    inner: int
    layers: int = LAYERS

    @property
    def tensors(self) -> dict[str, tuple[int, int]]:
        """Names and shapes, in the order of the names."""
        layer = {
            "self_attn.q_proj": (self.hidden, self.hidden),
            "self_attn.k_proj": (self.kv, self.hidden),
            "self_attn.v_proj": (self.kv, self.hidden),
            "self_attn.o_proj": (self.hidden, self.hidden),
            "mlp.gate_proj": (self.inner, self.hidden),
            "mlp.up_proj": (self.inner, self.hidden),
            "mlp.down_proj": (self.hidden, self.inner),
        }
        return dict(
            sorted(
                (f"layers.{i}.{name}.weight", shape)
                for i in range(self.layers)
                for name, shape in layer.items()
            )
        )

    @property
    def parameters(self) -> int:
        """How many it has."""
        return sum(rows * columns for rows, columns in self.tensors.values())


SHAPES = {
    shape.name: shape
    for shape in (
        Shape("tiny", 96, 16, 560, 4),
        Shape("small", 192, 32, 1120, 4),
        Shape("0.1B", 432, 72, 2520),
        Shape("0.13B", 480, 80, 2800),
        Shape("1.3B", 1536, 256, 8960),
        Shape("3B", 2304, 384, 13440),
        Shape("7B", 4096, 4096, 11008, 32),
        Shape("70B", 8192, 1024, 28672, 80),
    )
}
"""By name. The first two are for trying; up to 3 B all have 196 tensors and the proportions of the
1.3 B one; the last two are the linear layers of Llama 2."""


def linear(rows: int, columns: int, weight: torch.Tensor) -> torch.nn.Linear:
    """A linear layer around a weight, without bias."""
    layer = torch.nn.Linear(columns, rows, bias=False, device="meta")
    layer.weight = torch.nn.Parameter(weight, requires_grad=False)
    return layer


class Stack(torch.nn.Module):
    """The layers of a shape, by name; it is never run forward."""

    def __init__(self, weights: dict[str, torch.Tensor]) -> None:
        super().__init__()
        for name, weight in weights.items():
            *path, leaf, _ = name.split(".")
            module: torch.nn.Module = self
            for part in path:
                if not hasattr(module, part):
                    module.add_module(part, torch.nn.Module())
                module = module.get_submodule(part)
            module.add_module(leaf, linear(*weight.shape, weight))


def weights(
    shape: Shape, seed: int = 0, dtype: torch.dtype = torch.bfloat16
) -> dict[str, torch.Tensor]:
    """Normally distributed weights, each tensor in memory of its own.

    One random tile is repeated from a random offset on: nothing measured here depends on more.
    """
    generator = torch.Generator().manual_seed(seed)
    tile = (torch.randn(_TILE, generator=generator) * 0.02).to(dtype)
    found = {}
    for name, size in shape.tensors.items():
        flat = torch.empty(size[0] * size[1], dtype=dtype)
        offset = int(torch.randint(_TILE, (), generator=generator))
        done = 0
        while done < len(flat):
            part = tile[offset : offset + len(flat) - done]
            flat[done : done + len(part)] = part
            done, offset = done + len(part), 0
        found[name] = flat.view(size)
    return found


def model(shape: Shape, seed: int = 0) -> Stack:
    """A bf16 model of that shape."""
    return Stack(weights(shape, seed))


def positions(rng: np.random.Generator, size: int, count: int) -> npt.NDArray[np.int64]:
    """`count` random positions below `size`, unique and ascending."""
    found = np.empty(0, np.int64)
    while len(found) < count:
        more = rng.integers(size, size=count + count // 8 + 16)
        found = np.unique(np.concatenate([found, more]))
    return np.sort(rng.permutation(found)[:count])


def spread(entries: int, sizes: list[int]) -> list[int]:
    """`entries` shared out in proportion to the sizes, to the last one.

    Example:
        >>> spread(10, [1, 1, 2])
        [2, 3, 5]
    """
    edges = [0, *np.cumsum(sizes).tolist()]
    at = [edge * entries // edges[-1] for edge in edges]
    return [end - begin for begin, end in itertools.pairwise(at)]


def graft(tensors: dict[str, torch.Tensor], entries: int, seed: int) -> Graft:
    """A graft of random positions and values, its entries spread evenly over the tensors."""
    rng = np.random.default_rng(seed)
    counts = spread(entries, [t.numel() for t in tensors.values()])
    found = {}
    for (name, tensor), count in zip(tensors.items(), counts, strict=True):
        if count:
            indices = torch.from_numpy(positions(rng, tensor.numel(), count))
            old = tensor.detach().view(-1)[indices]
            new = torch.from_numpy(rng.standard_normal(count, np.float32)).to(old.dtype)
            found[name] = Entries(indices, new, old, tuple(tensor.shape))
    return Graft.from_entries(found)


def entries_at(density: float, shape: Shape) -> int:
    """Entries at a density of all parameters.

    Example:
        >>> entries_at(1e-4, SHAPES["1.3B"])
        131019
    """
    return int(density * shape.parameters)
