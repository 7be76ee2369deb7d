"""Reading a graft file and preparing the skill; importing hotgraft on top of torch."""

from __future__ import annotations

import subprocess
import sys

import hotgraft
import torch

from bench import shapes
from bench.rows import Row, Target
from bench.session import Session, make_rows
from bench.timing import Contender, take_turns

LOAD_MS, IMPORT_MS = 10.0, 30.0
_IMPORT = """
import time, torch
begin = time.perf_counter()
import hotgraft
print((time.perf_counter() - begin) * 1e6)
"""


def run(session: Session) -> None:
    """The case."""
    shape = shapes.SHAPES[session.pick("1.3B", "tiny")]
    model = shapes.model(shape)
    graft = shapes.graft(dict(model.named_parameters()), session.pick(131_019, 2000), 1)
    path = session.scratch / "patch.graft.safetensors"
    graft.save(path)
    host = hotgraft.attach(model)
    whole = Contender(
        "hotgraft",
        "cpu",
        {
            "Graft.load + host.load": lambda: host.load(path, "patch"),
            "host.unload": lambda: host.unload("patch"),
            "Graft.load": lambda: hotgraft.Graft.load(path),
        },
    )
    state = session.scratch / "patch.pt"
    torch.save({name: tuple(graft[name]) for name in graft.names}, state)
    plain = Contender(
        "torch.load of the same tensors", "torch", {"Graft.load": lambda: torch.load(state)}
    )
    whole.correct = hotgraft.Graft.load(path) == graft
    take_turns([whole, plain], session.pick(40, 3), cold=False)
    parameters = {"shape": shape.name, "entries": graft.nnz, "tensors": len(graft.names)}
    found = make_rows("load", [whole, plain], parameters, lambda _c, _s: path.stat().st_size)
    found[0].targets.append(
        Target("ms to read and prepare a file", round(found[0].median / 1000, 2), LOAD_MS)
    )
    session.add([row for row in found if row.operation != "host.unload"])
    host.detach()
    _imports(session)


def _imports(session: Session) -> None:
    samples = [
        float(
            subprocess.run(
                [sys.executable, "-c", _IMPORT], capture_output=True, text=True, check=True
            ).stdout
        )
        for _ in range(session.pick(9, 1))
    ]
    row = Row("load", "import", "import hotgraft, after torch", "Python", {}, samples)
    row.targets.append(Target("ms on top of torch", round(row.median / 1000, 1), IMPORT_MS))
    session.add([row])
