"""Read labelled texts from JSON lines or CSV. Every complaint names the file and the line."""

from __future__ import annotations

import csv
import gzip
import io
import json
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from hotgraft.errors import DataError
from hotgraft.tasks.texts import Split

ENDINGS = (".jsonl", ".csv", ".jsonl.gz", ".csv.gz")


def read_split(path: Path, text: str, label: str, class_of: Callable[[str], int]) -> Split:
    """Read a file of labelled texts.

    Args:
        path: JSON lines (an object a line) or CSV (with a header), UTF-8, also gzipped.
        text, label: the fields that hold a text and its answer.
        class_of: the class of a label; a `LookupError`'s text says why there is none.

    Raises:
        DataError: naming the file, the line, what was found and what was wanted.
        OSError: the file cannot be read.

    Example: `read_split(Path("train.jsonl"), "text", "label", {"game": 0, "font": 1}.__getitem__)`.
    """
    texts, labels = [], []
    for line, row in _rows(path):
        where = f"{path}, line {line}"
        found = _field(row, text, where, "text")
        if not isinstance(found, str) or not found.strip():
            raise DataError(f"{where}: {text!r} is {found!r}; wanted a text")
        _check_characters(found, where, text)
        answer = _field(row, label, where, "label")
        if isinstance(answer, int) and not isinstance(answer, bool):
            answer = str(answer)
        if not isinstance(answer, str):
            raise DataError(f"{where}: {label!r} is {answer!r}; wanted a string or a whole number")
        try:
            labels.append(class_of(answer))
        except LookupError as error:
            raise DataError(f"{where}: {error.args[0]}") from error
        texts.append(found)
    if not texts:
        raise DataError(f"{path}: it holds no text; wanted at least one")
    return Split(tuple(texts), torch.tensor(labels, dtype=torch.int64))


def _field(row: dict[str, Any], name: str, where: str, key: str) -> Any:
    if name not in row:
        there = ", ".join(map(repr, row)) or "none"
        raise DataError(
            f"{where}: there is no field {name!r}; there are {there}: name the right one as "
            f"data.{key} in the task file"
        )
    return row[name]


def _check_characters(text: str, where: str, name: str) -> None:
    """Refuse half of a surrogate pair: JSON can write it, and no tokenizer can read it."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"{where}: {name!r} has {text[error.start]!r}, half of a character, as its character "
            f"{error.start}; mend the text or leave it out"
        ) from error


def _rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """The rows of a file, each with its line."""
    packed = path.suffix == ".gz"
    kind = path.with_suffix("").suffix if packed else path.suffix
    if kind not in (".jsonl", ".csv"):
        raise DataError(f"{path}: wanted a file that ends in {', '.join(ENDINGS)}")
    data = path.read_bytes()
    if packed:
        try:
            data = gzip.decompress(data)
        except (OSError, EOFError, zlib.error) as error:
            raise DataError(f"{path}: not a whole gzip file: {error}") from error
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        byte = error.object[error.start]
        raise DataError(
            f"{path}, line {line}: not UTF-8 (byte 0x{byte:02x}): convert it first"
        ) from error
    return _json_rows(path, text) if kind == ".jsonl" else _csv_rows(path, text)


def _json_rows(path: Path, text: str) -> Iterator[tuple[int, dict[str, Any]]]:
    # Not splitlines(): texts may hold other line separators of Unicode.
    for line, content in enumerate(text.split("\n"), 1):
        if not content.strip():
            continue
        try:
            row = json.loads(content, object_pairs_hook=_object)
        except DataError as error:
            raise DataError(f"{path}, line {line}: {error}") from error
        except (ValueError, RecursionError) as error:
            raise DataError(f"{path}, line {line}: not JSON: {error}") from error
        if not isinstance(row, dict):
            raise DataError(f"{path}, line {line}: a {type(row).__name__}; wanted a JSON object")
        yield line, row


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object: of a field that is there twice, nobody knows which one is meant."""
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise DataError(f"the field {name!r} is there twice; wanted it once")
        found[name] = value
    return found


def _csv_rows(path: Path, text: str) -> Iterator[tuple[int, dict[str, Any]]]:
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    try:
        header = next(reader, [])
        if len(set(header)) != len(header):
            raise DataError(f"{path}, line 1: a column's name is there twice: {header}")
        line = reader.line_num + 1
        for row in reader:
            if row and len(row) != len(header):
                raise DataError(
                    f"{path}, line {line}: {len(row)} columns; the header has {len(header)}"
                )
            if row:
                yield line, dict(zip(header, row, strict=True))
            line = reader.line_num + 1
    except csv.Error as error:
        raise DataError(f"{path}, line {reader.line_num}: not CSV: {error}") from error
