"""The exact difference of two checkpoint files in the page cache."""

from __future__ import annotations

from pathlib import Path

import hotgraft
import torch

from bench import environment, floor, shapes
from bench.checkpoints import mapped_pairs, watch_diff, write_base, write_changed
from bench.rows import Row, Target
from bench.session import Session, make_rows, ratio
from bench.timing import Contender, take_turns

MEMORY_BYTES = 64 << 20
MINE, NONZERO = "hotgraft.diff", "torch (a != b).nonzero()"


def run(session: Session) -> None:
    """The case."""
    shape = shapes.SHAPES[session.pick("1.3B", "small")]
    base = session.scratch / "base.safetensors"
    state = write_base(base, shape)
    finetuned = session.scratch / "finetuned.safetensors"
    for changed in session.pick((1e-4, 1e-2), (1e-2,)):
        expected = write_changed(finetuned, state, changed)
        found = _measure(session, base, finetuned, shape, changed)
        mine = next(row for row in found if row.variant == MINE)
        mine.correct = hotgraft.diff(base, finetuned) == expected
        session.add([*found, memory_row("diff", base, finetuned, 0, mine, MEMORY_BYTES)])


def read_contender(base: Path, finetuned: Path) -> Contender:
    """The floor of reading both files through, mapped anew."""
    workers = floor.threads()

    def read() -> None:
        floor.read_mapped(base, workers)
        floor.read_mapped(finetuned, workers)

    return Contender(
        "floor, mapped read", f"plain C, {workers} threads", {"diff": read}, awake=True, slack=True
    )


def _measure(
    session: Session, base: Path, finetuned: Path, shape: shapes.Shape, changed: float
) -> list[Row]:
    mine = Contender(
        MINE,
        f"cpu {environment.isa()}, {floor.threads()} threads",
        {"diff": lambda: hotgraft.diff(base, finetuned)},
        slack=True,
    )
    theirs = Contender(
        NONZERO,
        f"torch, {torch.get_num_threads()} threads",
        {"diff": lambda: [(a != b).nonzero() for a, b in mapped_pairs(base, finetuned)]},
        every=session.pick(3, 1),
        slack=True,
    )
    contenders = [mine, theirs, read_contender(base, finetuned)]
    for contender in contenders:  # so that the page cache holds both files
        contender.steps["diff"]()
    take_turns(contenders, session.pick(9, 2), cold=False)
    size = base.stat().st_size + finetuned.stat().st_size
    parameters = {
        "shape": shape.name,
        "changed": changed,
        "entries": int(changed * shape.parameters),
        "files": "page cache",
    }
    found = make_rows("diff", contenders, parameters, lambda _c, _s: size)
    faster = round(1 / ratio(found, "diff", MINE, NONZERO), 2)
    share = round(1 / ratio(found, "diff", MINE, "floor"), 3)
    found[0].targets += [
        Target("times faster than nonzero", faster, 4, least=True),
        Target("of the mapped-read bandwidth", share, 0.5, least=True),
    ]
    return found


def memory_row(
    case: str, base: Path, finetuned: Path, density: float, like: Row, limit: int
) -> Row:
    """How much anonymous memory a comparison takes besides its result, in a process of its own."""
    result = watch_diff(base, finetuned, density)
    row = Row(
        case, "anonymous memory", like.variant, like.body,
        {**like.parameters, "result_bytes": result["result_bytes"], "reads": result["reads"]},
        [result["growth"] - result["result_bytes"]], unit="bytes",
    )  # fmt: skip
    row.targets.append(
        Target("MiB besides the result", round(row.median / 2**20, 1), limit / 2**20)
    )
    return row
