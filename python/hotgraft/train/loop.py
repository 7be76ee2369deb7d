"""finetune: the plain loop, with its accidents turned into errors."""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import nn

from hotgraft.batches import Loss, check_seed, endless, scalar, seeded
from hotgraft.errors import DataError, NonFiniteError
from hotgraft.train import parameters

Progress = Callable[[int, int, float], None]
"""Called after each step with the steps done, the steps in all, and the loss."""


def finetune(
    model: nn.Module,
    loss: Loss,
    data: Iterable[Any],
    optimizer: torch.optim.Optimizer,
    *,
    steps: int,
    seed: int | None = None,
    progress: Progress | None = None,
) -> list[float]:
    """Fine-tune a model in place, one step a batch, and give back the losses.

    Meanwhile the optimizer's parameters require a gradient and the model's others do not, whatever
    their flags were; afterwards, also on an exception, the flags are as before and the optimizer's
    parameters hold no gradient.

    Args:
        model: what is trained. It stays in the mode it is in: which of its parts drop out or keep
            statistics is the caller's choice, and `model.eval()`, without dropout, gives no worse
            grafts. What `from_pretrained` returns is in evaluation mode.
        loss: any function of the model and a batch that returns a scalar tensor.
        data: batches of any kind. It is read again from the start as often as needed; an iterator
            must have enough.
        optimizer: made with `sgd` or `adamw`, or any of torch's. Its parameters are what is
            trained.
        steps: how many.
        seed: where given, torch's generators start from it (dropout, a shuffling `DataLoader`), and
            are put back afterwards. On one machine and device the same seed gives the same bits.
        progress: called after each step.

    Raises:
        NonFiniteError: the loss or the gradient of a step is not finite. That step was not taken.
        DataError: there is no batch, an iterator ended early, the loss is not a scalar that
            depends on a trained tensor, or the seed is not a whole number in 0 .. 2**63 - 1.
        CoverageError: the optimizer trains nothing of the model.

    Example:
        >>> model = nn.Linear(2, 1)
        >>> batches = [(torch.ones(4, 2), torch.zeros(4, 1))]
        >>> def loss(model, batch):
        ...     return nn.functional.mse_loss(model(batch[0]), batch[1])
        >>> losses = finetune(model, loss, batches, torch.optim.SGD(model.parameters(), lr=0.1),
        ...                   steps=20)
        >>> losses[-1] < losses[0] or losses[0] == 0
        True
    """
    steps = operator.index(steps)
    if steps < 1:
        raise DataError(f"steps {steps}: wanted at least 1")
    if seed is not None:
        check_seed(seed)
    parameters.require_common(optimizer, model)
    batches = endless(data, steps)
    losses: list[float] = []
    with _only_trained(model, optimizer), seeded(model, seed):
        for step in range(1, steps + 1):
            value = loss(model, next(batches))
            losses.append(scalar(value, f"step {step} of {steps}"))
            optimizer.zero_grad()
            torch.autograd.backward(value)
            _check_gradient(optimizer, step, steps)
            optimizer.step()
            if progress is not None:
                progress(step, steps, losses[-1])
    return losses


@contextlib.contextmanager
def _only_trained(model: nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """What the optimizer trains requires a gradient, and nothing else in the model does."""
    trained = parameters.of_optimizer(optimizer)
    every: list[torch.Tensor] = [*model.parameters(), *trained]
    flags = {p: p.requires_grad for p in every}
    try:
        for p in every:
            p.requires_grad_(False)
        for p in trained:
            p.requires_grad_(True)
        yield
    finally:
        for p, flag in flags.items():
            p.requires_grad_(flag)
        for p in trained:
            p.grad = None


def _check_gradient(optimizer: torch.optim.Optimizer, step: int, steps: int) -> None:
    gradients = [p.grad for p in parameters.of_optimizer(optimizer) if p.grad is not None]
    norm = nn.utils.get_total_norm(gradients)
    if not torch.isfinite(norm):
        raise NonFiniteError(
            f"the loss is finite at step {step} of {steps}, but its gradient's norm is "
            f"{norm.item()}: that step was not taken; look at the loss function at this batch"
        )
