"""Make the demo's text: two questions about Debian packages, asked on their English descriptions.

    python -m hotgraft.demo.corpus --out python/hotgraft/demo/data

reads the package lists that `apt-get update` left on this machine, draws a balanced sample for each
question, and writes one `<task>.jsonl.gz` each with a `PROVENANCE.md` beside them. The same lists
give the same texts. It needs a Debian machine and the library python-debian; nothing else in
hotgraft does.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from hotgraft.demo.archive import LONG_CHARACTERS, Package, read_apt

Row = dict[str, str]


@dataclass(frozen=True)
class Question:
    """A classification task on package descriptions.

    `classes` maps each label to the readable name whose embedding will stand for it. `label` gives
    a package's label, None where the question has no clear answer. Every class gets exactly `train`
    training texts and `test` test texts.
    """

    asks: str
    classes: dict[str, str]
    label: Callable[[Package], str | None]
    train: int
    test: int


def _section(package: Package) -> str | None:
    return package.section


def _kind(package: Package) -> str | None:
    """What a package holds, where its section and its role tags do not contradict each other."""
    told = {"doc": "documentation", "libdevel": "devel-lib", "libs": "shared-lib"}
    if kind := told.get(package.section):
        return kind if package.roles <= {kind} else None
    # The tags call language modules now libraries, now development files: those are left out.
    unclear = package.section in ("perl", "python", "debug", "oldlibs", "metapackages")
    return None if unclear or len(package.roles) != 1 else min(package.roles)


QUESTIONS = {
    "section": Question(
        asks="Which section of the archive is this package in?",
        classes={
            "admin": "system administration",
            "editors": "text editors",
            "fonts": "fonts",
            "games": "games",
            "gnu-r": "GNU R statistics",
            "graphics": "graphics and images",
            "java": "Java",
            "mail": "electronic mail",
            "math": "mathematics",
            "net": "network",
            "science": "science",
            "sound": "sound and music",
            "text": "text processing",
            "web": "web",
            "x11": "X window system",
        },
        label=_section,
        train=160,
        test=67,
    ),
    "kind": Question(
        asks="What does this package hold?",
        classes={
            "program": "a program to run",
            "shared-lib": "a shared library",
            "devel-lib": "development files",
            "documentation": "documentation",
            "app-data": "data files",
        },
        label=_kind,
        train=480,
        test=200,
    ),
}


def sample(packages: Iterable[Package], question: Question) -> list[Row]:
    """Draw a question's rows, each with `split`, `label`, `package`, `source` and `text`.

    Packages of one source often share their words, so a source is all training or all test and
    gives at most one text to a class; of texts that differ only in digits and signs (versions of
    one library) one is taken. Sources come in the order of their hash, and the rarest class
    chooses first. In each split the classes alternate, so that every prefix is balanced.

    Raises:
        ValueError: a class has too few sources.

    Example: `sample(read_packages(packages, translations), QUESTIONS["section"])`.
    """
    pools: dict[str, dict[str, Package]] = {label: {} for label in question.classes}
    for package in sorted(packages, key=lambda package: package.name):
        if (label := question.label(package)) in pools:
            pools[label].setdefault(package.source, package)

    quota = {"test": question.test, "train": question.train}
    drawn: dict[tuple[str, str], list[Package]] = defaultdict(list)
    split_of: dict[str, str] = {}
    taken: set[str] = set()
    for label in sorted(pools, key=lambda label: (len(pools[label]), label)):
        for source in sorted(pools[label], key=hashed):
            package = pools[label][source]
            same = letters(package.text)
            room = [split for split in quota if len(drawn[split, label]) < quota[split]]
            split = split_of.get(source, room[0] if room else "")
            if split in room and same not in taken:
                split_of[source] = split
                taken.add(same)
                drawn[split, label].append(package)
        for split, wanted in quota.items():
            if (found := len(drawn[split, label])) < wanted:
                raise ValueError(
                    f"class {label!r}: found {found} {split} texts in {len(pools[label])} sources, "
                    f"wanted {wanted}; read a larger archive or ask for fewer"
                )
    return [
        {"split": split, "label": label, "package": p.name, "source": p.source, "text": p.text}
        for split in ("train", "test")
        for turn in zip(*(drawn[split, label] for label in question.classes), strict=True)
        for label, p in zip(question.classes, turn, strict=True)
    ]


def letters(text: str) -> str:
    """What makes two texts the same: their letters, small.

    Example: `letters("Lua 5.3") == letters("lua 5.4")`.
    """
    return "".join(filter(str.isalpha, text.lower()))


def hashed(text: str) -> str:
    """What things are put in order by, so that it is like no other.

    Example: `sorted(sources, key=hashed)`.
    """
    return hashlib.sha256(text.encode()).hexdigest()


def write(path: Path, header: Mapping[str, object], rows: list[Row]) -> None:
    """Write one task, gzipped: a header line, then a line of JSON for each row.

    Example: `write(Path("kind.jsonl.gz"), header("kind", asks, classes), rows)`.
    """
    lines = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in (header, *rows))
    path.write_bytes(gzip.compress(lines.encode(), mtime=0))  # no time: the same texts, same bytes


def header(name: str, asks: str, classes: dict[str, str]) -> dict[str, object]:
    """What the first line of a task's file says.

    Example: `header("chess", "Is it chess?", {"yes": "chess", "no": "no game"})["task"]`.
    """
    return {"task": name, "asks": asks, "classes": classes}


PROVENANCE = """\
# Where these texts come from

