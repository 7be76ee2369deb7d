"""Which tensor of the host a graft's tensor means, with real models of transformers."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import factories
import pytest
import torch
from hosts import contents, holds, single
from hotgraft import Graft, attach, diff
from hotgraft.errors import BaseMismatchError, CoverageError, LayoutError
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

TINY = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "vocab_size": 31,
}


@pytest.fixture(autouse=True)
def _seeded() -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


def tuned(model: nn.Module, seed: int = 1) -> dict[str, torch.Tensor]:
    return factories.finetuned(contents(model), seed, share=0.1)


def test_a_prefix_is_added_or_dropped() -> None:
    inner = BertModel(BertConfig(**TINY), add_pooling_layer=False)
    outer = BertForMaskedLM(BertConfig(**TINY))
    outer.bert.load_state_dict(inner.state_dict())
    base = contents(inner)
    new = tuned(inner)
    graft = diff(base, new)
    assert "encoder.layer.1.output.dense.weight" in graft.names

    host = attach(outer)
    before = contents(outer)
    host.load(graft, name="a")
    host.activate("a")
    assert holds(outer.bert, new)
    assert holds(outer, outer.state_dict())
    host.deactivate()
    assert holds(outer, before)

    prefixed = diff(
        {f"bert.{k}": v for k, v in base.items()}, {f"bert.{k}": v for k, v in new.items()}
    )
    host = attach(inner)
    host.load(prefixed, name="a")
    host.activate("a")
    assert holds(inner, new)


def test_wrappers_of_data_parallel_and_compile() -> None:
    model = BertModel(BertConfig(**TINY), add_pooling_layer=False)
    new = tuned(model)
    graft = diff(contents(model), new)

    class Wrapped(nn.Module):  # as DistributedDataParallel names it
        def __init__(self) -> None:
            super().__init__()
            self.module = model

    wrapped = Wrapped()
    for root in (wrapped, torch.compile(model, backend="eager")):
        host = attach(root)
        host.load(graft, name="a")
        with host.using("a"):
            assert holds(model, new)
        host.detach()
    model.encoder.layer[0] = torch.compile(model.encoder.layer[0], backend="eager")
    named = {k.replace("layer.0.", "layer.0._orig_mod."): v for k, v in new.items()}
    assert contents(model).keys() == named.keys()
    from_compiled = diff(contents(model), named)
    for one in (graft, from_compiled):  # a file's names, and the compiled module's own
        host = attach(model)
        host.load(one, name="a")
        with host.using("a"):
            assert holds(model, named)
        host.detach()


@pytest.mark.parametrize("head", ["lm_head.weight", "base"])
def test_tied_heads_go_under_either_name(head: str) -> None:
    quiet = {"bos_token_id": 0, "eos_token_id": 0}
    llama = LlamaForCausalLM(LlamaConfig(**TINY, num_key_value_heads=1, tie_word_embeddings=True))
    gpt2 = GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=31, **quiet))
    for model in (llama, gpt2):
        embedding = model.get_input_embeddings().weight
        base = next(n for n, p in model.named_parameters() if p is embedding)
        host = attach(model)
        host.load(
            single(head if head != "base" else base, embedding, [3, 40], [1.5, 2.5]), name="a"
        )
        host.activate("a")
        assert embedding.view(-1)[[3, 40]].tolist() == [1.5, 2.5]
        assert model.lm_head.weight is embedding


def test_a_tied_head_that_the_host_lacks_is_the_embedding() -> None:
    class Headless(nn.Module):
        _tied_weights_keys: ClassVar = {"lm_head.weight": "embed.weight"}

        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(5, 4)

    model = Headless()
    host = attach(model)
    host.load(single("lm_head.weight", model.embed.weight, [3], [1.5]), name="a")
    host.activate("a")
    assert model.embed.weight.view(-1)[3] == 1.5
    host.detach(force=True)
    Headless._tied_weights_keys = ["lm_head.weight"]  # as transformers 4 has it
    with pytest.raises(CoverageError, match=r"lacks 'lm_head.weight'"):
        attach(model).load(single("lm_head.weight", model.embed.weight, [3], [1.5]))


def test_an_ambiguous_prefix_is_refused_with_the_choices() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.text = nn.Sequential(nn.Linear(3, 3))
            self.image = nn.Sequential(nn.Linear(3, 3))

    model = Two()
    graft = diff(contents(model.text), tuned(model.text))
    host = attach(model)
    with pytest.raises(CoverageError, match=r"fit several .*'add image.', 'add text.'.*names="):
        host.load(graft)
    for names in ({n: f"text.{n}" for n in graft.names}, "text.{}".format):
        host.load(graft, name="a", names=names, replace=True)
        with host.using("a"):
            assert holds(model.text, {**contents(model.text), **factories.grafted(
                contents(model.text), graft)})  # fmt: skip
            assert (
                model.text[0]
                .weight.view(-1)[graft["0.weight"].indices]
                .equal(graft["0.weight"].new)
            )


def test_the_prefix_that_finds_most_is_taken() -> None:
    class Partly(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
            self.other = nn.Sequential(nn.Linear(3, 3))

    model = Partly()
    host = attach(model)
    graft = diff(contents(model.body), tuned(model.body))
    host.load(graft, name="a")
    host.activate("a")
    assert model.body[1].bias[graft["1.bias"].indices].equal(graft["1.bias"].new)


def test_names_is_checked() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    graft = diff(contents(model), tuned(model))
    host = attach(model)
    with pytest.raises(CoverageError, match=r"'0.bias' to '1.bia', .*nearest name.*'1.bias'"):
        host.load(graft, names={"0.bias": "1.bia"})
    with pytest.raises(CoverageError, match=r"several of the graft's tensors map to '1.bias'"):
        host.load(graft, names={"0.bias": "1.bias"})
    with pytest.raises(BaseMismatchError, match="does not fit"):
        host.load(graft, names=lambda name: {"0": "1", "1": "0"}[name[0]] + name[1:])
    assert not host.skills


def test_keys_of_names_that_the_graft_lacks_are_refused() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    graft = diff(contents(model), tuned(model))
    with pytest.raises(CoverageError, match=r"maps '0.wieght', which the graft lacks.*'0.weight'"):
        attach(model).load(graft, names={"0.wieght": "1.weight"})


class Half(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(4, 4)
        self.body = nn.Linear(4, 4)


class Wrapper(nn.Module):
    """Has a tensor of its own that is called as one of its encoder's."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = Half()
        self.proj = nn.Linear(4, 4)
        self.proj.load_state_dict(self.encoder.proj.state_dict())


