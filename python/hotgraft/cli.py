"""The command `hotgraft`. Exit status: 0, or 1 (a check failed, hotgraft refused), or 2 (bad use).

What takes long to import is imported by the command that needs it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hotgraft.arguments import (
    CheckpointPath,
    GraftOut,
    GraftPath,
    GraftPaths,
    Json,
    Policy,
    Weights,
    check_budget,
    check_count,
    check_folder,
    check_out,
    given_path,
    one_of,
    scopes,
    weights_for,
)
from hotgraft.console import Output, number, percent, printable, say_saved, size
from hotgraft.localize_command import localize
from hotgraft.serve_command import CONTEXT, serve

if TYPE_CHECKING:
    from hotgraft.graft import Graft

app = typer.Typer(
    name="hotgraft",
    help="Version control for live weights: find, store, compose and hot-swap sparse patches.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def main() -> None:
    """The entry point of the command `hotgraft`."""
    app(prog_name="hotgraft")


# ---- what the commands share ------------------------------------------------------------------


def _labels(paths: Sequence[Path]) -> list[str]:
    """What to call graft files: their names, or their paths where two names are the same."""
    names = [path.name.removesuffix(".safetensors").removesuffix(".graft") for path in paths]
    return names if len(set(names)) == len(names) else [str(path) for path in paths]


def _load(paths: Sequence[Path]) -> list[Graft]:
    from hotgraft.graft import Graft

    return [Graft.load(path) for path in paths]


def _base_id(output: Output, base: Path) -> str:
    """A base's id, with a bar while it is computed: everything is read once."""
    from hotgraft.weights import fingerprint

    with output.bars() as bars:
        bars.add_task(printable(f"hashing {base.name}"), total=None)
        return fingerprint(base)


def _show_version(wanted: bool) -> None:
    if wanted:
        from hotgraft.format import creator

        typer.echo(creator())
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Say the version."),
    ] = False,
) -> None:
    """Version control for live weights: find, store, compose and hot-swap sparse patches."""


# ---- the commands -----------------------------------------------------------------------------


@app.command()
def demo(
    train: Annotated[
        bool, typer.Option("--train", help="Fine-tune and make the skills again (minutes).")
    ] = False,
    model: Annotated[
        Path | None, typer.Option(help="A folder with all-MiniLM-L6-v2, instead of the package's.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Where the plot goes.")] = Path("hotgraft-demo"),
    texts: Annotated[
        int, typer.Option(min=10, help="Test texts a task; the whole test set has about 1,000.")
    ] = 300,
    as_json: Json = False,
) -> None:
    """Swap two real skills in and out of a pretrained encoder, and prove that nothing is left."""
    with Output(as_json) as output:
        from hotgraft.demo import run

        run.demo(output, train=train, model_folder=model, out=out, texts=texts)


@app.command("diff")
def diff_command(
    base: CheckpointPath,
    finetuned: CheckpointPath,
    out: GraftOut,
    density: Annotated[
        float | None, typer.Option(help="Keep this share of the eligible entries, in (0, 1].")
    ] = None,
    count: Annotated[int | None, typer.Option(min=1, help="Keep this many entries.")] = None,
    scope: Annotated[
        str,
        typer.Option(callback=one_of(scopes), help="Eligible tensors: all, encoder or linear."),
    ] = "all",
    base_id: Annotated[
        bool, typer.Option("--base-id", help="Compute the base's id (reads all of it) and store it")
    ] = False,
    as_json: Json = False,
) -> None:
    """Find the graft that leads from BASE to FINETUNED: exact, or its largest changes."""
    check_budget(density, count)
    check_out(out, [base, finetuned])
    with Output(as_json) as output:
        from hotgraft.difference import diff

        if count is not None:
            check_count(count, base, scope)
        identity = _base_id(output, base) if base_id else None
        with output.bar("comparing") as progress:
            graft = diff(
                base, finetuned, density=density, count=count, scope=scope, base_id=identity,
                progress=progress,
            )  # fmt: skip
        graft.save(out)
        say_saved(output, graft, out)


