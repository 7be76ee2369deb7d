"""The demo's questions, their texts, and the frozen read-out that makes an encoder a classifier.

Nothing is trained on top of the encoder. A text's embedding (mean over its tokens, length 1) is
compared with the embedding of each class's readable name, made once by the *base* weights and then
kept. Base, fine-tuned and grafted model answer through the same read-out, so a skill sits in the
encoder or nowhere.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

import torch
from torch import Tensor, nn

TASKS = ("section", "kind")
MAX_TOKENS = 64
# Divides the cosines. No answer depends on it, but training does: tried at 0.05, a graft of 1 % of
# the encoder kept less of the gain.
TEMPERATURE = 0.1


@dataclass(frozen=True)
class Split:
    """Texts with their answers, and the Debian source package that each text came from.

    `labels` is int64 of shape `[len(texts)]`, indices into the task's classes. Classes alternate,
    so the first `n` texts are balanced for every `n`.
    """

    texts: tuple[str, ...]
    labels: Tensor
    sources: tuple[str, ...]

    def head(self, count: int) -> Split:
        """The first `count` texts, or all where there are fewer.

        Example: `task.test.head(300)`.
        """
        return Split(self.texts[:count], self.labels[:count], self.sources[:count])


@dataclass(frozen=True)
class Task:
    """One question. `classes` are its labels, `names` what the read-out calls them, in order."""

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


def embed(model: nn.Module, tokenizer: Any, texts: Sequence[str]) -> Tensor:
    """Embed one batch of texts, each cut at 64 tokens. Gradients flow where they are enabled.

    Args:
        model: a transformers encoder.
        tokenizer: the encoder's own.

    Returns:
        fp32 `[len(texts), width]`, rows of length 1, on the model's device.

    Example: `embed(model, tokenizer, ["a chess engine"]).shape == (1, 384)`.
    """
    batch = tokenizer(
        list(texts), padding=True, truncation=True, max_length=MAX_TOKENS, return_tensors="pt"
    ).to(next(model.parameters()).device)
    states: Tensor = model(**batch).last_hidden_state  # [texts, tokens, width]
    real = batch["attention_mask"].unsqueeze(-1)  # [texts, tokens, 1], 0 on padding
    mean = (states * real).sum(1) / real.sum(1)
    return nn.functional.normalize(mean.float(), dim=-1)


@dataclass(frozen=True)
class Readout:
    """The frozen classifier. `prototypes`: fp32 `[classes, width]`, rows of length 1."""

    tokenizer: Any
    prototypes: Tensor

    @classmethod
    def from_base(cls, base: nn.Module, tokenizer: Any, task: Task) -> Readout:
        """Embed the task's class names with the base weights: make it before anything changes them.

        Example: `Readout.from_base(model, tokenizer, load_task("section"))`.
        """
        with torch.no_grad():
            return cls(tokenizer, embed(base, tokenizer, task.names))

    def logits(self, model: nn.Module, texts: Sequence[str]) -> Tensor:
        """Answer one batch: cosine / `TEMPERATURE`, fp32 `[len(texts), classes]`.

        Example: `readout.logits(model, ["a chess engine"]).argmax(-1)`.
        """
        return embed(model, self.tokenizer, texts) @ self.prototypes.T / TEMPERATURE


def predict(model: nn.Module, readout: Readout, texts: Sequence[str], *, batch: int = 64) -> Tensor:
    """The likeliest class of each text: int64 `[len(texts)]`, on the CPU.

    `model` should be in evaluation mode, as `load_model` and `finetune` leave it. Texts of like
    length share a batch, so that little is computed on padding.

    Example: `task.classes[predict(model, readout, ["a chess engine"])[0]]`.
    """
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    answers = torch.empty(len(texts), dtype=torch.int64)
    with torch.no_grad():
        for first in range(0, len(order), batch):
            some = order[first : first + batch]
            answers[some] = readout.logits(model, [texts[i] for i in some]).argmax(-1).cpu()
    return answers


def accuracy(model: nn.Module, readout: Readout, split: Split) -> float:
    """The share of a split's texts that the model answers rightly, in 0 .. 1.

    Example: `accuracy(model, readout, load_task("section").test)`.
    """
    return (predict(model, readout, split.texts) == split.labels).double().mean().item()
