"""The order of a device's streams around commits, on devices that only take notes."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from hotgraft.errors import BackendError, GateError
from hotgraft.streams import Streams

GPU, OTHER = torch.device("cuda:0"), torch.device("cuda:1")


@dataclasses.dataclass(eq=False)
class Stream:
    """Notes what it was told to wait for."""

    cuda_stream: int
    device: torch.device = GPU
    waits: list[Any] = dataclasses.field(default_factory=list)
    recorded: int = 0

    def record_event(self) -> tuple[str, int, int]:
        self.recorded += 1
        return "event", self.cuda_stream, self.recorded

    def wait_event(self, event: Any) -> None:
        self.waits.append(event)

    def wait_stream(self, stream: Stream) -> None:
        self.waits.append(stream.cuda_stream)


class Cuda:
    """Stands in for `torch.cuda`."""

    def __init__(self, **current: Stream) -> None:
        self.current = {torch.device("cuda", int(k[-1])): v for k, v in current.items()}
        self.capturing = False

    def current_stream(self, device: torch.device) -> Stream:
        return self.current[device]

    def is_current_stream_capturing(self) -> bool:
        return self.capturing


def commit(streams: Streams) -> None:
    streams.order_commit()
    streams.note_commit()


def test_on_one_stream_nobody_waits() -> None:
    only = Stream(7)
    streams = Streams([GPU], None, Cuda(gpu0=only))
    for _ in range(3):
        streams.order_entry()
        commit(streams)
    assert only.waits == []


def test_a_commit_waits_for_whoever_entered_and_who_enters_waits_for_it() -> None:
    side, commits = Stream(1), Stream(2)
    cuda = Cuda(gpu0=side)
    streams = Streams([GPU], commits, cuda)  # type: ignore[arg-type]
    streams.order_entry()
    assert side.waits == []  # there was no commit yet
    commit(streams)
    assert commits.waits == [1]
    for _ in range(3):
        streams.order_entry()
    assert side.waits == [("event", 2, 1)]  # once is enough
    third = cuda.current[GPU] = Stream(3)
    streams.order_entry()
    assert third.waits == [("event", 2, 1)]
    commit(streams)
    assert commits.waits == [1, 1, 3]
    commit(streams)
    assert commits.waits == [1, 1, 3]  # nobody entered since


def test_commits_on_changing_streams_wait_for_one_another() -> None:
    one, two = Stream(1), Stream(2)
    cuda = Cuda(gpu0=one)
    streams = Streams([GPU], None, cuda)
    commit(streams)
    cuda.current[GPU] = two
    commit(streams)
    assert two.waits[-1] in (1, ("event", 1, 1))
    assert one.waits == []


def test_every_device_has_its_own_order() -> None:
    zero, one, given = Stream(1), Stream(1, OTHER), Stream(2, OTHER)
    streams = Streams([GPU, OTHER], given, Cuda(gpu0=zero, gpu1=one))  # type: ignore[arg-type]
    streams.order_entry()
    commit(streams)
    assert (zero.waits, given.waits) == ([], [1])
    streams.order_entry()
    assert (zero.waits, one.waits) == ([], [("event", 2, 1)])


def test_no_commit_while_a_graph_is_captured() -> None:
    side, commits = Stream(1), Stream(2)
    cuda = Cuda(gpu0=side)
    streams = Streams([GPU], commits, cuda)  # type: ignore[arg-type]
    commit(streams)
    cuda.capturing = True
    streams.order_entry()  # a pass may be captured; it must not wait for what is not
    assert side.waits == []
    with pytest.raises(GateError, match="a CUDA graph is being captured"):
        streams.order_commit()
    with pytest.raises(GateError, match="a check would become part of the graph"):
        streams.require_no_capture("a check")
    cuda.capturing = False
    streams.order_entry()
    assert side.waits == [("event", 2, 1)]


def test_a_stream_of_another_device_is_refused() -> None:
    with pytest.raises(BackendError, match="belongs to cuda:1, and the model"):
        Streams([GPU], Stream(1, OTHER))  # type: ignore[arg-type]
    with pytest.raises(BackendError, match="weights are on no CUDA device"):
        Streams([torch.device("cpu")], Stream(1))  # type: ignore[arg-type]
