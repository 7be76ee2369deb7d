"""The demo's two skills: how they are made, and how the shipped ones are found.

A folder of skills holds `<task>.graft.safetensors` for each task and `results.json`, which says how
the fine-tuned checkpoints answered every test text: they are hundreds of times larger than their
grafts and are not kept.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress
from torch import nn

import hotgraft
from hotgraft.demo.model import SHA256
from hotgraft.demo.task import Task
from hotgraft.errors import HotgraftError
from hotgraft.tasks import Readout, Split, predict

CHOICE = 480
"""The last of a task's training texts, which teach nothing but decide on the density."""
RESULTS = "results.json"


def graft_path(folder: Path, task: str) -> Path:
    """Where a folder of skills holds a task's graft."""
    return folder / f"{task}.graft.safetensors"


def shipped() -> Path:
    """The folder of the skills that come with hotgraft.

    Raises:
        HotgraftError: they are not in this installation.
    """
    with as_file(files("hotgraft.demo").joinpath("skills")) as folder:
        found = Path(folder)
    if not (found / RESULTS).is_file():
        raise HotgraftError(
            "the demo's skills are not in this installation; `hotgraft demo --train` makes them"
        )
    return found


def correct(model: nn.Module, readout: Readout, split: Split) -> str:
    """For each text of a split `1` where the model answers rightly, else `0`.

    Example: `correct(model, readout, task.test.head(100)).count("1")`.
    """
    right = predict(model, readout, split) == split.labels
    return "".join("01"[int(answer)] for answer in right)


def share(answers: str, texts: int) -> float:
    """The accuracy on the first `texts` texts of what `correct` returned.

    Example:
        >>> share("1101", 2), share("1101", 4)
        (1.0, 0.75)
    """
    return answers[:texts].count("1") / len(answers[:texts])


def train(
    base_folder: Path,
    tasks: dict[str, Task],
    readouts: Mapping[str, Readout],
    out: Path,
    progress: Progress,
) -> None:
    """Fine-tune the encoder on each task, and keep the grafts and the answers in `out`.

    Args:
        base_folder: the pretrained model's.
        tasks, readouts: by the task's name.
        out: the folder to write; made where missing.
        progress: bars are added to it.

    Raises:
        OSError: `out` cannot be written.
    """
    from hotgraft.demo import search
    from hotgraft.demo.model import load_model
    from hotgraft.demo.train import finetune

    base, _ = load_model(base_folder)
    for name, task in tasks.items():
        lessons, choice = task.train.parts(len(task.train.texts) - CHOICE)
        readout = readouts[name]
        model, _ = load_model(base_folder)
        finetune(model, name, lessons, readout, progress=progress)
        graft, tried = search.find(
            base, model, readout, lessons, choice, title=name, progress=progress
        )
        bar = progress.add_task(f"testing {name}", total=None)
        keep(graft, tried, name, model, tasks, readouts, out)
        progress.remove_task(bar)


def keep(
    graft: hotgraft.Graft,
    tried: Mapping[str, float],
    name: str,
    finetuned: nn.Module,
    tasks: dict[str, Task],
    readouts: Mapping[str, Readout],
    out: Path,
) -> None:
    """Write a skill's graft, and its fine-tuned model's answers, into a folder of skills.

    Args:
        tried: by each density, which part of the gain in accuracy was kept on the texts that
            decided.

    Raises:
        OSError: `out` cannot be written.
    """
    out.mkdir(parents=True, exist_ok=True)
    graft.save(graft_path(out, name))
    results = read_results(out) if (out / RESULTS).is_file() else {}
    results[name] = {
        "graft": graft.id,
        "kept_by_density": dict(tried),
        "model_sha256": SHA256,
        "torch": torch.__version__,
        "finetuned_correct": {
            other: correct(finetuned, readouts[other], task.test) for other, task in tasks.items()
        },
    }
    (out / RESULTS).write_text(json.dumps(results, indent=1, sort_keys=True) + "\n")


def read_results(folder: Path) -> dict[str, Any]:
    """What is known of the fine-tuned checkpoints, by the task's name.

    Raises:
        HotgraftError: the file is missing or damaged.
    """
    try:
        results: dict[str, Any] = json.loads((folder / RESULTS).read_text())
    except (OSError, ValueError) as error:
        raise HotgraftError(f"{folder / RESULTS}: cannot be read: {error}") from error
    return results
