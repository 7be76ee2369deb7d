"""localize: the few entries of a fine-tuned model that carry its skill."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Mapping
from math import prod
from typing import Any

import numpy as np
from torch import nn

from hotgraft.batches import Loss, check_seed, seeded
from hotgraft.difference import check_same, diff, entries_wanted
from hotgraft.errors import DataError, UnreachedWarning
from hotgraft.format import Provenance
from hotgraft.gate import holding
from hotgraft.graft import Graft, Mask
from hotgraft.scope import Scope, in_scope
from hotgraft.search.candidates import Candidates
from hotgraft.search.choice import largest
from hotgraft.search.learned import Learned
from hotgraft.search.method import Method, Progress, Search
from hotgraft.search.panigrahi import Panigrahi
from hotgraft.search.scores import FirstOrder, Fisher, Movement, Snip
from hotgraft.weights import Weights, open_weights, sample

_SEARCHES: Mapping[str, type[Method]] = {
    method.name: method for method in (FirstOrder, Fisher, Snip, Movement, Panigrahi, Learned)
}
METHODS = ("magnitude", "random", *_SEARCHES)
"""The names of all methods. The first two need neither a loss nor data."""
DENSITY = 1e-4
"""The default: at which the paper's masks carry their skills."""


def localize(
    base: Weights,
    finetuned: Weights,
    loss: Loss | None = None,
    data: Iterable[Any] | None = None,
    *,
    density: float | None = None,
    count: int | None = None,
    scope: Scope = "encoder",
    method: str | Method = "learned",
    seed: int = 0,
    base_id: str | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
) -> Graft:
    """Find the few entries that carry what fine-tuning taught: exactly as many as asked for.

    Args:
        base: a live module with the base's weights, which the loss can run. It is searched in
            place, in evaluation mode, and holds its own weights again at the end, bit for bit, also
            after an exception. A skill that is live in it is part of the base. The commits of a
            host that is attached to it wait for the whole search, and passes of other threads see
            the weights that are being tried; do not load, verify or switch from `progress`.
            `magnitude` and `random` take any weights, as `diff` does.
        finetuned: a module, state dict, file or folder; files are streamed.
        loss: any function of the model and a batch that returns a scalar: the loss of the skill. It
            writes no weights. Checkpointing of activations must be non-reentrant
            (`use_reentrant=False`): the other kind loses the gradients of blocks whose input needs
            none.
        data: batches of any kind, read again from the start as often as needed. A sequence (a list
            of batches) is read in an order that the seed fixes, anything else in its own, where
            the seed settles torch's generators: a shuffling `DataLoader`.
        density, count: the budget, floor(density x eligible) or a number of entries; by default a
            density of 1e-4.
        scope: which tensors are eligible, as in `diff`.
        method: a name of `METHODS`, or a method with hyper-parameters, `Learned(steps=600)`.

            - `magnitude`: the largest |change|; `random`: any entries of the scope.
            - `first_order`, `fisher`, `snip`, `movement`: scores from a pass over the data.
            - `panigrahi`: the relaxation of Panigrahi et al. (2023), as published.
            - `learned`: a relaxation whose gates always sum up to the budget.
        seed: of all that is random. The same seed, data and machine give the same graft.
        base_id: the `fingerprint` of the weights as they are now, to be stored; with a skill live
            in them that is not the id of the base below.
        checkpoint: a file that `learned` saves its state to, and goes on from if it is there: to
            the same graft, if loss and data are the same too, which it cannot see.
        progress: called after each step.

    `learned` and the four scores choose among the largest changes only, which bounds their memory;
    `Learned` says by how much. Where fewer entries differ than were asked for, entries in which
    both models agree make up the number, the first in order.

    Returns:
        the graft; its `provenance` names the scope and the method.

    Raises:
        DataError: the method is unknown, the seed is not in 0 .. 2**63 - 1, loss or data are
            missing, used up or of no use, or the checkpoint is of another search.
        HostChangedError: somebody else moved or wrote the base's weights during the search; they
            are not what they were.
        NonFiniteError: the loss, a gradient or a difference is not finite.
        ParameterError: a candidate lies in a tensor that is frozen or has no gradient, or cannot be
            written; leave it out of the scope.
        BaseMismatchError, CoverageError: the two models do not fit, or a tensor is missing.
        GraftError: the density leaves no entry, or nothing differs.

    Warns:
        UnreachedWarning: no batch had a gradient for some of the tensors with candidates.

    Example:
        >>> import torch
        >>> base, tuned = nn.Linear(8, 1), nn.Linear(8, 1)
        >>> batches = [torch.randn(4, 8) for _ in range(10)]
        >>> def loss(model, batch):
        ...     return (model(batch) - tuned(batch).detach()).square().mean()
        >>> localize(base, tuned, loss, batches, count=3, scope="all").nnz
        3
    """
    search = _method(method)
    name = search if isinstance(search, str) else search.name
    seed = check_seed(seed)
    for what, weights in (("base", base), ("finetuned", finetuned)):
        _check_weights(what, weights)
    if checkpoint is not None and not getattr(search, "resumable", False):
        raise DataError(f"method {name!r} takes no checkpoint: it is done in one go")
    density = DENSITY if density is None and count is None else density
    unreached: list[str] = []
    with holding(base):  # from the first look at the base to the last
        with open_weights(base) as opened:
            label, names = in_scope(opened.specs, scope)
            shapes = {name: opened.specs[name].shape for name in names}
        eligible = sum(map(prod, shapes.values()))
        k = entries_wanted(density, count, eligible, label)
        assert k is not None
        if search == "random":
            with open_weights(base) as left, open_weights(finetuned) as right:
                check_same(left, right, names, label)
            found = Graft.from_mask(base, finetuned, _random(shapes, k, seed))
        elif isinstance(search, str):
            found = diff(base, finetuned, count=k, scope=scope)
        else:
            model = _live(base, name)
            asked = _asked(loss, data, k, seed, checkpoint, progress, name)
            pool = search.pool(k, eligible, sum(p.nbytes for p in model.parameters()))
            graft = diff(model, finetuned, count=pool, scope=scope)
            with Candidates(model, graft) as candidates, seeded(model, seed):
                found = graft
                if graft.nnz > k:
                    scores = search.rank(candidates, asked)
                    found = candidates.choose(largest(scores, k, candidates.changes().abs_()))
                    unreached = candidates.unreached()
        if found.nnz < k:
            found = Graft.from_mask(base, finetuned, _filled(found.mask, shapes, k))
    if unreached:
        warnings.warn(
            f"no batch had a gradient for {sample(unreached)}, so what was found there counts for "
            "nothing. That is right for a part that no batch uses (an expert). Otherwise: "
            "gradients are lost by checkpointing with use_reentrant=True (take False), by "
            "detach() and by no_grad()",
            UnreachedWarning,
            stacklevel=2,
        )
    provenance = Provenance(base_id, label, eligible, name)
    return Graft(found.rows, found.groups, provenance, known_id=found.id, checked=True)


