"""The lab: one GPU, its clocks, its cache, and what runs on it. Tests put another in its place.

Device time is between two events around what a call enqueues. A kernel that only spins goes in
front, so that everything is enqueued before the first event is reached and the time is the
device's, not that of Python's launching. Whole-call time is the CPU's, from an idle device until
the call returns; nothing waits for the device in between.
"""

from __future__ import annotations

import functools
import gc
import time
from collections.abc import Callable
from typing import Any

import hotgraft
import torch
from hotgraft import Host, kernels
from hotgraft.kernels.device import DeviceBackend

from bench.gpu.floor import Floor

Call = Callable[[], object]
BACKENDS = ("cuda", "triton")
EVICTION_BYTES = 256 << 20
"""At least so much is written to empty the L2; or four times its size."""
_SPIN_CYCLES_PER_US = 2000  # of a clock of 2 GHz; a slower one spins longer, which does no harm
_PATIENCE = 3  # samples that are taken again where the device did not wait for the CPU

# As torch has them, without types.
_event: Any = functools.partial(torch.cuda.Event, enable_timing=True)
_spin: Any = torch.cuda._sleep


class Lab:
    """The current CUDA device.

    Example:
        >>> Lab.why_not() is None or "CUDA" in Lab.why_not()
        True
    """

    device = torch.device("cuda", 0)

    @staticmethod
    def why_not() -> str | None:
        """Why nothing can be measured here, or None."""
        if torch.cuda.is_available():
            return None
        return "no CUDA device here" if torch.version.cuda else "this torch was built without CUDA"

    @functools.cached_property
    def backends(self) -> dict[str, str | None]:
        """The backends, with None where one runs here and the reason where it does not."""
        found = hotgraft.available_backends()
        return {name: found.get(name, "unknown to this hotgraft") for name in BACKENDS}

    @functools.cached_property
    def floor(self) -> Floor | str:
        """The raw kernels, or why there are none."""
        try:
            return Floor(torch.cuda.get_device_capability(self.device))
        except OSError as error:
            return str(error)

    def attach(self, model: torch.nn.Module, backend: str) -> Host:
        """A host on one of the backends."""
        return hotgraft.attach(model, backend=backend)

    def backend(self, name: str) -> DeviceBackend:
        """One of the backends, without a host."""
        found = kernels.resolve(name, self.device)
        assert isinstance(found, DeviceBackend)
        return found

    # ---- clocks ------------------------------------------------------------------------------

    def synchronize(self) -> None:
        """Wait until the device is idle."""
        torch.cuda.synchronize(self.device)

    def call_us(self, call: Call) -> float:
        """Microseconds until a call returns, the device idle before; then waits for the device."""
        self.synchronize()
        begin = time.perf_counter_ns()
        call()
        end = time.perf_counter_ns()
        self.synchronize()
        return (end - begin) / 1000

    def done_us(self, call: Call) -> float:
        """Microseconds until what a call enqueued is done, the device idle before."""
        self.synchronize()
        begin = time.perf_counter_ns()
        call()
        self.synchronize()
        return (time.perf_counter_ns() - begin) / 1000

    def device_us(self, call: Call, lead_us: float, cold: bool = False) -> float:
        """Microseconds that the device works on what a call enqueues.

        Args:
            call: must not wait for the device.
            lead_us: how long enqueuing takes, about.
            cold: whether the L2 is emptied before.
        """
        spin = 2 * lead_us + 100
        for _ in range(_PATIENCE):
            begin, end = (_event() for _ in range(2))
            self.synchronize()
            _spin(int(spin * _SPIN_CYCLES_PER_US))
            if cold:
                self._evict()
            begin.record()
            call()
            end.record()
            late = bool(begin.query())
            self.synchronize()
            if not late:  # everything was enqueued before the first event was reached
                break
            spin *= 3
        elapsed: float = begin.elapsed_time(end)
        return 1000 * elapsed

    # ---- memory ------------------------------------------------------------------------------

    def free_bytes(self) -> int:
        """Bytes of device memory that can still be had."""
        self.release()
        free: int = torch.cuda.mem_get_info(self.device)[0]
        return free

    def release(self) -> None:
        """Give back what nothing refers to."""
        gc.collect()
        torch.cuda.empty_cache()

    @functools.cached_property
    def _eviction_buffer(self) -> torch.Tensor:
        cache = int(torch.cuda.get_device_properties(self.device).L2_cache_size)
        return torch.ones(max(EVICTION_BYTES, 4 * cache), dtype=torch.uint8, device=self.device)

    def _evict(self) -> None:
        """Enqueue: write a buffer larger than the L2."""
        self._eviction_buffer.bitwise_not_()
