"""Checkpoints on disk: hostile folders are refused, and reading takes no memory of its own."""

import json
import os
import re
import subprocess
import sys
import textwrap

import pytest
import torch
from hostile import HOSTILE, good_file
from hotgraft import diff
from hotgraft.errors import FormatError
from hotgraft.weights import INDEX, open_weights
from safetensors.torch import save_file

GOOD = {"w": torch.zeros(4), "v": torch.ones(2)}


def refused(path, message):
    for arguments in ((path, GOOD), (GOOD, path)):
        with pytest.raises(FormatError, match=re.escape(message)) as caught:
            diff(*arguments)
        assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ("{", "not a safetensors index"),
        ("[]", "not a safetensors index"),
        ("7", "not a safetensors index"),
        ("[" * 100_000, "not a safetensors index"),
        ({}, "not a safetensors index: KeyError('weight_map')"),
        ({"weight_map": []}, "not a safetensors index"),
        ({"weight_map": {}}, "it must name files in its own folder"),
        ({"weight_map": {"w": 7}}, "not a safetensors index"),
        ({"weight_map": {"w": None}}, "not a safetensors index"),
        ({"weight_map": {"w": ["a"]}}, "not a safetensors index"),
        ({"weight_map": {"w": "../model.safetensors"}}, "it must name files in its own folder"),
        ({"weight_map": {"w": "/etc/passwd"}}, "it must name files in its own folder"),
        ({"weight_map": {"w": "a/b.safetensors"}}, "it must name files in its own folder"),
        ({"weight_map": {"w": "."}}, "it must name files in its own folder"),
        ({"weight_map": {"w": ".."}}, "it names '..', which is not in the folder"),
        ({"weight_map": {"w": ""}}, "it names '', which is not in the folder"),
        ({"weight_map": {"w": "a\0b"}}, "which is not in the folder"),
        ({"weight_map": {"w": "gone.safetensors"}}, "it names 'gone.safetensors', which is not in"),
        ({"weight_map": {"w": "weights.bin"}}, "not a safetensors file"),
    ],
)
def test_hostile_index(index, message, tmp_path):
    save_file(GOOD, tmp_path / "model.safetensors")
    torch.save(GOOD, tmp_path / "weights.bin")
    (tmp_path / INDEX).write_text(index if isinstance(index, str) else json.dumps(index))
    refused(tmp_path, message)


def test_an_index_that_is_not_text(tmp_path):
    (tmp_path / INDEX).write_bytes(b"\xff\xfe\x00")
    refused(tmp_path, "not a safetensors index")


def test_a_tensor_in_two_shards(tmp_path):
    for name in ("a.safetensors", "b.safetensors"):
        save_file(GOOD, tmp_path / name)
    shards = {"w": "a.safetensors", "v": "b.safetensors"}
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": shards}))
    refused(tmp_path, "is in another shard too")


def test_a_shard_that_lacks_what_the_index_says(tmp_path):
    save_file({"w": GOOD["w"]}, tmp_path / "a.safetensors")
    save_file({"v": GOOD["v"]}, tmp_path / "b.safetensors")
    for shards, message in (
        ({"w": "a.safetensors", "v": "a.safetensors"}, "it says that 'v' is in 'a.safetensors', "),
        ({"w": "a.safetensors", "v": "b.safetensors", "x": "b.safetensors"}, "says that 'x' is in"),
    ):
        (tmp_path / INDEX).write_text(json.dumps({"weight_map": shards}))
        refused(tmp_path, message)


