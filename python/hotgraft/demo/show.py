"""What the demo prints, and its plot. All of it comes from the dictionary that `run` made."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hotgraft.console import Output, number, size
from hotgraft.demo.task import TASKS

_INK, _GRAFT, _TUNED = "#7a828c", "#2a7f4f", "#b9c4d0"


def tables(output: Output, found: dict[str, Any]) -> None:
    """Print the demo's results for people."""
    _accuracy(output, found)
    _sizes(output, found)
    _times(output, found)
    _proof(output, found)
    output.say(f"plot: {found['plot']}    took {found['took']:.0f} s")


def _accuracy(output: Output, found: dict[str, Any]) -> None:
    texts = ", ".join(f"{count} of {task!r}" for task, count in found["texts"].items())
    shown = {"base": "base model"}
    shown.update({name: f"base + graft {name!r}" for name in TASKS})
    mark = "" if found["trained_now"] else " *"
    shown.update({f"finetuned on {n}": f"fully fine-tuned on {n!r}{mark}" for n in TASKS})
    output.table(
        ["live weights", *(f"{task}" for task in TASKS)],
        [
            [label, *(f"{100 * found['accuracy'][key][task]:.1f} %" for task in TASKS)]
            for key, label in shown.items()
        ],
        title=f"Accuracy (test texts: {texts})",
    )
    if mark:
        output.say(
            "* measured when the skills were made, on the same texts: these checkpoints are not "
            "shipped.\n"
        )


def _sizes(output: Output, found: dict[str, Any]) -> None:
    about = found["skills"]
    whole = about["model"]["bytes"]
    rows = [["the model", f"{number(found['parameters'])} parameters", size(whole), ""]]
    for name in TASKS:
        skill = about[name]
        rows.append(
            [
                f"graft {name!r}",
                f"{number(skill['entries'])} entries, {100 * skill['density']:.2g} % of the "
                f"{skill['scope']}",
                size(skill["bytes"]),
                f"1/{whole / skill['bytes']:.0f}",
            ]
        )
    output.table(["file", "holds", "size", "of the model's"], rows, title="Files", words=2)


def _times(output: Output, found: dict[str, Any]) -> None:
    seconds = found["seconds"]
    rows = []
    for way, label in (
        ("hotgraft", "hotgraft"),
        ("plain torch", "plain torch, index_select + index_copy_ per tensor"),
        ("load a checkpoint", "load a checkpoint, load_file + load_state_dict"),
    ):
        times = seconds[way]
        rows.append([label, *(_time(times[verb]) for verb in ("activate", "switch", "deactivate"))])
    output.table(
        ["way", "activate", "switch", "deactivate"],
        rows,
        title="Times (medians; skills loaded, indices and values prepared, caches warm)",
    )


def _time(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    return f"{1e6 * seconds:.0f} µs" if seconds < 1e-3 else f"{1e3 * seconds:.3g} ms"


def _proof(output: Output, found: dict[str, Any]) -> None:
    proof = found["proof"]
    prints = proof["fingerprints"]
    rows = [["before", prints["base"][:32], ""]]
    by_hand = "as written by plain torch" if proof["same_as_by_hand"] else "OTHER THAN BY HAND"
    rows += [[f"{name!r} live", prints[name][:32], by_hand] for name in TASKS]
    back = "the same as before" if proof["came_back"] else "OTHER THAN BEFORE"
    rows.append(["after", prints["after timing"][:32], back])
    output.table(
        ["weights", "SHA-256 over all of them", ""], rows, title="Proof, bit for bit", words=3
    )


def plot(found: dict[str, Any], path: Path) -> None:
    """Save accuracy bars and switch times as a picture.

    Raises:
        OSError: it cannot be written.
    """
    import matplotlib as mpl

    mpl.use("Agg")  # no display needed
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    _accuracy_bars(left, found["accuracy"])
    _switch_bars(right, found["seconds"])
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def _accuracy_bars(axes: Any, accuracy: dict[str, dict[str, float]]) -> None:
    kinds = (
        ("base", _INK, "base"),
        ("base + its graft", _GRAFT, "{task}"),
        ("fully fine-tuned", _TUNED, "finetuned on {task}"),
    )
    for i, (label, color, key) in enumerate(kinds):
        heights = [100 * accuracy[key.format(task=task)][task] for task in TASKS]
        places = [at + 0.27 * (i - 1) for at in range(len(TASKS))]
        bars = axes.bar(places, heights, 0.25, label=label, color=color)
        axes.bar_label(bars, fmt="%.0f", fontsize=9)
    axes.set_xticks(range(len(TASKS)), [f"task {task!r}" for task in TASKS])
    axes.set_ylim(0, 130)
    axes.set_yticks(range(0, 101, 20))
    axes.set_ylabel("accuracy, %")
    axes.set_title("One model, two skills", loc="left", fontsize=11)
    axes.legend(frameon=False, fontsize=8, loc="upper left")
    axes.spines[["top", "right"]].set_visible(False)


def _switch_bars(axes: Any, seconds: dict[str, dict[str, float]]) -> None:
    ways = ["load a checkpoint", "plain torch", "hotgraft"]
    times = [1e3 * seconds[way]["switch"] for way in ways]
    bars = axes.barh(ways, times, 0.5, color=[_TUNED, _TUNED, _GRAFT])
    axes.bar_label(bars, [_time(t / 1e3) for t in times], padding=4, fontsize=9)
    axes.set_xscale("log")
    axes.set_xlim(min(times) / 3, max(times) * 6)
    axes.set_xlabel("milliseconds, log scale")
    axes.set_title("Switch from one skill to the other (median)", loc="left", fontsize=11)
    axes.spines[["top", "right"]].set_visible(False)
