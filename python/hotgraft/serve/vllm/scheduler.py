"""Scheduler: each step of vLLM runs with the requests of one skill.

A request names its skill in `sampling_params.extra_args["hotgraft_skill"]`, and may say there which
digest the skill must have (`hotgraft_digest`). `SkillScheduler` decides whose turn it is
(`hotgraft.serve.vllm.turns`), hides the other skills' requests from vLLM's own `schedule()`, and
names the skill on its output (`hotgraft_skill`), where workers find it
(`hotgraft.serve.vllm.steps`). Only the hiding is ours: which requests of the skill run, with how
many tokens, is vLLM's decision.

Hidden requests count. They take up running slots, and they hold KV blocks. Where a running request
needs a block and there is none, the victim is the one that vLLM would take if no one were hidden:
the last that was admitted (or, by priority, the least urgent) of all running requests, hidden or
not. So there is always one that nobody can take from, and it runs whenever its skill has a turn:
nothing deadlocks. A waiting request never takes anything from a running one, as in vLLM. The
requests of all skills wait in one order: where n slots are free, only the first n may be let in,
each when its skill has a turn; and one that was refused for want of blocks holds back all that wait
behind it.

A skill that nothing can be done for (no free slot, no free block, its tokens in flight) gets no
turn. The bound on waiting is one on turns: a request that waits for a slot or for memory waits as
long as it would if all asked for one skill.

The blocks of a skill's requests are hashed with its digest, and those of the base's as in plain
vLLM, so prefixes are shared within a skill and never between two. The same is done to the keys of
encoder outputs.

With asynchronous scheduling `schedule()` is called for step n + 1 before the outputs of step n are
there. Nothing here reads outputs, but two things follow from it with vLLM's first model runner. It
takes the last token of a request from the step right before, so one whose tokens are still in
flight from an earlier step stays hidden until they are there; and it knows drafts of the step right
before only, so a request that comes back is scheduled without.
"""

from __future__ import annotations

import dataclasses
import itertools
import re
import time
from collections.abc import Callable, Iterable
from typing import Any

from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.interface import PauseState
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.request_queue import SchedulingPolicy
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs, FinishReason
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus

from hotgraft.errors import HotgraftError, SkillInUseError, UnknownSkillError
from hotgraft.serve.vllm.counters import Counters
from hotgraft.serve.vllm.queues import Place, SkillQueue
from hotgraft.serve.vllm.turns import Name, Rules, Turns

ARGUMENT = "hotgraft_skill"
"""The key in `extra_args`, and the attribute of scheduler outputs."""
DIGEST = "hotgraft_digest"
"""The key of the digest that the skill must have; it may be left out."""

RETRY = 16
"""After so many steps a skill whose step came out empty is tried again, whatever was the reason."""


@dataclasses.dataclass(frozen=True)
class _Empty:
    """What there was to have when a skill's step came out empty."""

    free_blocks: int
    running: int
    step: int


