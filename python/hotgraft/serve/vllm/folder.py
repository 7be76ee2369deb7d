"""Folder: what a server's folder of skills holds, from its files' headers."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from hotgraft.errors import HotgraftError
from hotgraft.library.folder import described, is_skill, signature_of
from hotgraft.library.shelf import Signature


class Seen(NamedTuple):
    """A file that is not as it was known."""

    signature: Signature | None = None
    """None if it cannot be read, or is gone."""
    digest: str | None = None
    """What its header states; None if it is gone, or there is an `error`."""
    error: Exception | None = None
    """Why it is no skill."""


def look(folder: Path, known: Mapping[str, Signature | tuple[()]]) -> dict[str, Seen]:
    """What is new in a folder, or was replaced, or is gone; only headers are read, and only those.

    For a thread: the folder may be large, or far away. A file that cannot be read just now, and was
    known before, is taken to be as it was; what cannot be read is tried again at each look.

    Args:
        folder: what is directly in it counts.
        known: files, there or elsewhere, as they were.

    Raises:
        OSError: the folder cannot be read.
    """
    # With strings: a server may look at thousands of files every other second.
    with os.scandir(folder) as entries:
        paths = {entry.path for entry in entries if is_skill(entry)}
    found = {}
    for path in sorted(paths | known.keys()):
        try:
            signature = signature_of(path)
            if known.get(path) != signature:
                found[path] = _read(path, signature)
        except (FileNotFoundError, IsADirectoryError):
            if path in known:
                found[path] = Seen()
        except OSError as error:
            if path not in known:
                found[path] = Seen(error=error)
    return found


def _read(path: str, signature: Signature) -> Seen:
    try:
        volume = described(Path(path))
    except HotgraftError as error:
        return Seen(signature, error=error)
    return Seen(volume.signature, volume.id)