def test_which_file_of_a_folder(tmp_path):
    refused(tmp_path / "missing", "no such file or folder")
    refused(tmp_path, "exactly one .safetensors file; found 0 and no index")
    torch.save(GOOD, tmp_path / "pytorch_model.bin")
    refused(tmp_path, "found 0 and no index")
    refused(tmp_path / "pytorch_model.bin", "only .safetensors checkpoints are read (a pickle can")
    (tmp_path / "skill.graft.safetensors").write_bytes(good_file(tmp_path))
    (tmp_path / "good.graft.safetensors").unlink()
    refused(tmp_path, "found 0 and no index")
    save_file(GOOD, tmp_path / "one.safetensors")
    tuned = GOOD | {"w": torch.ones(4)}
    assert diff(tmp_path, tuned).nnz == 4
    save_file(tuned, tmp_path / "two.safetensors")
    refused(tmp_path, "found 2 and no index")
    save_file(tuned, tmp_path / "model.safetensors")
    assert diff(GOOD, tmp_path).nnz == 4


CONTAINERS = [name for name, (_, message) in HOSTILE.items() if message.startswith("not a safeten")]


@pytest.mark.parametrize("name", CONTAINERS)
def test_hostile_checkpoint(name, tmp_path):
    """What is no safetensors file is no checkpoint either."""
    path = tmp_path / "x.safetensors"
    path.write_bytes(HOSTILE[name][0](good_file(tmp_path)))
    refused(path, "not a safetensors file")


def test_dtypes_that_grafts_do_not_hold(tmp_path):
    save_file({"z": torch.zeros(2, dtype=torch.complex64)}, tmp_path / "z.safetensors")
    refused(tmp_path / "z.safetensors", "'z' has dtype C64")


def test_files_are_closed_again(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file(GOOD, path)
    with open_weights(path) as checkpoint:
        held = checkpoint.tensor("w")
    assert held.tolist() == [0, 0, 0, 0]  # a mapped tensor outlives the file's handle
    del held
    assert not [fd for fd in os.listdir("/proc/self/fd") if _target(fd) == str(path)]


def _target(handle: str) -> str:
    try:
        return os.readlink(f"/proc/self/fd/{handle}")
    except OSError:
        return ""


def test_memory_does_not_grow_with_the_model(tmp_path):
    """Two files of 200 MB: what diff adds to the anonymous memory is its result and little more."""
    n, each = 12_500_000, 8
    generator = torch.Generator().manual_seed(0)
    for name in ("base", "tuned"):
        tensors = {}
        for i in range(each):
            values = torch.full((n,), i, dtype=torch.bfloat16)
            if name == "tuned":
                where = torch.randint(0, n, (20_000,), generator=generator)
                values[where] += torch.rand(20_000, generator=generator).bfloat16() + 1
            tensors[f"w{i}"] = values
        save_file(tensors, tmp_path / f"{name}.safetensors")
        assert os.path.getsize(tmp_path / f"{name}.safetensors") >= 200e6
    script = """
        import sys, threading, time
        import torch, hotgraft

        def anonymous():
            for line in open("/proc/self/status"):
                if line.startswith("RssAnon"):
                    return int(line.split()[1]) * 1024

        def watch():
            global peak
            while running:
                peak = max(peak, anonymous())
                time.sleep(0.002)

        base, tuned, kind = sys.argv[1:]
        hotgraft.diff({"w": torch.zeros(9)}, {"w": torch.ones(9)}, count=3)
        before = peak = anonymous()
        running = True
        thread = threading.Thread(target=watch)
        thread.start()
        graft = hotgraft.diff(base, tuned, **{"exact": {}, "top": {"density": 1e-4}}[kind])
        running = False
        thread.join()
        print(peak - before, graft.nbytes, graft.nnz)
    """
    for kind, entries in (("exact", range(150_000, 160_001)), ("top", range(10_000, 10_001))):
        done = subprocess.run(
            [
                sys.executable,
                "-c",
                textwrap.dedent(script),
                str(tmp_path / "base.safetensors"),
                str(tmp_path / "tuned.safetensors"),
                kind,
            ],
            capture_output=True,
            text=True,
            check=True,
        )
        grown, result, nnz = map(int, done.stdout.split())
        assert nnz in entries
        assert grown < 64 * 2**20 + result, f"{kind}: {grown / 2**20:.0f} MiB"
