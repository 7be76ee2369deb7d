"""Steps: a worker puts in the skill that a step is for, right before the step."""

from __future__ import annotations

import abc
from typing import Any


class SkillSteps(abc.ABC):
    """A mixin for vLLM's workers, for steps of `SkillScheduler`; stands before the worker's class.

    Every rank sees every step, so each switches for itself, in the order of `execute_model`. That
    is the right place with asynchronous scheduling too, where the scheduler runs a step ahead: what
    counts is the order in which work reaches the device. The pass of step n and its sampling are on
    the stream when `execute_model` is called for step n + 1 (vLLM enqueues `sample_tokens` of n
    before, also where it waits for a grammar), the commit goes onto the stream behind them, and the
    pass of n + 1 behind the commit. So no pass sees half a switch, nobody waits for the device, and
    what the scheduler has planned meanwhile plays no part. Passes on other streams are put in order
    by the host (`hotgraft.streams`).

    An error of `hotgraft_switch` ends the engine, as any error in a step does in vLLM: whatever can
    fail belongs into loading.
    """

    hotgraft_live: str | None = None
    """The skill whose weights are in; None is the base."""

    @abc.abstractmethod
    def hotgraft_switch(self, skill: str | None) -> None:
        """Put in this skill's weights, and take out those of the live one."""

    def execute_model(self, scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
        """Run a step with the weights of its skill.

        Args:
            scheduler_output: of any scheduler; one that names no skill (`hotgraft_skill`) leaves
                the weights as they are, and so does a step without tokens.
        """
        if scheduler_output.total_num_scheduled_tokens:
            skill = getattr(scheduler_output, "hotgraft_skill", self.hotgraft_live)
            if skill != self.hotgraft_live:
                self.hotgraft_switch(skill)
                self.hotgraft_live = skill
        return super().execute_model(scheduler_output, *args, **kwargs)  # type: ignore[misc]
