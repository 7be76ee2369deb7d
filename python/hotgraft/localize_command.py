"""The command `localize`: a task file in, a graft out, and what it is worth."""

from __future__ import annotations

import contextlib
import importlib.util
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hotgraft.arguments import (
    GraftOut,
    Json,
    check_budget,
    check_count,
    check_folder,
    check_out,
    given_path,
    one_of,
    scopes,
)
from hotgraft.console import Output, number, printable, say_saved

if TYPE_CHECKING:
    from hotgraft.evaluation import Estimate, Evaluation
    from hotgraft.graft import Graft
    from hotgraft.search import Method, Step
    from hotgraft.tasks import Task, TaskFile

_SCORES = {
    "accuracy": "accuracy",
    "f1": "F1",
    "rel": "Rel",
    "agreement": "agreement",
    "ece10": "ECE10",
    "ece15": "ECE15",
    "nll": "NLL",
    "brier": "Brier",
}


def _methods() -> Sequence[str]:
    from hotgraft.search import METHODS

    return METHODS


def localize(
    task: Annotated[
        Path,
        typer.Argument(
            metavar="TASK", exists=True, dir_okay=False, help="A task file: model, data, read-out."
        ),
    ],
    out: GraftOut,
    density: Annotated[
        float | None,
        typer.Option(help="Keep this share of the eligible entries, in (0, 1]. Default: 0.0001."),
    ] = None,
    count: Annotated[int | None, typer.Option(min=1, help="Keep this many entries.")] = None,
    method: Annotated[
        str,
        typer.Option(callback=one_of(_methods), help="How: learned, magnitude, first_order, ..."),
    ] = "learned",
    scope: Annotated[
        str,
        typer.Option(callback=one_of(scopes), help="Eligible tensors: all, encoder or linear."),
    ] = "encoder",
    seed: Annotated[int, typer.Option(min=0, help="Of all that is random.")] = 0,
    steps: Annotated[
        int | None, typer.Option(min=1, help="Steps, instead of the method's own number.")
    ] = None,
    checkpoint: Annotated[
        Path | None,
        typer.Option(parser=given_path, metavar="FILE", help="Save the search, and go on from it."),
    ] = None,
    evaluate: Annotated[
        bool, typer.Option("--evaluate", help="Score base, graft and fine-tuned on the test texts.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace the file that is there.")] = False,
    as_json: Json = False,
) -> None:
    """Find the few entries of a fine-tuned model that carry its skill, as TASK describes it."""
    check_budget(density, count)
    search = _with_steps(method, steps)
    if checkpoint is not None:
        if method != "learned":
            raise typer.BadParameter(f"{method} keeps none", param_hint="--checkpoint")
        if not checkpoint.absolute().parent.is_dir():
            raise typer.BadParameter(
                f"there is no folder {checkpoint.parent}", param_hint="--checkpoint"
            )
    check_folder(out)
    if out.is_dir():
        raise typer.BadParameter(f"{out} is a folder", param_hint="--out")
    if out.exists() and not force:
        raise typer.BadParameter(f"{out} is there; --force replaces it", param_hint="--out")
    with Output(as_json) as output:
        import hotgraft
        from hotgraft.tasks import read_task

        file = read_task(task)
        check_out(out, [task, file.base, file.finetuned])
        if evaluate:
            _check_evaluation(file)
        if count is not None:
            check_count(count, file.base, scope)
        opened = _opened(output, file)
        with _watched(output, method, checkpoint) as progress:
            graft = hotgraft.localize(
                opened.base,
                opened.finetuned,
                opened.readout.loss,
                opened.readout.batches(opened.train, file.batch),
                density=density,
                count=count,
                scope=scope,
                method=search,
                seed=seed,
                base_id=hotgraft.fingerprint(file.base),
                checkpoint=checkpoint,
                progress=progress,
            )
        graft.save(out)
        scores = _scores(output, opened, graft) if evaluate else {}
        shown = {
            "evaluation": {
                name: {key: _finite(getattr(found, key)) for key in _SCORES}
                for name, found in scores.items()
            }
        }
        say_saved(output, graft, out, **(shown if evaluate else {}))
        if opened.test is not None and evaluate:
            output.table(
                ["", *scores],
                [
                    [title, *(_shown(getattr(found, key)) for found in scores.values())]
                    for key, title in _SCORES.items()
                ],
                title=f"{number(len(opened.test.texts))} test texts, 95 % intervals",
            )


