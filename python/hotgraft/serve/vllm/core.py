"""Core: the part of `hotgraft serve` that lives in vLLM's engine process, beside the scheduler.

The API process reaches workers by `collective_rpc`, and nothing of vLLM's reaches the scheduler. An
engine looks up by name what it is asked to do, so it is given one more method, `hotgraft`. That
happens when this module is imported, and only engines whose `scheduler_cls` is one of the two here
import it. The method does nothing that takes long: steps wait for it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from vllm.v1.engine.core import EngineCore

from hotgraft.errors import LayoutError
from hotgraft.serve.vllm.counters import WAIT_BOUNDS
from hotgraft.serve.vllm.scheduler import AsyncSkillScheduler, SkillScheduler

__all__ = ["AsyncSkillScheduler", "SkillScheduler", "call"]


def call(core: Any, method: str, args: Sequence[Any] = ()) -> dict[str, Any]:
    """Tell the scheduler something. It never raises: vLLM would pass on no more than a sentence.

    Args:
        core: the engine, as a method's `self`.
        method: `set` (name, digest), `drop` (name, whether to abort) or `counters`.
        args: its arguments.

    Returns:
        `{"value": ...}`, or `{"error": [kind, message]}`.
    """
    try:
        scheduler = core.scheduler
        if not isinstance(scheduler, SkillScheduler):
            raise LayoutError(f"the scheduler is vLLM's {type(scheduler).__name__}, without skills")
        return {"value": METHODS[method](scheduler, *args)}
    except Exception as error:
        return {"error": [type(error).__name__, str(error)]}


def _set(scheduler: SkillScheduler, name: str, digest: str) -> None:
    scheduler.set_skill(name, digest)


def _drop(scheduler: SkillScheduler, name: str, abort: bool) -> int:
    return scheduler.drop_skill(name, abort=abort)


def _counters(scheduler: SkillScheduler) -> dict[str, Any]:
    found = dataclasses.asdict(scheduler.counters)
    steps = found.pop("steps")
    base = steps.pop(None, 0)
    steps = {"base": base, "skills": sum(steps.values())}
    return {**found, "steps": steps, "wait_bounds": list(WAIT_BOUNDS)}


METHODS: dict[str, Callable[..., Any]] = {"set": _set, "drop": _drop, "counters": _counters}
"""What the API process may ask for."""

EngineCore.hotgraft = call
