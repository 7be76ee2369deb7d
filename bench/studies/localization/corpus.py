"""Make the study's text: six questions about Debian packages, asked on their English descriptions.

    python -m bench.studies.localization.corpus --out bench/studies/localization/data

reads the package lists that `apt-get update` left on this machine, draws each question's texts, and
writes one `<task>.jsonl.gz` each with a `PROVENANCE.md` beside them. The same lists give the same
texts. It differs from the demo's corpus in what a study needs: thousands of test texts, one
division of the source packages for all tasks, and a second test on another distribution.
"""

from __future__ import annotations

import textwrap
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from hotgraft.demo import corpus as demo
from hotgraft.demo.archive import Package, read_apt

SPLITS = ("train", "test", "ood")
CHARACTERS = 140  # of a text: with the word pieces of package names, 35 to 40 tokens
LEAST_CHARACTERS = 60  # of an out-of-domain text: shorter ones say too little
PER_SOURCE = 3  # texts that one source package gives to a split of a task


@dataclass(frozen=True)
class Question:
    """A classification task on package descriptions.

    `classes` maps each label to the readable name whose embedding will stand for it. `label` gives
    a package's label, None where the question has no clear answer. No class gets more than `cap`
    texts of a split, and no split more than `limits` says, in the order of `SPLITS`; below that
    the classes are as frequent as in the archive.
    """

    asks: str
    classes: dict[str, str]
    label: Callable[[Package], str | None]
    cap: int
    limits: tuple[int, int, int] = (5000, 4500, 2000)


# ---- the questions -------------------------------------------------------------------------------

LIBRARIES = {"shared-lib", "devel-lib"}
NETWORK_SECTIONS = {"comm", "httpd", "mail", "net", "web"}
OTHER_SECTIONS = {
    *("editors", "electronics", "fonts", "games", "gnu-r", "graphics", "hamradio", "math"),
    *("science", "sound", "tex", "text", "video"),
}


def _section(package: Package) -> str | None:
    return package.section


def _implemented(package: Package) -> str | None:
    told = package.tagged("implemented-in")
    return min(told) if len(told) == 1 else None


def _library(package: Package) -> str | None:
    """Whether it is there to be called by programs, or to be run."""
    if package.section in ("libs", "libdevel") or package.roles & LIBRARIES:
        return None if package.roles - LIBRARIES else "library"
    return "program" if package.roles == {"program"} else None


def _network(package: Package) -> str | None:
    """Whether it has to do with networks, where its section or its tags tell."""
    if package.section in NETWORK_SECTIONS:
        return "network"
    if package.tagged("network") or package.tagged("protocol"):
        return "network"
    return "local" if package.section in OTHER_SECTIONS else None


QUESTIONS = {
    "section": Question(
        asks=demo.QUESTIONS["section"].asks,
        classes=demo.QUESTIONS["section"].classes,
        label=_section,
        cap=600,
    ),
    "kind": Question(
        asks=demo.QUESTIONS["kind"].asks,
        classes=demo.QUESTIONS["kind"].classes,
        label=demo.QUESTIONS["kind"].label,
        cap=1200,
    ),
    # Only languages that many of their packages do not name: with Go and Rust, which nearly all do,
    # the base answers this without being taught.
    "language": Question(
        asks="Which programming language is this package for?",
        classes={
            "haskell": "the Haskell programming language",
            "java": "the Java programming language",
            "javascript": "JavaScript and Node.js",
            "perl": "the Perl programming language",
            "php": "the PHP programming language",
            "python": "the Python programming language",
            "ruby": "the Ruby programming language",
        },
        label=_section,
        cap=900,
    ),
    "implemented": Question(
        asks="Which programming language is this package written in?",
        classes={
            "c": "written in C",
            "c++": "written in C++",
            "java": "written in Java",
            "lisp": "written in Lisp",
            "ocaml": "written in OCaml",
            "perl": "written in Perl",
            "python": "written in Python",
            "shell": "written in shell script",
        },
        label=_implemented,
        cap=1600,
    ),
    "library": Question(
        asks="Is this package a library or a program?",
        classes={"library": "a library", "program": "a program"},
        label=_library,
        cap=2500,
    ),
    "network": Question(
        asks="Does this package have to do with networks?",
        classes={"network": "network and internet", "local": "not about networks"},
        label=_network,
        cap=3000,
    ),
}


