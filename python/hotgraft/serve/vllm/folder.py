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
    """A file as it is now."""

    signature: Signature | None
    """None if it cannot be asked for."""
    digest: str | None = None
    """What its header states; None if it was known already, or there is an `error`."""
    error: Exception | None = None
    """Why it is no skill."""


def look(folder: Path, known: Mapping[Path, Signature]) -> dict[Path, Seen]:
    """The files of a folder, and those known that are elsewhere; headers of new ones are read.

    For a thread: the folder may be large, or far away.

    Args:
        folder: what is directly in it counts.
        known: files that need no reading unless they were replaced.

    Raises:
        OSError: the folder cannot be read.
    """
    with os.scandir(folder) as entries:
        paths = {Path(entry.path) for entry in entries if is_skill(entry)}
    found = {}
    for path in sorted(paths | known.keys()):
        try:
            signature = signature_of(path)
        except FileNotFoundError:
            continue
        except OSError as error:
            found[path] = Seen(None, error=error)
            continue
        found[path] = Seen(signature)
        if known.get(path) != signature:
            try:
                volume = described(path)
                found[path] = Seen(volume.signature, volume.id)
            except (HotgraftError, OSError) as error:
                found[path] = Seen(signature, error=error)
    return found
