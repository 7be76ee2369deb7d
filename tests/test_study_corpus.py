"""The localization study's data: what ships is what its page says, and how it is drawn."""

from __future__ import annotations

import gzip
import json
import shutil
import sys
from collections.abc import Callable
from itertools import permutations
from pathlib import Path

import pytest
import torch
from hotgraft.demo.archive import Package
from hotgraft.demo.corpus import Row, letters

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the bench is not installed
from bench.studies.localization import corpus, tasks
from bench.studies.localization.corpus import (
    QUESTIONS,
    SPLITS,
    Question,
    split_of,
)

# ---- what ships ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shipped() -> dict[str, tasks.Task]:
    return {name: tasks.load(name) for name in tasks.TASKS}


@pytest.fixture(scope="module")
def rows() -> dict[str, list[Row]]:
    """Each task's rows as they lie in its file."""
    files = {
        name: gzip.decompress((tasks.DATA / f"{name}.jsonl.gz").read_bytes()) for name in QUESTIONS
    }
    return {
        name: [json.loads(line) for line in file.decode().rstrip("\n").split("\n")[1:]]
        for name, file in files.items()
    }


def test_there_are_at_least_five_tasks_of_which_two_are_related() -> None:
    assert tuple(QUESTIONS) == tasks.TASKS
    assert len(tasks.TASKS) >= 5
    assert all(set(pair) <= set(tasks.TASKS) for pair in tasks.RELATED)


@pytest.mark.parametrize("name", tasks.TASKS)
def test_shipped_tasks_are_what_the_questions_say(
    name: str, shipped: dict[str, tasks.Task]
) -> None:
    task, asked = shipped[name], QUESTIONS[name]
    assert task.asks == asked.asks
    assert dict(zip(task.classes, task.names, strict=True)) == asked.classes
    least = {"train": 4000, "test": 4000, "ood": 1000}
    for which, limit in zip(SPLITS, asked.limits, strict=True):
        split = getattr(task, which)
        assert least[which] <= len(split.texts) <= limit
        assert len(split.texts) == len(split.sources) == len(split.labels)
        assert split.labels.dtype == torch.int64
        found = split.labels.bincount(minlength=len(task.classes))
        assert found.min() > 0
        assert found.max() <= asked.cap
        assert all(0 < len(text) <= corpus.CHARACTERS for text in split.texts)
        assert max(split.sources.count(s) for s in set(split.sources)) <= corpus.PER_SOURCE


def test_sources_are_divided_once_for_all_tasks(shipped: dict[str, tasks.Task]) -> None:
    for task in shipped.values():
        assert {split_of(source) for source in task.train.sources} == {"train"}
        assert {split_of(source) for source in task.test.sources + task.ood.sources} == {"test"}
    trained, tested = (
        {source for task in shipped.values() for source in getattr(task, which).sources}
        for which in ("train", "test")
    )
    assert trained
    assert tested
    assert not trained & tested


def test_no_text_is_twice_in_a_task_nor_trained_on_for_another(
    shipped: dict[str, tasks.Task],
) -> None:
    trained, tested = set(), set()
    for task in shipped.values():
        train, test, ood = (list(map(letters, getattr(task, split).texts)) for split in SPLITS)
        assert len(set(train + test)) == len(train + test)
        assert len(set(ood)) == len(ood)
        trained.update(train)
        tested.update(test, ood)
    assert not trained & tested


def test_out_of_domain_texts_are_others_of_the_same_packages(
    rows: dict[str, list[Row]],
) -> None:
    for of_task in rows.values():
        here = {row["package"]: row["text"] for row in of_task if row["split"] == "test"}
        both = [row for row in of_task if row["split"] == "ood" and row["package"] in here]
        assert len(both) > 500
        assert not any(here[row["package"]] in row["text"] for row in both)
        least = min(len(row["text"]) for row in of_task if row["split"] == "ood")
        assert least >= corpus.LEAST_CHARACTERS


