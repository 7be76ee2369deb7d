"""Compositions: a file that does what several skills do together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from hotgraft.composition import compose
from hotgraft.errors import HotgraftError
from hotgraft.graft import Graft
from hotgraft.serve.vllm.leases import Skill


def write_composition(
    path: Path, parts: Mapping[str, Skill], policy: str, weights: Sequence[float] | None
) -> None:
    """Compose the files of skills into a new one. For a thread: it reads them all.

    Args:
        path: of the file to be made.
        parts: the skills by their names.
        policy, weights: as in `hotgraft.compose`.

    Raises:
        FileExistsError: there is a file of that name; nothing was written.
        HotgraftError: a skill's file is another one than the server knows.
        OverlapError, BaseMismatchError, NonFiniteError, GraftError: as `hotgraft.compose`.
        FormatError, OSError: a file cannot be read, or the new one not be written.
    """
    try:
        path.touch(exist_ok=False)  # so that nobody else's file is replaced
    except FileExistsError:
        raise FileExistsError(
            f"there is a file {path.name!r} already in the folder of skills; choose another name"
        ) from None
    try:
        _composed(parts, policy, weights).save(path)
    except BaseException:
        path.unlink(missing_ok=True)
        raise


def _composed(parts: Mapping[str, Skill], policy: str, weights: Sequence[float] | None) -> Graft:
    grafts = []
    for name, skill in parts.items():
        graft = Graft.load(skill.path)
        if graft.id != skill.digest:
            raise HotgraftError(f"the file of the skill {name!r} was replaced; try again later")
        grafts.append(graft)
    return compose(grafts, policy, weights, labels=list(parts))
