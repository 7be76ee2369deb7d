"""Would another search keep more? Other hyper-parameters of `learned`, another loss, and a shorter
fine-tuning.

They are judged by the texts of the test that the study's tests leave out, so that no choice made
here looks at what is reported elsewhere. `distilled` searches with the divergence from the
fine-tuned model's answers in place of the labels' cross entropy.
"""

from __future__ import annotations

import time
from typing import Any, NamedTuple

import hotgraft
import torch
from hotgraft.search import Learned
from hotgraft.tasks import Batch, Prototypes
from rich.progress import Progress
from safetensors.torch import load_file
from torch import Tensor, nn

from bench.studies.localization import grid, tasks
from bench.studies.localization.lab import SCOPE, Lab
from bench.studies.localization.rows import Rows

TASKS = ("section", "kind")
SEED = 0
DENSITY = 1e-3
METHOD = "trial"


class Trial(NamedTuple):
    """One search; where it says nothing it is the study's own."""

    name: str
    changes: dict[str, Any] = {}  # noqa: RUF012 - nobody writes it
    """Hyper-parameters of `Learned`."""
    distilled: bool = False
    arm: str = "sgd"
    """Of `grid.ARMS`: how the searched model was fine-tuned."""


TRIALS = (
    Trial("as in the study"),
    Trial("half the fine-tuning", arm="sgd_half"),
    Trial("twice the steps", {"steps": 400}),
    Trial("distilled", distilled=True),
    Trial("twice the rate", {"rate": 1.6}),
    Trial("half the rate", {"rate": 0.4}),
    Trial("no prior", {"prior": 0.0}),
)


def run(
    lab: Lab,
    rows: Rows,
    progress: Progress,
    *,
    names: tuple[str, ...] = TASKS,
    trials: tuple[Trial, ...] = TRIALS,
    density: float = DENSITY,
) -> None:
    """Measure what the rows lack."""
    bar = progress.add_task("", total=len(names) * len(trials))
    for name in names:
        for trial in trials:
            progress.update(bar, description=f"{name}, {trial.name}")
            key = {"method": METHOD, "of": name, "seed": SEED, "trial": trial.name}
            key |= {"density": density}
            if rows.find(key) is None:
                rows.add({**key, "recipe": vars(lab.recipe), **_measure(lab, name, trial, density)})
            progress.advance(bar)


def _measure(lab: Lab, name: str, trial: Trial, density: float) -> dict[str, Any]:
    path, _ = lab.finetuned(grid.Cell(name, trial.arm, SEED))
    readout = lab.readout(name)
    data: list[Any] = lab.batches(name, None, 1000 + SEED)
    kept_back = tasks.load(name).test.parts(lab.recipe.texts)[1]
    base = readout.logits(lab.model, kept_back)
    with lab.holding(load_file(path)):
        tuned = readout.logits(lab.model, kept_back)
        if trial.distilled:
            data = [(batch, _answer(readout, lab.model, batch)) for batch in data]
    begin = time.perf_counter()
    graft = hotgraft.localize(
        lab.model,
        path,
        _Distilled(readout) if trial.distilled else readout.loss,
        data,
        density=density,
        scope=SCOPE,
        method=Learned(**{"steps": lab.recipe.learned_steps, **trial.changes}),
        seed=SEED,
        base_id=lab.base_id,
    )
    seconds = time.perf_counter() - begin
    host = hotgraft.attach(lab.model)
    host.load(graft, name=METHOD)
    with host.using(METHOD):
        grafted = readout.logits(lab.model, kept_back)
    host.detach()
    found = hotgraft.evaluate(grafted, kept_back.labels, base=base, finetuned=tuned)
    answers = {"base": base, "finetuned": tuned, "graft": grafted}
    labels = kept_back.labels
    return {
        "seconds": seconds,
        "texts": len(labels),
        "rel": list(found.rel or ()),
        "accuracy": {
            w: (a.argmax(-1) == labels).double().mean().item() for w, a in answers.items()
        },
        "nll": {w: nn.functional.cross_entropy(a, labels).item() for w, a in answers.items()},
    }


@torch.no_grad()
def _answer(readout: Prototypes, model: nn.Module, batch: Batch) -> Tensor:
    return readout.answer(model, batch.tokens).log_softmax(-1)


class _Distilled:
    """The divergence from what the fine-tuned model answered, a batch and its answers at a time."""

    def __init__(self, readout: Prototypes) -> None:
        self._readout = readout

    def __call__(self, model: nn.Module, batch: tuple[Batch, Tensor]) -> Tensor:
        found = self._readout.answer(model, batch[0].tokens).log_softmax(-1)
        return nn.functional.kl_div(found, batch[1], log_target=True, reduction="batchmean")