@pytest.mark.parametrize("which", SPLITS)
@pytest.mark.parametrize("name", tasks.TASKS)
def test_every_prefix_is_a_sample_of_the_whole(
    name: str, which: str, shipped: dict[str, tasks.Task]
) -> None:
    split, classes = getattr(shipped[name], which), len(shipped[name].classes)
    for first in (500, 1000):
        shares = [
            part.labels.bincount(minlength=classes) / len(part.labels)
            for part in (split.head(first), split)
        ]
        # Four standard errors of a share: 54 shares are looked at for each task.
        error = (shares[1] * (1 - shares[1]) / first).sqrt()
        assert bool(((shares[0] - shares[1]).abs() <= 4 * error + 1 / first).all())


def test_the_data_is_small_and_its_provenance_is_current(
    rows: dict[str, list[Row]],
) -> None:
    sizes = [path.stat().st_size for path in tasks.DATA.iterdir()]
    assert max(sizes) < 2_000_000
    assert sum(sizes) < 5_000_000
    page = (tasks.DATA / "PROVENANCE.md").read_text()
    release = page.split("package lists of\n")[1].split(", component")[0]
    drawn = {name: corpus.counts(of_task, QUESTIONS[name]) for name, of_task in rows.items()}
    assert page == corpus.provenance("bookworm", release, drawn)


# ---- reading -------------------------------------------------------------------------------------


def test_an_unknown_task_is_refused() -> None:
    with pytest.raises(ValueError, match=r"no task 'sql' in the study; choose one of: section, ki"):
        tasks.load("sql")


def test_a_file_that_lost_rows_is_refused(tmp_path: Path) -> None:
    shutil.copy(tasks.DATA / "library.jsonl.gz", tmp_path)
    assert tasks.load("library", tmp_path).test.texts == tasks.load("library").test.texts
    file = tmp_path / "library.jsonl.gz"
    lines = gzip.decompress(file.read_bytes()).splitlines(keepends=True)
    file.write_bytes(gzip.compress(b"".join(lines[:-1])))
    with pytest.raises(ValueError, match=r"ood texts of library, program, its header says \[1252,"):
        tasks.load("library", tmp_path)


# ---- drawing a sample ----------------------------------------------------------------------------

WORDS = ["".join(letters) for letters in permutations("abcdef", 5)]  # 720


def package(name: str, *, section: str = "games", source: str = "", **more: str) -> Package:
    return Package(
        name=name,
        source=source or name,
        section=section,
        tags=frozenset(more.get("tags", "").split()),
        synopsis=more.get("synopsis", f"about {name}"),
        long=more.get("long", ""),
    )


def archive(sections: tuple[str, ...] = ("games", "doc")) -> list[Package]:
    """Of each source one package for a section, with a description that goes on."""
    return [
        package(f"{section}-{word}", section=section, source=word, long=f"{section} {word} " * 20)
        for word in WORDS
        for section in sections
    ]


def question(
    cap: int = 1000,
    limits: tuple[int, int, int] = (1000, 1000, 1000),
    label: Callable[[Package], str | None] = lambda package: package.section,
) -> Question:
    return Question("?", {"games": "games", "doc": "documentation"}, label, cap, limits)


def draw(packages: list[Package], asked: Question) -> dict[str, list[Row]]:
    rows = corpus.sample(corpus.distinct(packages), asked)
    return {split: [row for row in rows if row["split"] == split] for split in SPLITS}


def test_a_text_ends_where_its_continuation_begins() -> None:
    long = " ".join(f"word{i}" for i in range(100))
    here, beyond = corpus.texts(package("p", synopsis="plays chess", long=long))
    assert here.startswith("plays chess. word0 word1 ")
    assert max(len(here), len(beyond)) <= corpus.CHARACTERS
    assert f"plays chess. {long}".startswith(f"{here} {beyond} ")
    assert corpus.texts(package("p", synopsis="plays", long="chess")) == ("plays. chess", "")
    short = f"{'x' * 130} {'y' * (corpus.LEAST_CHARACTERS - 1)}"
    assert corpus.texts(package("p", synopsis="", long=short))[1] == ""
    assert corpus.texts(package("p", synopsis="", long=short + "y"))[1] != ""


