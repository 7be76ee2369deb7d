"""Blocks: a host's open `using` blocks, and what each puts back."""

from __future__ import annotations

import dataclasses

from hotgraft.ledger import NOTHING, LiveSet


@dataclasses.dataclass(eq=False)
class Block:
    """A `using` block."""

    before: LiveSet = NOTHING
    """What it puts back."""


class Blocks:
    """The open ones, the outermost first. The host's lock guards changes."""

    def __init__(self) -> None:
        self._open: list[Block] = []

    def __len__(self) -> int:
        return len(self._open)

    def __contains__(self, block: Block) -> bool:
        return block in self._open

    def put_back(self, name: str) -> bool:
        """Whether one will make a skill of this name live again."""
        return any(name in block.before.names for block in tuple(self._open))

    def open(self, block: Block, before: LiveSet) -> None:
        """Enter a block."""
        block.before = before
        self._open.append(block)

    def close(self, block: Block) -> bool:
        """Leave a block; whether it is this one that puts back what was live before.

        Where a later one is open, that one puts it back.
        """
        at = self._open.index(block)
        later = self._open[at + 1 :]
        del self._open[at]
        if later:
            later[0].before = block.before
        return not later

    def clear(self) -> None:
        """Forget them all."""
        self._open.clear()