def test_a_prefix_that_some_names_need_and_others_fit_too_is_ambiguous() -> None:
    model = Wrapper()
    new = tuned(model.encoder)
    graft = diff(contents(model.encoder), new)
    host = attach(model)
    with pytest.raises(
        CoverageError,
        match=r"'proj.bias' may be 'proj.bias' or 'encoder.proj.bias' .*'body.bias' is found as "
        r"'encoder.body.bias' only.*names=",
    ):
        host.load(graft)
    host.load(graft, name="a", names="encoder.{}".format)
    host.activate("a")
    assert holds(model.encoder, new)
    host.detach(force=True)
    inner = attach(model.encoder)  # and the other way round, a prefix to drop
    prefixed = diff({f"encoder.{k}": v for k, v in contents(model.encoder).items()},
                    {f"encoder.{k}": v for k, v in tuned(model.encoder, 2).items()})  # fmt: skip
    inner.load(prefixed)


def test_one_block_is_not_the_model() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            block = nn.ModuleDict({"norm": nn.LayerNorm(4), "mlp": nn.Sequential(nn.Linear(4, 4))})
            self.layers = nn.ModuleList([block])

    model = Model()
    norm = model.layers[0]["norm"].weight
    host = attach(model)
    with pytest.raises(CoverageError, match=r"lacks 'norm.weight'; .*'layers.0.norm.weight'"):
        host.load(single("norm.weight", norm, [1], [2.0]))
    bare = attach(nn.ModuleDict({"norm": nn.LayerNorm(4)}))
    with pytest.raises(CoverageError, match=r"lacks 'layers.0.norm.weight'"):
        bare.load(single("layers.0.norm.weight", norm, [1], [2.0]))
    host.load(single("mlp.0.bias", model.layers[0]["mlp"][0].bias, [1], [2.0]), name="a")