def _with_steps(method: str, steps: int | None) -> str | Method:
    """The method, with another number of steps if one is given."""
    if steps is None:
        return method
    from hotgraft import search

    exported = (getattr(search, name) for name in search.__all__)
    kinds: dict[str, Callable[..., Method]] = {
        kind.name: kind for kind in exported if hasattr(kind, "name")
    }
    if method not in kinds:
        raise typer.BadParameter(f"{method} takes no steps", param_hint="--steps")
    return kinds[method](steps=steps)


def _check_evaluation(file: TaskFile) -> None:
    """Refuse now what would fail after the search."""
    from hotgraft.errors import HotgraftError

    if file.test is None:
        raise typer.BadParameter(
            f"{file.path} names no test texts, data.test", param_hint="--evaluate"
        )
    if importlib.util.find_spec("torchmetrics") is None:
        raise HotgraftError('--evaluate needs torchmetrics: pip install "hotgraft[localize]"')


def _opened(output: Output, file: TaskFile) -> Task:
    from hotgraft.tasks import open_task

    with output.bars() as bars:
        bars.add_task(printable(f"opening {file.path.name}"), total=None)
        return open_task(file)


@contextlib.contextmanager
def _watched(
    output: Output, method: str, checkpoint: Path | None
) -> Iterator[Callable[[Step], None]]:
    """A bar that says where the search is; a word on how to go on when it is broken off."""
    with output.bars() as bars:
        bar = bars.add_task(f"{method}: comparing the models", total=None)

        def show(step: Step) -> None:
            recovery = "" if step.recovery is None else f", recovery {100 * step.recovery:.0f} %"
            said = f"{method}: {number(step.kept)} entries, loss {step.loss:.3f}{recovery}"
            bars.update(bar, completed=step.step, total=step.steps, description=said)

        try:
            yield show
        except KeyboardInterrupt:
            if checkpoint is not None and checkpoint.exists():
                output.note(f"broken off; the same command goes on from {checkpoint}")
            raise


def _scores(output: Output, task: Task, graft: Graft) -> dict[str, Evaluation]:
    """Of base, graft and fine-tuned. The task's model holds the fine-tuned weights after it."""
    import hotgraft
    from hotgraft.tasks import write_weights

    assert task.test is not None
    with output.bars() as bars:
        bar = bars.add_task("answering the test texts", total=3)
        base = task.readout.logits(task.base, task.test)
        bars.advance(bar)
        host = hotgraft.attach(task.base)
        host.load(graft, name="graft")
        with host.using("graft"):
            grafted = task.readout.logits(task.base, task.test)
        host.detach()
        bars.advance(bar)
        write_weights(task.base, task.finetuned)
        finetuned = task.readout.logits(task.base, task.test)
        bars.update(bar, completed=3, description="scoring")
        return {
            name: hotgraft.evaluate(logits, task.test.labels, base=base, finetuned=finetuned)
            for name, logits in (("base", base), ("graft", grafted), ("fine-tuned", finetuned))
        }


def _finite(estimate: Estimate) -> dict[str, Any]:
    """JSON has no NaN and no infinity."""
    return {
        name: value if math.isfinite(value) else None for name, value in estimate._asdict().items()
    }


def _shown(estimate: Estimate) -> str:
    if not all(map(math.isfinite, estimate)):
        return "not known" if math.isnan(estimate.value) else f"{estimate.value:.3f} (unbounded)"
    return f"{estimate.value:.3f} ({estimate.low:.3f} to {estimate.high:.3f})"
