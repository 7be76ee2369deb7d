"""Fine-tune the encoder on one task: how the demo's two skills are made."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from rich.progress import Progress
from torch import nn

from hotgraft import train
from hotgraft.tasks import Readout, Split

STEPS = 300  # 2.5 epochs of 1,920 texts
BATCH = 16
LEARNING_RATE = 5e-2
MOMENTUM = 0.9
CLIP = 1.0
L1 = 1e-3


def finetune(
    model: nn.Module,
    title: str,
    lessons: Split,
    readout: Readout,
    *,
    steps: int = STEPS,
    seed: int = 0,
    progress: Progress | None = None,
) -> None:
    """Fine-tune `model` in place on a task's texts, and leave it in evaluation mode.

    SGD with momentum on the tensors named `encoder.*`, pulled towards the base, moves few weights
    far, which is what lets a small graft carry the skill; AdamW moves all of them a little.
    Embeddings, pooler and read-out stay as they are. fp32, constant learning rate, gradient norm
    clipped, no dropout.

    Args:
        model: the encoder, with the base weights.
        title: the task's name, shown in the bar.
        lessons, readout: the texts, and the read-out that the base weights made for the task.
        steps: batches of 16 texts.
        seed: fixes the order of the texts.
        progress: where given, a bar is added to it.

    Example: `finetune(model, "kind", task.train, readout)`.
    """

    def loss(model: nn.Module, batch: list[int]) -> torch.Tensor:
        return readout.loss(model, readout.batch(lessons, batch))

    bar = progress.add_task(f"training {title}", total=steps) if progress else None

    def show(step: int, _steps: int, value: float) -> None:
        if progress is not None and bar is not None:
            text = f"training {title}, loss {value:.2f}"
            progress.update(bar, completed=step, description=text)

    model.eval()  # no dropout: tried, it gives no better grafts; so the order alone is random
    optimizer = train.sgd(
        model, lr=LEARNING_RATE, l1=L1, momentum=MOMENTUM, clip=CLIP, scope=_in_encoder
    )
    data = batches(lessons, seed)
    train.finetune(model, loss, data, optimizer, steps=steps, progress=show)


def batches(split: Split, seed: int) -> Iterator[list[int]]:
    """Without end: indices of 16 texts; each epoch has an order of its own, and no rest.

    Example: `next(batches(task.train, 0))`.
    """
    generator = torch.Generator().manual_seed(seed)
    order: list[int] = []
    while True:
        if len(order) < BATCH:  # the next epoch
            order = torch.randperm(len(split.texts), generator=generator).tolist()
        yield order[:BATCH]
        order = order[BATCH:]


def _in_encoder(name: str, _shape: tuple[int, ...]) -> bool:
    return name.startswith("encoder.")
