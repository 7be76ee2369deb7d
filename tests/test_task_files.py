"""The task file and the labelled texts that it names, opened, and bad ones refused by name."""

from __future__ import annotations

import codecs
import csv
import gzip
import json
import shutil
from pathlib import Path

import hotgraft
import pytest
import tiny_task
import torch
from hotgraft import tasks
from hotgraft.errors import DataError, FormatError
from hotgraft.tasks import Prototypes, write_weights
from safetensors.torch import load_file, save_file
from transformers import BertForSequenceClassification, GPT2Config, GPT2ForSequenceClassification
from transformers.utils import logging

pytestmark = pytest.mark.usefixtures("one_thread")


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
    names = tuple(tiny_task.CLASSES.values())
    expected = Prototypes.from_base(tiny_task.model(), tiny_task.tokenizer(), names)
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


def test_a_decoders_head_finds_the_padding(folder: Path) -> None:
    shutil.rmtree(folder / "tuned")
    config = GPT2Config(vocab_size=15, n_positions=64, n_embd=16, n_layer=1, n_head=2, num_labels=3)
    assert config.pad_token_id is None
    torch.manual_seed(0)
    for name in ("base", "tuned"):
        GPT2ForSequenceClassification(config).save_pretrained(folder / name)
    (folder / "task.toml").write_text(tiny_task.HEAD)
    rows = [{"text": row["text"], "label": "2"} for row in tiny_task.texts(12)]
    for name in ("train.jsonl", "test.jsonl"):
        tiny_task.write_rows(folder / name, rows)
    task = tasks.open_task(tasks.read_task(folder / "task.toml"))
    alone = torch.cat([task.readout.logits(task.base, [text]) for text in task.train.texts])
    torch.testing.assert_close(task.readout.logits(task.base, task.train), alone)


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


@pytest.mark.parametrize(
    ("names", "complaint"),
    [
        (("A", "A", "B"), r"base: its head calls both class 0 and class 1 'A'; .*id2label of conf"),
        (("1", "0", "B"), r"base: its head calls class 0 '1', which is the number of another"),
        (("A", "B", "1"), r"base: its head calls class 2 '1', which is the number of another"),
    ],
)
def test_a_heads_names_say_which_class_is_meant(
    tmp_path: Path, names: tuple[str, ...], complaint: str
) -> None:
    path = tiny_task.write(tmp_path, "head")
    rename(tmp_path, names)
    with pytest.raises(FormatError, match=complaint):
        tasks.open_task(tasks.read_task(path))


def test_a_heads_names_may_be_their_numbers(tmp_path: Path) -> None:
    path = tiny_task.write(tmp_path, "head")
    rename(tmp_path, ("0", "7", "2"))
    for name in ("train.jsonl", "test.jsonl"):
        rows = '{"text": "a", "label": 1}\n{"text": "a", "label": "7"}\n{"text": "a", "label": 0}'
        (tmp_path / name).write_text(rows)
    task = tasks.open_task(tasks.read_task(path))
    assert task.classes == ("0", "7", "2")
    assert task.train.labels.tolist() == [1, 1, 0]


def rename(folder: Path, names: tuple[str, ...]) -> None:
    """Give the classes of a base's head other names."""
    path = folder / "base" / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"id2label": dict(enumerate(names)), "label2id": {}}))


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
        (
            "t.jsonl",
            GOOD + GOOD[:-2] + b', "text": "b"}',
            "line 2: the field 'text' is there twice",
        ),
        ("t.jsonl", GOOD[:-2] + b', "label": "net"}', r"t\.jsonl, line 1: the field 'label' is th"),
        (
            "t.jsonl",
            GOOD + rb'{"text": "ab\ud800", "label": "net"}',
            r"line 2: 'text' has '\\ud800', half of a character, as its character 2; mend",
        ),
        ("t.jsonl", codecs.BOM_UTF8 + GOOD + b'{"\xe4": 1}', r"line 2: not UTF-8 \(byte 0xe4\)"),
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
            r"readout\.temperature is nan; wanted a n",
        ),
        ("[readout]\n", "[readout]\ntemperature = inf\n", r"readout\.temperature is inf"),
        ("[readout]\n", "[readout]\ntemperature = 0\n", r"is 0; wanted a number from 0\.0001 to 1"),
        ("[readout]\n", "[readout]\ntemperature = 1e-300\n", r"line 11: readout\.temp.* is 1e-300"),
        ("[readout]\n", "[readout]\ntemperature = 1.1e4\n", r"readout\.temperature is 11000\.0"),
        ("[readout]\n", "[readout]\ntemperature = true\n", r"readout\.temperature is True"),
        pytest.param(
            "[readout]\n",
            f"[readout]\ntemperature = 1{'0' * 400}\n",
            r"line 11: readout\.temperature is 10{9,30}\.\.\.0+; wanted a number from 0\.0001",
            id="beyond-a-float",
        ),
        pytest.param("batch = 8", f"batch = 1{'0' * 5000}", "task.toml: not TOML", id="digits"),
        pytest.param(
            "batch = 8", f"text = 0x{'f' * 5000}", r"text is (a very long int|<int.*); w", id="hex"
        ),
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


@pytest.mark.parametrize("temperature", ["1e-4", "10000"])
def test_the_ends_of_the_temperatures_still_count(folder: Path, temperature: str) -> None:
    task = opened(folder, ("[readout]\n", f"[readout]\ntemperature = {temperature}\n"))
    batch = task.readout.batch(task.train, range(6))
    loss = task.readout.loss(task.base, batch)
    loss.backward()
    slopes = [p.grad for p in task.base.parameters() if p.grad is not None]
    assert loss.isfinite()
    assert all(slope.isfinite().all() for slope in slopes)
    assert any(slope.any() for slope in slopes)


def test_a_task_file_may_begin_with_a_byte_order_mark(folder: Path) -> None:
    before = tasks.read_task(folder / "task.toml")
    (folder / "task.toml").write_bytes(codecs.BOM_UTF8 + tiny_task.TASK.encode())
    assert tasks.read_task(folder / "task.toml") == before
    (folder / "task.toml").write_bytes(codecs.BOM_UTF8 + b"[other]\n" + tiny_task.TASK.encode())
    with pytest.raises(FormatError, match="line 1: other is unknown"):
        tasks.read_task(folder / "task.toml")


@pytest.mark.parametrize("mark", [b"", codecs.BOM_UTF8])
def test_a_task_file_that_is_not_utf8(folder: Path, mark: bytes) -> None:
    (folder / "task.toml").write_bytes(mark + tiny_task.TASK.encode() + b"# \xe4")
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
