"""Read a Debian archive's package lists, as `apt-get update` left them, with python-debian."""

from __future__ import annotations

import subprocess
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import IO

from debian.deb822 import Deb822

LONG_CHARACTERS = 200  # of the long description: with the synopsis, about 64 tokens


@dataclass(frozen=True)
class Package:
    """One binary package: what a question can ask about, and the text it is asked on.

    `tags` are all its debtags, `facet::tag`. `long` is the long description on one line.
    """

    name: str
    source: str
    section: str
    tags: frozenset[str]
    synopsis: str
    long: str

    def tagged(self, facet: str) -> frozenset[str]:
        """The debtags under one facet, without the facet.

        Example: `package.tagged("role")`, which may be `frozenset({"program"})`.
        """
        prefix = f"{facet}::"
        return frozenset(tag.removeprefix(prefix) for tag in self.tags if tag.startswith(prefix))

    @property
    def roles(self) -> frozenset[str]:
        """The debtags under `role::`."""
        return self.tagged("role")

    @property
    def text(self) -> str:
        """The synopsis and the beginning of the long description, cut between words."""
        long = textwrap.shorten(self.long, LONG_CHARACTERS, placeholder="")
        return f"{self.synopsis}. {long}"


def read_packages(packages: IO[bytes], translations: IO[bytes]) -> Iterator[Package]:
    """Join a `Packages` list with its `Translation-en` list by `Description-md5`.

    Args:
        packages, translations: streams in the archive's own format, decompressed.

    Yields:
        The packages that have a section and a long description, in the order of the list.

    Example: `list(read_packages(open("Packages", "rb"), open("Translation-en", "rb")))`.
    """
    english = {
        entry["Description-md5"]: entry["Description-en"]
        for entry in Deb822.iter_paragraphs(translations, use_apt_pkg=False)
    }
    for entry in Deb822.iter_paragraphs(packages, use_apt_pkg=False):
        synopsis, _, long = english.get(entry.get("Description-md5", ""), "").partition("\n")
        if not long or "Section" not in entry:
            continue
        # A line " ." stands for an empty one.
        words = [w for line in long.splitlines() if line.strip() != "." for w in line.split()]
        tags = (tag.strip() for tag in entry.get("Tag", "").split(","))
        yield Package(
            name=entry["Package"],
            source=entry.get("Source", entry["Package"]).split()[0],  # "name" or "name (version)"
            section=entry["Section"],
            tags=frozenset(filter(None, tags)),
            synopsis=synopsis.strip(),
            long=" ".join(words),
        )


def read_apt(suite: str, config: Path | None = None) -> tuple[list[Package], str]:
    """Read a suite's component `main` from apt's lists.

    Args:
        suite: a codename, such as `bookworm`.
        config: a configuration for apt, read last; `data/PROVENANCE.md` has one.

    Returns:
        The packages, and a line that says which release they are of and when it was made.

    Raises:
        FileNotFoundError: the lists, or their English descriptions, are not there.

    Example: `packages, release = read_apt("bookworm")`.
    """
    options = ["-c", str(config)] if config else []
    targets = {
        target["Identifier"]: target
        for target in Deb822.iter_paragraphs(
            _output("apt-get", *options, "indextargets"), use_apt_pkg=False
        )
        if target["Codename"] == suite and target.get("Component") == "main"
        if target.get("Language", "en") == "en"
    }
    for wanted in ("Packages", "Translations"):
        if wanted not in targets:
            raise FileNotFoundError(
                f"apt has no list {wanted!r} of {suite} main, it has {sorted(targets) or 'none'}; "
                "run `apt-get update` with Acquire::Languages set to en, see data/PROVENANCE.md"
            )
    packages, translations = (
        BytesIO(_output("/usr/lib/apt/apt-helper", "cat-file", targets[name]["Filename"]))
        for name in ("Packages", "Translations")
    )
    target = targets["Packages"]
    lists = target["Filename"].rpartition(target["MetaKey"].replace("/", "_"))[0]
    made = Deb822(Path(lists + "InRelease").read_bytes())["Date"]
    release = f"{target['Origin']} {target['Version']} ({suite}, {target['Architecture']})"
    return list(read_packages(packages, translations)), f"{release} of {made}"


def _output(*command: str) -> bytes:
    return subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout
