"""Made-up weights, grafts and models for the tests. Everything comes from a seed."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from hotgraft import Entries, Graft, Provenance
from hotgraft.format import DTYPES, DType
from hotgraft.graft import bits

FLOATS = ("BF16", "F16", "F32", "F64")
"""The types that know arithmetic."""
MANTISSA_BITS = {"BF16": 7, "F16": 10, "F32": 23, "F64": 52, "F8_E4M3": 3, "F8_E5M2": 2}
SPECS: Mapping[str, tuple[tuple[int, ...], str]] = {
    "embed.weight": ((13, 8), "BF16"),
    "layers.0.attention.weight": ((8, 8), "BF16"),
    "layers.0.norm.weight": ((8,), "F32"),
    "layers.1.attention.weight": ((8, 8), "BF16"),
    "layers.1.norm.weight": ((8,), "F32"),
    "step": ((), "I64"),
}
"""Names, shapes and dtypes of a small checkpoint."""


def specials(dtype: DType) -> list[int]:
    """Bits that go wrong easily: zeros, subnormals, the largest, infinities, NaNs, extremes."""
    top = (1 << (8 * dtype.item_size)) - 1
    sign = 1 << (8 * dtype.item_size - 1)
    if dtype.name == "BOOL":
        return [0, 1]
    if dtype.name not in MANTISSA_BITS:
        return [0, 1, sign - 1, sign, top]
    mantissa = (1 << MANTISSA_BITS[dtype.name]) - 1
    one = (sign - 1) // 2 & ~mantissa
    positive = [0, 1, mantissa, mantissa + 1, one, one + 1]
    if dtype.name == "F8_E4M3":  # no infinity; its largest number is one below its NaN
        positive += [0x7E, 0x7F]
    else:
        infinity = dtype.nonfinite
        quiet = infinity | (mantissa + 1) >> 1
        positive += [infinity - 1, infinity, quiet, quiet | 1, infinity | 1]
    return [value | s for value in positive for s in (0, sign)]


def random_bits(
    dtype: DType, n: int, seed: int, *, finite: bool = False, special: float = 0.3
) -> npt.NDArray[Any]:
    """n elements' bits: any pattern, a part of them `specials`; no NaN or infinity if `finite`."""
    rng = np.random.default_rng([seed, n, dtype.code])
    if dtype.name == "BOOL":
        return rng.integers(0, 2, n).astype(np.uint8)
    out = rng.integers(0, 1 << (8 * dtype.item_size), n, dtype=dtype.bits)
    chosen = rng.random(n) < special
    out[chosen] = rng.choice(np.array(specials(dtype), dtype.bits), int(chosen.sum()))
    if finite and dtype.nonfinite:
        mask = dtype.bits.type(dtype.nonfinite)
        wrong = (out & mask) == mask
        out[wrong] ^= dtype.bits.type(dtype.nonfinite & -dtype.nonfinite)
    return out


def from_bits(values: npt.NDArray[Any], dtype: DType, shape: tuple[int, ...]) -> torch.Tensor:
    """A tensor of its own that holds these bits."""
    return torch.from_numpy(values.copy()).view(dtype.torch).reshape(shape)


def tensor(
    dtype: str, shape: tuple[int, ...], seed: int = 0, *, finite: bool = True
) -> torch.Tensor:
    """A tensor of any dtype, -0 and subnormals included; NaN and infinity unless `finite`."""
    kind = DTYPES[dtype]
    return from_bits(random_bits(kind, prod(shape), seed, finite=finite), kind, shape)


def weights(dtype: str, shape: tuple[int, ...], seed: int = 0) -> torch.Tensor:
    """A float tensor that looks like a trained one: normal, of spread 0.02."""
    values = np.random.default_rng(seed).normal(0, 0.02, shape)
    return torch.from_numpy(values).to(DTYPES[dtype].torch)


