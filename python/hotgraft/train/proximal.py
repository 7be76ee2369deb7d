"""The pull towards the base: what makes a difference sparse, to the bit."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from hotgraft.errors import BaseMismatchError, CoverageError, DataError
from hotgraft.format import dtype_of
from hotgraft.train import parameters
from hotgraft.weights import Weights, open_weights, sample


def pull(
    optimizer: torch.optim.Optimizer,
    model: nn.Module,
    l1: float,
    *,
    base: Weights | None = None,
) -> RemovableHandle:
    """After each of an optimizer's steps, pull what it trained towards the base.

    The proximal step of l1 x sum |theta - base|: with t = lr x l1, and lr the parameter group's
    rate at that step, theta comes nearer to the base by t, and where it was no further away than t
    it gets *the base's bits*. So the difference has exact zeros, which a graft need not carry.

    Panigrahi et al. (2023) add 0.001 x sum |theta - base| to the loss instead. Under SGD without
    momentum the two agree to first order (there `l1=0.001` is theirs), but theirs leaves no exact
    zero: weights swing about the base. Momentum makes theirs stronger, not this one. Under AdamW
    theirs passes through the moments, which divide it by the root mean square of the gradient. This
    pull is apart from the gradient, as AdamW's weight decay is. AdamW's own step is lr x mean / rms
    of the recent gradients, so a weight leaves its base where |mean| / rms is above l1: `l1` is a
    bound on signal to noise, whatever the loss's scale.

    Args:
        optimizer: any of torch's. Parameters without a gradient are left alone, as it leaves them.
        model: gives the parameters their names; others of the optimizer's are not pulled.
        l1: strength, above 0.
        base: a module, state dict, file or folder, by default what the model holds now. It is
            copied: that costs as much memory as the trained tensors, on their device, and a step a
            few passes over them.

    In bf16 and fp16 the pull is computed in fp32 and rounded once. Zeros stay exact. But a weight
    that has left its base is brought back only by a t of at least half of its spacing (1/512 to
    1/256 of its size in bf16), and AdamW's own steps are lost below that too: train in fp32.

    Returns:
        a handle; its `remove()` ends the pull.

    Raises:
        CoverageError: the optimizer trains nothing of the model, or the base lacks a tensor.
        BaseMismatchError: the base has another shape or dtype.
        DataError: `l1` is not a finite number above 0.

    Example:
        >>> model = nn.Linear(2, 1, bias=False)
        >>> _ = nn.init.zeros_(model.weight)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        >>> handle = pull(optimizer, model, l1=0.2)
        >>> model.weight.grad = torch.tensor([[1.0, 0.1]])
        >>> optimizer.step()
        >>> [round(v, 4) for v in model.weight.tolist()[0]]
        [-0.4, 0.0]
    """
    if not (math.isfinite(l1) and l1 > 0):
        raise DataError(f"l1 {l1}: wanted a finite number above 0")
    parameters.require_common(optimizer, model)
    trained = {id(parameter) for parameter in parameters.of_optimizer(optimizer)}
    pulled = {name: p for name, p in parameters.named(model).items() if id(p) in trained}
    hook = _Pull(l1, pulled, _copies(pulled, base))
    return optimizer.register_step_post_hook(hook)


def _copies(
    pulled: dict[str, nn.Parameter], base: Weights | None
) -> dict[nn.Parameter, torch.Tensor]:
    """The base of each parameter, in memory of its own."""
    if base is None:
        return {p: p.detach().clone() for p in pulled.values()}
    found = {}
    with open_weights(base) as checkpoint:
        missing = set(pulled) - set(checkpoint.known)
        if missing:
            raise CoverageError(f"the base lacks {sample(missing)}, which the optimizer trains")
        for name, p in pulled.items():
            (shape, dtype), wanted = checkpoint.known[name], dtype_of(p.dtype, name)
            if (shape, dtype) != (tuple(p.shape), wanted):
                raise BaseMismatchError(
                    f"{name!r} is {dtype.name} {list(shape)} in the base and {wanted.name} "
                    f"{list(p.shape)} in the model; give the base that the model started from"
                )
            found[p] = torch.empty_like(p.detach()).copy_(checkpoint.tensor(name).view(shape))
    return found


class _Pull:
    """The hook: a strength, and a base for each parameter."""

    def __init__(
        self,
        l1: float,
        names: dict[str, nn.Parameter],
        bases: dict[nn.Parameter, torch.Tensor],
    ) -> None:
        self._l1 = l1
        self._names = {parameter: name for name, parameter in names.items()}
        self._bases = bases

    @torch.no_grad()
    def __call__(self, optimizer: torch.optim.Optimizer, _args: Any, _kwargs: Any) -> None:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if parameter in self._bases and parameter.grad is not None:
                    base = self._base(parameter)
                    parameter.copy_(shrunk(parameter, base, float(group["lr"]) * self._l1))

    def _base(self, parameter: nn.Parameter) -> torch.Tensor:
        """A parameter's base, where the parameter is now."""
        base = self._bases[parameter]
        if base.dtype != parameter.dtype:
            raise BaseMismatchError(
                f"{self._names[parameter]!r} was {base.dtype} when the pull began and is "
                f"{parameter.dtype} now; convert the model first, then make the optimizer"
            )
        if base.device != parameter.device:
            base = self._bases[parameter] = base.to(parameter.device)
        return base


def shrunk(theta: torch.Tensor, base: torch.Tensor, threshold: float) -> torch.Tensor:
    """theta, nearer to base by the threshold; base's bits where it was no further away.

    Example:
        >>> shrunk(torch.tensor([1.0, 1.5, 4.0]), torch.tensor([1.1, 1.1, 1.1]), 0.25).tolist()
        [1.100000023841858, 1.25, 3.75]
    """
    wide = theta if theta.dtype.itemsize >= 4 else theta.float()
    difference = wide - base
    step = difference.clamp(-threshold, threshold)
    return torch.where(step == difference, base, (wide - step).to(theta.dtype))