def _method(method: str | Method) -> str | Method:
    """A method without hyper-parameters by its name, the others with theirs.

    Raises:
        DataError: there is no such method.
    """
    if isinstance(method, str):
        if method not in METHODS:
            raise DataError(f"unknown method {method!r}; known are {', '.join(METHODS)}")
        return _SEARCHES[method]() if method in _SEARCHES else method
    if isinstance(method, type) or not hasattr(method, "rank"):
        raise DataError(
            f"method is {method!r}; wanted a name ({', '.join(METHODS)}), or a method with its "
            "hyper-parameters, such as Learned(steps=600)"
        )
    return method


def _check_weights(what: str, weights: object) -> None:
    if not isinstance(weights, (nn.Module, Mapping, str, os.PathLike)):
        raise DataError(
            f"{what} is a {type(weights).__name__}; wanted a model, a state dict, or the path of "
            "a file or folder"
        )


def _live(base: Weights, name: str) -> nn.Module:
    if not isinstance(base, nn.Module):
        raise DataError(
            f"method {name!r} runs the base, so it wants a live module; found a "
            f"{type(base).__name__}. Load the model, or use 'magnitude'"
        )
    return base


def _asked(
    loss: Loss | None,
    data: Iterable[Any] | None,
    k: int,
    seed: int,
    checkpoint: str | os.PathLike[str] | None,
    progress: Progress | None,
    name: str,
) -> Search:
    for what, given in (("loss", loss), ("data", data)):
        if given is None:
            raise DataError(
                f"method {name!r} needs a loss and data, and the {what} is missing; 'magnitude' "
                "needs neither"
            )
    assert loss is not None
    assert data is not None
    return Search(loss, data, k, seed, checkpoint, progress or (lambda _step: None))


def _random(shapes: Mapping[str, tuple[int, ...]], k: int, seed: int) -> Mask:
    """k positions, all sets of k being equally likely."""
    sizes = [prod(shape) for shape in shapes.values()]
    chosen = np.sort(np.random.default_rng(seed).choice(sum(sizes), k, replace=False))
    return _split(chosen, shapes)


def _filled(mask: Mask, shapes: Mapping[str, tuple[int, ...]], k: int) -> Mask:
    """A mask, and the first positions that it lacks, k in all."""
    free = np.ones(sum(map(prod, shapes.values())), np.bool_)
    first = 0
    for name, shape in shapes.items():
        if name in mask:
            free[first + mask[name]] = False
        first += prod(shape)
    return mask | _split(np.flatnonzero(free)[: k - mask.nnz], shapes)


def _split(positions: np.typing.NDArray[np.int64], shapes: Mapping[str, tuple[int, ...]]) -> Mask:
    """Positions in all tensors, one after another, as a mask."""
    bounds = np.cumsum([0, *map(prod, shapes.values())])
    edges = np.searchsorted(positions, bounds)
    return Mask(
        {
            name: (shape, positions[edges[i] : edges[i + 1]] - bounds[i])
            for i, (name, shape) in enumerate(shapes.items())
        }
    )