class SkillScheduler(Scheduler):  # type: ignore[misc]
    """vLLM's scheduler with skills; give it as `scheduler_cls` (by name, or the class).

    `additional_config={"hotgraft": {"quantum": 8, "max_wait": 1.0}}` sets the rules for turns
    (`hotgraft.serve.vllm.turns.Rules`).

    Attributes:
        skills: the digest of each skill that requests may name. Change it by `set_skill` and
            `drop_skill`.
        counters: for metrics.

    Raises:
        HotgraftError: the rules are out of range.
    """

    running: list[Request]
    max_num_active_reqs: int
    num_waiting_for_streaming_input: int

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        settings = self.vllm_config.additional_config
        settings = settings.get("hotgraft") if isinstance(settings, dict) else None
        self.skills: dict[str, str] = {}
        self.counters = Counters()
        self._turns = Turns(Rules.read(settings))
        self._clock: Callable[[], float] = time.monotonic
        # The unfinished requests of each skill that has any, and those to be told of an error.
        self._members: dict[Name, dict[str, Request]] = {}
        self._failed: list[tuple[Request, str]] = []
        # What is hidden during a step, in the order of `running`, and everybody's place in there.
        self._hidden: list[Request] = []
        self._places: dict[Request, int] = {}
        self._last_with_slot: Place | None = None
        # For each skill the waiting request that was refused blocks last, and its last empty step.
        self._short: dict[Name, Request] = {}
        self._empty: dict[Name, _Empty] = {}
        self.waiting = SkillQueue(self.policy)
        self.kv_holding_waiting = SkillQueue(self.policy)
        first_runner = not self.use_v2_model_runner
        self._lacks_drafts = first_runner and self.scheduler_config.async_scheduling
        self._allocate_plain = self.kv_cache_manager.allocate_slots

    # ---- skills --------------------------------------------------------------------------------

    def set_skill(self, name: str, digest: str) -> None:
        """Let requests name a skill.

        Args:
            name: of the skill.
            digest: what tells its weights from all others (hex): requests share KV blocks where
                their digests are equal.

        Raises:
            HotgraftError: the name is empty, or the digest is not hex.
            SkillInUseError: requests of this name with another digest are unfinished.
        """
        if not isinstance(name, str) or not name:
            raise HotgraftError(f"a skill is called {name!r}; its name is a string, and not empty")
        if not isinstance(digest, str) or not re.fullmatch(r"[0-9a-f]+", digest):
            raise HotgraftError(f"skill {name!r} has the digest {digest!r}; it is lower-case hex")
        if self.skills.get(name, digest) != digest:
            self._require_unused(name)
        self.skills[name] = digest

    def drop_skill(self, name: str, *, abort: bool = False) -> int:
        """Let requests name a skill no longer.

        Args:
            name: of the skill.
            abort: finish its requests with an error; their clients are told after the next step.

        Returns:
            How many requests were finished.

        Raises:
            UnknownSkillError: there is none of that name.
            SkillInUseError: it has unfinished requests.
        """
        if name not in self.skills:
            raise UnknownSkillError(self._unknown(name))
        if not abort:
            self._require_unused(name)
        requests = list(self._members.get(name, {}).values())
        for request in requests:
            self._fail(request, f"skill {name!r} was dropped")
        del self.skills[name]
        self._turns.forget(name)
        return len(requests)

    def unfinished(self, name: Name) -> int:
        """How many requests of a skill, or of the base (None), are unfinished."""
        return len(self._members.get(name, ()))

    def _require_unused(self, name: str) -> None:
        if count := self.unfinished(name):
            raise SkillInUseError(
                f"skill {name!r} has {count} unfinished requests; wait for them, or abort them"
            )

    def _unknown(self, name: str) -> str:
        known = ", ".join(sorted(self.skills)) or "none yet"
        return f"no skill {name!r} is there; there are: {known}"

    # ---- requests ------------------------------------------------------------------------------

    def add_request(self, request: Request) -> None:
        """Take in a request, or the next part of a streaming one.

        One that cannot be served is finished with an error, which its client is told after the
        next step: it names a skill that is not there, or has another digest, or no string, or
        another skill than its session does.
        """
        params = request.sampling_params
        given = (params and params.extra_args) or {}
        skill = given.get(ARGUMENT) or None
        session = self.requests.get(request.request_id)
        if skill is not None and not isinstance(skill, str):
            problem = f"{ARGUMENT} is {skill!r}; it is the name of a skill"
        elif skill is not None and skill not in self.skills:
            problem = self._unknown(skill)
        elif skill is not None and given.get(DIGEST) not in (None, self.skills[skill]):
            problem = f"skill {skill!r} was replaced while the request came; send it again"
        elif session is not None and request.resumable and skill != session.hotgraft_skill:
            problem = f"a session of skill {session.hotgraft_skill!r} goes on with {skill!r}"
        else:
            problem = ""
        if problem:
            self._fail(session or request, problem)
            return
        self._keep_apart(request, self.skills[skill] if skill is not None else None)
        if session is None:
            request.hotgraft_skill = skill
            self._members.setdefault(skill, {})[request.request_id] = request
            self._turns.join(skill, self._clock())
        self._empty.pop(skill, None)
        super().add_request(request)

    @staticmethod
    def _keep_apart(request: Request, digest: str | None) -> None:
        """Key a request's blocks by its skill.

        No client of the base may choose a salt that a skill's requests have: "base" is not hex.
        """
        salt = request.cache_salt or ""
        if digest is None and not salt.startswith("hotgraft "):
            return
        mark = f"hotgraft {digest or 'base'} "
        request.cache_salt = mark + salt
        if digest is not None:
            for feature in request.mm_features:
                feature.identifier = mark + feature.identifier
        request.block_hashes.clear()
        request.update_block_hashes()

    def _fail(self, request: Request, problem: str) -> None:
        self.counters.refusals += 1
        if request.request_id in self.requests:
            self.finish_requests(request.request_id, RequestStatus.FINISHED_ERROR)
        self._failed.append((request, problem))

    def _free_request(self, request: Request, *args: Any, **kwargs: Any) -> Any:
        skill = request.hotgraft_skill
        members = self._members.get(skill, {})
        members.pop(request.request_id, None)
        if not members:
            self._members.pop(skill, None)
            self._turns.leave(skill)
            self._empty.pop(skill, None)
        if self._short.get(skill) is request:
            del self._short[skill]
        return super()._free_request(request, *args, **kwargs)

    def has_requests(self) -> bool:
        """As vLLM's; also while a client is to be told of an error."""
        return bool(self._failed) or super().has_requests()

    def update_from_output(
        self, scheduler_output: SchedulerOutput, model_runner_output: ModelRunnerOutput
    ) -> dict[int, EngineCoreOutputs]:
        """As vLLM's, and tell clients of errors."""
        outputs: dict[int, EngineCoreOutputs] = super().update_from_output(
            scheduler_output, model_runner_output
        )
        failed, self._failed = self._failed, []
        for request, problem in failed:
            to = outputs.setdefault(request.client_index, EngineCoreOutputs())
            to.outputs.append(
                EngineCoreOutput(
                    request_id=request.request_id,
                    new_token_ids=[],
                    finish_reason=FinishReason.ERROR,
                    stop_reason=problem,
                    events=request.take_events(),
                    trace_headers=request.trace_headers,
                )
            )
            if self.finished_req_ids_dict is not None:
                to.finished_requests = {*(to.finished_requests or ()), request.request_id}
        return outputs

    # ---- steps ---------------------------------------------------------------------------------

    def schedule(self, *args: Any, **kwargs: Any) -> SchedulerOutput:
        """Plan a step with the requests of one skill, whose name the output has."""
        now = self._clock()
        limit = self.max_num_active_reqs
        crowded = len(self._members) > 1
        self._last_with_slot = self._find_last_with_slot() if crowded else None
        skill = self._next_skill(now)
        self._hide(skill)
        if crowded:
            self.kv_cache_manager.allocate_slots = self._allocate
        try:
            with (
                self.waiting.showing(skill, self._barrier),
                self.kv_holding_waiting.showing(skill),
            ):
                output = super().schedule(*args, **kwargs)
        finally:
            self.kv_cache_manager.allocate_slots = self._allocate_plain
            self.max_num_active_reqs = limit
            self._unhide()
        if output.total_num_scheduled_tokens:
            self._count(skill, now)
        elif crowded:
            self.counters.empty += 1
            self._empty[skill] = self._resources()
        output.hotgraft_skill = self._turns.live
        return output

    def _next_skill(self, now: float) -> Name:
        if len(self._members) == 1:
            return next(iter(self._members))
        if not self._members or self._pause_state == PauseState.PAUSED_ALL:
            return self._turns.live
        if ready := self._ready():
            by_priority = self.policy == SchedulingPolicy.PRIORITY
            return self._turns.choose(ready, now, self._urgency() if by_priority else None)
        # Nobody seems to be. Asking vLLM for each in turn costs an empty step, and misses nothing.
        turn: int = self.current_step % len(self._members)
        return list(self._members)[turn]

    def _ready(self) -> set[Name]:
        """The skills that could do something with a step."""
        now = self._resources()
        tried = {skill for skill, empty in self._empty.items() if self._as_before(empty, now)}
        ready = {r.hotgraft_skill for r in self.running if self._can_run(r)} - tried
        if self._free_slots() > 0:
            barrier = self._barrier()
            others = self._members.keys() - ready - tried
            ready |= {skill for skill in others if self._can_admit(skill, barrier)}
        return ready

    def _resources(self) -> _Empty:
        free = self.kv_cache_manager.block_pool.get_num_free_blocks()
        return _Empty(free, len(self.running), self.current_step)

    @staticmethod
    def _as_before(empty: _Empty, now: _Empty) -> bool:
        """Whether a step that came out empty would do so again."""
        more = now.free_blocks > empty.free_blocks or now.running < empty.running
        return not more and now.step - empty.step < RETRY

    def _can_run(self, request: Request) -> bool:
        """Whether a running request could get tokens: not all that it may have are in flight."""
        flying = request.num_output_placeholders
        known = request.num_computed_tokens + 2 - flying
        complete = flying > 0 and known >= request.num_prompt_tokens + request.max_tokens
        soon = self.current_step + 1 < request.next_decode_eligible_step
        return not (complete or soon or self._is_out_of_reach(request))

    def _is_out_of_reach(self, request: Request) -> bool:
        """Whether vLLM's first model runner could not find a running request's last token."""
        return (
            not self.use_v2_model_runner
            and request.num_output_placeholders > 0
            and request.request_id not in self.prev_step_scheduled_req_ids
        )

    def _can_admit(self, skill: Name, barrier: Place | None) -> bool:
        """Whether one of a skill's waiting requests waits for nothing but a step."""
        if any(map(self._is_willing, self.kv_holding_waiting.part(skill))):
            return True
        if self._pause_state != PauseState.UNPAUSED:
            return False
        requests = self.waiting.part(skill)
        return any(self._is_willing(r) and not self.waiting.behind(r, barrier) for r in requests)

    def _is_willing(self, request: Request) -> bool:
        match request.status:
            case RequestStatus.WAITING_FOR_STRUCTURED_OUTPUT_GRAMMAR:
                grammar = request.structured_output_request
                return grammar is not None and grammar.grammar is not None
            case RequestStatus.WAITING_FOR_REMOTE_KVS:
                return request.request_id in self.finished_recving_kv_req_ids
            case RequestStatus.WAITING_FOR_STREAMING_REQ:
                return False
        return not request.num_stale_output_tokens or bool(request.drop_stale_output)

    def _urgency(self) -> dict[Name, int]:
        """The smallest priority of each skill's requests."""
        return {
            skill: min(request.priority for request in members.values())
            for skill, members in self._members.items()
        }

    def _free_slots(self) -> int:
        return self.max_num_active_reqs - len(self.running) - self.num_waiting_for_streaming_input

    def _find_last_with_slot(self) -> Place | None:
        """The place of the last in line whom there is a slot for, if not for everybody."""
        free = self._free_slots()
        if not 0 < free < len(self.waiting):
            return None
        able = (r for r in self.waiting.merged() if r not in self.deferred_waiting)
        last = next(itertools.islice(able, free - 1, None), None)
        return None if last is None else self.waiting.place(last)

    def _barrier(self) -> Place | None:
        """The place behind which nobody is let in: for want of slots, or of blocks."""
        first = self._last_with_slot
        for skill, request in list(self._short.items()):
            if request not in self.waiting:
                del self._short[skill]
            elif not self.waiting.behind(request, first):
                first = self.waiting.place(request)
        return first

    def _hide(self, skill: Name) -> None:
        if len(self._members) < 2 and self._turns.live == skill:
            return  # there is nobody else, and was not in the last step
        visible: list[Request] = []
        for request in self.running:
            hide = request.hotgraft_skill != skill or self._is_out_of_reach(request)
            (self._hidden if hide else visible).append(request)
            if self._lacks_drafts and request.request_id not in self.prev_step_scheduled_req_ids:
                request.spec_token_ids = []
        if not self._hidden:
            return
        self._places = {request: i for i, request in enumerate(self.running)}
        self.running = visible
        self.max_num_active_reqs -= len(self._hidden)

    def _unhide(self) -> None:
        if self._places:
            left = {*self._hidden, *self.running}
            before = [request for request in self._places if request in left]
            self.running = before + [r for r in self.running if r not in self._places]
        self._hidden, self._places = [], {}

    def _count(self, skill: Name, now: float) -> None:
        before = self._turns.live
        wait = self._turns.ran(skill, now)
        self._empty.pop(skill, None)
        counters = self.counters
        counters.switches += skill != before
        counters.steps[skill] = counters.steps.get(skill, 0) + 1
        if wait is not None:
            counters.count_wait(wait)

    # ---- memory --------------------------------------------------------------------------------

    def _allocate(self, request: Request, *args: Any, **kwargs: Any) -> Any:
        """vLLM's `allocate_slots`; a running request may take a hidden one's blocks."""
        blocks = self._allocate_plain(request, *args, **kwargs)
        if blocks is None and request.status != RequestStatus.RUNNING:
            self._short[request.hotgraft_skill] = request
            return None
        while blocks is None and (victim := self._victim()) is not None:
            self._hidden.remove(victim)
            self._preempt_request(
                victim, time.monotonic(), drop_stale_output=self.requires_kv_delivery
            )
            self.counters.evictions += 1
            # As in vLLM a step that takes blocks from somebody does not give them to a newcomer.
            self.max_num_active_reqs = 0
            blocks = self._allocate_plain(request, *args, **kwargs)
        return blocks

    def _victim(self) -> Request | None:
        """The hidden request whose blocks are to be taken, or None where it is vLLM's to choose."""
        hidden: Iterable[Request] = filter(self._request_blocks_can_be_freed, self._hidden)
        if self.policy == SchedulingPolicy.PRIORITY:
            rank: Callable[[Request], Any] = _by_priority
        else:
            rank = self._places.__getitem__
        victim = max(hidden, key=rank, default=None)
        if victim is None or rank(victim) < max(map(rank, self.running)):
            return None
        return victim


class AsyncSkillScheduler(SkillScheduler, AsyncScheduler):  # type: ignore[misc]
    """`SkillScheduler` for asynchronous scheduling, the default on GPUs."""


def _by_priority(request: Request) -> tuple[int, float]:
    return request.priority, request.arrival_time
