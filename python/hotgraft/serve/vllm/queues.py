"""Waiting requests, of which a step sees one skill's."""

from __future__ import annotations

import contextlib
import heapq
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from vllm.v1.core.sched.request_queue import (
    RequestQueue,
    SchedulingPolicy,
    create_request_queue,
)
from vllm.v1.request import Request

from hotgraft.serve.vllm.turns import Name

Place = Any
"""A number, or by priority the request itself: what compares with others of its queue."""


class SkillQueue(RequestQueue):  # type: ignore[misc]
    """One of vLLM's queues for each skill, and the order of all their requests.

    It is one queue for adding, removing, counting and iterating. The head (`peek_request`,
    `pop_request`, and whether there is one: `bool`) is that of the skill that is shown.

    Args:
        policy: vLLM's: first come first served, or by priority.
    """

    def __init__(self, policy: SchedulingPolicy) -> None:
        self._policy = policy
        self._parts: dict[Name, RequestQueue] = {}
        # Places grow towards the end, and fall below zero in front of the first.
        self._places: dict[Request, int] = {}
        self._first = self._last = 0
        self._narrow = False
        self._shown: Name = None
        self._barrier: Callable[[], Place | None] = _no_barrier

    @contextlib.contextmanager
    def showing(
        self, skill: Name, barrier: Callable[[], Place | None] | None = None
    ) -> Iterator[None]:
        """Show the requests of one skill; those behind the barrier at that time stay hidden."""
        self._narrow, self._shown, self._barrier = True, skill, barrier or _no_barrier
        try:
            yield
        finally:
            self._narrow, self._shown, self._barrier = False, None, _no_barrier

    def part(self, skill: Name) -> Iterable[Request]:
        """One skill's requests, in order."""
        part: Iterable[Request] = self._parts.get(skill, ())
        return part

    def merged(self) -> Iterator[Request]:
        """All requests in order, at a cost that follows how many are taken."""
        return heapq.merge(*self._parts.values(), key=self.place)

    def place(self, request: Request) -> Place:
        """Where a request stands; places of all skills compare."""
        by_priority = self._policy == SchedulingPolicy.PRIORITY
        return request if by_priority else self._places[request]

    def behind(self, request: Request, barrier: Place | None) -> bool:
        """Whether a request stands behind a place."""
        return barrier is not None and bool(barrier < self.place(request))

    def __contains__(self, request: object) -> bool:
        return request in self._places

    def __bool__(self) -> bool:
        if not self._narrow:
            return bool(self._places)
        part = self._parts.get(self._shown)
        if not part:
            return False
        return not self.behind(part.peek_request(), self._barrier())

    def __len__(self) -> int:
        return len(self._places)

    def __iter__(self) -> Iterator[Request]:
        return iter(sorted(self._places, key=self.place))

    def peek_request(self) -> Request:
        return self._head().peek_request()

    def pop_request(self) -> Request:
        request = self._head().pop_request()
        self._drop(request)
        return request

    def add_request(self, request: Request) -> None:
        self._last += 1
        self._places[request] = self._last
        self._queue(request.hotgraft_skill).add_request(request)

    def prepend_request(self, request: Request) -> None:
        self._first -= 1
        self._places[request] = self._first
        self._queue(request.hotgraft_skill).prepend_request(request)

    def prepend_requests(self, requests: Iterable[Request]) -> None:
        for request in requests:
            self.prepend_request(request)

    def remove_request(self, request: Request) -> None:
        self._queue(request.hotgraft_skill).remove_request(request)
        self._drop(request)

    def remove_requests(self, requests: Iterable[Request]) -> None:
        here = [request for request in requests if request in self._places]
        for skill in {request.hotgraft_skill for request in here}:
            self._queue(skill).remove_requests({r for r in here if r.hotgraft_skill == skill})
        for request in here:
            self._drop(request)

    def _head(self) -> RequestQueue:
        if self._narrow:
            return self._queue(self._shown)
        return self._queue(next(iter(self)).hotgraft_skill)

    def _queue(self, skill: Name) -> RequestQueue:
        if skill not in self._parts:
            self._parts[skill] = create_request_queue(self._policy)
        return self._parts[skill]

    def _drop(self, request: Request) -> None:
        del self._places[request]
        if not self._parts.get(request.hotgraft_skill):
            self._parts.pop(request.hotgraft_skill, None)


def _no_barrier() -> None:
    return None
