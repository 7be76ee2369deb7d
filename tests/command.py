"""A folder with two checkpoints and two grafts, and the command run in it."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import hotgraft
import pytest
import torch
from hotgraft.cli import app
from safetensors.torch import save_file
from typer.testing import CliRunner

SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
METADATA = {"format": "pt", "made by": "a test"}


class Layer(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.proj = torch.nn.Linear(6, 5, dtype=torch.bfloat16)
        self.norm = torch.nn.LayerNorm(5)


class Model(torch.nn.Module):
    """Two layers and an embedding: tensors of two types for two shards."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embed = torch.nn.Embedding(7, 6, dtype=torch.float16)
        self.layers = torch.nn.ModuleList([Layer(), Layer()])
        for p in self.parameters():
            torch.nn.init.normal_(p)


def save_checkpoint(state: dict[str, torch.Tensor], folder: Path) -> Path:
    """A folder as `save_pretrained` leaves it: shards, index, config, tokenizer."""
    folder.mkdir(parents=True)
    names = list(state)
    parts = dict(zip(SHARDS, (names[:4], names[4:]), strict=True))
    for shard, inside in parts.items():
        save_file({name: state[name] for name in inside}, folder / shard, METADATA)
    index = {"weight_map": {name: shard for shard in parts for name in parts[shard]}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text('{"model_type": "toy"}')
    (folder / "tokenizer.json").write_bytes(os.urandom(5000))
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text("{}")
    return folder


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder, made the working directory, with `base`, `tuned` and two grafts of them."""
    base = Model(0).state_dict()
    tuned = {name: tensor.clone() for name, tensor in base.items()}
    for tensor in tuned.values():
        tensor.view(-1)[::3] += 1
    save_checkpoint(base, tmp_path / "base")
    save_checkpoint(tuned, tmp_path / "tuned")
    monkeypatch.chdir(tmp_path)
    hotgraft.diff("base", "tuned").save("all.graft.safetensors")
    hotgraft.diff("base", "tuned", count=7).save("few.graft.safetensors")
    return tmp_path


def run(*args: str, status: int = 0) -> str:
    result = CliRunner().invoke(app, list(args))
    assert result.exit_code == status, result.output + str(result.exception)
    assert "Traceback" not in result.output
    return result.stdout if status == 0 else result.stderr


def run_json(*args: str, status: int = 0) -> Any:
    result = CliRunner().invoke(app, [*args, "--json"])
    assert result.exit_code == status, result.output + str(result.exception)
    return json.loads(result.stdout)


def files(folder: Path | str) -> dict[str, bytes]:
    folder = Path(folder)
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
