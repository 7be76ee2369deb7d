"""Texts with their answers, and what a tokenizer makes of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hotgraft.errors import DataError


@dataclass(frozen=True, eq=False)
class Split:
    """Texts with their answers, and where each text came from, if that is known.

    `labels` is int64 of shape `[len(texts)]`, indices into the task's classes. A split is itself
    and no other: a read-out keeps its tokens for as long as it lives.
    """

    texts: tuple[str, ...]
    labels: Tensor
    sources: tuple[str, ...] = ()

    def head(self, count: int) -> Split:
        """The first `count` texts, or all where there are fewer.

        Example: `task.test.head(300)`.
        """
        return self.parts(count)[0]

    def parts(self, count: int) -> tuple[Split, Split]:
        """The first `count` texts, and the others.

        Example: `lessons, choice = task.train.parts(1920)`.
        """
        first, rest = (
            Split(self.texts[here], self.labels[here], self.sources[here])
            for here in (slice(count), slice(count, None))
        )
        return first, rest


class Batch(NamedTuple):
    """What a loss is given: a model's inputs `[texts, tokens]`, and int64 labels `[texts]`."""

    tokens: dict[str, Tensor]
    labels: Tensor


class Tokens:
    """Texts, tokenized once; batches are cut from them.

    Args:
        tokenizer: a model's own, of transformers.
        texts: any number of them.
        most: what a text is cut at.

    Raises:
        DataError: the tokenizer finds nothing in one of the texts.

    Example: `Tokens(tokenizer, ["a chess engine"], 64).rows([0])["input_ids"]`.
    """

    def __init__(self, tokenizer: Any, texts: Sequence[str], most: int) -> None:
        self._columns: Mapping[str, Tensor] = dict(
            tokenizer(
                list(texts), padding=True, truncation=True, max_length=most, return_tensors="pt"
            )
        )
        self._real = self._columns["attention_mask"].bool()
        self.lengths: list[int] = self._real.sum(1).tolist()
        """How many tokens each text has, without padding."""
        if 0 in self.lengths:
            text = self.lengths.index(0)
            raise DataError(
                f"text {text}, {texts[text][:60]!r}: the tokenizer finds nothing in it; leave "
                "it out"
            )

    def rows(self, indices: Sequence[int]) -> dict[str, Tensor]:
        """The tokens of some texts, padded to the longest of them: `[len(indices), tokens]`."""
        chosen = torch.tensor(indices, dtype=torch.int64)
        used = self._real[chosen].any(0).nonzero()
        # Where the tokenizer pads on the left, the first columns are the idle ones.
        first, last = int(used[0]), int(used[-1]) + 1
        return {name: column[chosen, first:last] for name, column in self._columns.items()}
