"""Find a skill's entries in its fine-tuned model: as few as keep it."""

from __future__ import annotations

from rich.progress import Progress
from torch import nn

import hotgraft
from hotgraft.errors import DataError
from hotgraft.search import Learned, Step
from hotgraft.tasks import Readout, Split, accuracy

SCOPE = "encoder"
DENSITIES = (2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2)
"""Tried one after another."""
KEPT = 0.95
"""The part of the gain in accuracy at which it is enough."""
METHOD = Learned(steps=200)
BATCH = 32


def find(
    base: nn.Module,
    finetuned: nn.Module,
    readout: Readout,
    lessons: Split,
    choice: Split,
    *,
    title: str,
    progress: Progress,
) -> tuple[hotgraft.Graft, dict[str, float]]:
    """The graft of the lowest density that keeps the skill, or of the highest of all.

    Args:
        base, finetuned: live models.
        readout: whose loss is searched with, and who answers.
        lessons: the texts that the search reads.
        choice: the texts that the densities are judged by; neither fine-tuning nor search has read
            them.
        title: of the bar that is added to `progress`.

    Returns:
        the graft; and, by each density tried, which part of the gain in accuracy was kept.

    Raises:
        DataError: fine-tuning gained nothing.

    Example: `find(base, tuned, readout, train, choice, title="kind", progress=bars)[0].density`.
    """
    base_id = hotgraft.fingerprint(base)
    worst, best = (accuracy(model, readout, choice) for model in (base, finetuned))
    if best <= worst:
        raise DataError(
            f"{title}: on the texts held out the fine-tuned model is right in {best:.1%} and the "
            f"base in {worst:.1%}, so there is no skill to find; train for longer"
        )
    tried: dict[str, float] = {}
    for density in DENSITIES:
        bar = progress.add_task("", total=METHOD.steps)

        def show(step: Step, *, bar: int = bar, density: float = density) -> None:
            text = f"searching {title} at {100 * density:g} %, loss {step.loss:.2f}"
            progress.update(bar, completed=step.step, description=text)  # type: ignore[arg-type]

        graft = hotgraft.localize(
            base,
            finetuned,
            readout.loss,
            readout.batches(lessons, BATCH),
            density=density,
            scope=SCOPE,
            method=METHOD,
            base_id=base_id,
            progress=show,
        )
        host = hotgraft.attach(base, base_id=base_id)
        host.load(graft, name=title)
        with host.using(title):
            found = accuracy(base, readout, choice)
        host.detach()
        tried[f"{density:g}"] = round((found - worst) / (best - worst), 3)
        if tried[f"{density:g}"] >= KEPT:
            break
    return graft, tried
