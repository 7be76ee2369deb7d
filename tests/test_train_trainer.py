"""The same optimizers in transformers' Trainer."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import factories
import numpy as np
import pytest
import torch
from hosts import contents, holds
from hotgraft import Mask, diff, train
from hotgraft.graft import bits
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments
from transformers.utils import logging

pytestmark = pytest.mark.usefixtures("one_thread", "quiet")


@pytest.fixture
def quiet() -> Iterator[None]:
    logging.disable_progress_bar()
    yield
    logging.enable_progress_bar()


def bert() -> BertForSequenceClassification:
    torch.manual_seed(0)
    config = BertConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        vocab_size=61,
        num_labels=3,
    )
    return BertForSequenceClassification(config)


def examples() -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(1, 61, (24, 7), generator=generator)
    return [{"input_ids": row, "labels": row[0] % 3} for row in tokens]


def trainer(
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    folder: Path,
    schedule: torch.optim.lr_scheduler.LRScheduler | None = None,
    **more: Any,
) -> Trainer:
    settings = {
        "output_dir": str(folder),
        "max_steps": 6,
        "per_device_train_batch_size": 4,
        "use_cpu": True,
        "report_to": "none",
        "save_strategy": "no",
        "logging_strategy": "no",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        **more,
    }
    return Trainer(
        model=model,
        args=TrainingArguments(**settings),
        train_dataset=examples(),
        optimizers=(optimizer, schedule),
    )


def some(model: torch.nn.Module, scope: str = "encoder.layer") -> Mask:
    return Mask(
        {
            name: (tuple(tensor.shape), range(0, tensor.numel(), 5))
            for name, tensor in model.state_dict().items()
            if scope in name
        }
    )


def untouched(model: torch.nn.Module, before: dict[str, torch.Tensor], mask: Mask) -> bool:
    now = contents(model)
    return all(np.array_equal(bits(now[n])[mask[n]], bits(before[n])[mask[n]]) for n in mask)


@pytest.mark.parametrize("accumulated", [1, 2])
def test_a_protected_run_with_a_pull(tmp_path: Path, accumulated: int) -> None:
    model = bert()
    before, mask = contents(model), some(model)
    optimizer = train.adamw(model, lr=1e-2, l1=0.9)
    with train.protect(optimizer, model, mask):
        trainer(model, optimizer, tmp_path, gradient_accumulation_steps=accumulated).train()
    assert untouched(model, before, mask)
    graft = diff(before, model)
    assert all(".encoder.layer." in name for name in graft.names)
    assert 0 < graft.nnz < 0.7 * sum(before[name].numel() for name in mask)
    assert (graft.mask & mask).nnz == 0


def test_sgd_with_a_schedule(tmp_path: Path) -> None:
    model = bert()
    before, mask = contents(model), some(model)
    optimizer = train.sgd(model, lr=0.5)
    schedule = torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)
    train.protect(optimizer, model, mask)
    trainer(model, optimizer, tmp_path, schedule).train()
    assert untouched(model, before, mask)
    graft = diff(before, model)
    assert graft.nnz > 0.9 * (sum(before[name].numel() for name in mask) - mask.nnz)


def test_a_run_that_goes_on_from_a_checkpoint(tmp_path: Path) -> None:
    """The same arguments and the first base give the same weights as a run without a break."""
    base = contents(bert())

    def run(folder: Path, **more: Any) -> torch.nn.Module:
        model = bert()
        optimizer = train.adamw(model, lr=1e-2, l1=0.9, base=base)
        train.protect(optimizer, model, some(model))
        start = more.pop("resume", None)
        trainer(model, optimizer, folder, **more).train(resume_from_checkpoint=start)
        return model

    through = run(tmp_path / "a", save_strategy="steps", save_steps=3)
    resumed = run(tmp_path / "b", resume=str(tmp_path / "a" / "checkpoint-3"))
    assert holds(resumed, contents(through))
    assert untouched(resumed, base, some(resumed))
    assert not factories.same_bits(contents(resumed), base)
