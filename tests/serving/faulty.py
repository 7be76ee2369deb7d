"""A worker with faults of its own making, for servers that have to live with them."""

import os
import resource
import signal
from pathlib import Path

from hotgraft.serve.vllm.served import ServedWorker

ROOM = 8 << 20
"""Bytes that a rank which is short of memory has left."""


class Worker(ServedWorker):
    """Faults are the last rank's, and go by the names of skills.

    The first load of "large" finds hardly any memory. That of "endless" never ends. A switch to
    "fatal" is the end of this process, when the other ranks may have made it.
    """

    unlimited = None
    short = True

    @property
    def last(self):
        return self.rank == self.parallel_config.world_size - 1

    def hotgraft(self, method, args=()):
        name = args[0] if args else None
        if name == "endless" and method == "prepared":
            return {"value": None}
        if name == "large" and method == "begin" and self.last and self.short:
            self.short = False
            self.unlimited = resource.getrlimit(resource.RLIMIT_AS)
            pages = int(Path("/proc/self/statm").read_text().split()[0])
            limit = pages * resource.getpagesize() + ROOM
            resource.setrlimit(resource.RLIMIT_AS, (limit, self.unlimited[1]))
        if name == "large" and method == "withdraw" and self.unlimited:
            resource.setrlimit(resource.RLIMIT_AS, self.unlimited)
            self.unlimited = None
        return super().hotgraft(method, args)

    def hotgraft_switch(self, skill):
        if skill == "fatal" and self.last:
            os.kill(os.getpid(), signal.SIGKILL)
        super().hotgraft_switch(skill)
