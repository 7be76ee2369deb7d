"""The demo: two real skills go in and out of a pretrained encoder, and nothing is left behind.

    hotgraft demo

finds the pretrained model, attaches it, loads the two skills, and measures what it prints:
accuracy, file sizes, the times of activate, switch and deactivate, and SHA-256 fingerprints of all
weights before, while and after the skills are live.
"""

from __future__ import annotations

import importlib.util
import time
from pathlib import Path
from typing import Any

from torch import nn

import hotgraft
from hotgraft.console import Output
from hotgraft.demo import show, skills, timing
from hotgraft.demo.model import WEIGHTS, find_model, load_model
from hotgraft.demo.task import TASKS, Task, load_task
from hotgraft.errors import HotgraftError
from hotgraft.tasks import Prototypes, accuracy

NEEDED = ("transformers", "matplotlib")


def demo(
    output: Output, *, train: bool, model_folder: Path | None, out: Path, texts: int
) -> dict[str, Any]:
    """Run the demo, print it, and save its plot.

    Args:
        output: where it is printed, as tables or JSON.
        train: fine-tune first, and use the skills that come of it, in `out / "skills"`.
        model_folder: the pretrained model's folder, instead of the package's.
        out: the folder for the plot; made where missing.
        texts: test texts a task.

    Returns:
        What is printed under `--json`.

    Raises:
        HotgraftError: a package, the model or the skills are missing or are others than expected,
            or the weights did not come back.
        OSError: `out` cannot be written.
    """
    begin = time.perf_counter()
    _require_packages()
    folder = find_model(model_folder)
    out.mkdir(parents=True, exist_ok=True)
    with output.bars() as bars:
        waiting = bars.add_task("loading the model", total=None)
        model, tokenizer = _load_quietly(folder)
        tasks = {name: load_task(name) for name in TASKS}
        readouts = {n: Prototypes.from_base(model, tokenizer, t.names) for n, t in tasks.items()}
        bars.remove_task(waiting)
        skill_folder = out / "skills" if train else skills.shipped()
        if train:
            skills.train(folder, tasks, readouts, skill_folder, bars)
        found = {
            "model": str(folder),
            "parameters": sum(p.numel() for p in model.parameters()),
            "skills": _about(skill_folder, folder),
            "trained_now": train,
            **_measure(model, tasks, readouts, skill_folder, texts, bars),
        }
        found["seconds"]["load a checkpoint"] = timing.of_loading(model, folder / WEIGHTS)._asdict()
    plot = out / "demo.png"
    show.plot(found, plot)
    found["plot"] = str(plot)
    found["took"] = time.perf_counter() - begin
    output.result(found)
    show.tables(output, found)
    if not (found["proof"]["came_back"] and found["proof"]["same_as_by_hand"]):
        raise HotgraftError("the weights are not what they should be: please report this")
    return found


def _require_packages() -> None:
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise HotgraftError(f'the demo needs {" and ".join(missing)}: pip install "hotgraft[demo]"')


def _load_quietly(folder: Path) -> tuple[nn.Module, Any]:
    from transformers.utils import logging

    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    return load_model(folder)


def _about(skill_folder: Path, model_folder: Path) -> dict[str, Any]:
    """Sizes: of the model's file, and of each skill's."""
    about: dict[str, Any] = {"model": {"bytes": (model_folder / WEIGHTS).stat().st_size}}
    for name in TASKS:
        path = skills.graft_path(skill_folder, name)
        graft = hotgraft.Graft.load(path)
        about[name] = {
            "bytes": path.stat().st_size,
            "entries": graft.nnz,
            "density": graft.density,
            "scope": graft.provenance.scope,
            "id": graft.id,
        }
    return about


def _measure(
    model: nn.Module,
    tasks: dict[str, Task],
    readouts: dict[str, Prototypes],
    skill_folder: Path,
    texts: int,
    bars: Any,
) -> dict[str, Any]:
    """Accuracy, times and proof, with the model as a host."""
    base_id = hotgraft.fingerprint(model)
    grafts = {name: hotgraft.Graft.load(skills.graft_path(skill_folder, name)) for name in TASKS}
    by_hand = timing.PlainTorch(model, grafts)
    host = hotgraft.attach(model, base_id=base_id)
    for name, graft in grafts.items():
        host.load(graft, name=name)

    splits = {name: task.test.head(texts) for name, task in tasks.items()}
    live: list[tuple[str, ...]] = [(), *((name,) for name in TASKS)]
    bar = bars.add_task("measuring accuracy", total=len(live) * len(TASKS))
    accuracies: dict[str, dict[str, float]] = {}
    fingerprints: dict[str, str] = {}
    for names in live:
        row = accuracies.setdefault("+".join(names) or "base", {})
        with host.using(*names):
            for task, split in splits.items():
                row[task] = accuracy(model, readouts[task], split)
                bars.advance(bar)
            fingerprints["+".join(names) or "base"] = hotgraft.fingerprint(model)
    fingerprints["after"] = hotgraft.fingerprint(model)

    seconds = {
        "hotgraft": timing.of_swaps(host, *TASKS)._asdict(),
        "plain torch": timing.of_swaps(by_hand, *TASKS)._asdict(),
    }
    checked = host.verify()
    host.detach()
    fingerprints["after timing"] = hotgraft.fingerprint(model)

    results = skills.read_results(skill_folder)
    for trained in TASKS:
        answers = results[trained]["finetuned_correct"]
        accuracies[f"finetuned on {trained}"] = {
            task: skills.share(answers[task], texts) for task in TASKS
        }
    return {
        "texts": {name: len(split.texts) for name, split in splits.items()},
        "accuracy": accuracies,
        "seconds": seconds,
        "proof": {
            "fingerprints": fingerprints,
            "same_as_by_hand": _fingerprints_by_hand(by_hand)
            == {name: fingerprints[name] for name in TASKS},
            "came_back": base_id == fingerprints["after"] == fingerprints["after timing"],
            "entries_verified": checked,
        },
    }


def _fingerprints_by_hand(by_hand: timing.PlainTorch) -> dict[str, str]:
    """What the weights should be while each skill is live, written without hotgraft."""
    found = {}
    for name in TASKS:
        by_hand.activate(name)
        found[name] = hotgraft.fingerprint(by_hand.model)
    by_hand.deactivate()
    return found
