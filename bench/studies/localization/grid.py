"""What the study measures, in the order of its importance."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple

from hotgraft.search import METHODS, Learned, Method, Panigrahi

from bench.studies.localization.tasks import TASKS

SEEDS = (0, 1, 2)
DENSITIES = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1)


class Products(StrEnum):
    """What products are computed in; the first takes longer on CPUs that do not have it."""

    BFLOAT16 = "bfloat16"
    FLOAT32 = "float32"


class Arm(NamedTuple):
    """A way to fine-tune."""

    label: str
    """What the page calls it."""
    adamw: bool = False
    """AdamW, not SGD."""
    l1: float = 0.0
    """The pull towards the base."""
    effort: float = 1.0
    """The part of the recipe's steps that it takes."""


class Cell(NamedTuple):
    """One fine-tuned model."""

    task: str
    """Several, joined by `+`, were learnt at once, a batch of each in turn."""
    arm: str
    """How it was fine-tuned: one of `ARMS`."""
    seed: int

    @property
    def tasks(self) -> tuple[str, ...]:
        """What it was fine-tuned on."""
        return tuple(self.task.split("+"))


class Mask(NamedTuple):
    """One graft of a fine-tuned model."""

    cell: Cell
    method: str
    """Of `hotgraft.localize`, or `shuffled`: learned, then moved about within each tensor."""
    density: float


@dataclass(frozen=True)
class Recipe:
    """How much of everything."""

    steps: int = 300
    """Of fine-tuning."""
    joint_steps: int = 150
    """Of each task, where one model learns several at once."""
    batch: int = 32
    """Texts of a step, in fine-tuning and in searching."""
    texts: int = 4000
    """Of the test."""
    ood_texts: int = 1000
    """Of the test out of domain."""
    score_steps: int = 32
    learned_steps: int = 200
    panigrahi_batches: int = 32
    """The paper's full pass is 1,024 texts."""

    def method(self, name: str) -> str | Method:
        """A method with the recipe's numbers of steps; the other hyper-parameters are defaults."""
        from hotgraft.search import FirstOrder, Fisher, Movement, Snip

        scores = {score.name: score for score in (FirstOrder, Fisher, Snip, Movement)}
        if name in scores:
            return scores[name](steps=self.score_steps)
        if name == Panigrahi.name:
            return Panigrahi(batches=self.panigrahi_batches)
        return Learned(steps=self.learned_steps) if name == Learned.name else name


class Grid(NamedTuple):
    """Cells, and what is done with each."""

    cells: tuple[Cell, ...]
    methods: tuple[str, ...]
    densities: tuple[float, ...]

    def masks(self) -> Iterator[Mask]:
        """Cell by cell."""
        for cell in self.cells:
            for method in self.methods:
                for density in self.densities:
                    yield Mask(cell, method, density)


def cells(tasks: tuple[str, ...], arm: str) -> tuple[Cell, ...]:
    """One seed of all tasks after another, so that a run that ends early has seen them all."""
    return tuple(Cell(task, arm, seed) for seed in SEEDS for task in tasks)


CORE = Grid(
    cells(("kind", "section"), "sgd"),
    ("magnitude", "learned", "first_order", "random"),
    (1e-3, 1e-4, 1e-2),
)
ARMS = {
    "sgd": Arm("SGD"),
    "sgd_half": Arm("SGD, half the steps", effort=0.5),
    "sgd_triple": Arm("SGD, three times the steps", effort=3.0),
    "sgd_l1=0.0005": Arm("SGD, L1 0.0005", l1=5e-4),
    "sgd_l1=0.001": Arm("SGD, L1 0.001", l1=1e-3),
    "adamw": Arm("AdamW", adamw=True),
    "adamw_l1=0.3": Arm("AdamW, L1 0.3", adamw=True, l1=0.3),
    "adamw_l1=0.8": Arm("AdamW, L1 0.8", adamw=True, l1=0.8),
}
FULL = (
    CORE,
    Grid(cells(TASKS, "sgd_half"), ("magnitude", "learned", "random"), (1e-3,)),
    *(
        Grid(cells(TASKS, arm), ("magnitude", "learned", "random"), (1e-3, 1e-4))
        for arm in ("sgd_l1=0.001", "sgd_l1=0.0005")
    ),
    Grid(cells(("kind",), "sgd_triple"), ("magnitude", "learned"), (1e-3, 1e-2)),
    CORE._replace(cells=cells(TASKS, "sgd")),
    Grid(cells(TASKS, "sgd"), (*METHODS, "shuffled"), (1e-3, 1e-4, 1e-2)),
    *(
        Grid(cells(TASKS[:4], arm), ("magnitude", "learned", "first_order"), DENSITIES)
        for arm in reversed(ARMS)
        if ARMS[arm].adamw
    ),
    Grid(cells(TASKS, "sgd"), (*METHODS, "shuffled"), DENSITIES),
)
"""One after another; what an earlier one measured is not measured again."""