def test_unknown_names_show_the_nearest() -> None:
    model = BertModel(BertConfig(**TINY))
    host = attach(model)
    graft = single("encoder.layer.1.output.dens.weight", torch.zeros(4), [1], [1.0])
    with pytest.raises(CoverageError, match=r"nearest.*'encoder.layer.1.output.dense.weight'"):
        host.load(graft)


# ---- modules whose layout is not their file's ---------------------------------------------------


def moe(kind: str) -> PreTrainedModel:
    sizes = {**TINY, "num_key_value_heads": 1}
    if kind == "mixtral":
        return MixtralForCausalLM(MixtralConfig(**sizes, num_local_experts=2))
    config = Qwen3MoeConfig(
        **sizes, num_experts=2, num_experts_per_tok=1, moe_intermediate_size=8, head_dim=8
    )
    return Qwen3MoeForCausalLM(config)


def checkpoint(model: PreTrainedModel, folder: Path) -> dict[str, torch.Tensor]:
    """What save_pretrained writes."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(folder)
    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe"])
def test_fused_experts_are_refused_by_name(kind: str, tmp_path: Path) -> None:
    model = moe(kind)
    base = contents(model)
    on_file = checkpoint(model, tmp_path / "base")
    assert any(".experts.0." in name for name in on_file)
    (tmp_path / "new").mkdir()
    new = factories.finetuned(on_file, share=0.1)
    save_file(new, tmp_path / "new" / "model.safetensors")
    host = attach(model)
    with pytest.raises(
        LayoutError,
        match=r"'model.layers.0.*experts.0.*stored fused .*'model.layers.0.mlp.experts.down_proj', "
        r"'model.layers.0.mlp.experts.gate_up_proj'.*diff\(module",
    ):
        host.load(diff(tmp_path / "base", tmp_path / "new"))
    attention = {name: on_file[name] for name in on_file if "self_attn" in name}
    host.load(diff(attention, {name: new[name] for name in attention}), name="attention")
    host.activate("attention")
    assert all(torch.equal(contents(model)[name], new[name]) for name in attention)
    host.deactivate()
    assert holds(model, base)


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe"])
def test_grafts_made_from_fused_modules_work(kind: str) -> None:
    model = moe(kind)
    base, new = contents(model), tuned(model)
    graft = diff(base, new)
    assert "model.layers.1.mlp.experts.gate_up_proj" in graft.names
    host = attach(model)
    host.load(graft, name="a")
    host.activate("a")
    assert holds(model, new)
    host.deactivate()
    assert holds(model, base)


def test_the_same_name_in_another_layout_fails_the_base_check() -> None:
    """As transformers transposes some experts on loading: square ones keep their shape."""
    model = nn.Linear(6, 6, bias=False)
    on_file = {"weight": model.weight.detach().t().clone()}
    graft = diff(on_file, factories.finetuned(on_file, share=0.5))
    with pytest.raises(BaseMismatchError, match=r"differ, first 'weight', position"):
        attach(model).load(graft)


def test_experts_kept_apart_are_no_fused_ones() -> None:
    class Apart(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mlp = nn.ModuleDict({"experts": nn.ModuleList([nn.Linear(3, 3) for _ in "ab"])})

    model = Apart()
    graft: Graft = diff(contents(model), tuned(model))
    attach(model).load(graft)
    with pytest.raises(CoverageError, match=r"lacks 'mlp.experts.7.weight'"):
        attach(Apart()).load(single("mlp.experts.7.weight", torch.zeros(3, 3), [0], [1.0]))
