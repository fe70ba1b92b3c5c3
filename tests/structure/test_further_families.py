"""Families of routed experts and hybrids: dropped layers, heads where they can be cut, clear refusals elsewhere."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

sys.path.insert(0, str(Path(__file__).resolve().parent))
from structure_models import (
    FURTHER,
    HEADED,
    ONLY_DEPTH,
    close,
    groups_cut,
    heads_cut,
    logits,
    removed,
    strictly,
    tokens,
    without,
    write,
)  # fmt: skip
from walk_models import model_folder, stock

from surgeon import architectures
from surgeon.architectures.conformance import check as conforms
from surgeon.checkpoint.checkpoint import open_path
from surgeon.errors import InputError
from surgeon.structure.check import check
from surgeon.structure.cut import Cut, LayerCut
from surgeon.structure.find import structure_of
from surgeon.structure.views import MaskedView, PrunedView

CORE = {
    ("minimax", 0),
    ("nemotron_h", 2),
    ("kimi_linear", 1),
    ("qwen3_next", 0),
    ("glm4_moe", 0),
    ("llama4_text", 1),
}
LAST_ATTENTION = {
    *((family, 1) for family in ("qwen3_next", "qwen3_5_moe_text", "lfm2_moe", "jamba", "granitemoehybrid", "kimi_linear")),
    ("nemotron_h", 2),
}  # fmt: skip
"""Where dropping a layer leaves no attention, and so nothing by which the library counts tokens."""
GROUPED = (("hidden_size", 48), ("num_attention_heads", 6), ("num_key_value_heads", 3))


def places():
    for family in FURTHER:
        for layer in range(5 if family == "nemotron_h" else 3):
            yield pytest.param(family, layer, marks=() if (family, layer) in CORE else pytest.mark.slow)


@torch.no_grad()
def uncached(model):
    """Return logits without the library's cache, which counts the layers of the whole model."""
    return model(input_ids=tokens(), use_cache=False).logits


@torch.no_grad()
def skipping(folder, *layers):
    """Return the logits of the stock model without some layers."""
    model = stock(folder)
    stack = model.model.layers

    def skip(module, args, kwargs, output):
        value = args[0] if args else kwargs["hidden_states"]
        return (value, *output[1:]) if isinstance(output, tuple) else value

    whole = uncached(model)
    for layer in layers:
        stack[layer].register_forward_hook(skip, with_kwargs=True)
    found = uncached(model)
    assert float((whole - found).abs().max() / whole.abs().max()) > 1e-2  # the layer matters
    return found


@pytest.mark.parametrize(("family", "layer"), places())
def test_a_dropped_layer(family, layer, scratch):
    folder = model_folder(family)
    checkpoint = open_path(folder)
    structure = structure_of(checkpoint)
    cut = without(Cut.whole(structure.layers), layer)
    wanted = skipping(folder, layer)
    if family == "minimax":  # its residual is normalised, so that no weights make a layer pass through
        with pytest.raises(InputError) as caught:
            MaskedView(checkpoint, structure, cut)
        assert caught.value.code == "E366"
    else:
        masked = write(MaskedView(checkpoint, structure, cut), scratch / "masked")
        close(uncached(stock(masked)), wanted)
    if (family, layer) in LAST_ATTENTION:
        with pytest.raises(InputError) as caught:
            PrunedView(checkpoint, structure, cut)
        assert caught.value.code == "E405" and "attention" in caught.value.message
        return
    view = PrunedView(checkpoint, structure, cut)
    small = write(view, scratch / "pruned")
    held = {name: (info.dtype, info.shape) for name, info in view.tensors.items()}
    assert conforms(view.config, held) == []
    close(logits(stock(small) if family == "kimi_k2" else strictly(small)), wanted)


@pytest.mark.slow
@pytest.mark.parametrize("family", FURTHER)
def test_several_dropped_layers_of_a_deeper_model(family, scratch):
    """Six layers with the family's own rule of kinds instead of a list; those that no value of a rule fits are refused."""
    extra = {"num_hidden_layers": 6, "layer_types": None, "mlp_only_layers": None, "moe_layers": None,
             "no_rope_layers": None, "mlp_layer_types": None}  # fmt: skip
    known = architectures.get(family).defaults.keys() | set(
        json.loads((model_folder(family) / "config.json").read_text())
    )
    if family == "nemotron_h":
        extra = {"layers_block_type": ["linear_attention", "moe", "mlp", "full_attention", "moe", "mlp"]}
    elif family in ("lfm2_moe", "granitemoehybrid"):
        other = "conv" if family == "lfm2_moe" else "mamba"
        extra = {"num_hidden_layers": 6, "layer_types": [other, "full_attention"] * 3}
    else:
        extra = {key: value for key, value in extra.items() if key in known}
    # lists cannot be keys of the cache of folders, so the model is saved here
    from tiny_models import build, save

    torch.manual_seed(4)
    model = build(family, **extra)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(parameter.numel()))
            parameter.copy_(1 + 0.3 * noise if parameter.ndim == 1 else 0.25 * noise)
    folder = scratch / "source"
    save(model, family, folder)
    checkpoint = open_path(folder)
    structure = structure_of(checkpoint)
    refused = 0
    for number, gone in enumerate([(0,), (5,), (1, 2), (0, 3, 4)]):
        cut = without(Cut.whole(6), *gone)
        try:
            view = PrunedView(checkpoint, structure, cut)
        except InputError as error:
            assert error.code in ("E341", "E405"), error
            refused += 1
            continue
        small = write(view, scratch / str(number))
        close(logits(stock(small)), skipping(folder, *gone))
    assert refused <= (3 if family == "jamba" else 1)


