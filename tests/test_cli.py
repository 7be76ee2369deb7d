"""The command line: every command, as tables and as JSON, exit status, messages, bad use."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

import hotgraft
import pytest
import torch
import typer
from command import SHARDS, Model, files, place, run, run_json
from hotgraft import inspection
from hotgraft.arguments import size
from hotgraft.errors import FormatError
from hotgraft.graft import Entries
from safetensors import safe_open
from safetensors.torch import load_file, save_file

__all__ = ["place"]  # a fixture: pytest finds it in this module by its name

# ---- diff, inspect, verify ----------------------------------------------------------------------


def test_diff_writes_the_exact_difference() -> None:
    said = run("diff", "base", "tuned", "-o", "new.graft.safetensors")
    assert "method   exact" in said
    new = hotgraft.Graft.load("new.graft.safetensors")
    assert new == hotgraft.Graft.load("all.graft.safetensors")
    assert new.id in said
    assert new.provenance.base_id is None


def test_diff_says_what_it_wrote_as_json() -> None:
    options = ("--density", "0.1", "--scope", "linear", "--base-id")
    found = run_json("diff", "base", "tuned", "-o", "new.graft.safetensors", *options)
    graft = hotgraft.Graft.load("new.graft.safetensors")
    assert found == {
        "path": "new.graft.safetensors",
        "bytes": Path("new.graft.safetensors").stat().st_size,
        "id": graft.id,
        "entries": 6,  # floor(0.1 x 2 layers x 30)
        "tensors": len(graft.names),
        "density": 0.1,
        "scope": "linear",
        "eligible": 60,
        "method": "magnitude",
        "base_id": hotgraft.fingerprint("base"),
    }


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (("--density", "0.1", "--count", "3"), "not both"),
        (("--density", "0"), "not in (0, 1]"),
        (("--density", "nan"), "not in (0, 1]"),
        (("--count", "0"), "--count"),
        (("--count", "100000"), "100000 is more than the"),
        (("--scope", "heads"), "'heads' is not one of all, encoder, linear"),
    ],
)
def test_diff_refuses_bad_options(options: tuple[str, ...], complaint: str) -> None:
    said = run("diff", "base", "tuned", "-o", "new.graft.safetensors", *options, status=2)
    assert complaint in said
    assert not Path("new.graft.safetensors").exists()


@pytest.mark.parametrize("command", [("diff", "base", "tuned"), ("compose",)])
@pytest.mark.parametrize(
    ("out", "complaint"),
    [
        ("", "it is empty"),
        ("base", "does not end in .graft.safetensors"),
        (f"base/{SHARDS[0]}", "does not end in .graft.safetensors"),
        ("nowhere/new.graft.safetensors", "there is no folder nowhere"),
        ("tuned/new.graft.safetensors", "would write into tuned"),
        ("link.graft.safetensors", "would write into few.graft.safetensors"),
    ],
)
def test_a_graft_is_not_written_over_what_it_is_made_from(
    place: Path, command: tuple[str, ...], out: str, complaint: str
) -> None:
    Path("link.graft.safetensors").symlink_to("few.graft.safetensors")
    if command[0] == "compose":
        command = (*command, "few.graft.safetensors")
    before = files(place)
    made_from = complaint.removeprefix("would write into ")
    if made_from == complaint or made_from in command:
        said = run(*command, "-o", out, status=2)
        assert complaint in " ".join(said.replace("│", " ").split())
        assert files(place) == before
    else:
        run(*command, "-o", out)


@pytest.mark.parametrize(
    "args",
    [
        ("diff", "no", "tuned", "-o", "new.graft.safetensors"),
        ("diff", "base", "no", "-o", "new.graft.safetensors"),
        ("verify", "few.graft.safetensors", "--base", "no"),
        ("apply", "no", "few.graft.safetensors", "-o", "out"),
        ("compose", "no", "-o", "new.graft.safetensors"),
        ("overlap", "few.graft.safetensors", "no"),
    ],
)
def test_a_missing_input_is_bad_use(args: tuple[str, ...]) -> None:
    assert "does not exist" in run(*args, status=2)


@pytest.mark.parametrize(("out", "why"), [("", "it is empty"), ("no/out", "there is no folder no")])
def test_apply_needs_a_place_to_write(out: str, why: str) -> None:
    assert why in run("apply", "base", "few.graft.safetensors", "-o", out, status=2)


def test_inspect_lists_tensors() -> None:
    said = run("inspect", "all.graft.safetensors")
    graft = hotgraft.Graft.load("all.graft.safetensors")
    assert graft.id in said
    for name in graft.names:
        assert name in said


def test_inspect_agrees_with_the_graft() -> None:
    found = run_json("inspect", "all.graft.safetensors")
    graft = hotgraft.Graft.load("all.graft.safetensors")
    assert found["metadata"]["id"] == graft.id
    assert (found["entries"], found["density"]) == (graft.nnz, graft.density)
    assert [row["name"] for row in found["tensors"]] == list(graft.names)
    for row in found["tensors"]:
        entries = graft[row["name"]]
        change = (entries.new.double() - entries.old.double()).abs().max().item()
        assert row["largest_change"] == change
        assert row["entries"] == len(entries.indices)
        assert row["share"] == len(entries.indices) / math.prod(entries.shape)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_inspect_shows_a_change_that_is_no_number(value: float) -> None:
    entries = Entries(torch.tensor([2]), torch.tensor([value]), torch.zeros(1), (9,))
    hotgraft.Graft.from_entries({"w": entries}).save("odd.graft.safetensors")
    assert run_json("inspect", "odd.graft.safetensors")["tensors"][0]["largest_change"] is None
    assert str(value) in run("inspect", "odd.graft.safetensors")


@pytest.mark.parametrize("command", ["inspect", "verify"])
def test_a_file_that_is_no_graft_is_one_line_and_status_1(command: str) -> None:
    said = run(command, "base/config.json", status=1)
    assert said.startswith("error: base/config.json: not a safetensors file")
    assert said.count("\n") == 1
    said = run(command, f"base/{SHARDS[0]}", status=1)
    assert "but not a graft" in said
    assert "does not exist" in run(command, "nowhere.graft.safetensors", status=2)
    found = run_json(command, "base/config.json", status=1)
    assert found["error"]["kind"] == "FormatError"


def test_hostile_text_does_not_reach_the_terminal() -> None:
    hostile = "\x1b]0;owned\x07\x1b[2J\u202eolleh"
    for change in ({"scope": hostile}, {"format": hostile}, {"note": hostile}):
        path = str(damaged(dict(change)))
        accepted = "note" in change
        said = run("inspect", path, status=0 if accepted else 1)
        assert said.replace("\n", "").isprintable()
        assert "\\x1b" in said
    assert run_json("inspect", path)["metadata"]["note"] == hostile
    name = "\x1b[2J.graft.safetensors"
    shutil.copy("few.graft.safetensors", name)
    for command in (
        ("inspect", name),
        ("verify", name),
        ("overlap", name, "few.graft.safetensors"),
    ):
        assert run(*command).replace("\n", "").isprintable()


def damaged(change: dict[str, str | None]) -> Path:
    """A graft file whose metadata was changed (None: taken away)."""
    with safe_open("all.graft.safetensors", "pt") as file:
        metadata = {k: v for k, v in {**file.metadata(), **change}.items() if v is not None}
    save_file(load_file("all.graft.safetensors"), "bad.graft.safetensors", metadata)
    return Path("bad.graft.safetensors")


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"version": "2"}, "graft format version '2'"),
        ({"table": None}, "the metadata lacks 'table'"),
        ({"table": "[["}, "table is malformed"),
        ({"eligible": None}, "the metadata lacks 'eligible'"),
        ({"eligible": "-5"}, "eligible is '-5', not a count"),
        ({"eligible": "1"}, "1 eligible elements cannot be"),
        ({"eligible": "many"}, "eligible is 'many', not a count"),
    ],
)
def test_inspect_checks_the_metadata(change: dict[str, str | None], complaint: str) -> None:
    with pytest.raises(FormatError, match=r"bad\.graft\.safetensors: ") as error:
        inspection.inspect(damaged(change))
    assert complaint in str(error.value)


@pytest.mark.parametrize(
    ("dtype", "positions", "complaint"),
    [
        ("F32", torch.tensor([[1, 2]], dtype=torch.int32), "wanted a flat I32"),
        ("F32", torch.tensor([1, 2]), "wanted a flat I32"),
        ("F32", torch.tensor([2, 1], dtype=torch.int32), "must ascend"),
        ("F32", torch.tensor([1, 99], dtype=torch.int32), "outside [0, 4)"),
        ("F99", torch.tensor([1, 2], dtype=torch.int32), "unknown dtype 'F99'"),
    ],
)
def test_inspect_checks_the_arrays(dtype: str, positions: torch.Tensor, complaint: str) -> None:
    with safe_open("all.graft.safetensors", "pt") as file:
        metadata = {**file.metadata(), "table": '[["w",[4],"F32",0,0,2]]', "eligible": "4"}
    arrays = {"positions": positions, "new": torch.ones(2), "old": torch.zeros(2)}
    save_file({f"{dtype}.{k}": v for k, v in arrays.items()}, "bad.graft.safetensors", metadata)
    assert complaint in run("inspect", "bad.graft.safetensors", status=1)


def test_verify_checks_the_file_and_the_base() -> None:
    assert "contents and id hold" in run("verify", "all.graft.safetensors")
    said = run("verify", "all.graft.safetensors", "--base", "base")
    count = hotgraft.Graft.load("all.graft.safetensors").nnz
    assert f"all {count} entries hold the old bits" in said
    found = run_json("verify", "few.graft.safetensors", "--base", "base")
    assert found["ok"] is True
    assert found["checked"] == ["file", "base"]


def test_verify_names_the_first_mismatch() -> None:
    graft = hotgraft.Graft.load("few.graft.safetensors")
    said = run("verify", "few.graft.safetensors", "--base", "tuned", status=1)
    first = graft[graft.names[0]]
    assert f"7 of 7 entries differ, first {graft.names[0]!r}, " in said
    assert f"position {int(first.indices[0])}: found bits 0x" in said
    found = run_json("verify", "few.graft.safetensors", "--base", "tuned", status=1)
    assert found["error"]["kind"] == "BaseMismatchError"


def test_verify_checks_the_base_id() -> None:
    run("diff", "base", "tuned", "-o", "known.graft.safetensors", "--base-id", "--count", "1")
    checked = ("--base", "base", "--base-id")
    assert run_json("verify", "known.graft.safetensors", *checked)["checked"][-1] == "base id"
    assert "does not state" in run("verify", "few.graft.safetensors", *checked, status=1)
    written = load_file(f"base/{SHARDS[1]}")
    graft = hotgraft.Graft.load("known.graft.safetensors")
    name = next(name for name in written if name not in graft.names)
    written[name].view(-1)[0] += 1
    save_file(written, f"base/{SHARDS[1]}")
    assert "its id is" in run("verify", "known.graft.safetensors", *checked, status=1)
    assert "needs --base" in run("verify", "few.graft.safetensors", "--base-id", status=2)


# ---- compose, overlap ---------------------------------------------------------------------------


def test_compose_writes_one_graft() -> None:
    grafts = ("all.graft.safetensors", "few.graft.safetensors")
    run("compose", *grafts, "-o", "both.graft.safetensors", "--policy", "mean", "--weights", "1,2")
    wanted = hotgraft.compose([hotgraft.Graft.load(g) for g in grafts], "mean", [1, 2])
    assert hotgraft.Graft.load("both.graft.safetensors") == wanted
    found = run_json("compose", *grafts, "-o", "both.graft.safetensors")  # they agree: no refusal
    assert found["method"] == "composed"


def test_compose_says_who_overlaps() -> None:
    hotgraft.diff("base", {k: v + 2 for k, v in Model(0).state_dict().items()}).save(
        "far.graft.safetensors"
    )
    args = (
        "compose",
        "far.graft.safetensors",
        "few.graft.safetensors",
        "-o",
        "both.graft.safetensors",
    )
    said = run(*args, status=1)
    assert "policy is 'refuse'" in said
    assert "far and few on" in said
    assert not Path("both.graft.safetensors").exists()


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (("--policy", "best"), "'best' is not one of refuse, priority, sum, mean, sign"),
        (("--weights", "1"), "1 weights for 2 grafts"),
        (("--weights", "1,x"), "not numbers"),
        (("--weights", "1,inf"), "not finite"),
    ],
)
@pytest.mark.parametrize("command", ["compose", "apply"])
def test_bad_policies_and_weights(command: str, options: tuple[str, ...], complaint: str) -> None:
    first = ("apply", "base") if command == "apply" else ("compose",)
    grafts = ("all.graft.safetensors", "few.graft.safetensors")
    said = run(*first, *grafts, "-o", "out", *options, status=2)
    assert complaint in " ".join(said.replace("│", " ").split())
    assert not Path("out").exists()


def test_overlap_shows_three_tables() -> None:
    grafts = ("all.graft.safetensors", "few.graft.safetensors")
    said = run("overlap", *grafts)
    assert "entries in both" in said
    assert "Jaccard" in said
    found = run_json("overlap", *grafts)
    n = hotgraft.Graft.load("all.graft.safetensors").nnz
    assert found["grafts"] == ["all", "few"]
    assert found["counts"] == [[n, 7], [7, 7]]
    assert found["jaccard"][0][1] == 7 / n
    assert found["share"] == [[1, 1], [7 / n, 1]]
    assert "at least two" in run("overlap", "all.graft.safetensors", status=2)


def test_overlap_shows_what_chance_would_share() -> None:
    def save(name: str, *where: int) -> str:
        ones = torch.ones(len(where))
        entries = {"w": Entries(torch.tensor(where), ones, 0 * ones, (2, 4))}
        provenance = hotgraft.Provenance(scope="linear", eligible=8)
        hotgraft.Graft.from_entries(entries, provenance=provenance).save(name)
        return name

    grafts = [save("a.graft.safetensors", 0, 1), save("b.graft.safetensors", *range(8))]
    found = run_json("overlap", *grafts)
    assert found["eligible"] == 8
    assert found["chance"] == [[0.5, 2.0], [2.0, 8.0]]
    assert found["similarity"] == [[1.0, None], [None, None]]  # what has everything tells nothing
    said = run("overlap", *grafts)
    assert "in both by chance" in said
    assert "phi: 0 at chance" in said

    found = run_json("overlap", "a.graft.safetensors", "few.graft.safetensors")
    assert (found["eligible"], found["chance"], found["similarity"]) == (None, None, None)
    assert "no common scope" in run("overlap", "a.graft.safetensors", "few.graft.safetensors")


def test_grafts_of_one_file_name_are_told_apart() -> None:
    Path("elsewhere").mkdir()
    shutil.copy("few.graft.safetensors", "elsewhere")
    found = run_json("overlap", "few.graft.safetensors", "elsewhere/few.graft.safetensors")
    assert found["grafts"] == ["few.graft.safetensors", "elsewhere/few.graft.safetensors"]


# ---- doctor, version, help, the real command ----------------------------------------------------


def test_doctor_says_what_works() -> None:
    found = run_json("doctor")
    assert found["ok"] is True
    assert found["backends"]["cpu"] is None
    assert found["backends"].keys() == hotgraft.available_backends().keys()
    assert found["native"]["instruction_sets"]["scalar"] is True
    assert found["torch"] == torch.__version__
    said = run("doctor")
    assert "CUDA" in said
    assert "works" in said


def test_doctor_fails_when_the_extension_does_not_load(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "hotgraft.kernels.native_cpu", None)
    found = run_json("doctor", status=1)
    assert found["ok"] is False
    assert found["native"] is None
    assert "does not load" in found["backends"]["cpu"]


def test_doctor_says_what_the_demo_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    from importlib.metadata import PackageNotFoundError

    from hotgraft import doctor

    def nothing(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(doctor, "version", nothing)
    found = run_json("doctor")["demo"]
    assert found["ready"] is False
    assert 'pip install "hotgraft[demo]"' in found["why_not"]


def hotgraft_command(*args: str) -> subprocess.CompletedProcess[str]:
    """The installed command, in a process of its own, with nothing of a terminal."""
    script = Path(sys.executable).with_name("hotgraft")
    return subprocess.run(
        [str(script), *args], capture_output=True, text=True, check=False, timeout=120
    )


def test_the_installed_command() -> None:
    done = hotgraft_command("inspect", "few.graft.safetensors", "--json")
    assert done.returncode == 0
    assert done.stderr == ""
    assert json.loads(done.stdout)["entries"] == 7
    done = hotgraft_command("verify", "base/config.json")
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    done = hotgraft_command("compose")
    assert done.returncode == 2


def test_version_and_help() -> None:
    assert run("--version").startswith("hotgraft ")
    said = run("--help")
    for command in ("demo", "diff", "inspect", "verify", "apply", "compose", "overlap", "doctor"):
        assert command in said
        assert "--json" in run(command, "--help")
    assert run("no-such-command", status=2)


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [
        ("4096", 4096),
        ("64KiB", 1 << 16),
        ("1.5 GiB", 3 << 29),
        ("2gb", 2 * 10**9),
        ("3MB", 3 * 10**6),
    ],
)
def test_sizes(text: str, nbytes: int) -> None:
    assert size(text) == nbytes


@pytest.mark.parametrize("text", ["", "0", "-1", "GiB", "2XB", "1e9", "2 GiB more"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(typer.BadParameter, match="such as 512MiB"):
        size(text)