# ---- the texts -----------------------------------------------------------------------------------


def texts(package: Package) -> tuple[str, str]:
    """A package's text, and the one that it is asked on out of domain.

    The first begins with the synopsis and goes on with the long description. The second is what
    follows where the first one ends: no synopsis, no beginning, another way of speaking. It is
    empty where fewer than `LEAST_CHARACTERS` follow.

    Example: `here, beyond = texts(package)`.
    """
    whole = " ".join(f"{package.synopsis}. {package.long}".split())
    here = textwrap.shorten(whole, CHARACTERS, placeholder="")
    beyond = textwrap.shorten(whole.removeprefix(here), CHARACTERS, placeholder="")
    return here, beyond if len(beyond) >= LEAST_CHARACTERS else ""


def split_of(source: str) -> str:
    """Where all packages of a source belong, in every task: `train` or `test`.

    Example: `split_of("hello")`.
    """
    return ("train", "test")[int(demo.hashed(f"split {source}"), 16) % 2]


def distinct(packages: Iterable[Package]) -> list[Package]:
    """Of packages whose texts differ only in digits and signs, one: the first with tags, by name.

    The order is that of the names' hashes.

    Example: `distinct(read_packages(packages, translations))`.
    """
    first: dict[str, Package] = {}
    for package in sorted(packages, key=lambda package: (not package.tags, package.name)):
        first.setdefault(demo.letters(texts(package)[0]), package)
    return sorted(first.values(), key=lambda package: demo.hashed(package.name))


def sample(packages: Iterable[Package], question: Question) -> list[demo.Row]:
    """Draw a question's rows, each with `split`, `label`, `package`, `source` and `text`.

    The rows of a split are in the order of a hash, so that every prefix is a sample of it.

    Args:
        packages: as `distinct` gives them; their order decides which are drawn.

    Raises:
        ValueError: a class has no text in a split.

    Example: `sample(distinct(packages), QUESTIONS["kind"])`.
    """
    limits = dict(zip(SPLITS, question.limits, strict=True))
    drawn: dict[str, list[demo.Row]] = {split: [] for split in SPLITS}
    of_class: Counter[tuple[str, str]] = Counter()
    of_source: Counter[tuple[str, str]] = Counter()
    beyonds: set[str] = set()

    def draw(split: str, label: str, package: Package, text: str) -> None:
        full = len(drawn[split]) == limits[split] or of_class[split, label] == question.cap
        if not text or full or of_source[split, package.source] == PER_SOURCE:
            return
        of_class[split, label] += 1
        of_source[split, package.source] += 1
        row = {"split": split, "label": label, "package": package.name, "source": package.source}
        drawn[split].append(row | {"text": text})

    for package in packages:
        label = question.label(package)
        if label is None or label not in question.classes:
            continue
        here, beyond = texts(package)
        split = split_of(package.source)
        draw(split, label, package, here)
        if split == "test" and demo.letters(beyond) not in beyonds:
            beyonds.add(demo.letters(beyond))
            draw("ood", label, package, beyond)
    for split in SPLITS:
        for label in question.classes:
            if not of_class[split, label]:
                raise ValueError(
                    f"class {label!r}: found no {split} text, wanted at least one; read a larger "
                    f"archive, or ask about {sorted({row['label'] for row in drawn[split]})} only"
                )
    # By another hash: where a class was full before the others, it would crowd the first rows.
    return [
        row
        for split in SPLITS
        for row in sorted(drawn[split], key=lambda row: demo.hashed(f"order {row['package']}"))
    ]


# ---- the files -----------------------------------------------------------------------------------


def counts(rows: Iterable[demo.Row], question: Question) -> dict[str, dict[str, int]]:
    """How many rows each split has of each class.

    Example: `counts(rows, QUESTIONS["kind"])["test"]["program"]`.
    """
    found = Counter((row["split"], row["label"]) for row in rows)
    return {split: {label: found[split, label] for label in question.classes} for split in SPLITS}


