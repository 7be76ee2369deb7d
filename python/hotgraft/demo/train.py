"""Fine-tune the encoder on one task: how the demo's two skills are made."""

from __future__ import annotations

import torch
from rich.progress import Progress
from torch import nn

from hotgraft.demo.task import Readout, Task

STEPS = 300  # 2 epochs of 2,400 texts
BATCH = 16
LEARNING_RATE = 5e-2
MOMENTUM = 0.9
CLIP = 1.0


def finetune(
    model: nn.Module,
    task: Task,
    readout: Readout,
    *,
    steps: int = STEPS,
    seed: int = 0,
    progress: Progress | None = None,
) -> None:
    """Fine-tune `model` in place on the task's training texts, and leave it in evaluation mode.

    SGD with momentum on the tensors named `encoder.*` moves few weights far, which is what lets a
    small graft carry the skill; AdamW moves all of them a little. Embeddings, pooler and read-out
    stay as they are. fp32, constant learning rate, gradient norm clipped, no dropout.

    Args:
        model: the encoder, with the base weights.
        task, readout: what is trained, and the read-out that the base weights made for it.
        steps: batches of 16 texts.
        seed: fixes the order of the texts.
        progress: where given, a bar is added to it.

    Example: `finetune(model, task, Readout.from_base(model, tokenizer, task))`.
    """
    model.eval()  # no dropout: tried, it gives no better grafts; so the order alone is random
    flags = {p: p.requires_grad for p in model.parameters()}
    trained = [p for name, p in model.named_parameters() if name.startswith("encoder.")]
    model.requires_grad_(False)
    for p in trained:
        p.requires_grad_(True)
    optimizer = torch.optim.SGD(trained, lr=LEARNING_RATE, momentum=MOMENTUM)
    generator = torch.Generator().manual_seed(seed)
    bar = progress.add_task(f"training {task.name}", total=steps) if progress else None
    order: list[int] = []
    for _ in range(steps):
        if len(order) < BATCH:  # the next epoch
            order = torch.randperm(len(task.train.texts), generator=generator).tolist()
        chosen, order = order[:BATCH], order[BATCH:]
        logits = readout.logits(model, [task.train.texts[i] for i in chosen])
        loss = nn.functional.cross_entropy(logits, task.train.labels[chosen].to(logits.device))
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_(trained, CLIP)
        optimizer.step()
        if progress is not None and bar is not None:
            text = f"training {task.name}, loss {loss.item():.2f}"
            progress.update(bar, advance=1, description=text)
    for p, flag in flags.items():
        p.requires_grad_(flag)
        p.grad = None