def state(
    seed: int = 0, specs: Mapping[str, tuple[tuple[int, ...], str]] = SPECS, *, finite: bool = True
) -> dict[str, torch.Tensor]:
    """A state dict."""
    return {
        name: tensor(dtype, shape, seed + i, finite=finite)
        for i, (name, (shape, dtype)) in enumerate(specs.items())
    }


def changed(base: torch.Tensor, count: int, seed: int = 0, *, finite: bool = True) -> torch.Tensor:
    """A copy of a tensor with other bits at `count` places."""
    kind = next(d for d in DTYPES.values() if d.torch == base.dtype)
    held = bits(base)
    where = np.random.default_rng(seed).choice(len(held), count, replace=False)
    fresh = random_bits(kind, count, seed + 1, finite=finite)
    same = fresh == held[where]
    fresh[same] ^= kind.bits.type(1)  # the lowest bit alone makes nothing infinite
    if kind.name == "F8_E4M3" and finite:
        fresh[same & ((fresh & 0x7F) == 0x7F)] ^= 2
    held[where] = fresh
    return from_bits(held, kind, tuple(base.shape))


def finetuned(
    base: Mapping[str, torch.Tensor], seed: int = 1, share: float = 0.25, *, finite: bool = True
) -> dict[str, torch.Tensor]:
    """A copy of a state dict with a share of every tensor changed, at least one entry of each."""
    return {
        name: changed(t, max(1, int(share * t.numel())), seed + i, finite=finite)
        for i, (name, t) in enumerate(base.items())
    }


def graft_on(
    base: Mapping[str, torch.Tensor],
    seed: int = 1,
    share: float = 0.25,
    *,
    finite: bool = True,
    provenance: Provenance | None = None,
) -> Graft:
    """A graft on a state dict: a share of every tensor's positions, random new bits."""
    entries = {}
    for i, (name, t) in enumerate(base.items()):
        kind = next(d for d in DTYPES.values() if d.torch == t.dtype)
        rng = np.random.default_rng([seed, i])
        count = max(1, int(share * t.numel()))
        where = torch.from_numpy(np.sort(rng.choice(t.numel(), count, replace=False)))
        new = from_bits(random_bits(kind, count, seed + i, finite=finite), kind, (count,))
        entries[name] = Entries(where, new, t.reshape(-1)[where], tuple(t.shape))
    return Graft.from_entries(entries, provenance)


def grafted(base: Mapping[str, torch.Tensor], graft: Graft) -> dict[str, torch.Tensor]:
    """What a state dict holds once the graft is in, computed with plain indexing."""
    out = {name: t.clone() for name, t in base.items()}
    for name in graft.names:
        entries = graft[name]
        flat = bits(out[name])
        flat[entries.indices.numpy()] = bits(entries.new)
        kind = next(d for d in DTYPES.values() if d.torch == out[name].dtype)
        out[name] = from_bits(flat, kind, tuple(out[name].shape))
    return out


def same_bits(a: Mapping[str, torch.Tensor], b: Mapping[str, torch.Tensor]) -> bool:
    """Whether two state dicts agree in names, dtypes, shapes and every bit."""
    return a.keys() == b.keys() and all(
        a[n].dtype == b[n].dtype and a[n].shape == b[n].shape and (bits(a[n]) == bits(b[n])).all()
        for n in a
    )


class TinyModel(torch.nn.Module):
    """An embedding, two blocks and a head that is tied to the embedding."""

    def __init__(self, width: int = 8, vocabulary: int = 13, *, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.embed = torch.nn.Embedding(vocabulary, width)
            self.layers = torch.nn.ModuleList(
                torch.nn.Sequential(torch.nn.LayerNorm(width), torch.nn.Linear(width, width))
                for _ in range(2)
            )
            self.head = torch.nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        hidden = self.embed(tokens)
        for layer in self.layers:
            hidden = hidden + layer(hidden)
        out: torch.Tensor = self.head(hidden)
        return out
