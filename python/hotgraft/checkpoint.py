"""Checkpoints on disk: does a graft fit one, and a full copy of one with grafts applied.

A copy is the base's own bytes, shard by shard, with the grafts' entries written over them. So
names, order, metadata and index stay what they were, and memory does not grow with the model.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import cast

import numpy as np
import torch

from hotgraft.composition import compose
from hotgraft.errors import BaseMismatchError, CoverageError
from hotgraft.format import Bits, Positions, Row
from hotgraft.graft import Graft, bit_view
from hotgraft.placement import refuse_nonfinite
from hotgraft.placement.names import resolve_names
from hotgraft.placement.slots import Slot
from hotgraft.weights import INDEX, Spec, Weights, open_weights, sample, shard_paths

Progress = Callable[[int, int], None]
"""Called with the bytes written so far and in all."""

WEIGHT_SUFFIXES = frozenset(
    {".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".pkl", ".h5", ".msgpack", ".npz", ".gguf"}
    | {".onnx", ".onnx_data"}
)
"""Files that hold weights. Beside the shards they would hold the base's, so they are left out."""

_CHUNK = 1 << 24


@dataclasses.dataclass(frozen=True)
class Applied:
    """What `apply` wrote."""

    folder: Path
    graft: Graft
    """The one graft that was applied: the composed one where several were given."""
    shards: tuple[str, ...]
    """The names of the weight files."""
    copied: tuple[str, ...]
    """The other files, as they were in the base's folder."""
    left_out: tuple[str, ...]
    """Files of the base's folder that are not in the copy: other weights, hidden folders."""
    nbytes: int


def check(graft: Graft, base: Weights) -> dict[str, str]:
    """Check that a base holds the graft's old bits, reading only where the graft writes.

    Args:
        graft: the graft.
        base: a module, state dict, `.safetensors` file or checkpoint folder.

    Returns:
        The base's name for each of the graft's tensors: the same one, or, where that is missing,
        the one that differs by the prefix that all of them differ by (`encoder.` against
        `bert.encoder.`).

    Raises:
        CoverageError: the base lacks a tensor.
        BaseMismatchError: shapes, dtypes or bits differ; says how many and which is the first.
        FormatError, OSError: the base cannot be read.

    Example:
        >>> import hotgraft
        >>> base = {"w": torch.zeros(4)}
        >>> graft = hotgraft.diff(base, {"w": torch.tensor([0.0, 1.0, 0.0, 0.0])})
        >>> check(graft, base)
        {'w': 'w'}
    """
    with open_weights(base) as checkpoint:
        names = _names_in(graft, checkpoint.known)
        wrong, first = 0, ""
        for row in graft.rows:
            positions, _, old = graft.arrays(row)
            found = bit_view(checkpoint.tensor(names[row.name]))[row.block :][positions]
            differing = np.flatnonzero(found != old)
            if len(differing) and not wrong:
                first = _difference(row, positions, old, found, int(differing[0]))
            wrong += len(differing)
    if wrong:
        raise BaseMismatchError(
            f"the base does not hold the graft's old bits: {wrong} of {graft.nnz} entries differ, "
            f"first {first}; it was made against another base (Graft.rebase makes it fit)"
        )
    return names


def apply(
    base: str | os.PathLike[str],
    grafts: Sequence[Graft],
    out: str | os.PathLike[str],
    policy: str = "refuse",
    weights: Sequence[float] | None = None,
    *,
    labels: Sequence[str] | None = None,
    allow_nonfinite: bool = False,
    progress: Progress | None = None,
) -> Applied:
    """Write a full checkpoint folder: the base with the grafts applied, bit for bit.

    Loading it gives what a host on this base holds while these grafts are live. The base's bits are
    checked before anything is written. The folder is written under a temporary name next to `out`,
    flushed, then renamed: it is there whole or not at all.

    Args:
        base: a checkpoint folder, or a single `.safetensors` file, of which only it is written.
            Everything else in a folder (config, tokenizer, index, ...) comes along, except other
            files of weights, which would hold the base's.
        grafts: at least one.
        out: the folder to write; it must not exist, or be empty. Its parent must exist.
        policy, weights: how several grafts meet, see `compose`.
        labels: what to call the grafts in messages.
        allow_nonfinite: let a graft write NaN and infinity.
        progress: called with bytes written and in all.

    Raises:
        BaseMismatchError, CoverageError: a graft does not fit the base.
        GraftError, OverlapError, NonFiniteError: the grafts cannot be composed like that, or write
            what they may not.
        FormatError: the base is not a safetensors checkpoint.
        FileExistsError: `out` is there and not empty.
        OSError: reading or writing failed; nothing is left behind.

    Example:
        >>> import hotgraft, safetensors.torch
        >>> folder = Path(tempfile.mkdtemp())
        >>> base, tuned = {"w": torch.zeros(4)}, {"w": torch.tensor([0.0, 1.0, 0.0, 0.0])}
        >>> safetensors.torch.save_file(base, folder / "model.safetensors")
        >>> grafted = apply(folder / "model.safetensors", [hotgraft.diff(base, tuned)],
        ...                 folder / "grafted")
        >>> safetensors.torch.load_file(grafted.folder / "model.safetensors")["w"].tolist()
        [0.0, 1.0, 0.0, 0.0]
    """
    source, target = Path(base), Path(os.path.realpath(out))
    _require_free(target)
    if not allow_nonfinite:
        for one in grafts:
            refuse_nonfinite(one)
    graft = compose(grafts, policy, weights, labels=labels)
    names = check(graft, source)

    shards = shard_paths(source)
    others, left_out = _companions(source, shards)
    sizes = [path.stat().st_size for path in (*shards, *others)]
    folder = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        folder.chmod(0o755)  # mkdtemp's is for its owner alone
        done = 0
        for path, size in zip((*shards, *others), sizes, strict=True):
            copy = folder / (path.name if path in shards else path.relative_to(source))
            copy.parent.mkdir(parents=True, exist_ok=True)
            for written in _copy(path, copy):
                if progress is not None:
                    progress(min(done + written, sum(sizes)), sum(sizes))
            if path in shards:
                _write_entries(copy, graft, names)
            _flush(copy)
            done += size
        for inner in sorted((p for p in folder.rglob("*") if p.is_dir()), reverse=True):
            _flush(inner)
        _flush(folder)
        folder.rename(target)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    _flush(target.parent)
    return Applied(
        folder=target,
        graft=graft,
        shards=tuple(path.name for path in shards),
        copied=tuple(str(path.relative_to(source)) for path in others),
        left_out=tuple(left_out),
        nbytes=sum(sizes),
    )


