"""The frozen read-outs that make a model a classifier.

Nothing is trained in a read-out. Base, fine-tuned and grafted model answer through the same one, so
a skill sits in the model or nowhere.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from hotgraft.errors import DataError
from hotgraft.tasks.texts import Batch, Split, Tokens

COLDEST, HOTTEST = 1e-4, 1e4
"""Temperatures: over less a cosine is no finite logit in the end, over more all are alike."""


def embed(model: nn.Module, tokens: Mapping[str, Tensor]) -> Tensor:
    """Embed one batch: the mean over each text's tokens. Gradients flow where they are enabled.

    Args:
        model: a transformers encoder (`AutoModel`).
        tokens: its inputs, with the attention mask, padded.

    Returns:
        fp32 `[texts, width]`, rows of length 1, on the model's device.

    Example: `embed(model, Tokens(tokenizer, ["a chess engine"], 64).rows([0]))`.
    """
    inputs = _moved(tokens, model)
    states: Tensor = model(**inputs).last_hidden_state.float()  # [texts, tokens, width]
    real = inputs["attention_mask"].unsqueeze(-1)  # [texts, tokens, 1], 0 on padding
    mean = (states * real).sum(1) / real.sum(1)
    return nn.functional.normalize(mean, dim=-1)


@dataclass(frozen=True, eq=False, kw_only=True)
class Readout(ABC):
    """From texts to logits. Each split is tokenized once, and padded batch by batch.

    Args:
        tokenizer: the model's own, of transformers.
        max_tokens: what texts are cut at.
        autocast: the type that the model computes in (`torch.bfloat16`), if not its own.
    """

    tokenizer: Any
    max_tokens: int = 64
    autocast: torch.dtype | None = None
    _known: WeakKeyDictionary[Split, Tokens] = field(
        default_factory=WeakKeyDictionary, init=False, repr=False
    )

    @abstractmethod
    def answer(self, model: nn.Module, tokens: Mapping[str, Tensor]) -> Tensor:
        """The logits of one batch, with gradients where they are enabled.

        Args:
            model: on any device.
            tokens: its inputs, as in a `Batch`.

        Returns:
            fp32 `[texts, classes]` on the model's device.
        """

    def tokens(self, texts: Split | Sequence[str]) -> Tokens:
        """The tokens of some texts; those of a split are made once.

        Raises:
            DataError: there is no text, or the tokenizer finds nothing in one.
        """
        if not isinstance(texts, Split):
            return self._tokenized(texts)
        if texts not in self._known:
            self._known[texts] = self._tokenized(texts.texts)
        return self._known[texts]

    def _tokenized(self, texts: Sequence[str]) -> Tokens:
        if not texts:
            raise DataError("there is no text: wanted at least one")
        return Tokens(self.tokenizer, texts, self.max_tokens)

    def batch(self, split: Split, indices: Sequence[int]) -> Batch:
        """Some texts of a split as one batch, padded to the longest of them.

        Example: `readout.loss(model, readout.batch(task.train, [3, 14, 15]))`.
        """
        return Batch(self.tokens(split).rows(indices), split.labels[list(indices)])

    def batches(self, split: Split, size: int) -> list[Batch]:
        """A split in its own order, `size` texts a batch; the last one may have fewer.

        Raises:
            DataError: the split is empty or the size is none.

        Example: `hotgraft.localize(base, finetuned, readout.loss, readout.batches(train, 32))`.
        """
        if size < 1:
            raise DataError(f"batches of {size} texts: wanted at least 1")
        count = len(self.tokens(split).lengths)
        return [
            self.batch(split, range(first, min(first + size, count)))
            for first in range(0, count, size)
        ]

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """The mean cross entropy of one batch: what `localize` and `train.finetune` take."""
        logits = self.answer(model, batch.tokens)
        return nn.functional.cross_entropy(logits, batch.labels.to(logits.device))

    @torch.no_grad()
    def logits(self, model: nn.Module, texts: Split | Sequence[str], *, batch: int = 64) -> Tensor:
        """The logits of all texts, fp32 `[texts, classes]`, in their order, on the CPU.

        The model should be in evaluation mode. Texts of like length share a batch, so that next to
        nothing is computed on padding.

        Raises:
            DataError: there is no text, or the tokenizer finds nothing in one.

        Example: `hotgraft.evaluate(readout.logits(model, task.test), task.test.labels)`.
        """
        tokens = self.tokens(texts)
        order = sorted(range(len(tokens.lengths)), key=tokens.lengths.__getitem__)
        parts = [
            self.answer(model, tokens.rows(order[first : first + batch])).cpu()
            for first in range(0, len(order), batch)
        ]
        answers = torch.empty(len(order), parts[0].shape[1])
        answers[order] = torch.cat(parts)
        return answers

    def _autocast(self, model: nn.Module) -> torch.autocast:
        device = next(model.parameters()).device.type
        return torch.autocast(device, self.autocast, enabled=self.autocast is not None)


@dataclass(frozen=True, eq=False, kw_only=True)
class Prototypes(Readout):
    """For encoders without a head: how near a text is to each class's readable name.

    A logit is the cosine of the text's embedding and the name's, over `temperature`. The names are
    embedded once, by the *base* weights, and then kept.

    Args:
        prototypes: fp32 `[classes, width]`, rows of length 1.
        temperature: no answer depends on it, but training does: tried at 0.05, a graft of 1 % of an
            encoder kept less of the gain. In 1e-4 .. 1e4.

    Raises:
        DataError: the temperature is not in that range.
    """

    prototypes: Tensor
    temperature: float = 0.1

    def __post_init__(self) -> None:
        if not COLDEST <= self.temperature <= HOTTEST:
            raise DataError(
                f"temperature {self.temperature}: wanted a number in {COLDEST:g} .. {HOTTEST:g}"
            )

    @classmethod
    def from_base(
        cls,
        base: nn.Module,
        tokenizer: Any,
        names: Sequence[str],
        *,
        temperature: float = 0.1,
        max_tokens: int = 64,
        autocast: torch.dtype | None = None,
    ) -> Prototypes:
        """Embed the classes' names with the base weights: make it before anything changes them.

        Example: `Prototypes.from_base(model, tokenizer, ("a game", "a font"))`.
        """
        tokens = Tokens(tokenizer, names, max_tokens).rows(range(len(names)))
        with torch.no_grad():
            prototypes = embed(base, tokens)
        return cls(
            tokenizer=tokenizer,
            prototypes=prototypes,
            temperature=temperature,
            max_tokens=max_tokens,
            autocast=autocast,
        )

    def answer(self, model: nn.Module, tokens: Mapping[str, Tensor]) -> Tensor:
        """See `Readout.answer`."""
        with self._autocast(model):
            embedded = embed(model, tokens)
        return embedded @ self.prototypes.to(embedded.device).T / self.temperature


@dataclass(frozen=True, eq=False, kw_only=True)
class Head(Readout):
    """The model's own head: that of an `AutoModelForSequenceClassification`."""

    def answer(self, model: nn.Module, tokens: Mapping[str, Tensor]) -> Tensor:
        """See `Readout.answer`."""
        with self._autocast(model):
            logits: Tensor = model(**_moved(tokens, model)).logits
        return logits.float()


def predict(
    model: nn.Module, readout: Readout, texts: Split | Sequence[str], *, batch: int = 64
) -> Tensor:
    """The likeliest class of each text: int64 `[texts]`, on the CPU.

    Example: `task.classes[predict(model, readout, ["a chess engine"])[0]]`.
    """
    return readout.logits(model, texts, batch=batch).argmax(-1)


def accuracy(model: nn.Module, readout: Readout, split: Split) -> float:
    """The share of a split's texts that the model answers rightly, in 0 .. 1.

    Example: `accuracy(model, readout, task.test)`.
    """
    return (predict(model, readout, split) == split.labels).double().mean().item()


def _moved(tokens: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    device = next(model.parameters()).device
    return {name: column.to(device) for name, column in tokens.items()}
