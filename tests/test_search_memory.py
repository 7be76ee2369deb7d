"""What a search holds: its candidates, one dense gradient at a time, and no model again."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import searching
import torch
from hotgraft import diff
from hotgraft.search.candidates import Candidates
from hotgraft.search.method import PER_CANDIDATE, largest_affordable
from searching import batches, loss
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

pytestmark = pytest.mark.usefixtures("one_thread")


class Deep(nn.Module):
    """Twelve layers of one size."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(6, 6) for _ in range(12)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x[:, :3]


@pytest.mark.parametrize("freed", [True, False])
def test_dense_gradients_of_two_layers_are_never_alive_at_once(freed: bool) -> None:
    model = Deep()
    graft = diff(model, searching.nudged(model.state_dict()))
    alive: list[tuple[str, StorageWeakRef]] = []
    most: list[int] = []

    def watch(name: str) -> Any:
        def arrived(gradient: torch.Tensor) -> None:
            alive.append((name, StorageWeakRef(gradient.untyped_storage())))
            most.append(len({n for n, storage in alive if not storage.expired()}))

        return arrived

    for name, p in model.named_parameters():
        if name.endswith("weight"):
            p.register_hook(watch(name))
    if freed:
        with Candidates(model, graft) as candidates:
            candidates.differentiate(loss, batches(1)[0], "here")
            assert all(storage.expired() for _, storage in alive)
            assert candidates.slopes.count_nonzero() > graft.nnz // 2
    else:  # that the watch sees gradients which are kept
        loss(model, batches(1)[0]).backward()
    assert len(most) == 12
    assert max(most) == (1 if freed else 12)


RUN = """
import ctypes
import gc
import re
from pathlib import Path
import torch
import hotgraft
from hotgraft.search import Learned
from hotgraft.search.method import largest_affordable
from torch import nn

def now(key):
    return 1024 * int(re.search(key + r":\\s+(\\d+)", Path("/proc/self/status").read_text())[1])

torch.set_num_threads(1)
torch.manual_seed(0)

class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(512, 512) for _ in range(60)])
    def forward(self, x):
        for layer in self.layers:
            x = x + torch.tanh(layer(x))
        return x

model = Block()
tuned = {n: t + 0.01 * torch.randn_like(t) for n, t in model.state_dict().items()}
x = torch.randn(4, 512)
def loss(model, batch):
    return model(batch).square().mean()
loss(model, x).backward()  # what torch itself needs at first
model.zero_grad()
nbytes = sum(p.nbytes for p in model.parameters())
hotgraft.localize(model, tuned, loss, [x], count=5, method=Learned(steps=2))
gc.collect()
ctypes.CDLL(None).malloc_trim(0)  # or what is free already hides what is taken anew
Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
before = now("RssAnon")
graft = hotgraft.localize(model, tuned, loss, [x], density=1e-3, method=Learned(steps=3))
peak = now("VmHWM") - now("RssFile") - now("RssShmem") - before
eligible = graft.provenance.eligible
print(nbytes, graft.nnz, largest_affordable(graft.nnz, eligible, nbytes), peak)
"""


def test_peak_memory_is_a_quarter_of_the_base() -> None:
    """Beyond the base, and with the activations of a small batch."""
    command = [sys.executable, "-c", RUN]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    nbytes, count, pool, peak = map(int, done.stdout.split())
    assert count == nbytes // 4 // 1000
    assert pool * PER_CANDIDATE <= nbytes // 4
    assert pool > 10 * count
    assert pool * 20 < peak < nbytes // 4 + 2**20 + 2**22  # a layer's gradient, and noise
    assert pool == largest_affordable(count, nbytes // 4, nbytes)
