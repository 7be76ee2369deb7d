"""The arguments and options that commands share, and what is checked before any work: bad use."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated

import typer


def one_of(names: Callable[[], Sequence[str]]) -> Callable[[str], str]:
    """A check that an option is one of some names."""

    def check(value: str) -> str:
        if value not in names():
            raise typer.BadParameter(f"{value!r} is not one of {', '.join(names())}")
        return value

    return check


def _policies() -> Sequence[str]:
    from hotgraft.kernels import POLICIES

    return POLICIES


def scopes() -> Sequence[str]:
    """The names of the scopes."""
    from hotgraft.scope import SCOPES

    return tuple(SCOPES)


def _numbers(text: str | None) -> list[float] | None:
    """`--weights 1,0.5` as numbers."""
    if text is None:
        return None
    try:
        numbers = [float(part) for part in text.split(",")]
    except ValueError:
        raise typer.BadParameter(
            f"{text!r} is not numbers with commas between them", param_hint="--weights"
        ) from None
    if not all(map(math.isfinite, numbers)):
        raise typer.BadParameter(f"{text!r} is not finite", param_hint="--weights")
    return numbers


def weights_for(text: str | None, paths: Sequence[Path]) -> list[float] | None:
    """`--weights`, a number a graft."""
    weights = _numbers(text)
    if weights is not None and len(weights) != len(paths):
        raise typer.BadParameter(
            f"{len(weights)} weights for {len(paths)} grafts", param_hint="--weights"
        )
    return weights


_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def size(text: str) -> int:
    """A number of bytes.

    Example:
        >>> size("1.5GiB")
        1610612736
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?) ?([a-zA-Z]*)", text.strip())
    if not found or found[2].upper() not in _UNITS or not (n := float(found[1])):
        raise typer.BadParameter(f"{text!r} is no size, such as 512MiB or 2GiB")
    return int(n * _UNITS[found[2].upper()])


def given_path(text: str) -> Path:
    """Where to write: `Path("")` would be the current folder."""
    if not text:
        raise typer.BadParameter("it is empty")
    return Path(text)


def check_folder(out: Path) -> None:
    """Refuse to write where no folder is."""
    if not out.absolute().parent.is_dir():
        raise typer.BadParameter(f"there is no folder {out.parent}", param_hint="--out")


def check_out(out: Path, inputs: Sequence[Path]) -> None:
    """Refuse to write a graft over or among what it is made from, or where no folder is."""
    if not out.name.endswith(".graft.safetensors"):
        raise typer.BadParameter(f"{out} does not end in .graft.safetensors", param_hint="--out")
    target = out.resolve()
    for path in inputs:
        if path.resolve() in (target, *target.parents):
            raise typer.BadParameter(f"{out} would write into {path}", param_hint="--out")
    check_folder(out)


def check_budget(density: float | None, count: int | None) -> None:
    """Raises `BadParameter` for both at once, or a density that is none."""
    if density is not None and count is not None:
        raise typer.BadParameter("give --density or --count, not both", param_hint="--count")
    if density is not None and not 0 < density <= 1:
        raise typer.BadParameter(f"{density} is not in (0, 1]", param_hint="--density")


def check_count(count: int, base: Path, scope: str) -> None:
    """Refuse a count beyond the eligible elements; only the base's header is read."""
    from hotgraft.scope import in_scope
    from hotgraft.weights import open_weights

    with open_weights(base) as checkpoint:
        _, names = in_scope(checkpoint.specs, scope)
        eligible = sum(math.prod(checkpoint.specs[name].shape) for name in names)
    if count > eligible:
        raise typer.BadParameter(
            f"{count} is more than the {eligible} eligible elements", param_hint="--count"
        )


Json = Annotated[bool, typer.Option("--json", help="Print one JSON value and nothing else.")]
GraftPath = Annotated[
    Path, typer.Argument(metavar="GRAFT", exists=True, help="A *.graft.safetensors file.")
]
GraftPaths = Annotated[list[Path], typer.Argument(metavar="GRAFT", exists=True, help="Graft files")]
CheckpointPath = Annotated[
    Path, typer.Argument(exists=True, help="A .safetensors file or a checkpoint folder.")
]
GraftOut = Annotated[
    Path,
    typer.Option(
        "--out", "-o", metavar="PATH", parser=given_path, help="The *.graft.safetensors file."
    ),
]
Policy = Annotated[
    str,
    typer.Option(
        callback=one_of(_policies),
        help="How grafts meet: refuse, priority (the last named wins), sum, mean or sign.",
    ),
]
Weights = Annotated[
    str | None,
    typer.Option(metavar="W,W,...", help="A number a graft, commas between them. Default: all 1."),
]