Made by `python -m hotgraft.demo.corpus` from the package lists of
{release}, component `main`:
the synopsis and the first {characters} characters of the long description, in English. The
answers are the archive's own metadata: the section; and for `kind` what the sections `doc`,
`libdevel` and `libs` say, elsewhere the one debtag under `role::`. Packages that these leave
unclear are left out.

{tables}
No source package is in both training and test of a task, and no text is in a task twice; texts that
differ only in digits and signs count as the same.
"""


ENDING = """
## Licence

The descriptions are metadata of the Debian archive, written by the packages' maintainers. Each is
under the terms of its package, stated in that package's `debian/copyright`; everything in `main` is
free by the Debian Free Software Guidelines. Every row names its package and its source package, so
that its authors can be found. The selection and the format are hotgraft's, under Apache-2.0.

## To make them again

On a Debian machine, after `pip install ".[corpus]"`, as root:

```
printf '#clear Acquire::Languages;\\nAcquire::Languages {{ "en"; }};\\n' > apt.conf
apt-get -c apt.conf update
python -m {module} --suite {suite} --apt-config apt.conf --out FOLDER
```

The same lists give the same texts; a later point release of the archive gives slightly others.
"""
"""Of the page beside a corpus: its licence, and how to make it again with a module's command."""


def provenance(suite: str, release: str) -> str:
    """The text of `PROVENANCE.md`.

    Example: `provenance("bookworm", "Debian 12.0 (bookworm, amd64) of ...")`.
    """
    tables = ""
    for name, question in QUESTIONS.items():
        rows = "".join(f"| {label} | {called} |\n" for label, called in question.classes.items())
        tables += (
            f"## `{name}.jsonl.gz`: {question.asks}\n\n{len(question.classes)} classes, for each "
            f"{question.train} training and {question.test} test texts.\n\n"
            f"| label | readable name, which the read-out embeds |\n|---|---|\n{rows}\n"
        )
    tables = tables.rstrip() + "\n"
    about = PROVENANCE.format(release=release, characters=LONG_CHARACTERS, tables=tables)
    return about + ENDING.format(module="hotgraft.demo.corpus", suite=suite)


def read_arguments(doc: str | None) -> argparse.Namespace:
    """What a corpus's command is given: `out`, `suite` and `apt_config`; `doc` is its module's.

    Example: `read_arguments(__doc__).out`.
    """
    parser = argparse.ArgumentParser(description=(doc or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder to write to")
    parser.add_argument("--suite", default="bookworm", help="codename (default: bookworm)")
    parser.add_argument("--apt-config", type=Path, help="a configuration for apt, read last")
    return parser.parse_args()


def main() -> None:
    """The command `python -m hotgraft.demo.corpus`."""
    arguments = read_arguments(__doc__)
    packages, release = read_apt(arguments.suite, arguments.apt_config)
    arguments.out.mkdir(parents=True, exist_ok=True)
    for name, question in QUESTIONS.items():
        rows = sample(packages, question)
        about = header(name, question.asks, question.classes)
        write(arguments.out / f"{name}.jsonl.gz", about, rows)
        print(f"{name}: {len(rows)} texts from {len(packages)} packages")
    (arguments.out / "PROVENANCE.md").write_text(provenance(arguments.suite, release))


if __name__ == "__main__":
    main()
