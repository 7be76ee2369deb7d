"""Loading a skill on a rank that runs out of memory, wherever that is."""

import os
import subprocess
import sys

SCRIPT = """
import resource, sys, time
from pathlib import Path
import hotgraft, torch
from hotgraft.serve.rank import Rank
from hotgraft.weights import open_weights

class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.w = torch.nn.Parameter(torch.zeros(256, 1024))
    def load_weights(self, weights):
        for _, tensor in weights:
            self.w.data.copy_(tensor)

folder = Path(sys.argv[1])
base = {"w": torch.randn(256, 1024)}
hotgraft.diff(base, {"w": base["w"] + 1}).save(folder / "large")
hotgraft.diff(base, {"w": torch.where(base["w"] > 2, 0.0, base["w"])}).save(folder / "small")
model = Model()
model.load_weights(base.items())
with open_weights(base) as weights:
    rank = Rank(model, model.load_weights, weights)

def load(name):
    rank.begin(name, "token", folder / name)
    while rank.prepared(name, "token") is None:
        time.sleep(0.0005)

load("small")
rank.keep("small", "token")
load("large")
rank.withdraw("large", "token")
limits = resource.getrlimit(resource.RLIMIT_AS)
failed = 0
for room in range(0, 40 << 20, 1 << 19):
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + room, limits[1]))
    try:
        load("large")
        break
    except MemoryError:
        failed += 1
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)
    rank.withdraw("large", "token")
    assert list(rank.host.skills) == ["small"]
    rank.activate(("small",), "refuse", None)
    assert rank.verify() > 0
    rank.activate((), "refuse", None)
    assert torch.equal(model.w, base["w"])
rank.keep("large", "token")
rank.activate(("large",), "refuse", None)
assert torch.equal(model.w, base["w"] + 1)
print(failed)
"""
MALLOC = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_THRESHOLD_": "65536",
    "MALLOC_TRIM_THRESHOLD_": "65536",
}
"""Memory comes from the system and goes back to it, so that a limit finds every allocation."""


def test_a_load_that_runs_out_of_memory_is_an_error_and_leaves_nothing(tmp_path):
    """With ever more room: each try but the last fails, and the rank is as it was before."""
    environment = {**os.environ, **MALLOC, "OMP_NUM_THREADS": "1"}
    run = [sys.executable, "-c", SCRIPT, str(tmp_path)]
    found = subprocess.run(
        run, check=False, capture_output=True, text=True, env=environment, timeout=120
    )
    assert found.returncode == 0, found.stderr
    assert int(found.stdout) > 10
