"""Splits and read-outs, on a tiny BERT."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import tiny_task
import torch
from hotgraft import tasks
from hotgraft.errors import DataError
from hotgraft.tasks import Head, Prototypes, Split, Tokens, embed
from torch import nn
from transformers import BertForSequenceClassification

pytestmark = pytest.mark.usefixtures("one_thread")


class Counting:
    """A tokenizer that counts the texts it is given."""

    def __init__(self) -> None:
        self._real = tiny_task.tokenizer()
        self.texts = 0

    def __call__(self, texts: list[str], **options: Any) -> Any:
        self.texts += len(texts)
        return self._real(texts, **options)


def prototypes(tokenizer: Any = None, **options: Any) -> tuple[nn.Module, Prototypes]:
    base = tiny_task.model()
    names = tuple(tiny_task.CLASSES.values())
    tokenizer = tokenizer or tiny_task.tokenizer()
    return base, Prototypes.from_base(base, tokenizer, names, **options)


# ---- splits and tokens ---------------------------------------------------------------------------


def test_the_head_of_a_split_keeps_texts_labels_and_sources_together() -> None:
    split = Split(("a", "b", "c"), torch.tensor([2, 0, 1]), ("x", "y", "z"))
    head = split.head(2)
    assert (head.texts, head.labels.tolist(), head.sources) == (("a", "b"), [2, 0], ("x", "y"))
    assert Split(("a", "b"), torch.tensor([1, 0])).head(1).sources == ()


@pytest.mark.parametrize("side", ["left", "right"])
def test_rows_are_what_the_tokenizer_makes_of_these_texts_alone(side: str) -> None:
    tokenizer = tiny_task.tokenizer()
    tokenizer.padding_side = side
    texts = tiny_task.split().texts
    tokens = Tokens(tokenizer, texts, 7)
    for chosen in ([3], [0, 1], [22, 5, 11]):
        alone = tokenizer(
            [texts[i] for i in chosen],
            padding=True,
            truncation=True,
            max_length=7,
            return_tensors="pt",
        )
        rows = tokens.rows(chosen)
        assert rows.keys() == alone.keys()
        assert all(torch.equal(rows[name], alone[name]) for name in rows)
    assert max(tokens.lengths) == 7  # some were cut


def test_a_text_without_tokens_is_refused() -> None:
    def nothing(texts: list[str], **_: object) -> dict[str, torch.Tensor]:
        mask = torch.tensor([[1, 0], [0, 0]])[: len(texts)]
        return {"input_ids": mask, "attention_mask": mask}

    with pytest.raises(DataError, match=r"text 1, '\\u200b': the tokenizer finds nothing in it"):
        Tokens(nothing, ["a", "\u200b"], 8)


# ---- read-outs -----------------------------------------------------------------------------------


def test_embeddings_ignore_padding_and_have_length_one() -> None:
    base = tiny_task.model()
    tokens = Tokens(tiny_task.tokenizer(), ["play chess", "a the a the a the font"], 64)
    alone, padded = embed(base, tokens.rows([0])), embed(base, tokens.rows([0, 1]))
    torch.testing.assert_close(alone[0], padded[0])
    torch.testing.assert_close(padded.norm(dim=-1), torch.ones(2))
    mean = base(**tokens.rows([1])).last_hidden_state.mean(1)
    torch.testing.assert_close(padded[1:], nn.functional.normalize(mean, dim=-1))


@pytest.mark.parametrize("temperature", [0.0, -0.1, 1e-5, 1e5, float("nan"), float("inf")])
def test_a_temperature_out_of_range_is_refused(temperature: float) -> None:
    with pytest.raises(DataError, match=r"wanted a number in 0\.0001 \.\. 10000"):
        prototypes(temperature=temperature)


def test_prototypes_are_the_names_as_the_base_embeds_them() -> None:
    base, readout = prototypes(temperature=0.25)
    logits = readout.logits(base, ["font", "a mail"])
    expected = torch.cat([embed(base, readout.tokens([t]).rows([0])) for t in ("font", "a mail")])
    torch.testing.assert_close(logits, expected @ readout.prototypes.T / 0.25)
    assert logits.argmax(1)[0] == 1
    torch.testing.assert_close(logits[0, 1], torch.tensor(4.0))  # cosine 1 / temperature
    with torch.no_grad():
        base.encoder.layer[0].output.dense.weight.mul_(3)
    assert logits[0, 1] > readout.logits(base, ["font"])[0, 1]  # the prototypes stayed


def test_a_head_answers_with_its_own_logits() -> None:
    base = tiny_task.model(BertForSequenceClassification)
    readout = Head(tokenizer=tiny_task.tokenizer())
    split = tiny_task.split()
    tokens = tiny_task.tokenizer()(list(split.texts), padding=True, return_tensors="pt")
    expected = base(**tokens).logits
    torch.testing.assert_close(readout.logits(base, split), expected)
    loss = readout.loss(base, readout.batch(split, range(24)))
    torch.testing.assert_close(loss, nn.functional.cross_entropy(expected, split.labels))


@pytest.mark.parametrize("batch", [1, 7, 64])
def test_logits_keep_the_order_of_the_texts(batch: int) -> None:
    base, readout = prototypes()
    split = tiny_task.split()
    one_by_one = torch.cat([readout.logits(base, [text]) for text in split.texts])
    logits = readout.logits(base, split, batch=batch)
    assert (logits.dtype, logits.requires_grad) == (torch.float32, False)
    torch.testing.assert_close(logits, one_by_one)
    assert (
        tasks.predict(base, readout, split, batch=batch).tolist() == one_by_one.argmax(1).tolist()
    )
    right = (one_by_one.argmax(1) == split.labels).sum().item()
    assert tasks.accuracy(base, readout, split) == right / 24


def test_texts_of_like_length_share_a_batch() -> None:
    widths = []

    class Watching(Head):
        def answer(self, model: nn.Module, tokens: Any) -> torch.Tensor:
            widths.append(tokens["input_ids"].shape[1])
            return super().answer(model, tokens)

    base = tiny_task.model(BertForSequenceClassification)
    readout = Watching(tokenizer=tiny_task.tokenizer())
    split = tiny_task.split()
    readout.logits(base, split, batch=6)
    lengths = sorted(readout.tokens(split).lengths)
    assert len(set(lengths)) > 3
    assert widths == lengths[5::6]


def test_batches_are_the_split_in_its_own_order() -> None:
    base, readout = prototypes()
    split = tiny_task.split(20)
    batches = readout.batches(split, 8)
    assert [len(batch.labels) for batch in batches] == [8, 8, 4]
    assert torch.cat([batch.labels for batch in batches]).tolist() == split.labels.tolist()
    answers = torch.cat([readout.answer(base, batch.tokens) for batch in batches])
    torch.testing.assert_close(answers.detach(), readout.logits(base, split))
    loss = readout.loss(base, batches[2])
    assert loss.requires_grad
    expected = nn.functional.cross_entropy(answers[16:], split.labels[16:])
    torch.testing.assert_close(loss, expected)


def test_a_split_is_tokenized_once_and_forgotten_with_it() -> None:
    tokenizer = Counting()
    base, readout = prototypes(tokenizer)
    before = tokenizer.texts
    split = tiny_task.split()
    for _ in range(2):
        readout.batches(split, 8)
        readout.logits(base, split)
        readout.batch(split, [1, 2])
    assert tokenizer.texts == before + 24
    kept = weakref.ref(readout.tokens(split))
    del split
    gc.collect()
    assert kept() is None


def test_autocast_computes_in_another_type_and_answers_in_fp32() -> None:
    base, readout = prototypes()
    _, low = prototypes(autocast=torch.bfloat16)
    split = tiny_task.split()
    exact, rounded = readout.logits(base, split), low.logits(base, split)
    assert rounded.dtype == torch.float32
    assert not torch.equal(exact, rounded)
    torch.testing.assert_close(exact, rounded, atol=0.3, rtol=0.1)


@pytest.mark.parametrize(
    ("texts", "size", "complaint"),
    [(0, 8, "there is no text"), (4, 0, "batches of 0 texts: wanted at least 1")],
)
def test_batches_of_nothing_are_refused(texts: int, size: int, complaint: str) -> None:
    _, readout = prototypes()
    with pytest.raises(DataError, match=complaint):
        readout.batches(tiny_task.split().head(texts), size)
