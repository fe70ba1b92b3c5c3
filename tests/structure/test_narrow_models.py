"""A narrower residual stream: exact where the removed channels were never used, refused where it cannot be right."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))
from safetensors.torch import load_file
from structure_models import close, ffn_cut, groups_cut, logits, opened, stock, strictly, without, write

from surgeon.checkpoint.memory import MemoryCheckpoint
from surgeon.errors import InputError, UsageError
from surgeon.structure.check import check
from surgeon.structure.cut import Cut, LayerCut
from surgeon.structure.views import MaskedView, PrunedView

KEPT = tuple(sorted({*range(48)} - {0, 5, 6, 7, 20, 33, 46, 47}))  # 40 channels
WRITERS = ("o_proj", "self_attn.dense", "down", "mlp.fc2", "c_proj", "w2", "output_linear")
EMBEDDINGS = ("embed_tokens", "wte", "wpe")


def unused(checkpoint, centred):
    """Return the model with zeros in the removed channels of the residual stream, centred ones where norms centre."""
    gone = [c for c in range(48) if c not in KEPT]
    state = load_file(checkpoint.folder / "model.safetensors")
    for name, value in state.items():
        axis = None
        if any(f"{e}.weight" in name for e in EMBEDDINGS):
            axis = -1
        elif any(w in name for w in WRITERS):
            conv = "c_proj.weight" in name
            axis = -1 if value.ndim == 1 or conv or name.endswith(("down_proj_bias",)) else -2
            if ".experts." in name and name.endswith("down_proj"):  # stored [experts, ffn, hidden]
                axis = -1
        elif name.endswith(".bias") and ("norm" in name or ".ln_" in name):
            value[gone] = 0
            continue
        if axis is None:
            continue
        value.index_fill_(axis, torch.tensor(gone), 0)
        if centred:
            value -= value.mean(axis, keepdim=True) * 48 / len(KEPT)
            value.index_fill_(axis, torch.tensor(gone), 0)
    found = MemoryCheckpoint("unused", state)
    found.config, found.folder = checkpoint.config, checkpoint.folder
    return found


@pytest.mark.parametrize("family", [
    "llama", "mistral", "qwen2", "qwen3", "phi", "phi3", "gpt2", "mixtral", "qwen2_moe", "qwen3_moe", "granitemoe", "gpt_oss",
    "deepseek_v3", "deepseek_v2",
])  # fmt: skip
def test_channels_that_were_never_used(family, scratch):
    extra = {"hidden_size": 48} if family.startswith("deepseek") else {}
    checkpoint, structure = opened(family, **extra)
    source = unused(checkpoint, centred=family in ("phi", "gpt2"))
    cut = replace(Cut.whole(structure.layers), hidden=KEPT)
    if family in ("llama", "gpt2"):  # 40 channels: Llama wants a divisor of them, GPT-2 five heads of eight
        heads = (0, 1, 4, 5) if family == "llama" else (0, 1, 2, 3, 4)
        cut = Cut((LayerCut(heads=heads),) * 3, KEPT)
        dense = MaskedView(source, structure, replace(cut, hidden=None))
    else:
        dense = source
    wanted = logits(strictly(write(dense, scratch / "dense", source.config)))
    check(cut, structure, source.config, for_stock=True)
    small = strictly(write(PrunedView(source, structure, cut), scratch / "small"))
    share = 48 / len(KEPT)  # mean squares are taken over fewer channels: |x|^2/48 = |x|^2/40 * 40/48
    for name, module in small.named_modules():
        weight = getattr(module, "weight", None)
        if weight is not None and weight.shape == (len(KEPT),) and ("norm" in name or ".ln_" in name):
            weight.data *= share**0.5
            key = "eps" if hasattr(module, "eps") else "variance_epsilon"
            setattr(module, key, getattr(module, key) * share)
            if isinstance(module, torch.nn.LayerNorm):
                assert module.bias is not None
    close(logits(small), wanted, 1e-4)


def test_a_narrow_bert_is_sliced_everywhere(scratch):
    checkpoint, structure = opened("bert")
    cut = Cut((LayerCut(heads=(0, 1, 2, 3, 5)),) * 3, KEPT)
    view = PrunedView(checkpoint, structure, cut)
    model, dense = strictly(write(view, scratch / "small")), stock(checkpoint.folder)
    assert (model.config.hidden_size, model.config.num_attention_heads, model.config.intermediate_size) == (
        40,
        5,
        48,
    )
    keep = torch.tensor(KEPT)
    for name in (
        "bert.embeddings.position_embeddings",
        "bert.embeddings.LayerNorm",
        "cls.predictions.transform.dense",
    ):
        a, b = model.get_submodule(name).weight, dense.get_submodule(name).weight
        for axis in [n for n, size in enumerate(b.shape) if size == 48]:
            b = b.index_select(axis, keep)
        assert torch.equal(a, b)
    assert logits(model).isfinite().all()


def test_width_and_everything_else_together(scratch):
    checkpoint, structure = opened("qwen2")
    cut = without(Cut(tuple(LayerCut(a.heads, b.channels) for a, b in zip(groups_cut(structure).layers, ffn_cut(structure).layers, strict=True)), KEPT), 1)  # fmt: skip
    solved = MemoryCheckpoint("solved", {structure.ffn[2].output.weight: torch.randn(48, 20)})
    view = PrunedView(checkpoint, structure, cut, solved)
    model = strictly(write(view, scratch / "small"))
    assert model.config.head_dim == 8 and model.config.hidden_size == 40
    name = structure.ffn[2].output.weight
    wanted = solved.read(name, 0, 960).reshape(48, 20)[list(KEPT)]
    assert torch.equal(model.model.layers[1].mlp.down_proj.weight.data, torch.from_numpy(wanted.copy()))


@pytest.mark.parametrize(("family", "words", "kept"), [
    ("gemma", "multiplies embeddings by the root of hidden_size", KEPT),
    ("gemma2", "multiplies embeddings", KEPT),
    ("gemma3_text", "multiplies embeddings", KEPT),
    ("gpt2", "layer 0 would keep 6 heads of 8 and 40 channels", KEPT),
    ("bert", "layer 0 would keep 6 heads of 8 and 40 channels", KEPT),
])  # fmt: skip
def test_families_whose_width_cannot_be_cut(family, words, kept):
    checkpoint, structure = opened(family)
    cut = replace(Cut.whole(3), hidden=kept)
    for refuse in (
        lambda: check(cut, structure, checkpoint.config),
        lambda: PrunedView(checkpoint, structure, cut),
    ):
        with pytest.raises(InputError, match=words) as caught:
            refuse()
        assert caught.value.code == "E368"


def test_widths_no_stock_class_loads():
    checkpoint, structure = opened("llama", attention_bias=True)
    cut = replace(Cut.whole(3), hidden=KEPT)  # 6 heads do not divide 40
    with pytest.raises(InputError, match="refuses 6 heads: they do not divide hidden_size = 40"):
        check(cut, structure, checkpoint.config, for_stock=True)
    checkpoint, structure = opened("deepseek_v2", hidden_size=48)
    with pytest.raises(InputError, match="refuses 4 heads: they do not divide hidden_size = 39"):
        check(replace(Cut.whole(4), hidden=KEPT[:39]), structure, checkpoint.config, for_stock=True)


def test_unknown_tensors_and_masks():
    checkpoint, structure = opened("llama")
    state = load_file(checkpoint.folder / "model.safetensors")
    other = MemoryCheckpoint("other", {**state, "model.value_head.weight": torch.zeros(1, 48)})
    other.config = checkpoint.config
    cut = replace(Cut.whole(3), hidden=KEPT)
    with pytest.raises(InputError, match=r"value_head.weight of other is unknown"):
        PrunedView(other, structure, cut)
    assert "model.value_head.weight" in PrunedView(other, structure, ffn_cut(structure)).tensors
    with pytest.raises(UsageError, match="no masked equivalent"):
        MaskedView(checkpoint, structure, cut)