PROVENANCE = """\
# Where these texts come from

Made by `python -m bench.studies.localization.corpus` from the package lists of
{release}, component `main`.
The answers are the archive's own metadata:

- `section`: the section, where it is one of the fifteen below;
- `kind`: what the sections `doc`, `libdevel` and `libs` say, elsewhere the one debtag under
  `role::`;
- `language`: the section again, where it is a language's, and a language that many of its packages
  do not name;
- `implemented`: the one debtag under `implemented-in::`, so this task is related to `language`;
- `library`: a library by its section (`libs`, `libdevel`) or its `role::`, or a program by its one
  `role::`, so this task is related to `kind`;
- `network`: by a section ({network}) or a debtag under `network::`
  or `protocol::`; else not, by a section of another matter
  ({other}).

What these leave unclear is left out.

## The texts

`train` and `test`: the first {characters} characters, cut between words, of the synopsis and the
long description, in English. `ood`, the test out of domain, asks the same question on what follows:
the next {characters} characters, without synopsis and beginning, where there are at least {least}.
It is drawn from all packages of the test's sources, whether or not they are in `test`.

- A hash divides the source packages in two halves, one for training, one for both tests, and does
  so for all tasks at once: no source that any task trains on is in the test of any task.
- Texts that differ only in digits and signs are one text: no text is twice in a task, and none is
  in the training of one task and the test of another.
- A source gives at most {per_source} texts to a split of a task.
- Classes are as frequent as in the archive, up to a cap for each task. The rows of a split are in
  the order of a hash, so that every prefix is a sample of it.

{tables}
"""


def provenance(suite: str, release: str, drawn: dict[str, dict[str, dict[str, int]]]) -> str:
    """The text of `PROVENANCE.md`; `drawn` is each task's `counts`.

    Example: `provenance("bookworm", "Debian 12.0 (bookworm, amd64) of ...", drawn)`.
    """
    tables = ""
    for name, question in QUESTIONS.items():
        of = drawn[name]
        sums = " | ".join(str(sum(of[split].values())) for split in SPLITS)
        tables += (
            f"## `{name}.jsonl.gz`: {question.asks}\n\n"
            f"| label | readable name, which the read-out embeds | {' | '.join(SPLITS)} |\n"
            "|---|---|---:|---:|---:|\n"
        )
        for label, called in question.classes.items():
            cells = " | ".join(str(of[split][label]) for split in SPLITS)
            tables += f"| {label} | {called} | {cells} |\n"
        tables += f"| all | | {sums} |\n\n"
    about = PROVENANCE.format(
        release=release,
        characters=CHARACTERS,
        least=LEAST_CHARACTERS,
        per_source=PER_SOURCE,
        network=_listed(NETWORK_SECTIONS),
        other=textwrap.fill(_listed(OTHER_SECTIONS), 95, subsequent_indent="  "),
        tables=tables.rstrip(),
    )
    return about + demo.ENDING.format(module="bench.studies.localization.corpus", suite=suite)


def _listed(sections: set[str]) -> str:
    return ", ".join(f"`{section}`" for section in sorted(sections))


def main() -> None:
    """The command `python -m bench.studies.localization.corpus`."""
    arguments = demo.read_arguments(__doc__)
    archive, release = read_apt(arguments.suite, arguments.apt_config)
    packages = distinct(archive)
    arguments.out.mkdir(parents=True, exist_ok=True)
    drawn = {}
    for name, question in QUESTIONS.items():
        rows = sample(packages, question)
        drawn[name] = counts(rows, question)
        header = demo.header(name, question.asks, question.classes) | {"counts": drawn[name]}
        demo.write(arguments.out / f"{name}.jsonl.gz", header, rows)
        print(f"{name}: {len(rows)} texts from {len(packages)} packages")
    page = provenance(arguments.suite, release, drawn)
    (arguments.out / "PROVENANCE.md").write_text(page)


if __name__ == "__main__":
    main()
