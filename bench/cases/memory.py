"""What a loaded skill takes: real memory, measured over many loads in a process of its own.

The skills come from files, so no graft object is shared with the host. Two patches, one large and
one of a few entries a tensor, tell the cost of an entry from that of a tensor.
"""

from __future__ import annotations

import sys
import tracemalloc
from pathlib import Path
from typing import Any

import hotgraft

from bench import memory, shapes
from bench.rows import Row, Target
from bench.session import Session

ENTRY_BYTES, TENSOR_BYTES = 8, 256


def run(session: Session) -> None:
    """The case."""
    shape = shapes.SHAPES[session.pick("0.13B", "tiny")]
    tensors = dict(shapes.model(shape).named_parameters())
    sizes = session.pick(((131_019, 20), (4 * len(tensors), 200)), ((20_000, 5),))
    for entries, skills in sizes:
        folder = session.scratch / str(entries)
        folder.mkdir()
        for i in range(skills):
            shapes.graft(tensors, entries, seed=i).save(folder / f"s{i}.graft.safetensors")
        rows = []
        for how in ("resident", "traced"):
            result = memory.watch_child(__spec__.name, shape.name, str(folder), how)
            each = result["bytes"] / skills
            row = Row(
                "memory", "load", f"a skill, {how}", "cpu",
                {"shape": shape.name, "entries": entries, "tensors": len(tensors),
                 "skills": skills, "nbytes": result["nbytes"]},
                [each], unit="bytes", correct=result["correct"],
            )  # fmt: skip
            if how == "resident":
                limit = ENTRY_BYTES * entries + TENSOR_BYTES * len(tensors)
                row.targets.append(
                    Target("bytes over 8 an entry and 256 a tensor", round(each / limit, 4), 1.0)
                )
            rows.append(row)
        session.add(rows)


def child(shape: str, folder: str, how: str) -> dict[str, Any]:
    """Load every graft of a folder into a host and see what that took."""
    host = hotgraft.attach(shapes.model(shapes.SHAPES[shape]))
    paths = sorted(Path(folder).iterdir())
    host.load(paths[0], "first")  # so that what happens once is done
    host.activate("first")
    host.deactivate()
    host.unload("first")
    if how == "traced":
        tracemalloc.start()
    before = memory.settled()
    for i, path in enumerate(paths):
        host.load(path, f"s{i}")
    after = memory.settled()
    taken = after - before if how == "resident" else tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    checked = host.verify()
    skills = host.skills.values()
    return {
        "bytes": taken,
        "nbytes": next(iter(skills)).nbytes,
        "correct": checked == sum(skill.nnz for skill in skills),
    }


if __name__ == "__main__":
    memory.serve(lambda: child(*sys.argv[1:]))
