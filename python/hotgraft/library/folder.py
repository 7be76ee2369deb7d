"""Keep a library like a folder of graft files."""

from __future__ import annotations

import logging
import os
import threading
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from hotgraft import files
from hotgraft.errors import HotgraftError, SkillInUseError, UnknownSkillError
from hotgraft.library.shelf import Signature, Volume

if TYPE_CHECKING:
    from hotgraft.library.library import Library

ENDING = ".graft.safetensors"
"""Of graft files; what stands before it is the skill's name."""
log = logging.getLogger("hotgraft.library")


class Changes(NamedTuple):
    """What a scan found, by name."""

    added: tuple[str, ...] = ()
    replaced: tuple[str, ...] = ()
    """Their files are others than before. What is in use goes on as it was until it is not."""
    removed: tuple[str, ...] = ()
    kept: tuple[str, ...] = ()
    """Their files are gone, but they are in use; the next scan removes them if they are not."""
    failed: dict[str, HotgraftError | OSError] = {}  # noqa: RUF012 - nobody writes it
    """Files that are not taken, and why. What had their name before stays."""


class Folder:
    """A folder that a library follows.

    Args:
        library: it gets the folder's skills, under their files' stems.
        path: the folder.
    """

    def __init__(self, library: Library, path: str | os.PathLike[str]) -> None:
        self._library = library
        self.path = Path(path).absolute()
        self._lock = threading.Lock()
        self._told: dict[Path, object] = {}  # files whose refusal was logged
        self._mine: set[str] = set()  # the skills that came from here

    def scan(self) -> Changes:
        """Add, replace and remove, once.

        Raises:
            OSError: the folder cannot be read.
        """
        with self._lock:
            return self._scan()

    def _scan(self) -> Changes:
        with os.scandir(self.path) as found:
            paths = {e.name.removesuffix(ENDING): Path(e.path) for e in found if is_skill(e)}
        changes: dict[str, list[str]] = {what: [] for what in Changes._fields[:-1]}
        failed: dict[str, HotgraftError | OSError] = {}
        for name, path in sorted(paths.items()):
            try:
                if what := self._take(name, path):
                    changes[what].append(name)
                self._told.pop(path, None)
            except (HotgraftError, OSError) as error:
                failed[name] = error
                self._tell(path, error)
        for name in sorted(self._mine - set(paths)):
            try:
                self._library.remove(name)
                changes["removed"].append(name)
            except SkillInUseError:
                changes["kept"].append(name)
                continue
            except UnknownSkillError:  # somebody else removed it
                pass
            self._mine.discard(name)
        return Changes(**{what: tuple(names) for what, names in changes.items()}, failed=failed)

    def _take(self, name: str, path: Path) -> str | None:
        """Which of the changes it is, if one."""
        known = self._library.volume(name)
        if known is None:
            self._library.add(path)
            self._mine.add(name)
            return "added"
        if known.path != path:
            raise SkillInUseError(
                f"{path}: there is a skill {name!r} already, from {known.path or 'a graft'}; "
                "rename the file"
            )
        if known.signature == signature_of(path):
            return None
        self._library.replace(known, described(path))
        return "replaced"

    def _tell(self, path: Path, error: Exception) -> None:
        """Log why a file is refused, once."""
        try:
            now: object = signature_of(path)
        except OSError:
            now = None
        if path not in self._told or self._told[path] != now:
            self._told[path] = now
            log.warning("%s is left out: %s", path, error)

    def follow(self, every: float, stop: threading.Event) -> None:
        """Scan until it is stopped; changes are logged."""
        while not stop.wait(every):
            try:
                found = self.scan()
            except Exception as error:
                if not stop.is_set():  # else it was closed meanwhile
                    self._tell(self.path, error)
                continue
            for what in ("added", "replaced", "removed"):
                for name in getattr(found, what):
                    log.info("%s %r", what, name)


def described(path: Path) -> Volume:
    """A skill, as its file's header has it.

    Raises:
        FormatError, OSError: it is no graft file, or cannot be read.
    """
    signature = signature_of(path)
    name = path.name.removesuffix(".safetensors").removesuffix(".graft")
    return Volume(name, path, files.stated_id(path), signature[0], signature)


def signature_of(path: str | os.PathLike[str]) -> Signature:
    """What changes when a file is replaced."""
    found = os.stat(path)
    return found.st_size, found.st_mtime_ns, found.st_ino


def is_skill(entry: os.DirEntry[str]) -> bool:
    """Whether it is called and kept like a graft's file."""
    if not entry.name.endswith(ENDING) or entry.name.startswith("."):
        return False
    try:
        return entry.is_file()
    except OSError:  # such as a link to itself; who reads it is told why
        return True
