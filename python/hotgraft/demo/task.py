"""The demo's questions and their texts.

They are answered through `hotgraft.tasks.Prototypes`: nothing is trained on top of the encoder.
"""

from __future__ import annotations

import gzip
import json
from dataclasses import dataclass
from importlib.resources import files

import torch

from hotgraft.tasks import Split

TASKS = ("section", "kind")


@dataclass(frozen=True)
class Task:
    """One question. `classes` are its labels, `names` what the read-out calls them, in order.

    A split's sources are the Debian source packages of its texts. Classes alternate, so the first
    `n` texts are balanced for every `n`.
    """

    name: str
    asks: str
    classes: tuple[str, ...]
    names: tuple[str, ...]
    train: Split
    test: Split


def load_task(name: str) -> Task:
    """Read one of the shipped tasks, `TASKS`.

    Raises:
        ValueError: there is no task of that name.

    Example: `load_task("section").test.texts[0]`.
    """
    if name not in TASKS:
        raise ValueError(f"no demo task {name!r}; choose one of: {', '.join(TASKS)}")
    packed = files("hotgraft.demo").joinpath("data", f"{name}.jsonl.gz").read_bytes()
    # Not splitlines(): texts may hold other line separators of Unicode.
    header, *rows = map(json.loads, gzip.decompress(packed).decode().rstrip("\n").split("\n"))
    classes = tuple(header["classes"])

    def split(which: str) -> Split:
        chosen = [row for row in rows if row["split"] == which]
        return Split(
            texts=tuple(row["text"] for row in chosen),
            labels=torch.tensor([classes.index(row["label"]) for row in chosen]),
            sources=tuple(row["source"] for row in chosen),
        )

    names = tuple(header["classes"].values())
    return Task(name, header["asks"], classes, names, split("train"), split("test"))