@pytest.mark.parametrize("family", ONLY_DEPTH)
def test_heads_channels_and_width_of_hybrids_are_refused(family):
    checkpoint = open_path(model_folder(family))
    structure = structure_of(checkpoint)
    layers = structure.layers
    reason = architectures.get(family).only_depth
    assert reason and set(structure.attention) == set(structure.ffn) == {None}
    for part in (LayerCut(heads=(0,)), LayerCut(channels=(0, 1))):
        with pytest.raises(InputError) as caught:
            check(Cut((part, *(LayerCut() for _ in range(layers - 1)))), structure, checkpoint.config)
        assert caught.value.code == "E366" and reason in caught.value.message
    with pytest.raises(InputError) as caught:
        check(Cut(tuple(LayerCut() for _ in range(layers)), tuple(range(16))), structure, checkpoint.config)
    assert caught.value.code == "E368" and reason in caught.value.message


@pytest.mark.parametrize("mode", [groups_cut, heads_cut])
@pytest.mark.parametrize(
    "family",
    [pytest.param(family, marks=() if family == "glm4_moe" else pytest.mark.slow) for family in HEADED],
)
def test_heads_of_attention_families(family, mode, scratch):
    if mode is heads_cut and family == "minimax_m2":
        pytest.skip("norms over all heads")
    extra = (
        *GROUPED,
        *((("head_dim", 8),) if family in ("glm4_moe", "hunyuan_v1_moe", "minimax_m2") else ()),
    )
    checkpoint = open_path(model_folder(family, extra))
    structure = structure_of(checkpoint)
    cut = mode(structure)
    dense = stock(checkpoint.folder)
    with removed(dense, structure, cut):
        wanted = logits(dense)
    close(logits(strictly(write(MaskedView(checkpoint, structure, cut), scratch / "masked"))), wanted)
    if family == "minimax_m2":
        with pytest.raises(Exception) as caught:
            PrunedView(checkpoint, structure, cut)
        assert caught.value.code == "E262"
        return
    close(logits(strictly(write(PrunedView(checkpoint, structure, cut), scratch / "pruned"))), wanted)


def with_prediction(family: str, folder: Path) -> Path:
    """Return a model with what predicts further tokens added to its files, as the record describes it."""
    source = model_folder(family)
    config = json.loads((source / "config.json").read_text())
    config["num_nextn_predict_layers"] = 1
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    shutil.copy(source / "model.safetensors", folder)
    tensors = load_file(folder / "model.safetensors")
    for name, spec in architectures.get(family).expected(config).items():
        if spec.group.startswith("prediction") and name not in tensors:
            tensors[name] = torch.full(spec.shape, 0.01)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


PREDICTING = ["qwen3_next", "qwen3_5_moe_text", "ernie4_5_moe", "nemotron_h", "glm4_moe", "kimi_k2"]


@pytest.mark.parametrize("family", PREDICTING)
def test_what_predicts_further_tokens_goes_with_dropped_layers(family, scratch):
    checkpoint = open_path(with_prediction(family, scratch / "source"))
    held = {name: (info.dtype, info.shape) for name, info in checkpoint.tensors.items()}
    assert conforms(checkpoint.config, held) == []
    extra = held.keys() - open_path(model_folder(family)).tensors.keys()
    assert len(extra) > 8
    for name in sorted(extra)[:: max(1, len(extra) // 6)]:
        rest = {other: entry for other, entry in held.items() if other != name}
        assert [finding.tensor for finding in conforms(checkpoint.config, rest)] == [name]
    structure = structure_of(checkpoint)
    whole = PrunedView(checkpoint, structure, Cut.whole(structure.layers))
    assert whole.tensors.keys() == held.keys() and not whole.notes
    cut = PrunedView(checkpoint, structure, without(Cut.whole(structure.layers), structure.layers - 1))
    assert not any("mtp" in name for name in cut.tensors) and cut.notes
    assert conforms(cut.config, {name: (i.dtype, i.shape) for name, i in cut.tensors.items()}) == []
    assert not cut.config.get("num_nextn_predict_layers")
