"""Names: which tensor of the host each tensor of a graft means."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable, Mapping

import torch

from hotgraft.errors import CoverageError, LayoutError
from hotgraft.placement.slots import Slot
from hotgraft.weights import sample

Names = Mapping[str, str] | Callable[[str], str]
"""`names=`: the host's name for a graft's name, as a mapping or a function."""

_EXPERT = re.compile(r"^(?P<experts>.*\bexperts)\.\d+\.")


def resolve_names(
    wanted: Iterable[str],
    slots: Mapping[str, Slot],
    model: torch.nn.Module,
    names: Names | None = None,
) -> tuple[dict[str, Slot], list[str]]:
    """The slot of every wanted name, and the names that have none.

    Tried in turn: what `names` says; the same name; one prefix added to or taken from all names
    (`encoder.` against `bert.encoder.`), if exactly one fits; the tensor that a missing tied one is
    tied to.

    Raises:
        CoverageError: several prefixes fit, or `names` points to nothing.
        LayoutError: the module stores the tensor in another layout (fused experts).
    """
    wanted = list(wanted)
    found: dict[str, Slot] = {}
    for name in wanted:
        target = names(name) if callable(names) else (names or {}).get(name)
        if target is not None and target not in slots:
            raise CoverageError(f"names maps {name!r} to {target!r}, which the host lacks")
        if target is not None or name in slots:
            found[name] = slots[target if target is not None else name]
    rest = [name for name in wanted if name not in found]
    if rest:
        ties = _ties(model)
        tied = {name: slots[ties[name]] for name in rest if ties.get(name) in slots}
        rename = _one_prefix([n for n in rest if n not in tied], slots)
        for name in rest:
            if name in tied:
                found[name] = tied[name]
            elif rename(name) in slots:
                found[name] = slots[rename(name)]
            elif ties.get(rename(name)) in slots:
                found[name] = slots[ties[rename(name)]]
    missing = [name for name in wanted if name not in found]
    for name in missing:
        _refuse_fused(name, slots)
    return found, missing


def missing_message(missing: list[str], slots: Mapping[str, Slot]) -> str:
    """What to say of names that the host lacks."""
    close = difflib.get_close_matches(missing[0], slots, n=1, cutoff=0.0)
    return (
        f"the host lacks {sample(missing)}; the nearest name it has is {close[0]!r}. Give names= "
        "(a mapping or function from the graft's names to the host's), or partial=True to leave "
        "them out"
    )


def _ties(model: torch.nn.Module) -> dict[str, str]:
    """Names that transformers drops because they are tied, and what they are tied to."""
    ties: dict[str, str] = {}
    for attribute in ("_tied_weights_keys", "all_tied_weights_keys"):
        declared = getattr(model, attribute, None)
        if isinstance(declared, Mapping):
            ties.update({str(k): str(v) for k, v in declared.items()})
    return ties


def _one_prefix(names: list[str], slots: Mapping[str, Slot]) -> Callable[[str], str]:
    """The one renaming by a prefix that finds most of the names; the identity if none does."""
    if not names:
        return lambda name: name
    renamings: dict[tuple[str, str], Callable[[str], str]] = {}
    probe = max(names, key=lambda name: name.count("."))
    for slot in slots:
        if slot.endswith("." + probe):
            prefix = slot[: -len(probe)]
            renamings["add", prefix] = lambda name, p=prefix: p + name  # type: ignore[misc]
        elif probe.endswith("." + slot):
            prefix = probe[: -len(slot)]
            renamings["drop", prefix] = lambda name, p=prefix: (  # type: ignore[misc]
                name.removeprefix(p)
            )
    hits = {key: sum(r(name) in slots for name in names) for key, r in renamings.items()}
    best = [key for key, count in hits.items() if count == max(hits.values())]
    if len(best) > 1:
        choices = ", ".join(f"{verb} {prefix!r}" for verb, prefix in sorted(best))
        raise CoverageError(
            f"{probe!r} fits several tensors of the host equally well ({choices}); say which with "
            "names="
        )
    return renamings[best[0]] if best else lambda name: name


def _refuse_fused(name: str, slots: Mapping[str, Slot]) -> None:
    match = _EXPERT.match(name)
    if match is None:
        return
    tail = match["experts"].rpartition("model.")[2]
    fused = [slot for slot in slots if f"{tail}." in f"{slot}." and not _EXPERT.match(slot)]
    fused = [slot for slot in fused if slot.rpartition(".")[0].endswith(tail)]
    if fused:
        raise LayoutError(
            f"{name!r} is stored fused in this module, as {sample(fused)}: its layout is not its "
            "file's, so checkpoint positions do not apply. Make the graft from the module itself "
            "(hotgraft.diff(module, finetuned_module)), or load a model that keeps experts apart"
        )
