"""Lets vLLM's CPU engine schedule a step ahead, as it does on GPUs.

Its platform forbids that, as there is nothing to gain: a step is over when its call returns. The
engine's loop, the scheduler and the model runner are those of GPUs all the same. Only streams and
events of the device have to be stood in for, and where all is done at once they have nothing to do.
"""

import contextlib

import torch
from vllm.platforms.cpu import CpuPlatform


class Stream:
    def __init__(self, *_, **__):
        self.device = torch.device("cpu")

    def wait_stream(self, other):
        pass


class Event:
    def __init__(self, *_, **__):
        pass

    def record(self, *_):
        pass

    def synchronize(self):
        pass


@contextlib.contextmanager
def allowed(patch):
    """Engines that are made in the block, and used while it lasts, schedule ahead."""
    plain = CpuPlatform.check_and_update_config

    def check_and_update_config(config):
        plain(config)
        config.scheduler_config.async_scheduling = True

    with patch.context() as inside:
        ours = staticmethod(check_and_update_config)
        inside.setattr(CpuPlatform, "check_and_update_config", ours)
        inside.setattr(torch.cuda, "Stream", Stream)
        inside.setattr(torch.cuda, "Event", Event)
        inside.setattr(torch.cuda, "current_stream", lambda *_: Stream())
        inside.setattr(torch.cuda, "stream", lambda _: contextlib.nullcontext())
        yield