@app.command("inspect")
def inspect_command(graft: GraftPath, as_json: Json = False) -> None:
    """Say what a graft file holds, tensor by tensor. The file is mapped, not held."""
    with Output(as_json) as output:
        from hotgraft.inspection import inspect

        found = inspect(graft)
        output.result(
            {
                "path": str(graft),
                "bytes": found.nbytes,
                "entries": found.entries,
                "density": found.density,
                "metadata": dict(found.metadata),
                "tensors": [
                    {
                        **tensor._asdict(),
                        "largest_change": _finite(tensor.largest_change),
                    }
                    for tensor in found.tensors
                ],
            }
        )
        about = {k: v for k, v in found.metadata.items() if k not in {"density", "eligible"}}
        output.facts(
            {
                "file": f"{graft} ({size(found.nbytes)})",
                "entries": f"{number(found.entries)} in {number(len(found.tensors))} tensors",
                "density": f"{percent(found.density)} of {number(found.eligible)} elements "
                f"(scope {about.pop('scope')})",
                **{name.replace("_", " "): about[name] for name in sorted(about)},
            }
        )
        output.table(
            ["tensor", "shape", "type", "entries", "share", "largest change"],
            [
                [
                    tensor.name,
                    "×".join(map(str, tensor.shape)),
                    tensor.dtype,
                    number(tensor.entries),
                    percent(tensor.share),
                    f"{tensor.largest_change:.4g}",
                ]
                for tensor in found.tensors
            ],
            words=3,
        )


def _finite(value: float) -> float | None:
    """JSON has no NaN and no infinity."""
    return value if math.isfinite(value) else None


@app.command()
def verify(
    graft: GraftPath,
    base: Annotated[
        Path | None,
        typer.Option(exists=True, help="Check too that this checkpoint holds the old bits."),
    ] = None,
    base_id: Annotated[
        bool, typer.Option("--base-id", help="Check too the base's id (reads all of the base).")
    ] = False,
    as_json: Json = False,
) -> None:
    """Check a graft file: its contents, its id, and that a base holds what it wants to replace."""
    if base_id and base is None:
        raise typer.BadParameter("it needs --base", param_hint="--base-id")
    with Output(as_json) as output:
        from hotgraft.checkpoint import check
        from hotgraft.errors import BaseMismatchError
        from hotgraft.graft import Graft

        loaded = Graft.load(graft)
        checked = {"file": f"{graft}: contents and id hold ({loaded.id})"}
        if base is not None:
            check(loaded, base)
            checked["base"] = f"{base}: all {number(loaded.nnz)} entries hold the old bits"
        if base is not None and base_id:
            stored = loaded.provenance.base_id
            found = _base_id(output, base)
            if found != stored:
                raise BaseMismatchError(
                    f"{base}: its id is {found}, but the graft was made against "
                    f"{stored or 'a base whose id it does not state'}"
                )
            checked["base id"] = f"{base}: it is {stored}, as the graft states"
        output.result(
            {
                "ok": True,
                "id": loaded.id,
                "entries": loaded.nnz,
                "base": None if base is None else str(base),
                "checked": list(checked),
            }
        )
        for sentence in checked.values():
            output.say(f"ok  {sentence}")


