"""The order of a device's streams around commits, on devices that only take notes."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hosts import single, use
from hotgraft import attach
from hotgraft.errors import (
    AdoptWarning,
    BackendError,
    BaseMismatchError,
    GateError,
    HostChangedError,
)
from hotgraft.streams import Streams
from simulated import Simulated

GPU, OTHER = torch.device("cuda:0"), torch.device("cuda:1")


@dataclasses.dataclass(eq=False)
class Stream:
    """Notes what it was told to wait for."""

    cuda_stream: int
    device: torch.device = GPU
    waits: list[Any] = dataclasses.field(default_factory=list)
    recorded: int = 0
    captured: bool = False

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

    @contextlib.contextmanager
    def stream(self, stream: Stream) -> Iterator[None]:
        before, self.capturing = self.capturing, stream.captured
        yield
        self.capturing = before


def commit(streams: Streams) -> None:
    streams.order_write()
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
    assert side.waits == [("event", 2, 1)]  # the caller's own stream, at once
    for _ in range(3):
        streams.order_entry()
    assert side.waits == [("event", 2, 1)]  # once is enough
    third = cuda.current[GPU] = Stream(3)
    streams.order_entry()
    assert third.waits == [("event", 2, 1)]
    commit(streams)
    assert commits.waits == [1, 1, 3]
    commit(streams)
    assert commits.waits == [1, 1, 3, 3]  # the caller's stream, and nobody who entered since


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
    late = cuda.current[GPU] = Stream(3)
    cuda.capturing = True
    streams.order_entry()  # a pass may be captured; it must not wait for what is not
    assert late.waits == []
    with pytest.raises(GateError, match="a CUDA graph is being captured"):
        streams.order_write()
    with pytest.raises(GateError, match="a check would become part of the graph"):
        streams.require_no_capture("a check")
    cuda.capturing = False
    streams.order_entry()
    assert late.waits == [("event", 2, 1)]


def test_a_stream_of_another_device_is_refused() -> None:
    with pytest.raises(BackendError, match="belongs to cuda:1, and the model"):
        Streams([GPU], Stream(1, OTHER))  # type: ignore[arg-type]
    with pytest.raises(BackendError, match="weights are on no CUDA device"):
        Streams([torch.device("cpu")], Stream(1))  # type: ignore[arg-type]


def test_a_write_waits_for_the_callers_stream_though_nobody_entered_on_it() -> None:
    current, commits = Stream(1), Stream(2)
    streams = Streams([GPU], commits, Cuda(gpu0=current))  # type: ignore[arg-type]
    streams.order_write("a check")
    assert commits.waits == [1]


def test_what_is_undone_on_another_stream_waits_for_the_write() -> None:
    one, two = Stream(1), Stream(2)
    cuda = Cuda(gpu0=one)
    streams = Streams([GPU], None, cuda)
    streams.order_write()  # and then it was interrupted
    cuda.current[GPU] = two
    streams.order_write()
    assert two.waits == [1]


def test_no_commit_while_a_stream_that_runs_the_model_is_captured() -> None:
    side, commits = Stream(1), Stream(2)
    streams = Streams([GPU], commits, Cuda(gpu0=side))  # type: ignore[arg-type]
    streams.order_entry()
    side.captured = True
    with pytest.raises(GateError, match="captured on a stream that runs the model: the switch"):
        streams.order_write()
    assert commits.waits == []


class Late(Stream):
    """What is enqueued on it happens when somebody waits for it."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.queue: list[Callable[[], object]] = []

    def run(self) -> None:
        queue, self.queue = self.queue, []
        for work in queue:
            work()

    def record_event(self) -> Any:
        return self

    def wait_event(self, event: Any) -> None:
        event.run()

    def wait_stream(self, stream: Any) -> None:
        stream.run()


@pytest.mark.parametrize("verb", ["adopt", "verify", "load"])
def test_a_check_sees_what_was_enqueued_before_it(verb: str) -> None:
    current, given = Late(1), Late(2)
    model = torch.nn.Linear(4, 1, bias=False)
    torch.nn.init.constant_(model.weight, 1.0)
    graft = single("weight", model.weight.detach(), [0], [5.0])
    host = attach(model)
    use(host, Simulated())
    host._streams = host._ledger._streams = Streams([GPU], given, Cuda(gpu0=current))  # type: ignore[arg-type]
    host.load(graft, name="a")
    current.queue.append(lambda: model.weight.data.fill_(2.0))  # a step that has still to run
    if verb == "adopt":
        with pytest.warns(AdoptWarning):
            assert host.adopt() == ("a",)
    elif verb == "verify":
        with pytest.raises(HostChangedError, match="position 0"):
            host.verify()
    else:
        with pytest.raises(BaseMismatchError, match="position 0"):
            host.load(graft, name="b")
    assert model.weight.tolist() == [[2.0] * 4]
