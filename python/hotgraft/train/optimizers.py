"""Optimizers whose change a small graft can carry: SGD and AdamW, with a pull to the base."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from hotgraft.errors import DataError, NonFiniteError
from hotgraft.scope import Scope
from hotgraft.train import parameters
from hotgraft.train.proximal import pull
from hotgraft.weights import Weights


def sgd(
    model: nn.Module,
    *,
    lr: float = 5e-2,
    l1: float = 0.0,
    momentum: float = 0.9,
    clip: float | None = 1.0,
    base: Weights | None = None,
    scope: Scope = "encoder",
) -> torch.optim.SGD:
    """SGD with momentum and clipping, which moves few weights far.

    A weight moves as far as its gradient is large, where AdamW moves all by nearly the same, so the
    change concentrates in the few that matter and a small graft can carry it. With a pull towards
    the base a smaller one can: what hardly matters stays at the base's bits.

    Args:
        model: what is trained.
        lr, momentum: as in `torch.optim.SGD`; the defaults suit an encoder under a mean loss.
        l1: strength of the pull, see `pull`; unlike AdamW's it is in units of the (clipped)
            gradient: a weight leaves its base where the mean one is above (1 - momentum) x l1.
            0.001 is a good value for the defaults.
        clip: before each step the gradient is scaled down to this norm; None does not.
        base: where the pull leads, by default to what the model holds now.
        scope: the tensors to train, as in `hotgraft.diff`.

    bf16 weights lose every step below half of their spacing (1/512 to 1/256 of their size), and
    most steps are. Train in fp32, and put the graft into a bf16 host with `cast=True`.

    A step with a gradient that is not finite raises `NonFiniteError` and writes nothing.

    Raises:
        CoverageError: the scope is unknown or holds no parameter, or the base lacks one of them.
        BaseMismatchError: the base has another shape or dtype.
        ParameterError: a parameter in scope is of a type that has no gradient.
        DataError: `l1` or `clip` is out of range, or there is a base and no pull.

    Example:
        >>> model = nn.ModuleDict({"layers": nn.ModuleList([nn.Linear(4, 4)]), "head":
        ...     nn.Linear(4, 2)})
        >>> len(sgd(model).param_groups[0]["params"])
        2
    """
    _require_pull_of(base, l1)
    optimizer = torch.optim.SGD(parameters.in_model(model, scope), lr=lr, momentum=momentum)
    _clip(optimizer, clip)
    if l1 != 0:
        pull(optimizer, model, l1, base=base)
    return optimizer


def adamw(
    model: nn.Module,
    *,
    lr: float = 3e-5,
    l1: float = 0.0,
    weight_decay: float = 0.0,
    clip: float | None = 1.0,
    base: Weights | None = None,
    scope: Scope = "encoder",
) -> torch.optim.AdamW:
    """AdamW, with a pull towards the base that makes the difference sparse.

    Without the pull AdamW moves every weight a little, and no small graft carries the skill. With
    it, most weights hold the base's bits exactly after each step, and `hotgraft.diff` has few
    entries; see `pull` for what `l1` means and costs.

    Args:
        model: what is trained.
        lr, weight_decay: as in `torch.optim.AdamW`. Decay moves weights away from the base by
            lr x weight_decay x |theta| a step, so it is 0 unless asked for.
        l1: strength of the pull, in units of AdamW's own step. Useful is what lies between 0 (plain
            AdamW) and 1 (hardly a weight leaves its base).
        clip: before each step the gradient is scaled down to this norm; None does not.
        base: where the pull leads, by default to what the model holds now.
        scope: the tensors to train, as in `hotgraft.diff`.

    To resume, make the optimizer as before, with the first base as `base=`, then load its state:
    neither the base nor `l1` and `clip` are in `state_dict()`.

    A step with a gradient that is not finite raises `NonFiniteError` and writes nothing.

    Raises:
        CoverageError: the scope is unknown or holds no parameter, or the base lacks one of them.
        BaseMismatchError: the base has another shape or dtype.
        ParameterError: a parameter in scope is of a type that has no gradient.
        DataError: `l1` or `clip` is out of range, or there is a base and no pull.

    Example:
        >>> model = nn.ModuleDict({"layers": nn.ModuleList([nn.Linear(4, 4)])})
        >>> adamw(model, lr=1e-3, l1=0.2).defaults["weight_decay"]
        0.0
    """
    _require_pull_of(base, l1)
    optimizer = torch.optim.AdamW(
        parameters.in_model(model, scope), lr=lr, weight_decay=weight_decay
    )
    _clip(optimizer, clip)
    if l1 != 0:
        pull(optimizer, model, l1, base=base)
    return optimizer


def _require_pull_of(base: Weights | None, l1: float) -> None:
    if base is not None and l1 == 0:
        raise DataError("base is where l1 pulls, and l1 is 0: give both or neither")


def _clip(optimizer: torch.optim.Optimizer, clip: float | None) -> None:
    """Before each step: refuse a gradient that is not finite, scale one that is too long."""
    if clip is not None and not clip > 0:
        raise DataError(f"clip {clip}: wanted a norm above 0, or None for no clipping")

    def hook(optimizer: torch.optim.Optimizer, _args: Any, _kwargs: Any) -> None:
        trained = [p for p in parameters.of_optimizer(optimizer) if p.grad is not None]
        norm = nn.utils.get_total_norm([p.grad for p in trained if p.grad is not None])
        if not torch.isfinite(norm):
            raise NonFiniteError(
                f"the gradient's norm is {norm.item()}: no step was taken; use a smaller learning "
                "rate, or look at the batch"
            )
        if clip is not None:
            nn.utils.clip_grads_with_norm_(trained, clip, norm)

    optimizer.register_step_pre_hook(hook)
