"""Weights solved for kept columns, and biases they bring along, in the masked and in the small model."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))
from structure_models import (
    both,
    close,
    ffn_cut,
    groups_cut,
    logits,
    opened,
    removed,
    stock,
    strictly,
    without,
    write,
)

from surgeon.checkpoint.memory import MemoryCheckpoint
from surgeon.errors import InputError
from surgeon.structure.cut import Cut, LayerCut
from surgeon.structure.views import MaskedView, PrunedView


def columns(structure, cut, number):
    """Return (attention columns, FFN columns) that stay in a layer, by plain loops."""
    kept, a, f = cut.layers[number], structure.attention[number], structure.ffn[number]
    heads = range(a.heads) if kept.heads is None else kept.heads
    return [h * a.head_dim + at for h in heads for at in range(a.head_dim)], list(
        range(f.width) if kept.channels is None else kept.channels
    )


def solved_for(checkpoint, structure, cut, dtype=torch.float32, layers=None):
    """Return random output matrices at kept width, and the same scattered into the source's width."""
    drawn = torch.Generator().manual_seed(7)
    narrow, wide = {}, {}
    for number in cut.kept_layers if layers is None else layers:
        for part, kept in zip(
            (structure.attention[number], structure.ffn[number]), columns(structure, cut, number), strict=True
        ):
            name, axis = part.output.weight, part.output.input_axis
            shape = list(checkpoint.tensors[name].shape)
            wide[name] = torch.zeros(shape)
            shape[axis] = len(kept)
            narrow[name] = torch.randn(shape, generator=drawn).to(dtype)
            wide[name].index_copy_(axis, torch.tensor(kept), narrow[name].float())
    return MemoryCheckpoint("solved", narrow), wide


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_solved_weights_are_scattered_and_sliced(family, dtype, scratch):
    checkpoint, structure = opened(family)
    cut = ffn_cut(structure) if family == "gpt2" else both(groups_cut(structure), ffn_cut(structure))
    cut = without(cut, 1)
    solved, wide = solved_for(checkpoint, structure, cut, dtype)
    masked, pruned = (
        MaskedView(checkpoint, structure, cut, solved),
        PrunedView(checkpoint, structure, cut, solved),
    )
    model = stock(checkpoint.folder)
    model.load_state_dict(wide, strict=False)
    for layer in cut.kept_layers:  # zero columns of an output matrix are all a cut is
        assert (
            wide[structure.ffn[layer].output.weight].shape
            == masked.tensors[structure.ffn[layer].output.weight].shape
        )
    with removed(model, structure, without(Cut.whole(3), 1)):
        wanted = logits(model)
    close(logits(strictly(write(masked, scratch / "masked"))), wanted)
    close(logits(strictly(write(pruned, scratch / "pruned"))), wanted)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_values_of_solved_weights_are_exact(family):
    checkpoint, structure = opened(family)
    cut = ffn_cut(structure)
    solved, wide = solved_for(checkpoint, structure, cut, layers=[1])
    masked, pruned = (
        MaskedView(checkpoint, structure, cut, solved),
        PrunedView(checkpoint, structure, cut, solved),
    )
    for name, values in wide.items():
        assert masked.computed(name) and pruned.computed(name)
        flat = values.reshape(-1).numpy()
        for start, stop in ((0, len(flat)), (5, 6), (17, 331), (len(flat) - 3, len(flat)), (9, 9)):
            assert np.array_equal(masked.read(name, start, stop), flat[start:stop])
        narrow = solved.read(name, 0, solved.tensors[name].elements)
        assert np.array_equal(pruned.read(name, 3, len(narrow)), narrow[3:])
        assert pruned.tensors[name].shape == solved.tensors[name].shape
        assert pruned.tensors[name].dtype == checkpoint.tensors[name].dtype


def test_a_masked_bfloat16_model_keeps_its_bits():
    checkpoint, structure = opened("llama")
    name = structure.ffn[0].output.weight
    state = {n: torch.randn(i.shape).bfloat16() for n, i in checkpoint.tensors.items()}
    half = MemoryCheckpoint("half", state)
    half.config = checkpoint.config
    cut = ffn_cut(structure)
    keep = np.zeros(48, dtype=bool)
    keep[list(cut.layers[0].channels)] = True
    bits = state[name].view(torch.int16).numpy().view(np.uint16)
    view = MaskedView(half, structure, cut)
    assert np.array_equal(
        view.read(name, 0, bits.size).reshape(bits.shape), np.where(keep, bits, 0).astype(np.uint16)
    )
    small = PrunedView(half, structure, cut)
    assert np.array_equal(small.read(name, 0, 48 * 20).reshape(48, 20), bits[:, keep])
    assert np.array_equal(half.read(name, 0, bits.size), bits.reshape(-1))  # the source was not written to
    solved, wide = solved_for(checkpoint, structure, cut, layers=[0])
    found = MaskedView(half, structure, cut, solved).read(name, 0, bits.size)
    assert found.dtype == np.float32 and np.array_equal(found, wide[name].reshape(-1).numpy())


