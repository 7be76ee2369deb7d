"""Toy checkpoints of the architectures that servers run, in real layouts, with random weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

SIZES: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 300,
    "max_position_embeddings": 128,
}
ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("Mixtral", {**SIZES, "num_local_experts": 4}),
    "llama": ("Llama", SIZES),
    "llama-wide": ("Llama", {**SIZES, "hidden_size": 256, "intermediate_size": 1024}),
    "llama-tied": ("Llama", {**SIZES, "tie_word_embeddings": True}),
    "llama-one-kv-head": ("Llama", {**SIZES, "num_key_value_heads": 1}),
    "qwen2": ("Qwen2", SIZES),
    "qwen3": ("Qwen3", {**SIZES, "head_dim": 32}),
    "gemma2": ("Gemma2", {**SIZES, "head_dim": 32}),
    "gpt2": (
        "GPT2",
        {"n_embd": 128, "n_layer": 2, "n_head": 4, "vocab_size": 300, "n_positions": 128,
         "bos_token_id": 0, "eos_token_id": 0},
    ),
}  # fmt: skip
"""transformers' name of each, and its configuration."""


def save(name: str, folder: Path) -> Path:
    """Write a toy checkpoint in bf16; the same one every time."""
    kind, sizes = ARCHITECTURES[name]
    head = "LMHeadModel" if kind == "GPT2" else "ForCausalLM"
    config = getattr(transformers, f"{kind}Config")(**sizes)
    torch.manual_seed(0)
    model = getattr(transformers, f"{kind}{head}")(config).bfloat16()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    model.save_pretrained(folder / name)
    return folder / name


def tuned(state: dict[str, Tensor], density: float = 0.01, seed: int = 1) -> dict[str, Tensor]:
    """The same tensors with other values at some positions, one at least in each."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for name, tensor in state.items():
        chosen = torch.rand(tensor.shape, generator=generator) < density
        chosen.view(-1)[seed % chosen.numel()] = True
        found[name] = torch.where(chosen, tensor * 1.5 + 0.125, tensor)
    return found
