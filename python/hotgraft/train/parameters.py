"""Which parameters of a model a scope chooses, and which an optimizer trains."""

from __future__ import annotations

import torch
from torch import nn

from hotgraft.errors import CoverageError, ParameterError
from hotgraft.format import dtype_of
from hotgraft.scope import Scope, in_scope
from hotgraft.weights import Spec, plain_name, sample


def named(model: nn.Module) -> dict[str, nn.Parameter]:
    """A model's parameters by checkpoint name, in the model's order; tied ones once."""
    return {plain_name(name): parameter for name, parameter in model.named_parameters()}


def in_model(model: nn.Module, scope: Scope) -> list[nn.Parameter]:
    """The parameters in a scope, in the model's order.

    Raises:
        CoverageError: the scope is unknown or holds none.
        ParameterError: one of them is of a type that has no gradient.

    Example:
        >>> model = nn.ModuleDict({"embed": nn.Embedding(5, 4), "layers": nn.ModuleList(
        ...     [nn.Linear(4, 4)])})
        >>> [list(p.shape) for p in in_model(model, "encoder")]
        [[4, 4], [4]]
    """
    parameters = named(model)
    specs = {n: Spec(tuple(p.shape), dtype_of(p.dtype, n)) for n, p in parameters.items()}
    label, names = in_scope(specs, scope)
    chosen = {name: p for name, p in parameters.items() if name in set(names)}
    fixed = {name for name, p in chosen.items() if not p.is_floating_point()}
    if fixed:
        raise ParameterError(
            f"{sample(fixed)} in scope {label!r} cannot be trained: {chosen[min(fixed)].dtype} "
            "has no gradient; load the model unquantised, or choose a scope without it"
        )
    return list(chosen.values())


def of_optimizer(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    """All that an optimizer trains, in its order."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def require_common(optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
    """Raises `CoverageError` unless the optimizer trains a parameter of the model."""
    trained = {id(parameter) for parameter in of_optimizer(optimizer)}
    if not any(id(parameter) in trained for parameter in model.parameters()):
        raise CoverageError(
            f"the optimizer trains {len(trained)} tensors, none of them this model's: it was made "
            "for another model, or for the one that this is a copy of; make it anew"
        )
