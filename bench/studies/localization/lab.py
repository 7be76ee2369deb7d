"""One model, its tasks, and what is done with them: fine-tune, localize, evaluate."""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import hotgraft
import numpy as np
import torch
from hotgraft import train
from hotgraft.demo.model import find_model, load_model
from hotgraft.graft import Graft, Mask
from hotgraft.tasks import Batch, Prototypes, Split
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from bench.studies.localization import grid, tasks

Weights = Mapping[str, Tensor]
SCOPE = "encoder"
BASE = "base"
"""In the place of an arm: not fine-tuned."""
MAX_TOKENS = 48
"""The texts have 140 characters; few reach this."""
ESTIMATES = ("accuracy", "f1", "nll", "brier", "ece10", "ece15", "rel", "agreement")


class Lab:
    """The base model and its tasks; fine-tuned weights and logits lie in a folder.

    Args:
        work: the folder. What is there already is not computed again.
        recipe: how much of everything.
        loaded: a model and its tokenizer, if not the demo's.
        products: what products are computed in (autocast), for base, fine-tuned and grafted models
            alike; weights are fp32. A folder is for one kind.
    """

    def __init__(
        self,
        work: Path,
        recipe: grid.Recipe,
        loaded: tuple[nn.Module, Any] | None = None,
        products: grid.Products = grid.Products.BFLOAT16,
    ) -> None:
        self.recipe = recipe
        self.products = products
        self._work = work
        self._is_base = True
        work.mkdir(parents=True, exist_ok=True)
        self.model, self._tokenizer = loaded or load_model(find_model())
        self.base_id = hotgraft.fingerprint(self.model)

    @functools.cache  # noqa: B019 - a handful of labs
    def task(self, name: str) -> tasks.Task:
        """A task, its tests cut to the recipe's numbers of texts."""
        whole = tasks.load(name)
        test, ood = whole.test.head(self.recipe.texts), whole.ood.head(self.recipe.ood_texts)
        return tasks.Task(**{**vars(whole), "test": test, "ood": ood})

    @functools.cache  # noqa: B019
    def readout(self, name: str) -> Prototypes:
        """A task's read-out, made by the base."""
        assert self._is_base
        return Prototypes.from_base(
            self.model,
            self._tokenizer,
            self.task(name).names,
            max_tokens=MAX_TOKENS,
            autocast=torch.bfloat16 if self.products is grid.Products.BFLOAT16 else None,
        )

    def batches(self, name: str, count: int | None, seed: int) -> list[Batch]:
        """Training batches in an order that the seed fixes; None for one round."""
        split, size = self.task(name).train, self.recipe.batch
        generator = torch.Generator().manual_seed(seed)
        count = len(split.texts) // size if count is None else count
        order: list[int] = []
        while len(order) < count * size:
            order += torch.randperm(len(split.texts), generator=generator).tolist()
        chosen = (order[first : first + size] for first in range(0, count * size, size))
        return [self.readout(name).batch(split, indices) for indices in chosen]

    def finetuned(self, cell: grid.Cell) -> tuple[Path, float | None]:
        """The fine-tuned weights' file, and the seconds that it took if it was made now."""
        path = self.path(cell, "safetensors")
        return path, None if path.exists() else self.learn(cell, path)

    def learn(
        self,
        cell: grid.Cell,
        path: Path,
        *,
        start: Weights | None = None,
        protected: Graft | None = None,
    ) -> float:
        """Fine-tune on a cell's tasks, a batch of each in turn; the seconds that it took.

        Args:
            cell: what is learnt, and how.
            path: where the weights go.
            start: what is fine-tuned, if not the base.
            protected: its positions stay as they are.
        """
        each = self._steps(cell)
        lessons = [[(task, b) for b in self.batches(task, each, cell.seed)] for task in cell.tasks]
        batches = [batch for turn in zip(*lessons, strict=True) for batch in turn]

        def loss(model: nn.Module, batch: tuple[str, Batch]) -> Tensor:
            return self.readout(batch[0]).loss(model, batch[1])

        with self.holding(start or {}):
            optimizer = optimizer_of(grid.ARMS[cell.arm], self.model)
            if protected is not None:
                train.protect(optimizer, self.model, protected)
            begin = time.perf_counter()
            train.finetune(self.model, loss, batches, optimizer, steps=len(batches), seed=cell.seed)
            seconds = time.perf_counter() - begin
            weights = {n: p.detach().clone() for n, p in self.model.named_parameters()}
        save_file(weights, path)
        return seconds

    @contextlib.contextmanager
    def holding(self, weights: Weights) -> Iterator[None]:
        """The model has these weights in here, and may be changed; then it is the base again."""
        before = {name: p.detach().clone() for name, p in self.model.named_parameters()}
        try:
            self.model.load_state_dict(weights, strict=False)
            self._is_base = False
            yield
        finally:
            self.model.load_state_dict(before, strict=False)
            self._is_base = True

    def logits(self, cell: grid.Cell | None, task: str, which: str) -> Tensor:
        """Those of a fine-tuned model, or of the base, on a test; kept in the folder."""
        about = f"{which}-{self.recipe.texts}-{self.recipe.ood_texts}"
        owner = cell or grid.Cell(task, BASE, 0)
        path = self.path(owner, f"{task}-{about}.logits")
        if not path.exists():
            if cell is None:
                found = self.answer(task, which)
            else:
                found = self.answer_of(load_file(self.finetuned(cell)[0]), task, which)
            save_file({"logits": found}, path)
        return load_file(path)["logits"]

    def answer(self, task: str, which: str) -> Tensor:
        """The logits of the model as it is, on a test of a task."""
        return self.readout(task).logits(self.model, self.split(task, which))

    def answer_of(self, weights: Weights, task: str, which: str) -> Tensor:
        """The logits of the model with these weights, on a test of a task."""
        self.readout(task)  # the base's
        with self.holding(weights):
            return self.answer(task, which)

    def split(self, task: str, which: str) -> Split:
        """`test` or `ood`."""
        found: Split = getattr(self.task(task), which)
        return found

    def localize(
        self,
        mask: grid.Mask,
        *,
        task: str | None = None,
        path: Path | None = None,
        start: Weights | None = None,
    ) -> tuple[Graft, float | None]:
        """The graft, and the seconds that it took if it was not in the folder.

        Args:
            mask: what is sought, in which fine-tuned model.
            task: the one of the model's tasks whose skill is sought, where it has several.
            path: the fine-tuned weights, if they are not the cell's own.
            start: what was fine-tuned, if not the base.
        """
        cell = mask.cell
        task = task or cell.task
        if mask.method == "shuffled":
            learned = mask._replace(method="learned")
            found, seconds = self.localize(learned, task=task, path=path, start=start)
            moved = shuffled(found.mask, cell.seed)
            return Graft.from_mask(self.model, path or self.finetuned(cell)[0], moved), seconds
        about = f"{task}-{mask.method}-{mask.density:g}-{self.recipe.learned_steps}"
        kept = self.path(cell, f"{about}.graft.safetensors") if path is None else None
        if kept is not None and kept.exists():
            return Graft.load(kept), None
        path = path or self.finetuned(cell)[0]
        data = self.batches(task, None, 1000 + cell.seed)
        with self.holding(start) if start else contextlib.nullcontext():
            begin = time.perf_counter()
            found = hotgraft.localize(
                self.model,
                path,
                self.readout(task).loss,
                data,
                density=mask.density,
                scope=SCOPE,
                method=self.recipe.method(mask.method),
                seed=cell.seed,
                base_id=None if start else self.base_id,
            )
            seconds = time.perf_counter() - begin
        if kept is not None:
            found.save(kept)
        return found, seconds

    def grafted(self, graft: Graft, task: str, which: str) -> Tensor:
        """The logits of the base with a graft, on a test of a task."""
        self.readout(task)  # the base's
        host = hotgraft.attach(self.model)
        try:
            host.load(graft, name="graft")
            with host.using("graft"):
                return self.answer(task, which)
        finally:
            host.detach(force=True)

    def scores(self, logits: Tensor, cell: grid.Cell, task: str, which: str) -> dict[str, Any]:
        """What logits are worth, with intervals: `[value, low, high]` by the measure's name."""
        found = hotgraft.evaluate(
            logits,
            self.split(task, which).labels,
            base=self.logits(None, task, which),
            finetuned=self.logits(cell, task, which),
        )
        scores = {name: list(getattr(found, name)) for name in ESTIMATES}
        assert found.change is not None
        scores["ece10_change"] = list(found.change.ece10)
        scores["nll_change"] = list(found.change.nll)
        scores["brier_change"] = list(found.change.brier)
        return scores

    def path(self, cell: grid.Cell, ending: str) -> Path:
        """A file of the folder, named after what a model was fine-tuned on, and how."""
        steps = self._steps(cell)
        return self._work / f"{cell.task}-{cell.arm}-{cell.seed}-{steps}.{ending}"

    def _steps(self, cell: grid.Cell) -> int:
        """Those of fine-tuning on each of a cell's tasks; none for the base."""
        if cell.arm == BASE:
            return 0
        steps = self.recipe.joint_steps if len(cell.tasks) > 1 else self.recipe.steps
        return int(grid.ARMS[cell.arm].effort * steps)


def optimizer_of(arm: grid.Arm, model: nn.Module) -> torch.optim.Optimizer:
    """An arm's optimizer, otherwise with the helpers' defaults."""
    make = train.adamw if arm.adamw else train.sgd
    return make(model, l1=arm.l1, scope=SCOPE)


def shuffled(mask: Mask, seed: int) -> Mask:
    """As many positions in each tensor, but others: what a mask's tensors alone are worth."""
    generator = np.random.default_rng(seed)
    moved = {}
    for name in mask:
        shape = mask.shape(name)
        size = int(np.prod(shape))
        moved[name] = (shape, generator.choice(size, len(mask[name]), replace=False))
    return Mask(moved)
