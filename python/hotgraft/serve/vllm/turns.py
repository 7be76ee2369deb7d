"""Turns: which skill has the next step. The policy alone, without a server.

A step of a server runs with the requests of one skill, so skills take turns. The waiting ones stand
in a line, in the order in which they last had a step or, since then, got their first request. A
turn lasts for `quantum` steps while others wait, and ends early where the first in line has waited
for `max_wait` seconds.

What follows, for a skill x that could run all the while and S - 1 others before it in line or live:
whoever has a step goes behind x, so each of them has at most one turn before x has its own.

- x waits for at most (S - 1) * quantum steps.
- x waits for at most max(max_wait, t) + (S - 1) * t seconds, where t is the longest step and the
  wait counts from the start of its last step: from max_wait on each of the others has one step.

Where S - 1 skills with full turns fit into `max_wait`, turns are whole. Where they do not, the
bound is kept and turns get shorter, down to one step each.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Mapping

from hotgraft.errors import HotgraftError

Name = str | None
"""A skill's name; None is the base."""


@dataclasses.dataclass(frozen=True)
class Rules:
    """How turns are taken.

    Args:
        quantum: how many steps a turn has while others wait.
        max_wait: the seconds after which a waiting skill cuts a turn short.

    Raises:
        HotgraftError: a value is of the wrong type, or out of range.

    Example:
        >>> Rules.read({"quantum": 4})
        Rules(quantum=4, max_wait=1.0)
    """

    quantum: int = 8
    max_wait: float = 1.0

    def __post_init__(self) -> None:
        quantum, wait = self.quantum, self.max_wait
        if isinstance(quantum, bool) or not isinstance(quantum, int) or quantum < 1:
            raise HotgraftError(f"quantum is {quantum!r}; it is a number of steps, 1 or more")
        number = isinstance(wait, int | float) and not isinstance(wait, bool)
        if not number or math.isnan(wait) or wait < 0:
            raise HotgraftError(f"max_wait is {wait!r}; it is a number of seconds, 0 or more")

    @classmethod
    def read(cls, settings: object) -> Rules:
        """The rules in a server's settings; what they do not say is as usual.

        Args:
            settings: a mapping with `quantum` and `max_wait`, or None. Other keys are not read.
        """
        if settings is None:
            return cls()
        if not isinstance(settings, Mapping):
            raise HotgraftError(
                f"hotgraft's settings are {settings!r}; give a mapping such as "
                f"{{'quantum': {cls.quantum}, 'max_wait': {cls.max_wait}}}"
            )
        return cls(**{key: settings[key] for key in ("quantum", "max_wait") if key in settings})


class Turns:
    """The line of skills that have requests, and whose turn it is.

    It reads no clock: times are given to it, in seconds, and do not decrease.

    Example:
        >>> turns = Turns(Rules(quantum=2))
        >>> turns.join("sql", now=0.0)
        >>> turns.join("french", now=0.0)
        >>> def step(now: float) -> str:
        ...     skill = turns.choose({"sql", "french"}, now)
        ...     _ = turns.ran(skill, now)
        ...     return skill
        >>> [step(i / 100) for i in range(5)]
        ['sql', 'sql', 'french', 'french', 'sql']
    """

    def __init__(self, rules: Rules | None = None) -> None:
        self.rules = rules or Rules()
        # Since when each waits, the first in line first; who has a step goes to the end.
        self._line: dict[Name, float] = {}
        self._live: Name = None
        self._used = 0

    @property
    def live(self) -> Name:
        """The skill that had the last step; at first the base."""
        return self._live

    def join(self, skill: Name, now: float) -> None:
        """A request of this skill arrived. Does nothing for one in line."""
        self._line.setdefault(skill, now)

    def leave(self, skill: Name) -> None:
        """The last request of this skill is gone."""
        self._line.pop(skill, None)

    def forget(self, skill: str) -> None:
        """There is no such skill any more: it is neither in line nor live."""
        self.leave(skill)
        if self._live == skill:
            self._live = None
            self._used = 0  # the base is live, but this is no turn of its own

    def choose(
        self, ready: Collection[Name], now: float, urgency: Mapping[Name, int] | None = None
    ) -> Name:
        """The skill that should have the next step. Changes nothing.

        Args:
            ready: the skills in line that could do something with a step.
            now: the time.
            urgency: a number for each of these; while nobody has waited too long, only those with
                the smallest take turns.

        Raises:
            ValueError: nobody is ready.
        """
        if not ready:
            raise ValueError("no skill is ready, so none can be chosen")
        line = [skill for skill in self._line if skill in ready]
        others = [skill for skill in line if skill != self._live or not self._used]
        if others and now - self._line[others[0]] >= self.rules.max_wait:
            return others[0]
        if urgency is not None:
            best = min(urgency[skill] for skill in line)
            line = [skill for skill in line if urgency[skill] == best]
            others = [skill for skill in others if urgency[skill] == best]
        if others and (self._live not in line or not 0 < self._used < self.rules.quantum):
            return others[0]
        return self._live

    def ran(self, skill: Name, now: float) -> float | None:
        """This skill has a step, now.

        Returns:
            How long it had waited, where its turn begins; else None.
        """
        since = self._line.pop(skill, now)
        self._line[skill] = now
        if skill == self._live and self._used:
            # Steps that nobody waited for are no part of a turn: where one skill's last requests
            # meet the next one's first, the others would give way to these few.
            self._used = self._used + 1 if len(self._line) > 1 else 1
            return None
        self._live = skill
        self._used = 1
        return max(0.0, now - since)
