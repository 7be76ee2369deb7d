"""Tasks: splits and read-outs on a tiny BERT, the task file, labelled texts, bad ones by name."""

from __future__ import annotations

import csv
import gc
import gzip
import json
import shutil
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hotgraft
import pytest
import tiny_task
import torch
from hotgraft import tasks
from hotgraft.errors import DataError, FormatError
from hotgraft.tasks import Head, Prototypes, Split, Tokens, embed
from hotgraft.tasks.opening import write_weights
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModel, BertForSequenceClassification
from transformers.utils import logging


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Work this small only waits for other threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


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


# ---- a task file, opened -------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["prototypes", "head"])
def written(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_task.write(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_task.write(tmp_path_factory.mktemp("made")).parent


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    """A copy of a task's folder, to be spoilt."""
    shutil.copytree(made, tmp_path / "task")
    return tmp_path / "task"


def test_a_task_is_what_its_file_names(written: Path) -> None:
    file = tasks.read_task(written)
    task = tasks.open_task(file)
    assert task.classes == tuple(tiny_task.CLASSES)
    assert task.train.texts == tiny_task.split(48).texts
    assert task.train.labels.tolist() == tiny_task.split(48).labels.tolist()
    assert task.test is not None
    assert task.test.texts == tiny_task.split(36).texts
    assert task.finetuned == file.finetuned  # the names are the same: nothing is read yet
    assert hotgraft.fingerprint(task.base) == hotgraft.fingerprint(file.base)
    assert not task.base.training
    before = tasks.accuracy(task.base, task.readout, task.test)
    write_weights(task.base, task.finetuned)
    assert hotgraft.fingerprint(task.base) == hotgraft.fingerprint(file.finetuned)
    assert before < 0.6 < tasks.accuracy(task.base, task.readout, task.test) == 1.0


def test_the_prototypes_of_a_task_are_the_bases(folder: Path) -> None:
    text = (folder / "task.toml").read_text().replace('"prototypes"', '"prototypes"\ntemperature=2')
    (folder / "task.toml").write_text(text)
    task = tasks.open_task(tasks.read_task(folder / "task.toml"))
    _, expected = prototypes()
    assert isinstance(task.readout, Prototypes)
    torch.testing.assert_close(task.readout.prototypes, expected.prototypes)
    assert task.readout.temperature == 2


def test_a_task_file_has_defaults_and_paths_beside_it(folder: Path) -> None:
    (folder / "deep").mkdir()
    text = (folder / "task.toml").read_text()
    for name in ("base", "tuned", "train.jsonl"):
        text = text.replace(f'"{name}"', f'"../{name}"')
    text = text.replace('test = "test.jsonl"\nbatch = 8\n', "")
    (folder / "deep" / "task.toml").write_text(text)
    file = tasks.read_task(folder / "deep" / "task.toml")
    assert (file.text, file.label, file.max_tokens, file.batch) == ("text", "label", 64, 32)
    assert (file.kind, file.temperature, file.test) == ("prototypes", 0.1, None)
    assert list(file.classes.items()) == list(tiny_task.CLASSES.items())
    assert tasks.open_task(file).test is None


def test_finetuned_weights_may_be_one_file_or_have_a_head_on_top(folder: Path) -> None:
    bare = load_file(folder / "tuned" / "model.safetensors")
    save_file(bare, folder / "tuned.safetensors")
    task = opened(folder, ('finetuned = "tuned"', 'finetuned = "tuned.safetensors"'))
    assert task.finetuned == folder / "tuned.safetensors"

    headed = tiny_task.model(BertForSequenceClassification)
    headed.bert.load_state_dict(bare)
    headed.save_pretrained(folder / "headed")
    task = opened(folder, ('finetuned = "tuned"', 'finetuned = "headed"'))
    assert isinstance(task.finetuned, dict)
    assert hotgraft.fingerprint(task.finetuned) == hotgraft.fingerprint(bare)


def test_transformers_is_quiet_and_left_as_it_was(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = logging.get_verbosity(), logging.is_progress_bar_enabled()
    tasks.open_task(tasks.read_task(folder / "task.toml"))
    assert capsys.readouterr() == ("", "")
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == before


def opened(folder: Path, *changes: tuple[str, str]) -> tasks.Task:
    """The task of a folder, with its file changed."""
    text = tiny_task.TASK
    for old, new in changes:
        assert old in text
        text = text.replace(old, new)
    (folder / "task.toml").write_text(text)
    return tasks.open_task(tasks.read_task(folder / "task.toml"))


# ---- labelled texts ------------------------------------------------------------------------------

ROWS = [
    {"text": 'she said "play",\nthen left', "label": "games"},
    {"text": "Zoë\u2028types", "label": "fonts"},
]


def as_jsonl(rows: list[dict[str, str]]) -> bytes:
    return "\n".join(json.dumps(row, ensure_ascii=False) for row in rows).encode() + b"\n\n"


def as_csv(rows: list[dict[str, str]], path: Path) -> bytes:
    with path.open("w", newline="", encoding="utf-8-sig") as file:
        writer = csv.DictWriter(file, ["label", "text"])
        writer.writeheader()
        writer.writerows(rows)
    return path.read_bytes()


@pytest.mark.parametrize("name", ["train.jsonl", "train.jsonl.gz", "train.csv", "train.csv.gz"])
def test_texts_come_back_from_every_kind_of_file(folder: Path, name: str) -> None:
    data = as_jsonl(ROWS) if "jsonl" in name else as_csv(ROWS, folder / "x")
    (folder / name).write_bytes(gzip.compress(data) if name.endswith("gz") else data)
    train = opened(folder, ("train.jsonl", name)).train
    assert train.texts == tuple(row["text"] for row in ROWS)
    assert (train.labels.tolist(), train.labels.dtype) == ([0, 1], torch.int64)


def test_fields_have_the_names_the_task_says_and_labels_may_be_numbers(folder: Path) -> None:
    (folder / "train.jsonl").write_text('{"said": "play", "about": 7}\n{"said": "a", "about": "x"}')
    changes = [("batch = 8", 'text = "said"\nlabel = "about"')]
    changes += [('test = "test.jsonl"\n', ""), ("games =", "x ="), ("net =", "7 =")]
    assert opened(folder, *changes).train.labels.tolist() == [2, 0]


def test_a_heads_labels_are_its_names_or_numbers(tmp_path: Path) -> None:
    path = tiny_task.write(tmp_path, "head")
    (tmp_path / "train.jsonl").write_text(
        '{"text": "a", "label": 2}\n{"text": "a", "label": "net"}'
    )
    assert tasks.open_task(tasks.read_task(path)).train.labels.tolist() == [2, 2]
    (tmp_path / "train.jsonl").write_text('{"text": "a", "label": 3}')
    with pytest.raises(DataError, match=r"line 1: the label '3' has no class; .*base's head has"):
        tasks.open_task(tasks.read_task(path))


GOOD = b'{"text": "a", "label": "net"}\n'


@pytest.mark.parametrize(
    ("name", "data", "complaint"),
    [
        ("t.jsonl", b"", "t.jsonl: it holds no text"),
        ("t.jsonl", b"\n \n", "t.jsonl: it holds no text"),
        ("t.jsonl", GOOD + b"\n{", "t.jsonl, line 3: not JSON"),
        pytest.param("t.jsonl", GOOD + b"[" * 10**6, "line 2: not JSON", id="deep"),
        ("t.jsonl", GOOD + b"[1]", "line 2: a list; wanted a JSON object"),
        ("t.jsonl", GOOD + b'{"txt": 1, "label": 2}', r"line 2: .* no field 'text'; .* 'txt', 'l"),
        ("t.jsonl", b'{"text": "a"}', "line 1: there is no field 'label'; .* as data.label in"),
        ("t.jsonl", b"{}", "there are none"),
        ("t.jsonl", b'{"text": 1, "label": "net"}', "line 1: 'text' is 1; wanted a text"),
        ("t.jsonl", b'{"text": " ", "label": "net"}', "line 1: 'text' is ' '; wanted a text"),
        ("t.jsonl", b'{"text": "a", "label": true}', "line 1: 'label' is True; wanted a str"),
        ("t.jsonl", b'{"text": "a", "label": null}', "'label' is None"),
        (
            "t.jsonl",
            GOOD + b'{"text": "a", "label": "sql"}',
            r"t\.jsonl, line 2: the label 'sql' has no class; \[readout.classes\] of .*task\.toml "
            "has 'fonts', 'games', 'net'",
        ),
        ("t.jsonl", GOOD + b'{"text": "\xe4"}', r"line 2: not UTF-8 \(byte 0xe4\)"),
        ("t.jsonl.gz", GOOD, "t.jsonl.gz: not a whole gzip file"),
        ("t.jsonl.gz", gzip.compress(GOOD)[:-9], "not a whole gzip file"),
        ("t.txt", GOOD, r"t\.txt: wanted a file that ends in \.jsonl, \.csv, \.jsonl\.gz"),
        ("t.gz", GOOD, r"t\.gz: wanted a file that ends in"),
        ("t.csv", b"", "it holds no text"),
        ("t.csv", b"text,label\n", "it holds no text"),
        ("t.csv", b"text,lbl\na,net\n", "line 2: there is no field 'label'"),
        ("t.csv", b'text,label\n"a\nb",net\nc\n', "line 4: 1 columns; the header has 2"),
        ("t.csv", b"text,text\na,b\n", "line 1: a column's name is there twice"),
        ("t.csv", b'text,label\n"a,net\n', "line 2: not CSV"),
    ],
)
def test_bad_texts_are_refused_by_file_and_line(
    folder: Path, name: str, data: bytes, complaint: str
) -> None:
    (folder / name).write_bytes(data)
    for key in ("train", "test"):
        with pytest.raises(DataError, match=complaint):
            opened(folder, (f"{key}.jsonl", name))


# ---- bad task files ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("old", "new", "complaint"),
    [
        ("[data]", "[date]", r"task\.toml: data is missing; wanted a table, \[data\]"),
        ("[model]", "data = 3\n[model]", "task.toml: not TOML"),
        ('base = "base"', "", r"task\.toml, line 1: model\.base is missing"),
        (
            '"base"',
            '"nowhere"',
            r"line 2: model\.base is '.*nowhere', which is not there; wanted a",
        ),
        ('"base"', '"train.jsonl"', r"line 2: model\.base is .*; wanted a folder"),
        ('"base"', "3", r"line 2: model\.base is 3; wanted a string"),
        ('"base"', r'"\u0000"', r"line 2: model\.base is .*not there"),
        ('"tuned"', '""', r"line 3: model\.finetuned is ''; wanted a string that is not empty"),
        ('"train.jsonl"', '"base"', r"line 6: data\.train is .*wanted a file"),
        ("batch = 8", "bach = 8", r"line 8: data\.bach is unknown; wanted one of 'batch', 'label'"),
        ("batch = 8", "batch = 0", r"line 8: data\.batch is 0; wanted a whole number from 1 on"),
        ("batch = 8", "batch = true", r"data\.batch is True"),
        ("batch = 8", "batch = 1.5", r"data\.batch is 1\.5"),
        ("batch = 8", "max_tokens = 2", r"data\.max_tokens is 2; wanted a whole number from 3 on"),
        ("batch = 8", "max_tokens = 65", r"data\.max_tokens is 65; .*base takes up to 64"),
        ("batch = 8", "text = 3", r"line 8: data\.text is 3"),
        ("[readout]\n", "[readout]\nlr = 1\n", r"line 11: readout\.lr is unknown"),
        (
            "[readout]\n",
            "[readout]\ntemperature = nan\n",
            r"readout\.temperature is nan; wanted a f",
        ),
        ("[readout]\n", "[readout]\ntemperature = inf\n", r"readout\.temperature is inf"),
        ("[readout]\n", "[readout]\ntemperature = 0\n", "is 0; wanted a finite number above 0"),
        ("[model]", "[other]\n[model]", r"line 1: other is unknown; wanted one of 'data', 'model'"),
        (
            '"prototypes"',
            '"heads"',
            r"readout\.kind is 'heads'; wanted one of 'prototypes', 'head'",
        ),
        ('"prototypes"', '"head"', r"line 13: readout\.classes is unknown"),
        ('= "font"', "= 2", r"line 15: readout\.classes\.fonts is 2; wanted a string"),
        (
            '= "font"',
            '= "game"',
            r"line 15: .*fonts is 'game', as for 'games'; wanted names that d",
        ),
        ('\nfonts = "font"\nnet = "mail"', "", r"line 13: readout\.classes is 1 of them"),
        ("[readout.classes]", "[readout.names]", r"line 10: readout\.classes is missing"),
        ("[readout.classes]", "[[readout.classes]]", r"readout\.classes is \[.*wanted a table"),
        ("[model]", "[model", "not TOML: .*line 1"),
    ],
)
def test_a_bad_task_file_is_refused_by_key_and_line(
    folder: Path, old: str, new: str, complaint: str
) -> None:
    with pytest.raises(FormatError, match=complaint):
        opened(folder, (old, new))


def test_a_task_file_that_is_not_utf8(folder: Path) -> None:
    (folder / "task.toml").write_bytes(tiny_task.TASK.encode() + b"# \xe4")
    with pytest.raises(FormatError, match=r"task\.toml, line 17: not UTF-8 \(byte 0xe4\)"):
        tasks.read_task(folder / "task.toml")


# ---- bad models ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("gone", "complaint"),
    [
        ("config.json", "base: transformers finds no configuration in it"),
        ("model.safetensors", "base: transformers finds no model in it"),
        ("tokenizer", r"base: its tokenizer knows no word; wanted tokenizer\.json"),
    ],
)
def test_a_folder_that_lacks_something(folder: Path, gone: str, complaint: str) -> None:
    for path in (folder / "base").glob(f"{gone}*"):
        path.unlink()
    with pytest.raises(FormatError, match=complaint):
        opened(folder)


def test_weights_that_transformers_would_make_up_are_missing(folder: Path) -> None:
    head = tiny_task.HEAD
    (folder / "task.toml").write_text(head)
    with pytest.raises(FormatError, match=r"wants 'classifier\.bias', 'classifier\.weight', which"):
        tasks.open_task(tasks.read_task(folder / "task.toml"))
    weights = load_file(folder / "base" / "model.safetensors")
    without = {name: value for name, value in weights.items() if "pooler" not in name}
    save_file(without, folder / "base" / "model.safetensors", {"format": "pt"})
    assert opened(folder).classes  # nobody asks the pooler
    del without["encoder.layer.1.output.dense.bias"]
    save_file(without, folder / "base" / "model.safetensors", {"format": "pt"})
    with pytest.raises(FormatError, match=r"AutoModel wants 'encoder\.layer\.1\.output\.dense\.b"):
        opened(folder)


def test_a_pickle_is_not_read(folder: Path) -> None:
    AutoModel.from_pretrained(folder / "base")
    (folder / "base" / "model.safetensors").unlink()
    torch.save(tiny_task.model().state_dict(), folder / "base" / "pytorch_model.bin")
    with pytest.raises(FormatError, match="finds no model"):
        opened(folder)


def test_a_tokenizer_without_padding_is_refused(folder: Path) -> None:
    for name, key in (("tokenizer_config.json", "pad_token"), ("tokenizer.json", "padding")):
        path = folder / "base" / name
        config = json.loads(path.read_text())
        del config[key]
        path.write_text(json.dumps(config))
    with pytest.raises(FormatError, match="its tokenizer has no padding token"):
        opened(folder)
