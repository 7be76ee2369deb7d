"""A worker whose skills are made up: each adds something of its own to the model's norms."""

import torch
from hotgraft.serve.vllm.steps import SkillSteps
from vllm.v1.worker.cpu_worker import CPUWorker

SEEN = []
"""For each step with tokens its skill, the live one, and how many tokens for whom."""


class FakeSkillWorker(SkillSteps, CPUWorker):
    def hotgraft_switch(self, skill):
        norms = [p for n, p in self.model_runner.model.named_parameters() if "norm" in n]
        if not hasattr(self, "_base"):
            self._base = [p.detach().clone() for p in norms]
        noise = torch.Generator().manual_seed(sum(map(ord, skill or "")))
        for norm, base in zip(norms, self._base, strict=True):
            shift = torch.randn(base.shape, generator=noise) if skill else torch.zeros(base.shape)
            norm.data.copy_(base + shift)

    def execute_model(self, scheduler_output):
        result = super().execute_model(scheduler_output)
        if tokens := scheduler_output.num_scheduled_tokens:
            # The engine adds to a request's name.
            counts = {name.rpartition("-")[0]: n for name, n in tokens.items()}
            named = getattr(scheduler_output, "hotgraft_skill", None)
            SEEN.append((named, self.hotgraft_live, counts))
        return result