def test_a_source_is_on_one_side_whatever_is_asked() -> None:
    packages = archive()
    reversed_question = question(label=lambda p: {"games": "doc", "doc": "games"}[p.section])
    drawn = [draw(packages, asked) for asked in (question(), reversed_question)]
    for one in drawn:
        for other in drawn:
            train = {row["source"] for row in one["train"]}
            for split in ("test", "ood"):
                assert not train & {row["source"] for row in other[split]}
    assert 300 < len({row["source"] for row in drawn[0]["train"]}) < 420  # about half of 720


def test_limits_and_caps_hold_and_the_rows_are_mixed() -> None:
    drawn = draw(archive(), question(cap=200, limits=(300, 1000, 50)))
    assert [len(drawn[split]) for split in SPLITS] == [300, 400, 50]
    labels = [row["label"] for row in drawn["test"]]
    assert labels.count("games") == labels.count("doc") == 200
    assert 60 < labels[:200].count("games") < 140


def test_a_class_that_is_full_early_does_not_crowd_the_first_rows() -> None:
    rare = [p for i, p in enumerate(archive()) if p.section == "games" or i % 10 == 1]
    labels = [row["label"] for row in draw(rare, question(cap=60))["train"]]
    assert labels.count("games") == 60
    halves = labels[: len(labels) // 2], labels[len(labels) // 2 :]
    assert all(half.count("games") < 45 for half in halves)


def test_a_source_gives_few_texts() -> None:
    extra = [
        package(f"x{word}", source="big", synopsis=word, long=f"{word} " * 60) for word in WORDS
    ]
    drawn = draw(archive() + extra, question())
    for split in SPLITS:
        found = sum(row["source"] == "big" for row in drawn[split])
        assert found == (0 if (split == "train") != (split_of("big") == "train") else 3)


def test_texts_equal_up_to_digits_are_one_and_tagged_packages_come_first() -> None:
    versions = [package(f"lua5.{i}", synopsis=f"Lua 5.{i}") for i in range(9)]
    tagged = package("lua6", synopsis="Lua 6", tags="role::program")
    assert corpus.distinct([*versions, tagged]) == [tagged]
    assert [p.name for p in corpus.distinct(versions)] == ["lua5.0"]


def test_a_continuation_that_many_share_is_drawn_once() -> None:
    packages = [
        package(f"{section}-{word}", section=section, synopsis=word, long=f"{section} as all " * 20)
        for word in WORDS
        for section in ("games", "doc")
    ]
    drawn = draw(packages, question())
    assert len(drawn["test"]) > 500
    assert [row["label"] for row in drawn["ood"]].count("games") == 1
    assert [row["label"] for row in drawn["ood"]].count("doc") == 1


def test_each_split_gets_its_own_part_of_a_description() -> None:
    parts = {p.name: corpus.texts(p) for p in archive()}
    drawn = draw(archive(), question())
    for part, split in enumerate(("test", "ood")):
        assert drawn[split]
        assert all(row["text"] == parts[row["package"]][part] for row in drawn[split])


def test_a_sample_does_not_depend_on_the_order_of_the_archive() -> None:
    packages = archive()
    assert draw(packages, question()) == draw(packages[::-1], question())


def test_a_class_without_texts_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"class 'doc': found no train text, .* ask about \['games'\] only"
    ):
        draw(archive(("games",)), question())


@pytest.mark.parametrize(
    ("task", "section", "tags", "label"),
    [
        ("section", "games", "", "games"),
        ("kind", "doc", "", "documentation"),
        ("implemented", "utils", "implemented-in::c", "c"),
        ("implemented", "utils", "implemented-in::c implemented-in::perl", None),
        ("implemented", "utils", "", None),
        ("library", "libs", "", "library"),
        ("library", "perl", "role::devel-lib role::shared-lib", "library"),
        ("library", "libs", "role::program", None),
        ("library", "utils", "role::program", "program"),
        ("library", "utils", "role::program role::devel-lib", None),
        ("library", "utils", "", None),
        ("network", "mail", "", "network"),
        ("network", "games", "protocol::http", "network"),
        ("network", "utils", "network::client", "network"),
        ("network", "games", "role::program", "local"),
        ("network", "utils", "", None),
    ],
)
def test_answers_are_the_archives_own(
    task: str, section: str, tags: str, label: str | None
) -> None:
    assert QUESTIONS[task].label(package("p", section=section, tags=tags)) == label
