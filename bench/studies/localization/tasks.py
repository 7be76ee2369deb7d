"""Read the study's tasks: training texts, a test in the same domain and one out of it.

`data/PROVENANCE.md` says what they ask and how they were drawn; the read-out is the demo's.
"""

from __future__ import annotations

import gzip
import json
from dataclasses import dataclass
from pathlib import Path

import torch
from hotgraft.demo import task as demo
from hotgraft.tasks import Split

DATA = Path(__file__).with_name("data")
TASKS = ("section", "kind", "language", "implemented", "library", "network")
RELATED = (("language", "implemented"), ("kind", "library"))
"""Tasks that ask about nearly the same thing."""


@dataclass(frozen=True)
class Task(demo.Task):
    """A task of the demo's kind, with one test more.

    `ood` asks the same question on texts from another distribution: how a description goes on where
    the texts of `train` and `test` end. The rows of a split come in the order of a hash: the first
    `n` are a sample of it, with classes nearly as frequent as in the whole.
    """

    ood: Split


def load(name: str, folder: Path = DATA) -> Task:
    """Read one of the tasks, `TASKS`.

    Args:
        folder: where its file is; the shipped one is read unless another is named.

    Raises:
        ValueError: there is no task of that name, or its file is not what its header says.

    Example: `load("section").ood.texts[0]`.
    """
    if name not in TASKS:
        raise ValueError(f"no task {name!r} in the study; choose one of: {', '.join(TASKS)}")
    packed = (folder / f"{name}.jsonl.gz").read_bytes()
    # Not splitlines(): texts may hold other line separators of Unicode.
    header, *rows = map(json.loads, gzip.decompress(packed).decode().rstrip("\n").split("\n"))
    classes = tuple(header["classes"])

    def split(which: str) -> Split:
        chosen = [row for row in rows if row["split"] == which]
        labels = torch.tensor([classes.index(row["label"]) for row in chosen], dtype=torch.int64)
        found = labels.bincount(minlength=len(classes)).tolist()
        wanted = [header["counts"][which][label] for label in classes]
        if found != wanted:
            raise ValueError(
                f"{name}.jsonl.gz: found {found} {which} texts of {', '.join(classes)}, its header "
                f"says {wanted}; make the file again, see PROVENANCE.md beside it"
            )
        return Split(
            texts=tuple(row["text"] for row in chosen),
            labels=labels,
            sources=tuple(row["source"] for row in chosen),
        )

    return Task(
        name=name,
        asks=header["asks"],
        classes=classes,
        names=tuple(header["classes"].values()),
        train=split("train"),
        test=split("test"),
        ood=split("ood"),
    )
