"""Budget: bytes that things may take together, and which of them go first."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")


class Budget(Generic[T]):
    """What is kept, in the order of its last use, within a number of bytes.

    It knows nothing of how things come and go: a library of one process keeps skills of its host by
    it, and a server those of all its ranks. Not thread-safe.

    Args:
        limit: bytes that may be taken.

    Example:
        >>> budget = Budget[str](10)
        >>> budget.put("sql", 6)
        >>> budget.put("french", 4)
        >>> budget.touch("sql")
        >>> budget.candidates(3, lambda name: True)
        ['french', 'sql']
        >>> budget.remove("french")
        >>> budget.nbytes, budget.fits(3)
        (6, True)
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.nbytes = 0
        """Of what is kept, and what is reserved."""
        self._kept: OrderedDict[T, int] = OrderedDict()  # the last used come last

    def __len__(self) -> int:
        return len(self._kept)

    def __contains__(self, thing: object) -> bool:
        return thing in self._kept

    def put(self, thing: T, nbytes: int) -> None:
        """Keep a thing, which is used now."""
        self._kept[thing] = nbytes
        self.nbytes += nbytes

    def remove(self, thing: T) -> None:
        """Keep it no longer."""
        self.nbytes -= self._kept.pop(thing)

    def touch(self, thing: T) -> None:
        """It is used now."""
        self._kept.move_to_end(thing)

    def all(self) -> list[T]:
        """What is kept, the least recently used first."""
        return list(self._kept)

    def excess(self, wanted: int) -> int:
        """How many bytes are too many if so many more are taken; at most 0 if there is room."""
        return self.nbytes + wanted - self.limit

    def fits(self, wanted: int) -> bool:
        """Whether so many bytes are free."""
        return self.excess(wanted) <= 0

    def candidates(self, wanted: int, may_go: Callable[[T], bool]) -> list[T]:
        """What may go, the least recently used first; nothing if that leaves too little room."""
        found = [thing for thing in self._kept if may_go(thing)]
        enough = sum(self._kept[thing] for thing in found) >= self.excess(wanted)
        return found if enough else []
