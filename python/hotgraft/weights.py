"""Where weights are read from: modules, state dicts, safetensors files and checkpoint folders.

All look the same from here: names, shapes, dtypes, and a tensor at a time. Files are mapped, so
reading a checkpoint of any size takes no anonymous memory.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import torch
from safetensors import SafetensorError, safe_open
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from hotgraft.errors import CoverageError, FormatError, ParameterError
from hotgraft.format import DTYPES, DType, dtype_of

Weights: TypeAlias = torch.nn.Module | Mapping[str, torch.Tensor] | str | os.PathLike[str]
"""What `diff` and its kin take: a module, a state dict, a `.safetensors` file, a folder of them."""

_SIGNED = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
INDEX = "model.safetensors.index.json"


class Spec(NamedTuple):
    """What is known of a tensor without reading it."""

    shape: tuple[int, ...]
    dtype: DType


class Layout(NamedTuple):
    """A tensor, and the order of its dimensions in memory, the one of the largest stride first."""

    name: str
    spec: Spec
    order: tuple[int, ...]


class Tie(NamedTuple):
    """A later name of memory that another name holds already, as it is or transposed."""

    first: Layout
    later: Layout


class Checkpoint:
    """Tensors by name, read one at a time. Use `open_weights` to make one."""

    def __init__(
        self,
        specs: Mapping[str, Spec],
        read: Callable[[str], torch.Tensor],
        ties: Mapping[str, Tie] | None = None,
    ) -> None:
        self.specs = dict(specs)
        """Every tensor; tied ones once, under their first name."""
        self.ties = dict(ties or {})
        """The later names of tied ones."""
        self.known = self.specs | {name: tie.later.spec for name, tie in self.ties.items()}
        """Every name."""
        self._read = read

    def tensor(self, name: str) -> torch.Tensor:
        """The tensor, flat, contiguous, on the CPU; mapped if it comes from a file.

        Raises:
            CoverageError: there is no tensor of that name.
        """
        if name not in self.known:
            raise CoverageError(f"there is no tensor {name!r}; there are {sample(self.specs)}")
        plain = self._read(name).detach().resolve_conj().resolve_neg()
        return plain.cpu().contiguous().view(-1)

    def holds(self, tie: Tie) -> bool:
        """Whether two tensors that are tied elsewhere are equal here, bit for bit."""
        if self.ties.get(tie.later.name) == tie:
            return True
        one, other = (
            self.tensor(name).view(_SIGNED[spec.dtype.item_size]).view(spec.shape).permute(order)
            for name, spec, order in tie
        )
        return torch.equal(one.reshape(-1), other.reshape(-1))


def sample(names: Mapping[str, Any] | list[str] | set[str], most: int = 3) -> str:
    """A few of many names, for a message."""
    names = sorted(names)
    shown = ", ".join(repr(name) for name in names[:most])
    return shown + (f" and {len(names) - most} more" if len(names) > most else "")


def plain_name(name: str) -> str:
    """A state-dict name without what `torch.compile` puts in for the submodules it wraps.

    Example:
        >>> plain_name("layers.0._orig_mod.weight")
        'layers.0.weight'
    """
    return name.replace("_orig_mod.", "")


@contextlib.contextmanager
def open_weights(source: Weights) -> Iterator[Checkpoint]:
    """Open a module, state dict, file or folder for reading.

    Raises:
        FormatError: a file or index is malformed, or no safetensors file is there.
        ParameterError: a tensor has no values of its own (meta, quantised, sparse, ...).
        GraftError: a tensor's dtype is not one that grafts can hold.

    Example:
        >>> with open_weights({"w": torch.zeros(2, 3)}) as checkpoint:
        ...     checkpoint.specs["w"].shape
        (2, 3)
    """
    if isinstance(source, torch.nn.Module):
        state = {plain_name(k): v for k, v in source.state_dict(keep_vars=True).items()}
        yield _from_state({k: v for k, v in state.items() if isinstance(v, torch.Tensor)})
    elif isinstance(source, Mapping):
        yield _from_state(source)
    else:
        with contextlib.ExitStack() as stack:
            yield _from_files(Path(source), stack)


def _from_state(state: Mapping[str, torch.Tensor]) -> Checkpoint:
    specs: dict[str, Spec] = {}
    ties: dict[str, Tie] = {}
    seen: dict[object, Layout] = {}
    for name, tensor in state.items():
        _check_plain(name, tensor)
        if tensor.numel() == 0:
            continue
        spec = Spec(tuple(tensor.shape), dtype_of(tensor.dtype, name))
        strides = tensor.stride()
        order = tuple(sorted(range(tensor.ndim), key=strides.__getitem__, reverse=True))
        place: tuple[object, ...] = (tensor.data_ptr(), tensor.dtype, tensor.is_neg())
        if tensor.permute(order).is_contiguous():  # it covers its memory, be it transposed
            place = (*place, tensor.numel())
        else:
            place = (*place, tensor.shape, strides)
        here = Layout(name, spec, order)
        first = seen.setdefault(place, here)
        if first is here:
            specs[name] = spec
        else:
            ties[name] = Tie(first, here)  # counted once
    return Checkpoint(specs, state.__getitem__, ties)


def _check_plain(name: str, tensor: object) -> None:
    """Refuse what is not a tensor with values of its own."""
    if not isinstance(tensor, torch.Tensor) or tensor.layout != torch.strided:
        found = getattr(tensor, "layout", type(tensor).__name__)
        raise ParameterError(
            f"{name!r} is a {found}, not a dense tensor: pass a mapping of tensors, such as a "
            "module's state_dict()"
        )
    if torch.nn.parameter.is_lazy(tensor):
        raise ParameterError(f"{name!r} is not initialised yet: run the model once first")
    if tensor.is_meta:
        raise ParameterError(f"{name!r} is on the meta device: load its weights first")
    if is_traceable_wrapper_subclass(tensor) or (tensor.numel() and not tensor.data_ptr()):
        raise ParameterError(
            f"{name!r} is a {type(tensor).__name__}, which stores other bits than its values "
            "(quantised or sharded): pass plain tensors"
        )


def shard_paths(path: Path) -> list[Path]:
    """The safetensors files of a checkpoint: the file itself, or a folder's one file or shards.

    Raises:
        FormatError: there is none, more than one and no index, or the index is malformed.
    """
    if path.is_file():
        if path.suffix != ".safetensors":
            raise FormatError(
                f"{path}: only .safetensors checkpoints are read (a pickle can run code); "
                "save_pretrained writes one"
            )
        return [path]
    if not path.exists():
        raise FormatError(f"{path}: no such file or folder")
    index = path / INDEX
    if index.exists():
        files = sorted(set(_weight_map(index).values()))
        missing = [file for file in files if not (path / file).is_file()]
        if missing:
            raise FormatError(f"{index}: it names {missing[0]!r}, which is not in the folder")
        return [path / file for file in files]
    every = sorted(path.glob("*.safetensors"))
    found = [p for p in every if not p.name.endswith(".graft.safetensors")]
    if path / "model.safetensors" in found:
        return [path / "model.safetensors"]
    if len(found) == 1:
        return found
    raise FormatError(
        f"{path}: wanted model.safetensors, {INDEX} or exactly one .safetensors file; found "
        f"{len(found)} and no index"
    )


def _weight_map(index: Path) -> dict[str, str]:
    """Which shard holds which tensor, as an index says."""
    try:
        where: dict[str, str] = json.loads(index.read_text())["weight_map"]
        if not where or any(Path(file).name != file for file in where.values()):
            raise ValueError("it must name files in its own folder")
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise FormatError(f"{index}: not a safetensors index: {error!r}") from error
    return where


def _from_files(path: Path, stack: contextlib.ExitStack) -> Checkpoint:
    specs, where = {}, {}
    held: dict[str, str] = {}  # which file, for each name
    for shard in shard_paths(path):
        try:
            file = stack.enter_context(safe_open(shard, framework="pt"))
            for name in file.keys():  # noqa: SIM118 - not a mapping
                piece = file.get_slice(name)
                if piece.get_dtype() not in DTYPES:
                    raise FormatError(f"{shard}: {name!r} has dtype {piece.get_dtype()}")
                if name in held:
                    raise FormatError(f"{shard}: {name!r} is in another shard too")
                held[name] = shard.name
                shape = tuple(piece.get_shape())
                if 0 not in shape:
                    specs[name], where[name] = Spec(shape, DTYPES[piece.get_dtype()]), file
        except SafetensorError as error:
            raise FormatError(f"{shard}: not a safetensors file: {error}") from error

    if (path / INDEX).exists():
        for name, file_name in _weight_map(path / INDEX).items():
            if held.get(name) != file_name:
                raise FormatError(
                    f"{path / INDEX}: it says that {name!r} is in {file_name!r}, which lacks it"
                )

    def read(name: str) -> torch.Tensor:
        tensor: torch.Tensor = where[name].get_tensor(name)
        return tensor

    return Checkpoint(specs, read)


def fingerprint(source: Weights) -> str:
    """The base id of some weights: SHA-256 (hex) over names, shapes, dtypes and bits.

    It reads everything (about 1 s a GB). Tied tensors count once, so a module and its checkpoint
    agree where their names do.

    Example:
        >>> len(fingerprint({"w": torch.zeros(3)}))
        64
    """
    with open_weights(source) as checkpoint:
        digest = hashlib.sha256(b"hotgraft base 1\n")
        for name in sorted(checkpoint.specs):
            shape, dtype = checkpoint.specs[name]
            digest.update(json.dumps([name, list(shape), dtype.name]).encode())
            digest.update(checkpoint.tensor(name).view(torch.uint8).numpy().data)
        return digest.hexdigest()
