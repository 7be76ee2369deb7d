"""The largest |difference| of two models: in memory beside torch.topk, and from files."""

from __future__ import annotations

import hotgraft
import torch
from hotgraft import Graft
from safetensors.torch import save_file

from bench import environment, floor, shapes
from bench.cases.diff import memory_row, read_contender
from bench.checkpoints import noisy, write_base
from bench.rows import Target
from bench.session import Session, make_rows, ratio
from bench.timing import Contender, take_turns

DENSITY = 1e-4
MEMORY_BYTES, READS = 32 << 20, 4
MINE, TOPK = "hotgraft.diff", "torch.topk"


def run(session: Session) -> None:
    """The case."""
    density = session.pick(DENSITY, 1e-2)
    _in_memory(session, shapes.SHAPES[session.pick("0.13B", "tiny")], density)
    _from_files(session, shapes.SHAPES[session.pick("1.3B", "small")], density)


def _body() -> str:
    return f"cpu {environment.isa()}, {floor.threads()} threads"


def _scores(base: dict[str, torch.Tensor], tuned: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.cat([(tuned[name].float() - base[name].float()).abs_().view(-1) for name in base])


def _in_memory(session: Session, shape: shapes.Shape, density: float) -> None:
    base = shapes.weights(shape)
    tuned = noisy(base)
    k = shapes.entries_at(density, shape)
    mine = Contender(
        MINE, _body(), {"topk": lambda: hotgraft.diff(base, tuned, density=density)}, slack=True
    )
    theirs = Contender(
        TOPK,
        f"torch, {torch.get_num_threads()} threads",
        {"topk": lambda: torch.topk(_scores(base, tuned), k, sorted=False)},
        every=session.pick(3, 1),
        slack=True,
    )
    mine.correct = _is_largest(hotgraft.diff(base, tuned, density=density), base, tuned, k)
    take_turns([mine, theirs], session.pick(9, 2), cold=False)
    parameters = {"shape": shape.name, "density": density, "entries": k, "files": "none"}
    size = 2 * shape.parameters * 2
    found = make_rows("topk", [mine, theirs], parameters, lambda _c, _s: size)
    faster = round(1 / ratio(found, "topk", MINE, TOPK), 2)
    found[0].targets.append(Target("times faster than torch.topk", faster, 5, least=True))
    session.add(found)


def _is_largest(
    graft: Graft, base: dict[str, torch.Tensor], tuned: dict[str, torch.Tensor], k: int
) -> bool:
    wanted = torch.topk(_scores(base, tuned), k).values
    kept = torch.cat([(graft[n].new.float() - graft[n].old.float()).abs() for n in graft.names])
    return graft.nnz == k and torch.equal(kept.sort(descending=True).values, wanted)


def _from_files(session: Session, shape: shapes.Shape, density: float) -> None:
    base, tuned = (session.scratch / f"{n}.safetensors" for n in ("base", "tuned"))
    save_file(noisy(write_base(base, shape)), tuned)
    mine = Contender(
        MINE, _body(), {"diff": lambda: hotgraft.diff(base, tuned, density=density)}, slack=True
    )
    contenders = [mine, read_contender(base, tuned)]
    for contender in contenders:
        contender.steps["diff"]()
    take_turns(contenders, session.pick(5, 2), cold=False)
    parameters = {
        "shape": shape.name,
        "density": density,
        "entries": shapes.entries_at(density, shape),
        "files": "page cache",
    }
    size = base.stat().st_size + tuned.stat().st_size
    found = make_rows("topk", contenders, parameters, lambda _c, _s: size)
    for row in found:
        row.operation = "topk"
    row = memory_row("topk", base, tuned, density, found[0], MEMORY_BYTES)
    row.targets.append(Target("reads of the data", round(row.parameters["reads"], 2), READS))
    session.add([*found, row])
