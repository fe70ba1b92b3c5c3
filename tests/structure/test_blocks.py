"""Reads of any range equal slices of the whole tensor, and touch little more than the rows they come from."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).resolve().parent))
from structure_models import both, ffn_cut, groups_cut, heads_cut, opened, without

from surgeon.structure import selection as selection_module
from surgeon.structure.cut import Cut
from surgeon.structure.selection import Selection
from surgeon.structure.views import MaskedView, PrunedView


@st.composite
def selections(draw):
    shape = tuple(draw(st.lists(st.integers(1, 7), min_size=1, max_size=4)))
    axes = draw(st.sets(st.integers(0, len(shape) - 1), min_size=1))
    kept = {
        a: np.array(sorted(draw(st.sets(st.integers(0, shape[a] - 1), min_size=1))), dtype=np.int64)
        for a in axes
    }
    return shape, kept


@given(selections(), st.data())
@settings(max_examples=300, deadline=None)
def test_any_range_of_any_selection(drawn, data):
    shape, kept = drawn
    stored = np.arange(np.prod(shape), dtype=np.float64)
    wanted = stored.reshape(shape)
    for axis, indices in kept.items():
        wanted = np.take(wanted, indices, axis=axis)
    found = Selection(shape, kept)
    assert found.shape == wanted.shape
    start = data.draw(st.integers(0, wanted.size))
    stop = data.draw(st.integers(start, wanted.size))
    saved = selection_module.GAP_ELEMENTS, selection_module.READ_ELEMENTS
    selection_module.GAP_ELEMENTS = data.draw(st.sampled_from((0, 3, 1 << 14)))
    selection_module.READ_ELEMENTS = data.draw(st.sampled_from((1, 5, 1 << 22)))
    try:
        values = found.read(lambda a, b: stored[a:b], start, stop)
    finally:
        selection_module.GAP_ELEMENTS, selection_module.READ_ELEMENTS = saved
    assert np.array_equal(values, wanted.reshape(-1)[start:stop])


def test_few_columns_of_a_wide_matrix_are_read_in_pieces(monkeypatch):
    monkeypatch.setattr(selection_module, "READ_ELEMENTS", 1000)
    monkeypatch.setattr(selection_module, "GAP_ELEMENTS", 0)
    sizes = []

    def read(start, stop):
        sizes.append(stop - start)
        return np.arange(start, stop)

    rows = np.array([*range(40), *range(60, 100)])
    found = Selection((100, 200), {0: rows, 1: np.array([0, 199])}).read(read, 0, 160)
    assert np.array_equal(found.reshape(80, 2), np.stack([rows * 200, rows * 200 + 199], axis=1))
    assert max(sizes) <= 1000 and sum(sizes) == 80 * 200


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3", "gpt_oss", "olmoe"])
@given(data=st.data())
@settings(max_examples=25, deadline=None)
def test_blocks_of_views(family, data):
    checkpoint, structure = opened(family)
    cut = groups_cut(structure) if family in ("gpt2", "olmoe", "gpt_oss") else heads_cut(structure)
    cut = without(both(cut, ffn_cut(structure)), 2)
    for view in (
        MaskedView(checkpoint, structure, cut),
        PrunedView(checkpoint, structure, cut, allow_norm_approx=True),
    ):
        name = data.draw(st.sampled_from(sorted(view.tensors)))
        info = view.tensors[name]
        whole = view.read(name, 0, info.elements)
        assert info.nbytes == whole.nbytes and len(whole) == info.elements
        start = data.draw(st.integers(0, info.elements))
        stop = data.draw(st.integers(start, info.elements))
        assert np.array_equal(view.read(name, start, stop), whole[start:stop])
        step = view.granularity(name)
        assert info.elements % step == 0
        parts = [view.read(name, at, min(at + step, info.elements)) for at in range(0, info.elements, step)]
        assert np.array_equal(np.concatenate(parts), whole)


def test_fused_matrices_are_cut_in_all_their_parts():
    checkpoint, structure = opened("phi3")
    name = "model.layers.0.self_attn.qkv_proj.weight"
    stored = checkpoint.read(name, 0, 96 * 48).reshape(96, 48)
    view = PrunedView(checkpoint, structure, groups_cut(structure))  # layer 0 loses key/value head 0
    wanted = np.concatenate([stored[16:48], stored[56:72], stored[80:96]])
    assert np.array_equal(view.read(name, 0, wanted.size).reshape(-1, 48), wanted)
    checkpoint, structure = opened("gpt2")
    name = "transformer.h.1.attn.c_attn.weight"
    stored = checkpoint.read(name, 0, 48 * 144).reshape(48, 144)
    view = PrunedView(checkpoint, structure, groups_cut(structure))  # layer 1 loses head 1
    gone = [part * 48 + at for part in range(3) for at in range(8, 16)]
    assert np.array_equal(view.read(name, 0, 48 * 120).reshape(48, 120), np.delete(stored, gone, axis=1))
    bias = checkpoint.read("transformer.h.1.attn.c_attn.bias", 0, 144)
    assert np.array_equal(view.read("transformer.h.1.attn.c_attn.bias", 0, 120), np.delete(bias, gone))


def test_sinks_and_norms_over_all_heads_follow_their_heads():
    checkpoint, structure = opened("gpt_oss")
    sinks = checkpoint.read("model.layers.1.self_attn.sinks", 0, 6)
    view = PrunedView(checkpoint, structure, groups_cut(structure))  # layer 1 loses heads 2 and 3
    assert np.array_equal(view.read("model.layers.1.self_attn.sinks", 0, 4), sinks[[0, 1, 4, 5]])
    checkpoint, structure = opened("olmoe")
    assert {s.tensor.rpartition(".layers.0.")[2] for s in structure.attention[0].norms} == {
        "self_attn.q_norm.weight", "self_attn.k_norm.weight",
    }  # fmt: skip
    view = PrunedView(checkpoint, structure, groups_cut(structure), allow_norm_approx=True)
    for part, size, keep in (("q_norm", 48, range(16, 48)), ("k_norm", 24, range(8, 24))):
        name = f"model.layers.0.self_attn.{part}.weight"
        stored = checkpoint.read(name, 0, size)
        assert np.array_equal(view.read(name, 0, len(keep)), stored[list(keep)])


def test_bytes_of_what_is_cut_are_never_handed_out():
    checkpoint, structure = opened("llama")
    for view in (
        MaskedView(checkpoint, structure, ffn_cut(structure)),
        PrunedView(checkpoint, structure, ffn_cut(structure)),
    ):
        name = structure.ffn[0].output.weight
        with pytest.raises(AssertionError, match="no stored bytes"):
            view.read_bytes(name, 0, 4)
        q = "model.layers.0.self_attn.q_proj.weight"
        assert not view.computed(q)
        assert np.array_equal(view.read_bytes(q, 8, 40), checkpoint.read_bytes(q, 8, 40))


def test_a_dropped_layer_of_experts_writes_nothing():
    for family in ("mixtral", "qwen2_moe", "granitemoe", "gpt_oss", "deepseek_v3"):
        checkpoint, structure = opened(family)
        view = MaskedView(checkpoint, structure, without(Cut.whole(structure.layers), 1))
        zeros = {n for n in view.tensors if view.computed(n)}
        down = ("o_proj", "down", "w2", "output_linear")
        wanted = {n for n in view.tensors if ".layers.1." in n and any(d in n for d in down)}
        assert zeros == wanted and wanted
        assert all(not view.read(n, 0, view.tensors[n].elements).any() for n in zeros)
