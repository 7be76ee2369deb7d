"""The task file, TOML: which model, texts and read-out. `docs/localization.md` shows one."""

from __future__ import annotations

import os
import re
import reprlib
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hotgraft.errors import FormatError
from hotgraft.tasks.readout import COLDEST, HOTTEST

KINDS = ("prototypes", "head")
_NONE: Mapping[str, Any] = {}
_SHORTEST = 3
"""Tokens: most tokenizers put one before a text and one after it."""


@dataclass(frozen=True)
class TaskFile:
    """What a task file says. Paths are as they are opened, not as they are written."""

    path: Path
    base: Path
    finetuned: Path
    train: Path
    test: Path | None
    text: str
    label: str
    max_tokens: int
    batch: int
    kind: str
    """Of the read-out: `prototypes` or `head`."""
    temperature: float
    classes: Mapping[str, str]
    """Of `prototypes`: what the read-out calls each label, in order."""


def read_task(path: str | os.PathLike[str]) -> TaskFile:
    """Read a task file. The model and the texts that it names are looked for, but not read.

    Raises:
        FormatError: naming the file, the key (and its line), what was found and what was wanted.
        OSError: the file cannot be read.

    Example: `read_task("debian.toml").classes["games"]`.
    """
    path = Path(path)
    data = path.read_bytes()
    try:
        text = data.decode("utf-8-sig")
        content = tomllib.loads(text)
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        byte = error.object[error.start]
        raise FormatError(
            f"{path}, line {line}: not UTF-8 (byte 0x{byte:02x}), which TOML is"
        ) from error
    except (ValueError, RecursionError) as error:  # also of thousands of digits
        raise FormatError(f"{path}: not TOML: {error}") from error

    file = _Table(path, text, "", content)
    model, texts, readout = (file.table(name) for name in ("model", "data", "readout"))
    file.no_more()
    kind = readout.string("kind")
    if kind not in KINDS:
        raise readout.wrong("kind", repr(kind), f"one of {', '.join(map(repr, KINDS))}")
    prototypes = kind == "prototypes"
    found = TaskFile(
        path=path,
        base=model.existing("base", "a folder", Path.is_dir),
        finetuned=model.existing("finetuned", "a folder or .safetensors file", Path.exists),
        train=texts.existing("train", "a file", Path.is_file),
        test=texts.existing("test", "a file", Path.is_file) if "test" in texts.content else None,
        text=texts.string("text", "text"),
        label=texts.string("label", "label"),
        max_tokens=texts.whole("max_tokens", 64, _SHORTEST),
        batch=texts.whole("batch", 32, 1),
        kind=kind,
        temperature=readout.number("temperature", 0.1, COLDEST, HOTTEST) if prototypes else 1.0,
        classes=_classes(readout) if prototypes else _NONE,
    )
    for table in (model, texts, readout):
        table.no_more()
    return found


def _classes(readout: _Table) -> dict[str, str]:
    table = readout.table("classes")
    classes = {label: table.string(label) for label in table.content}
    if len(classes) < 2:
        raise readout.wrong("classes", f"{len(classes)} of them", "a name for each of two or more")
    seen: dict[str, str] = {}
    for label, name in classes.items():
        if name in seen:
            raise table.wrong(
                label, f"{name!r}, as for {seen[name]!r}", "names that differ: they are compared"
            )
        seen[name] = label
    return classes


class _Table:
    """One table of a TOML file: its values are taken one by one, and none may be left."""

    def __init__(self, path: Path, text: str, name: str, content: Mapping[str, Any]) -> None:
        self.content = content
        self._path, self._text, self._name = path, text, name
        self._taken: set[str] = set()

    def wrong(self, key: str, found: str, wanted: str) -> FormatError:
        """An error that names the file, the key and, where it can be told, the key's line."""
        full = f"{self._name}.{key}" if self._name else key
        line = _line_of(self._text, self._name, key)
        at = "" if line is None else f", line {line}"
        return FormatError(f"{self._path}{at}: {full} is {found}; wanted {wanted}")

    def take(self, key: str, wanted: str, default: Any = None) -> Any:
        """A value, or its default where it has one."""
        self._taken.add(key)
        if key not in self.content and default is None:
            raise self.wrong(key, "missing", wanted)
        return self.content.get(key, default)

    def table(self, key: str) -> _Table:
        wanted = f"a table, [{self._name}.{key}]" if self._name else f"a table, [{key}]"
        found = self.take(key, wanted)
        if not isinstance(found, dict):
            raise self.wrong(key, _shown(found), wanted)
        name = f"{self._name}.{key}" if self._name else key
        return _Table(self._path, self._text, name, found)

    def string(self, key: str, default: str | None = None) -> str:
        found = self.take(key, "a string", default)
        if not isinstance(found, str) or not found.strip():
            raise self.wrong(key, _shown(found), "a string that is not empty")
        return found

    def existing(self, key: str, wanted: str, there: Any) -> Path:
        found = self._path.parent / self.string(key)
        try:
            exists = there(found)
        except ValueError:  # a null character
            exists = False
        if not exists:
            raise self.wrong(key, f"{str(found)!r}, which is not there", wanted)
        return found

    def whole(self, key: str, default: int, least: int) -> int:
        wanted = f"a whole number from {least} on"
        found = self.take(key, wanted, default)
        if type(found) is not int or found < least:
            raise self.wrong(key, _shown(found), wanted)
        return found

    def number(self, key: str, default: float, least: float, most: float) -> float:
        wanted = f"a number from {least:g} to {most:g}"
        found = self.take(key, wanted, default)
        if type(found) not in (int, float) or not least <= found <= most:
            raise self.wrong(key, _shown(found), wanted)
        return float(found)

    def no_more(self) -> None:
        """Refuse the first key that nobody asked for: it may be one misspelt."""
        for key in self.content:
            if key not in self._taken:
                known = ", ".join(map(repr, sorted(self._taken)))
                raise self.wrong(key, "unknown", f"one of {known}")


def _shown(found: object) -> str:
    """A value for a message, however long it is."""
    try:
        return reprlib.repr(found)
    except ValueError:  # Python writes no number of more than some thousand digits
        return f"a very long {type(found).__name__}"


def _line_of(text: str, table: str, key: str) -> int | None:
    """Where a key stands, or the table itself, as far as plain reading finds it.

    Example:
        >>> _line_of("[model]\\nbase = 'a'\\n[data]\\nbase = 'b'", "data", "base")
        4
    """
    here, begin = "", None
    named = re.compile(rf"""\s*(["']?){re.escape(key)}\1\s*=""")
    for number, line in enumerate(text.split("\n"), 1):
        if header := re.match(r"\s*\[([^\[\]]+)\]\s*(#.*)?$", line):
            here = header[1].replace(" ", "").replace('"', "")
            if here == (f"{table}.{key}" if table else key):
                return number
            if here == table:
                begin = number
        elif here == table and named.match(line):
            return number
    return begin