@app.command("apply")
def apply_command(
    base: CheckpointPath,
    grafts: GraftPaths,
    out: Annotated[
        Path,
        typer.Option(
            "--out",
            "-o",
            metavar="PATH",
            parser=given_path,
            help="The folder to write: new or empty.",
        ),
    ],
    policy: Policy = "refuse",
    weights: Weights = None,
    allow_nonfinite: Annotated[
        bool, typer.Option("--allow-nonfinite", help="Let a graft write NaN and infinity.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Write BASE with the grafts applied as a full checkpoint folder, config and tokenizer along.

    The base's bits are checked first. Other files of weights in the base's folder stay behind.
    """
    numbers = weights_for(weights, grafts)
    check_folder(out)
    with Output(as_json) as output:
        from hotgraft.checkpoint import apply

        loaded = _load(grafts)
        with output.bar("writing") as progress:
            applied = apply(
                base, loaded, out, policy, numbers,
                labels=_labels(grafts), allow_nonfinite=allow_nonfinite, progress=progress,
            )  # fmt: skip
        output.result(
            {
                "path": str(applied.folder),
                "bytes": applied.nbytes,
                "id": applied.graft.id,
                "entries": applied.graft.nnz,
                "shards": list(applied.shards),
                "copied": list(applied.copied),
                "left_out": list(applied.left_out),
            }
        )
        output.facts(
            {
                "wrote": f"{applied.folder} ({size(applied.nbytes)})",
                "entries": number(applied.graft.nnz),
                "weights": ", ".join(applied.shards),
                "along": ", ".join(applied.copied) or "nothing else was there",
            }
        )
        if applied.left_out:
            output.note(
                "left out, because they may hold the base's weights or are hidden: "
                + ", ".join(applied.left_out)
            )


@app.command("compose")
def compose_command(
    grafts: GraftPaths,
    out: GraftOut,
    policy: Policy = "refuse",
    weights: Weights = None,
    as_json: Json = False,
) -> None:
    """Join grafts of one base into one."""
    numbers = weights_for(weights, grafts)
    check_out(out, grafts)
    with Output(as_json) as output:
        from hotgraft.composition import compose

        graft = compose(_load(grafts), policy, numbers, labels=_labels(grafts))
        graft.save(out)
        say_saved(output, graft, out)


@app.command("overlap")
def overlap_command(grafts: GraftPaths, as_json: Json = False) -> None:
    """Say how many positions grafts share, pair by pair."""
    if len(grafts) < 2:
        raise typer.BadParameter("give at least two grafts", param_hint="GRAFT...")
    with Output(as_json) as output:
        from hotgraft.composition import overlap

        names = _labels(grafts)
        found = overlap(_load(grafts))
        tables: list[tuple[str, str, list[list[float]], Callable[[float], str]]] = [
            ("counts", "entries in both", found.counts.tolist(), number),
            ("jaccard", "in both / in either (Jaccard)", found.jaccard.tolist(), percent),
            ("share", "the column's share that lies in the row", found.share.tolist(), percent),
        ]
        if found.chance is not None and found.similarity is not None:
            chance, similarity = found.chance.tolist(), found.similarity.tolist()
            tables += [
                ("chance", "in both by chance", chance, "{:,.4g}".format),
                ("similarity", "phi: 0 at chance, 1 for equal masks", similarity, "{:.3f}".format),
            ]
        value: dict[str, object] = {"grafts": names, "eligible": found.eligible}
        value |= {"chance": None, "similarity": None}
        for key, _, matrix, _ in tables:
            value[key] = [[None if math.isnan(x) else x for x in row] for row in matrix]
        output.result(value)
        for _, title, matrix, shown in tables:
            lines = [[name, *map(shown, row)] for name, row in zip(names, matrix, strict=True)]
            output.table(["", *names], lines, title=title)
        if found.eligible is None:
            output.say("What chance would share is not known: the grafts state no common scope.")


app.command("localize")(localize)
app.command("serve", context_settings=CONTEXT)(serve)


@app.command()
def doctor(as_json: Json = False) -> None:
    """Say what is built, which backends work here, and why the others do not."""
    with Output(as_json) as output:
        from hotgraft.doctor import diagnose

        found = diagnose()
        output.result(found)
        native, parts = found["native"], found["demo"]
        sets = native["instruction_sets"] if native else {}
        cuda = native["cuda"] if native else None
        output.facts(
            {
                "hotgraft": f"{found['hotgraft']}, Python {found['python']}, {found['platform']}",
                "torch": f"{found['torch']}, {found['torch_threads']} threads",
                "extension": f"compiler {native['compiler']}, {native['threads']} threads"
                if native
                else "does not load, see the backend cpu",
                "instruction sets": ", ".join(
                    name if runs else f"({name}: not on this processor)"
                    for name, runs in sets.items()
                ),
                "CUDA": f"{cuda['toolkit']}, built for {', '.join(cuda['targets'])}"
                if cuda
                else "not built: no nvcc was found",
                "GPUs": ", ".join(found["gpus"]) or "none that torch sees",
                "demo": f"ready, model in {parts['model']}" if parts["ready"] else parts["why_not"],
                **{
                    f"  {name}": installed or "not installed"
                    for name, installed in parts["packages"].items()
                },
            }
        )
        output.table(
            ["backend", "here"],
            [[name, why or "works"] for name, why in found["backends"].items()],
            words=2,
        )
        if not found["ok"]:
            raise typer.Exit(1)