def _names_in(graft: Graft, specs: Mapping[str, Spec]) -> dict[str, str]:
    """The checkpoint's name for each of the graft's tensors, of the same shape and dtype."""
    # It looks at the names alone, and a checkpoint has no more than that.
    slots = cast(Mapping[str, Slot], specs)
    found, missing = resolve_names(graft.names, slots, torch.nn.Module())
    if missing:
        raise CoverageError(
            f"the base lacks {sample(missing)}, which the graft touches; it has {sample(slots)}"
        )
    targets = list(found.values())
    doubled = {name for name in targets if targets.count(name) > 1}
    if doubled:
        raise CoverageError(f"several of the graft's tensors mean {sample(doubled)} of the base")
    for row in graft.rows:
        shape, dtype = specs[found[row.name]]
        if (shape, dtype.name) != (row.shape, row.dtype):
            raise BaseMismatchError(
                f"{row.name!r} is {row.dtype} {list(row.shape)} in the graft and {dtype.name} "
                f"{list(shape)} in the base: it was made for another model or precision"
            )
    return found


def _difference(row: Row, positions: Positions, wanted: Bits, found: Bits, at: int) -> str:
    return (
        f"{row.name!r}, position {row.block + int(positions[at])}: found bits "
        f"{int(found[at]):#x}, wanted {int(wanted[at]):#x}"
    )


def _require_free(target: Path) -> None:
    if not target.parent.is_dir():
        raise FileNotFoundError(f"{target.parent}: no such folder to write {target.name!r} in")
    if target.is_dir() and not any(target.iterdir()):
        return
    if target.exists():
        raise FileExistsError(f"{target} is there already: name a new or an empty folder")


def _companions(source: Path, shards: Sequence[Path]) -> tuple[list[Path], list[str]]:
    """The other files of a checkpoint folder that belong into a copy, and what does not."""
    if source.is_file():
        return [], []
    others: list[Path] = []
    left_out: list[str] = []
    for where, folders, files in os.walk(source):
        here = Path(where)
        # Hidden folders are caches and version control; linked ones could lead anywhere.
        skipped = [f for f in folders if f.startswith(".") or (here / f).is_symlink()]
        folders[:] = sorted(set(folders) - set(skipped))
        left_out += [f"{(here / name).relative_to(source)}/" for name in skipped]
        for path in (here / name for name in files):
            if path in shards:
                continue
            kind = Path(path.name.removesuffix(".index.json")).suffix
            if kind in WEIGHT_SUFFIXES and path != source / INDEX:
                left_out.append(str(path.relative_to(source)))
            else:
                others.append(path)
    return sorted(others), sorted(left_out)


def _copy(source: Path, target: Path) -> Iterator[int]:
    """Copy a file's bytes; yields how many are written, now and then."""
    done = 0
    with source.open("rb") as reader, target.open("wb") as writer:
        while chunk := reader.read(_CHUNK):
            writer.write(chunk)
            done += len(chunk)
            yield done


def _write_entries(shard: Path, graft: Graft, names: Mapping[str, str]) -> None:
    """Write a graft's new bits into a safetensors file, in place."""
    with shard.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    for row in graft.rows:
        entry = header.get(names[row.name])
        if entry is None:
            continue  # another shard's
        positions, new, old = graft.arrays(row)
        begin, end = entry["data_offsets"]
        mapped = np.memmap(
            shard, new.dtype, "r+", offset=8 + length + begin, shape=(end - begin) // new.itemsize
        )
        cells = mapped[row.block :]
        # The copy is compared too: the base could have been rewritten since it was checked.
        found = cells[positions]
        differing = np.flatnonzero(found != old)
        if len(differing):
            at = _difference(row, positions, old, found, int(differing[0]))
            raise BaseMismatchError(f"the base was changed while it was being copied: {at}")
        cells[positions] = new
        mapped.flush()


def _flush(path: Path) -> None:
    """Wait until a file or folder is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
