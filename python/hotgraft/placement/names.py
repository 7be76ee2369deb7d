"""Names: which tensor of the host each tensor of a graft means."""

from __future__ import annotations

import difflib
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping

import torch

from hotgraft.errors import CoverageError, LayoutError
from hotgraft.weights import plain_name, sample

Names = Mapping[str, str] | Callable[[str], str]
"""`names=`: the host's name for a graft's name, as a mapping or a function."""

_EXPERT = re.compile(r"\.experts\.\d+\.")
_NUMBER = re.compile(r"(?:(?<=\.)|^)\d+(?=\.|$)")


def resolve_names(
    wanted: Iterable[str],
    slots: Collection[str],
    model: torch.nn.Module,
    names: Names | None = None,
) -> tuple[dict[str, str], list[str]]:
    """The host's name for every wanted name, and the names that have none.

    Tried in turn: what `names` says; the same name; one prefix added to or taken from all names
    (`encoder.` against `bert.encoder.`), if exactly one fits; the tensor that a missing tied one is
    tied to. A prefix with a number in it (`layers.0.`) counts only where a number follows too: one
    block's `norm.weight` is not the model's.

    Raises:
        CoverageError: several prefixes fit; one is needed that fits names found without it too; or
            `names` names nothing, here or there.
        LayoutError: the module stores the tensor in another layout (fused experts).
    """
    wanted = list(wanted)
    if names is not None and not callable(names) and not isinstance(names, Mapping):
        raise CoverageError(f"names {names!r}: wanted a mapping or a function of the graft's names")
    unknown = [] if names is None or callable(names) else [n for n in names if n not in wanted]
    if unknown:
        raise CoverageError(
            f"names maps {sample(unknown)}, which the graft lacks; the nearest name it has to "
            f"{unknown[0]!r} is {_nearest(unknown[0], wanted)!r}"
        )
    found: dict[str, str] = {}
    same: list[str] = []
    for name in wanted:
        target = names(name) if callable(names) else (names or {}).get(name)
        if target is not None and target not in slots:
            raise CoverageError(
                f"names maps {name!r} to {target!r}, which the host lacks; the nearest name it has "
                f"is {_nearest(target, slots)!r}"
            )
        if target is not None:
            found[name] = target
        elif plain_name(name) in slots:
            found[name] = plain_name(name)
            same.append(name)
    rest = {name: plain_name(name) for name in wanted if name not in found}
    for name in rest:
        _refuse_fused(name, slots)
    if rest:
        ties = _ties(model)
        rename = _one_prefix([plain for plain in rest.values() if plain not in ties], slots)
        for name, plain in rest.items():
            candidates = (rename(plain), ties.get(plain), ties.get(rename(plain)))
            target = next((c for c in candidates if c in slots), None)
            if target is not None:
                found[name] = target
        renamed = [name for name, plain in rest.items() if found.get(name) == rename(plain)]
        for name in same if renamed else ():
            other = rename(found[name])
            if other != found[name] and other in slots:
                raise CoverageError(
                    f"{name!r} may be {found[name]!r} or {other!r} in the host, for {renamed[0]!r} "
                    f"is found as {found[renamed[0]]!r} only; say which with names="
                )
    return found, [name for name in wanted if name not in found]


def missing_message(missing: list[str], slots: Collection[str]) -> str:
    """What to say of names that the host lacks."""
    return (
        f"the host lacks {sample(missing)}; the nearest name it has to {missing[0]!r} is "
        f"{_nearest(missing[0], slots)!r}. Give names= "
        "(a mapping or function from the graft's names to the host's), or partial=True to leave "
        "them out"
    )


def _nearest(name: str, known: Iterable[str]) -> str:
    return difflib.get_close_matches(name, list(known), n=1, cutoff=0.0)[0]


def _ties(model: torch.nn.Module) -> dict[str, str]:
    """Names that transformers drops because they are tied, and what they are tied to."""
    ties: dict[str, str] = {}
    for attribute in ("_tied_weights_keys", "all_tied_weights_keys"):
        declared = getattr(model, attribute, None)
        if isinstance(declared, Mapping):
            ties.update({str(k): str(v) for k, v in declared.items()})
    return ties


def _one_prefix(names: list[str], slots: Collection[str]) -> Callable[[str], str]:
    """The one renaming by a prefix that finds the most names; the identity if none finds any."""
    longer: dict[str, list[str]] = {}  # the tail of a host's name -> what stands before it
    for slot in slots:
        for prefix, tail in _splits(slot):
            longer.setdefault(tail, []).append(prefix)
    hits: Counter[tuple[str, str]] = Counter()
    for name in names:
        hits.update(("add", prefix) for prefix in longer.get(name, ()))
        hits.update(("drop", prefix) for prefix, tail in _splits(name) if tail in slots)
    best = [key for key, count in hits.items() if count == max(hits.values())]
    if len(best) > 1:
        choices = sample([f"{verb} {prefix}" for verb, prefix in best])
        raise CoverageError(
            f"{sample(names)} fit several tensors of the host equally well ({choices}); say which "
            "with names="
        )
    if not best:
        return lambda name: name
    verb, prefix = best[0]
    return (lambda name: prefix + name) if verb == "add" else lambda name: name.removeprefix(prefix)


def _splits(name: str) -> list[tuple[str, str]]:
    """Every way to cut a name after one of its dots, but for cuts after its last number."""
    cuts = [at + 1 for at, letter in enumerate(name) if letter == "."]
    pairs = [(name[:cut], name[cut:]) for cut in cuts]
    return [(a, b) for a, b in pairs if not _NUMBER.search(a) or _NUMBER.search(b)]


def _refuse_fused(name: str, slots: Collection[str]) -> None:
    """Refuse one expert's tensor where the host keeps those of all experts in one."""
    if not _EXPERT.search(name):
        return
    layer = _NUMBER.findall(_EXPERT.split(name)[0])
    experts = [slot for slot in slots if ".experts." in slot]
    fused = [s for s in experts if _NUMBER.findall(s.partition(".experts.")[0]) == layer]
    if fused and not any(map(_EXPERT.search, experts)):
        raise LayoutError(
            f"{name!r} is stored fused in this module, as {sample(fused)}: its layout is not its "
            "file's, so checkpoint positions do not apply. Make the graft from the module itself "
            "(hotgraft.diff(module, finetuned_module)), or load a model that keeps experts apart"
        )
