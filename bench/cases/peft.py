"""Merging and unmerging adapters with peft, beside hotgraft on an equal model.

Three rounds each; then the weights are compared with what they were: peft adds and subtracts.
"""

from __future__ import annotations

import warnings
from importlib.metadata import version

import torch

from bench import shapes
from bench.cases.switch import workload
from bench.rows import Target
from bench.session import Session, make_rows, ratio
from bench.switching import ACTIVATE, DEACTIVATE, Workload, hotgraft_way
from bench.timing import Contender

CYCLES = 3
TIMES_FASTER = {"Super-Tuning": 300, "SHiRA": 1000, "LoRA": 1000}
_STEP = 0.02
"""The scale of the adapters' values: that of the weights."""


def run(session: Session) -> None:
    """The case."""
    shape = shapes.SHAPES[session.pick("1.3B", "tiny")]
    work = workload(shapes.model(shape), session.pick(131_019, 2000))
    for kind in TIMES_FASTER:
        _measure(session, shape, kind, work)
    work.host.detach()


def adapted(model: torch.nn.Module, kind: str, sparsity: float) -> torch.nn.Module:
    """The model with a random adapter on every linear layer."""
    import peft

    targets = sorted(
        {n.rpartition(".")[2] for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    )
    config: peft.PeftConfig
    if kind == "LoRA":
        config = peft.LoraConfig(r=16, target_modules=targets, init_lora_weights=False)
    elif kind == "SHiRA":
        config = peft.ShiraConfig(r=1, target_modules=targets, init_weights=False, random_seed=0)
    else:
        config = peft.SupertuningConfig(
            sparsity=sparsity, target_modules=targets, init_weights=False
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped = peft.get_peft_model(model, config)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "shira_weight" in name or "supertuning_values" in name:
                parameter.mul_(_STEP)
    return wrapped


def _measure(session: Session, shape: shapes.Shape, kind: str, work: Workload) -> None:
    weights = shapes.weights(shape)
    wrapped = adapted(shapes.Stack(weights), kind, session.pick(0.9999, 0.99))
    layers = [m for m in wrapped.modules() if hasattr(m, "merge") and hasattr(m, "base_layer")]
    mine = hotgraft_way(work)
    mine.steps = {step: mine.steps[step] for step in (ACTIVATE, DEACTIVATE)}
    theirs = Contender(
        f"peft {kind}",
        f"torch, {torch.get_num_threads()} threads",
        {ACTIVATE: wrapped.merge_adapter, DEACTIVATE: wrapped.unmerge_adapter},
        slack=True,
    )
    with torch.no_grad():
        for _ in range(CYCLES):
            theirs.sample(cold=False)
            for _ in range(session.pick(20, 3)):
                mine.sample(cold=False)
    mine.correct = work.holds(work.a, old=True)
    differing = _differing(wrapped, shapes.weights(shape))
    theirs.correct = differing == 0
    parameters = {
        "shape": shape.name,
        "model_parameters": shape.parameters,
        "tensors": len(layers),
        "entries": work.a.nnz,
        "peft": version("peft"),
        "adapter_parameters": sum(p.numel() for p in wrapped.parameters() if p.requires_grad),
        "caches": "warm",
    }
    found = make_rows("peft", [mine, theirs], parameters)
    for row in found:
        if row.variant == theirs.name:
            row.note = f"{differing} of {shape.parameters} elements differ after {CYCLES} cycles"
        elif row.operation == ACTIVATE:
            faster = 1 / ratio(found, ACTIVATE, "hotgraft", theirs.name)
            row.targets.append(
                Target(f"times faster than {kind} merge", round(faster), TIMES_FASTER[kind], True)
            )
    session.add(found)


def _differing(wrapped: torch.nn.Module, before: dict[str, torch.Tensor]) -> int:
    """Elements whose bits are not what they were."""
    count = 0
    for name, module in wrapped.named_modules():
        if hasattr(module, "base_layer"):
            original = before[f"{name.removeprefix('base_model.model.')}.weight"]
            now = module.base_layer.weight.detach()
            count += int((now.view(torch.int16) != original.view(torch.int16)).sum())
    return count
