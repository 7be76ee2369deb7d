"""A BERT of six thousand weights with a tokenizer of whole words, texts, and a task file."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from hotgraft import tasks, train
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")
WORDS = ("play", "chess", "type", "glyph", "send", "letter", "a", "the", "game", "font", "mail")
CLASSES = {"games": "game", "fonts": "font", "net": "mail"}
ABOUT = {"games": ("play", "chess"), "fonts": ("type", "glyph"), "net": ("send", "letter")}

TASK = """\
[model]
base = "base"
finetuned = "tuned"

[data]
train = "train.jsonl"
test = "test.jsonl"
batch = 8

[readout]
kind = "prototypes"

[readout.classes]
games = "game"
fonts = "font"
net = "mail"
"""
HEAD = TASK.partition("[readout]")[0] + '[readout]\nkind = "head"\n'


def tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {word: i for i, word in enumerate((*SPECIAL, *WORDS))}
    made = Tokenizer(WordLevel(vocabulary, unk_token="[UNK]"))
    made.pre_tokenizer = Whitespace()
    ends = [(mark, vocabulary[mark]) for mark in ("[CLS]", "[SEP]")]
    made.post_processor = TemplateProcessing("[CLS] $A [SEP]", special_tokens=ends)
    return PreTrainedTokenizerFast(
        tokenizer_object=made,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        model_max_length=64,
    )


def model(kind: type[PreTrainedModel] = BertModel) -> PreTrainedModel:
    torch.manual_seed(0)
    names = dict(enumerate(CLASSES))
    config = BertConfig(
        vocab_size=len(SPECIAL) + len(WORDS),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=64,
        initializer_range=0.3,
        id2label=names,
        label2id={name: i for i, name in names.items()},
    )
    return kind(config).eval()


def texts(count: int) -> list[dict[str, str]]:
    """Each holds one word or two of its class, and some that say nothing."""
    labels = list(ABOUT)
    rows = []
    for i in range(count):
        label = labels[i % 3]
        said = "a the " * (i // 3 % 4) + " ".join(ABOUT[label][: 1 + i // 12 % 2])
        rows.append({"text": said, "label": label})
    return rows


def split(count: int = 24) -> tasks.Split:
    rows = texts(count)
    labels = torch.tensor([list(CLASSES).index(row["label"]) for row in rows])
    return tasks.Split(tuple(row["text"] for row in rows), labels)


def write_rows(path: Path, rows: list[dict[str, str]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def finetuned(base: PreTrainedModel, readout: tasks.Readout) -> PreTrainedModel:
    """A copy that has learnt the texts, in its encoder."""
    tuned = type(base)(base.config).eval()
    tuned.load_state_dict(base.state_dict())
    optimizer = train.sgd(tuned, lr=0.1, momentum=0.9, scope="encoder")
    train.finetune(tuned, readout.loss, readout.batches(split(48), 16), optimizer, steps=60)
    return tuned


def write(folder: Path, kind: str = "prototypes") -> Path:
    """A folder with base, tuned, texts and the task file, which is given back."""
    made = tokenizer()
    readout: tasks.Readout
    if kind == "prototypes":
        base = model()
        readout = tasks.Prototypes.from_base(base, made, tuple(CLASSES.values()))
    else:
        base = model(BertForSequenceClassification)
        readout = tasks.Head(tokenizer=made)
    base.save_pretrained(folder / "base")
    made.save_pretrained(folder / "base")
    finetuned(base, readout).save_pretrained(folder / "tuned")
    write_rows(folder / "train.jsonl", texts(48))
    write_rows(folder / "test.jsonl", texts(36))
    path = folder / "task.toml"
    path.write_text(TASK if kind == "prototypes" else HEAD)
    return path
