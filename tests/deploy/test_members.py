"""Nested families: sorting changes nothing, members are leading slices byte for byte, and the record survives."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).resolve().parent))
from deploy_models import FAMILIES, logits, opened, stock_folder, write

from surgeon.deploy.build import load
from surgeon.deploy.members import (
    FILE,
    Kept,
    LayerOrder,
    Member,
    check_nested,
    companion,
    named,
    permute,
    read_members,
)
from surgeon.errors import InputError, UsageError
from surgeon.structure.views import MaskedView, PrunedView

LAYERS = 5


def orders(seed: int = 0) -> dict[int, LayerOrder]:
    draw = np.random.default_rng(seed)
    return {
        layer: LayerOrder(draw.permutation(4), [draw.permutation(2) for _ in range(4)], draw.permutation(96))
        for layer in range(LAYERS)
        if layer != 2
    }


@pytest.mark.parametrize("family", FAMILIES)
def test_sorting_keeps_the_function(family, scratch):
    folder = stock_folder(family, scratch / "source")
    checkpoint, structure = opened(folder)
    view = permute(checkpoint, structure, orders())
    sorted_folder = write(view, scratch / "sorted")
    before, after = logits(load(folder)), logits(load(sorted_folder))
    assert float((before - after).abs().max() / before.abs().max()) < 1e-5
    moved = {
        n
        for n, t in load_file(sorted_folder / "model.safetensors").items()
        if not torch.equal(t, load_file(folder / "model.safetensors")[n])
    }
    assert (
        moved
        and all(view.computed(name) for name in moved)
        and not any("layers.2." in name for name in moved)
    )


@pytest.mark.parametrize("step", [1, 7, 64, 1000])
def test_any_range_can_be_read(step, scratch):
    checkpoint, structure = opened(stock_folder("phi3", scratch / "source"))
    view = permute(checkpoint, structure, orders(1))
    for name in (
        "model.layers.0.self_attn.qkv_proj.weight",
        "model.layers.1.mlp.down_proj.weight",
        "model.norm.weight",
    ):
        count = view.tensors[name].elements
        whole = view.read(name, 0, count)
        part = np.concatenate(
            [view.read(name, at, min(at + step, count)) for at in range(0, min(count, 3000), step)]
        )
        assert np.array_equal(part, whole[: len(part)]) and len(view.read(name, 5, 5)) == 0


def test_heads_move_as_the_order_says(scratch):
    """Against an index written out by hand: group 2 first, its second query head before its first."""
    checkpoint, structure = opened(stock_folder("qwen2", scratch / "source"))
    state = load_file(scratch / "source" / "model.safetensors")
    order = LayerOrder(groups=[2, 0, 3, 1], heads=[[0, 1], [0, 1], [1, 0], [0, 1]])
    view = permute(checkpoint, structure, {0: order})
    place = "model.layers.0.self_attn."

    def read(name):
        info = view.tensors[name]
        return view.read(name, 0, info.elements).reshape(info.shape)

    heads = [5, 4, 0, 1, 6, 7, 2, 3]
    query = state[place + "q_proj.weight"].reshape(8, 16, 64).numpy()
    assert np.array_equal(read(place + "q_proj.weight"), query[heads].reshape(128, 64))
    assert np.array_equal(
        read(place + "q_proj.bias"), state[place + "q_proj.bias"].reshape(8, 16).numpy()[heads].reshape(-1)
    )
    assert np.array_equal(
        read(place + "v_proj.weight"),
        state[place + "v_proj.weight"].reshape(4, 16, 64).numpy()[[2, 0, 3, 1]].reshape(64, 64),
    )
    output = state[place + "o_proj.weight"].reshape(64, 8, 16).numpy()
    assert np.array_equal(read(place + "o_proj.weight"), output[:, heads].reshape(64, 128))
    assert (
        permute(checkpoint, structure, {0: order}).identity
        == view.identity
        != permute(checkpoint, structure, orders()).identity
    )


def family_of(structure) -> list[Member]:
    full = Kept(4, 2, 96)
    return [
        Member("small", {0: Kept(2, 1, 32), 1: Kept(2, 1, 32), 4: Kept(2, 1, 32)}, {"parameters": 1}),
        Member("large", dict.fromkeys(range(LAYERS), full)),
        Member("middle", {n: Kept(3, 2, 64) for n in (0, 1, 3, 4)}, {"kl": 0.25}),
    ]


def test_members_are_leading_slices_byte_for_byte(scratch):
    checkpoint, structure = opened(stock_folder("llama", scratch / "source"))
    parent = permute(checkpoint, structure, orders())
    state = {n: parent.read(n, 0, i.elements).reshape(i.shape) for n, i in parent.tensors.items()}
    members = {member.name: member for member in family_of(structure)}
    view = PrunedView(parent, structure, members["small"].cut(structure))
    for new, old in enumerate((0, 1, 4)):

        def held(name, new=new):
            name = f"model.layers.{new}.{name}"
            return view.read(name, 0, view.tensors[name].elements).reshape(view.tensors[name].shape)

        place = f"model.layers.{old}."
        assert np.array_equal(held("mlp.up_proj.weight"), state[place + "mlp.up_proj.weight"][:32])
        assert np.array_equal(held("mlp.down_proj.weight"), state[place + "mlp.down_proj.weight"][:, :32])
        assert np.array_equal(held("self_attn.k_proj.weight"), state[place + "self_attn.k_proj.weight"][:32])
        first = np.r_[0:16, 32:48]  # the first query head of either group
        assert np.array_equal(
            held("self_attn.q_proj.weight"), state[place + "self_attn.q_proj.weight"][first]
        )
        assert np.array_equal(
            held("self_attn.o_proj.weight"), state[place + "self_attn.o_proj.weight"][:, first]
        )
    masked = load(write(MaskedView(parent, structure, members["middle"].cut(structure)), scratch / "masked"))
    small = load(write(PrunedView(parent, structure, members["middle"].cut(structure)), scratch / "middle"))
    assert float((logits(masked) - logits(small)).abs().max()) <= 1e-5
    assert small.config.num_hidden_layers == 4 and small.config.num_attention_heads == 6
    assert all(layer is not None and layer.heads is None for layer in members["large"].cut(structure).layers)


def test_the_record_survives_and_damage_is_refused(scratch):
    _, structure = opened(stock_folder("llama", scratch / "source"))
    members = family_of(structure)
    name, content = companion(members, structure)
    assert name == FILE == "members.json" and list(read_members(content)) == members
    assert named(members, "middle").figures == {"kl": 0.25}
    with pytest.raises(UsageError, match='no member "midle"') as refused:
        named(members, "midle")
    assert refused.value.code == "E289" and refused.value.help is not None and "middle" in refused.value.help
    for damaged in (
        b"{",
        b"[]",
        b'{"schema": 2, "members": []}',
        json.dumps({**json.loads(content), "members": [{}]}).encode(),
    ):
        with pytest.raises(InputError) as broken:
            read_members(damaged)
        assert broken.value.code == "E330"


def test_families_must_be_nested(scratch):
    _, structure = opened(stock_folder("llama", scratch / "source"))
    members = family_of(structure)
    check_nested(members, structure)
    with pytest.raises(UsageError, match="small keeps something"):
        check_nested([*members[1:], Member("small", {2: Kept(1, 1, 8)})], structure)
    with pytest.raises(UsageError, match="one name"):
        check_nested([members[0], members[0]], structure)


@pytest.mark.parametrize(
    ("order", "word"),
    [
        (LayerOrder(groups=[0, 1, 2]), "groups of layer 0"),
        (LayerOrder(heads=[[0, 1]] * 3 + [[1, 1]]), "heads of group 3"),
        (LayerOrder(heads=[[0, 1]] * 3), "4 groups"),
        (LayerOrder(channels=[*range(95), 94]), "channels of layer 0"),
    ],
    ids=["groups", "heads", "count", "channels"],
)
def test_orders_that_are_none_are_refused(order, word, scratch):
    checkpoint, structure = opened(stock_folder("llama", scratch / "source"))
    with pytest.raises(UsageError, match=word) as refused:
        permute(checkpoint, structure, {0: order})
    assert refused.value.code == "E289"


@pytest.mark.parametrize("kept", [Kept(5, 2, 96), Kept(4, 3, 96), Kept(4, 2, 97)])
def test_members_the_parent_cannot_give_are_refused(kept, scratch):
    _, structure = opened(stock_folder("llama", scratch / "source"))
    with pytest.raises(InputError, match="layer 1") as refused:
        Member("m", {1: kept}).cut(structure)
    assert refused.value.code == "E330"
    with pytest.raises(InputError, match="has not"):
        Member("m", {9: Kept(1, 1, 1)}).cut(structure)
