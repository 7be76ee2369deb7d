"""Served: the worker of `hotgraft serve`, which forgets skills that nobody asks for any more."""

from __future__ import annotations

import bisect
import time
from typing import Any

from hotgraft.serve.vllm.worker import SkillWorker

SWITCH_BOUNDS = (0.00003, 0.0001, 0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0)
"""Seconds: the upper bounds of the counted switches; one more count is for those above."""


class ServedWorker(SkillWorker):
    """`SkillWorker`, with what a server that runs for long needs."""

    hotgraft_switch_count: list[int] | None = None
    hotgraft_switch_time = 0.0

    def hotgraft(self, method: str, args: tuple[Any, ...] = ()) -> dict[str, Any]:
        """As `Grafts.hotgraft`.

        A skill stays in the weights after its last request, until a step is for another one; to be
        unloaded it is taken out here.
        """
        if method == "release" and self.hotgraft_live is not None and args[0] == self.hotgraft_live:
            try:
                self.hotgraft_switch(None)
            except Exception as error:
                return {"error": [type(error).__name__, str(error)]}
            self.hotgraft_live = None
        return super().hotgraft(method, args)

    def hotgraft_switch(self, skill: str | None) -> None:
        """As `SkillWorker.hotgraft_switch`, and count how long it takes this process."""
        started = time.perf_counter()
        super().hotgraft_switch(skill)
        seconds = time.perf_counter() - started
        if self.hotgraft_switch_count is None:
            self.hotgraft_switch_count = [0] * (len(SWITCH_BOUNDS) + 1)
        self.hotgraft_switch_count[bisect.bisect_left(SWITCH_BOUNDS, seconds)] += 1
        self.hotgraft_switch_time += seconds

    def hotgraft_switches(self) -> dict[str, Any]:
        """How many switches ended within each of `SWITCH_BOUNDS`, but not the one before it."""
        return {
            "bounds": list(SWITCH_BOUNDS),
            "counts": self.hotgraft_switch_count or [0] * (len(SWITCH_BOUNDS) + 1),
            "seconds": self.hotgraft_switch_time,
        }
