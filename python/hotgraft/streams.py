"""Streams: a device's work on several streams, put into order around commits.

A commit is enqueued on one stream of each device. Passes may run on others. Whoever enters waits
(on the device, not on the CPU) for the last commit, and so does the stream that is current when it
is made. A commit, or a check, waits for all that was enqueued before it on the streams that anybody
entered on, and on the caller's current one. CUDA graphs that are replayed outside of the model's
`forward` are not seen: replay them on the commits' stream, or on the stream that is current when
`host.hold()` is entered.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch

from hotgraft.errors import BackendError, GateError
from hotgraft.gate import untraced


class Streams:
    """The order of one host's streams.

    Args:
        devices: where its weights are; only CUDA devices have streams.
        given: the stream that commits of its device go to; by default the current one at each.
        cuda: the module to ask, for tests.

    Raises:
        BackendError: the stream belongs to another device.

    Example:
        >>> Streams([torch.device("cpu")]).order_entry()  # nothing to do
    """

    def __init__(
        self,
        devices: Iterable[torch.device],
        given: torch.cuda.Stream | None = None,
        cuda: Any = torch.cuda,
    ) -> None:
        self._cuda = cuda
        self._devices = tuple(device for device in devices if device.type == "cuda")
        if given is not None and given.device not in self._devices:
            held = ", ".join(map(str, self._devices)) or "no CUDA device"
            raise BackendError(
                f"the stream belongs to {given.device}, and the model's weights are on {held}"
            )
        self._given: Mapping[torch.device, Any] = {} if given is None else {given.device: given}
        self._committed: dict[torch.device, tuple[Any, Any]] = {}  # the last: its stream, its event
        # The streams entered on since the last commit, by device and number. Those in here have
        # waited for the last commit.
        self._entered: dict[torch.device, dict[int, Any]] = {d: {} for d in self._devices}

    def _commits_on(self, device: torch.device) -> Any:
        return self._given.get(device) or self._cuda.current_stream(device)

    @untraced
    def order_entry(self) -> None:
        """The current streams wait for the last commit, and the next commit will wait for them."""
        if not self._devices or self._cuda.is_current_stream_capturing():
            return  # what is captured does not run now, and may not wait for what is not captured
        for device in self._devices:
            current = self._cuda.current_stream(device)
            entered = self._entered[device]
            if current.cuda_stream in entered:
                continue
            if device in self._committed:
                stream, event = self._committed[device]
                if stream != current:
                    current.wait_event(event)
            entered[current.cuda_stream] = current

    def require_no_capture(self, what: str) -> None:
        """Raises `GateError` if the current stream is being captured into a CUDA graph."""
        if self._devices and self._cuda.is_current_stream_capturing():
            raise GateError(
                f"a CUDA graph is being captured on this stream: {what} would become part of the "
                "graph instead of happening now; do it before or after the capture"
            )

    def order_write(self, what: str = "the switch") -> None:
        """The commits' streams wait for the caller's current ones and for whoever entered.

        Raises:
            GateError: the current stream, or one that somebody entered on, is being captured into
                a CUDA graph.
        """
        self.require_no_capture(what)
        self.order_entry()
        for device in self._devices:
            mine, entered = self._commits_on(device), self._entered[device]
            others = [stream for stream in entered.values() if stream != mine]
            if any(map(self._is_capturing, others)):
                raise GateError(
                    f"a CUDA graph is being captured on a stream that runs the model: {what} would "
                    "become part of the graph; wait until the capture is over"
                )
            for stream in others:
                mine.wait_stream(stream)
            if device in self._committed and self._committed[device][0] != mine:
                mine.wait_event(self._committed[device][1])
            entered[mine.cuda_stream] = mine  # whoever undoes this elsewhere waits for it

    def _is_capturing(self, stream: Any) -> bool:
        with self._cuda.stream(stream):
            capturing: bool = self._cuda.is_current_stream_capturing()
        return capturing

    def note_commit(self) -> None:
        """A commit was enqueued: the caller's current streams, and whoever enters, wait for it."""
        for device in self._devices:
            mine, current = self._commits_on(device), self._cuda.current_stream(device)
            event = mine.record_event()
            self._committed[device] = mine, event
            self._entered[device] = {mine.cuda_stream: mine}
            if current != mine:
                current.wait_event(event)
                self._entered[device][current.cuda_stream] = current
