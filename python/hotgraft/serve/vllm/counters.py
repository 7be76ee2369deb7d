"""Counters: what a scheduler has done, for metrics."""

from __future__ import annotations

import dataclasses

from hotgraft.serve.vllm.turns import Name

WAIT_BOUNDS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0)
"""Seconds: the upper bounds of the counted waits; one more count is for those above."""


@dataclasses.dataclass
class Counters:
    """What a scheduler has done so far."""

    switches: int = 0
    """Steps for another skill than the step before."""
    steps: dict[Name, int] = dataclasses.field(default_factory=dict)
    """Steps with tokens, for each skill; None is the base."""
    empty: int = 0
    """Steps that came out empty while several skills had requests."""
    evictions: int = 0
    """Hidden requests that lost their KV blocks to another skill's."""
    refusals: int = 0
    """Requests that were finished with an error."""
    waits: list[int] = dataclasses.field(default_factory=lambda: [0] * (len(WAIT_BOUNDS) + 1))
    """How many waits for a turn ended within each of `WAIT_BOUNDS`, but not the one before it."""
    wait_seconds: float = 0.0
    """All of these together."""
    longest_wait: float = 0.0
    """The longest of these."""

    def count_wait(self, seconds: float) -> None:
        """A turn begins after so long."""
        at = next((i for i, bound in enumerate(WAIT_BOUNDS) if seconds <= bound), len(WAIT_BOUNDS))
        self.waits[at] += 1
        self.wait_seconds += seconds
        self.longest_wait = max(self.longest_wait, seconds)