def test_biases_a_llama_lacks_come_with_zeros_for_the_others(scratch):
    checkpoint, structure = opened("llama")
    cut = both(groups_cut(structure), ffn_cut(structure))
    drawn = torch.Generator().manual_seed(1)
    given = {
        f"{part.output.module}.bias": torch.randn(48, generator=drawn)
        for part in (structure.attention[0], structure.ffn[2])
    }
    solved = MemoryCheckpoint("biases", given)
    model = stock(checkpoint.folder)
    with removed(model, structure, cut):
        for name, value in given.items():
            module = model.get_submodule(name.removesuffix(".bias"))
            module.bias = torch.nn.Parameter(value)
        wanted = logits(model)
    masked, pruned = (
        MaskedView(checkpoint, structure, cut, solved),
        PrunedView(checkpoint, structure, cut, solved),
    )
    for view, place in ((masked, "masked"), (pruned, "pruned")):
        assert view.config["attention_bias"] is True and view.config["mlp_bias"] is True
        close(logits(strictly(write(view, scratch / place))), wanted)
    assert pruned.tensors["model.layers.1.self_attn.k_proj.bias"].shape == (16,)
    assert masked.tensors["model.layers.1.self_attn.k_proj.bias"].shape == (24,)
    only = MemoryCheckpoint("one", {name: value for name, value in given.items() if "down" in name})
    assert not PrunedView(checkpoint, structure, cut, only).config.get("attention_bias")


def test_biases_a_model_has_are_replaced(scratch):
    checkpoint, structure = opened("gpt2")
    bias = torch.arange(48.0)
    solved = MemoryCheckpoint("bias", {structure.ffn[1].output.bias: bias})
    view = PrunedView(checkpoint, structure, ffn_cut(structure), solved)
    model = strictly(write(view, scratch / "pruned"))
    assert torch.equal(model.transformer.h[1].mlp.c_proj.bias, bias)


@pytest.mark.parametrize("family", ["mistral", "qwen2", "phi3"])
def test_a_bias_no_class_has_is_refused(family):
    checkpoint, structure = opened(family)
    solved = MemoryCheckpoint("bias", {f"{structure.attention[0].output.module}.bias": torch.zeros(48)})
    for view in (MaskedView, PrunedView):
        with pytest.raises(InputError, match="no such bias") as caught:
            view(checkpoint, structure, Cut.whole(3), solved)
        assert caught.value.code == "E369"


@pytest.mark.parametrize(("change", "words"), [
    (lambda name: {name: torch.zeros(48, 21)}, "the cut leaves"),
    (lambda name: {name: torch.zeros(48, 20, dtype=torch.int32)}, "not a plain number type"),
    (lambda name: {name.replace("down", "up"): torch.zeros(48, 20)}, "belongs to no output matrix"),
    (lambda name: {name.replace("layers.0", "layers.2"): torch.zeros(48, 20)}, "belongs to no output matrix"),
    (lambda name: {name.replace("layers.0", "layers.1"): torch.zeros(48, 20)}, "belongs to no output matrix"),
])  # fmt: skip
def test_solved_weights_of_another_cut_are_refused(change, words):
    checkpoint, structure = opened("llama")
    first = ffn_cut(structure).layers[0]
    cut = Cut((first, LayerCut(channels=()), None))
    solved = MemoryCheckpoint("solved", change(structure.ffn[0].output.weight))
    for view in (MaskedView, PrunedView):
        with pytest.raises(InputError, match=words) as caught:
            view(checkpoint, structure, cut, solved)
        assert caught.value.code == "E369"


def test_identity_follows_the_cut_and_every_solved_value():
    checkpoint, structure = opened("llama")
    cut = ffn_cut(structure)
    solved, _ = solved_for(checkpoint, structure, cut)
    again, _ = solved_for(checkpoint, structure, cut)
    name = structure.ffn[2].output.weight
    state = {
        n: torch.from_numpy(again.read(n, 0, i.elements).copy()).reshape(i.shape)
        for n, i in again.tensors.items()
    }
    state[name][-1, -1] += 1e-6
    views = [
        MaskedView(checkpoint, structure, cut),
        PrunedView(checkpoint, structure, cut),
        PrunedView(checkpoint, structure, ffn_cut(structure, 21)),
        PrunedView(checkpoint, structure, cut, solved),
        PrunedView(checkpoint, structure, cut, MemoryCheckpoint("other", state)),
    ]
    assert len({view.identity for view in views}) == len(views)
    assert PrunedView(checkpoint, structure, cut, again).identity == views[3].identity
