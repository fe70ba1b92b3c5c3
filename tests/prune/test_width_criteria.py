"""Width criteria against their formulas in plain torch, on stock models, and against what must not change them."""

from __future__ import annotations

import dataclasses
import functools
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "calibrate"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "architectures"))
from walk_models import model_folder, stock, texts

from surgeon.calibrate.settings import Settings
from surgeon.checkpoint.checkpoint import open_path
from surgeon.checkpoint.memory import MemoryCheckpoint
from surgeon.errors import InputError, UsageError
from surgeon.prune import criteria
from surgeon.prune.criteria import Context, Moments, flap, minitron
from surgeon.structure.find import structure_of

ONE = Settings(threads=1, batch_tokens=64)
MODES = (("ffn", "channels"), ("attention", "groups"), ("attention", "heads"))
BIASED = (("attention_bias", True), ("mlp_bias", True))
FAMILIES = ("llama", "qwen2", "phi", "phi3", "gpt2", "bert", "gemma2")
NAMES = ("flap", "magnitude", "minitron", "random", "wanda")


@functools.cache
def activations(folder):
    """Inputs of all linear-like modules of the stock model, by path: one [tokens, in] per sample."""
    model, found = stock(folder), {}

    def keep(path):
        return lambda module, args: found.setdefault(path, []).append(
            args[0].detach().reshape(-1, args[0].shape[-1])
        )

    for path, module in model.named_modules():
        if getattr(module, "weight", None) is not None and module.weight.ndim == 2:
            module.register_forward_pre_hook(keep(path))
    with torch.no_grad():
        for sample in texts():
            model.base_model(torch.from_numpy(sample)[None])
    return model, found


def moments_of(rows):
    """Definitions, over all samples' rows."""
    together = torch.cat(rows).double()
    return Moments(
        len(together),
        together.mean(0).numpy(),
        together.var(0, correction=0).numpy(),
        together.square().sum(0).sqrt().numpy(),
        together.abs().mean(0).numpy(),
        (together != 0).sum(0).numpy(),
        torch.stack([row.double().abs().mean(0) for row in rows]).square().sum(0).sqrt().numpy(),
    )


def context_of(checkpoint, kind, mode, layer=1, rows=None, **changes):
    structure = structure_of(checkpoint)
    part = (structure.ffn if kind == "ffn" else structure.attention)[layer]
    assert part is not None
    if rows is None:
        _, found = activations(checkpoint.folder)
        rows = next(value for path, value in found.items() if path.endswith(part.output.module))
    return Context(checkpoint, part, mode, moments=moments_of(rows), **changes)


def changed(checkpoint, change):
    state = {
        n: checkpoint.read(n, 0, i.elements).reshape(i.shape).copy() for n, i in checkpoint.tensors.items()
    }
    for name in state:
        change(name, state[name])
    view = MemoryCheckpoint("changed", state)
    view.config, view.folder = checkpoint.config, checkpoint.folder
    return view


def matrices(folder, family, layer=1):
    """The stock model's matrices of a layer: output [out, in] and producers, by plain name."""
    model, _ = activations(folder)
    state = {name: value.double() for name, value in model.state_dict().items()}

    def get(end):
        return next((v for n, v in state.items() if f".{layer}.{end}" in n), None)

    return get


def scores_behind(ranking):
    """Scores up to a factor, by unit, from the steps of the error."""
    steps = np.diff(ranking.errors)
    scores = np.empty(len(steps))
    scores[ranking.order] = steps
    return scores


def same_up_to_scale(found, wanted, tolerance=1e-5):
    wanted = np.asarray(wanted, dtype=np.float64)
    np.testing.assert_allclose(found, wanted / wanted.sum(), rtol=tolerance)


# ---- formulas ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind,mode", MODES[:2])
@pytest.mark.parametrize("family", ["llama", "bert"])
def test_scores_are_their_formulas(family, kind, mode):
    folder = model_folder(family)
    checkpoint = open_path(folder)
    context = context_of(checkpoint, kind, mode)
    get = matrices(folder, family)
    if family == "bert":
        weight = get("output.dense.weight") if kind == "ffn" else get("attention.output.dense.weight")
    else:
        weight = get("mlp.down_proj.weight") if kind == "ffn" else get("self_attn.o_proj.weight")
    _, found = activations(folder)
    rows = next(value for path, value in found.items() if path.endswith(context.module))
    x = torch.cat(rows).double()
    pieces = context.units
    by_unit = {
        "wanda": weight.abs().sum(0) * x.norm(dim=0),
        "flap": ((x - x.mean(0)) ** 2).mean(0) * weight.square().sum(0),
    }
    for name, columns in by_unit.items():
        same_up_to_scale(scores_behind(criteria.get(name).rank(context)), columns.reshape(pieces, -1).sum(1))
    mean = torch.stack([row.double().abs().mean(0) for row in rows])
    wanted = mean.square().sum(0).sqrt().reshape(pieces, -1).norm(dim=1)
    same_up_to_scale(scores_behind(minitron.CRITERION.rank(context)), wanted)


def test_magnitude_is_its_formula():
    folder = model_folder("llama", BIASED)
    get = matrices(folder, "llama")
    context = context_of(open_path(folder), "ffn", "channels")
    gate, up = (
        torch.cat([get(f"mlp.{n}.weight"), get(f"mlp.{n}.bias")[:, None]], 1).norm(dim=1)
        for n in ("gate_proj", "up_proj")
    )
    wanted = get("mlp.down_proj.weight").norm(dim=0) * gate * up
    same_up_to_scale(scores_behind(criteria.get("magnitude").rank(context)), wanted)
    value = torch.cat([get("self_attn.v_proj.weight"), get("self_attn.v_proj.bias")[:, None]], 1).reshape(
        2, 8, 33
    )
    out = get("self_attn.o_proj.weight").reshape(32, 4, 8)
    heads = torch.stack([(out[:, h] @ value[h // 2]).norm() for h in range(4)])
    groups = criteria.get("magnitude").rank(context_of(open_path(folder), "attention", "groups"))
    same_up_to_scale(scores_behind(groups), heads.reshape(2, 2).norm(dim=1))
    rows = criteria.get("magnitude").rank(context_of(open_path(folder), "attention", "heads"))
    for group in (0, 1):
        own = heads[2 * group : 2 * group + 2]
        assert rows.order[:, group].tolist() == (own.argsort() + 2 * group).tolist()


@pytest.mark.parametrize("family", FAMILIES)
def test_magnitude_reads_values_and_producers_wherever_they_are(family):
    """Zero value rows of one group, or one channel's up rows, and it goes first: fused, transposed or plain."""
    checkpoint = open_path(model_folder(family))
    structure = structure_of(checkpoint)
    attention, ffn = structure.attention[1], structure.ffn[1]
    assert attention is not None and ffn is not None
    wanted_group, wanted_channel = attention.groups - 1, 5
    query, _, value = _qkv(attention, checkpoint)

    def clear(name, array):
        for section, unit in ((value[0], wanted_group), *((b, wanted_group) for b in value[1:])):
            if name == section.tensor:
                size = section.length // section.units
                np.moveaxis(array, section.axis, 0)[
                    section.start + unit * size : section.start + (unit + 1) * size
                ] = 0
        for section in ffn.inputs:
            if name == section.tensor:
                np.moveaxis(array, section.axis, 0)[section.start + wanted_channel] = 0

    view = changed(checkpoint, clear)
    assert query
    group = criteria.get("magnitude").rank(context_of(view, "attention", "groups"))
    assert group.order[0] == wanted_group and group.errors[1] == 0
    channel = criteria.get("magnitude").rank(context_of(view, "ffn", "channels"))
    assert channel.order[0] == wanted_channel and channel.errors[1] == 0


def _qkv(attention, checkpoint):
    """The value's sections, found by the names of tensors and the known order inside fused ones."""
    key = [s for s in attention.key_values if "k_proj" in s.tensor or ".key." in s.tensor]
    value = [s for s in attention.key_values if "v_proj" in s.tensor or ".value." in s.tensor]
    if not value:  # qkv behind each other
        starts = sorted({s.start for s in attention.key_values})
        key = [s for s in attention.key_values if s.start == starts[0]]
        value = [s for s in attention.key_values if s.start == starts[1]]
    return attention.queries, key, value


# ---- what must not change them -------------------------------------------------------------------


@pytest.mark.parametrize("extra", [(), BIASED])
def test_magnitude_does_not_see_how_scale_is_shared_out(extra):
    checkpoint = open_path(model_folder("llama", extra))
    drawn = np.random.default_rng(0)
    scale = np.exp(drawn.normal(size=48) * 3).astype(np.float32)
    mix = drawn.normal(size=(2, 8, 8)) + 3 * np.eye(8)

    def rescale(name, array):
        if ".1.mlp.up_proj" in name:
            array *= scale[:, None] if array.ndim == 2 else scale
        elif ".1.mlp.down_proj.weight" in name:
            array /= scale
        elif ".1.self_attn.v_proj" in name:
            array[:] = np.concatenate([m @ part for m, part in zip(mix, np.split(array, 2), strict=True)])
        elif ".1.self_attn.o_proj.weight" in name:
            parts = np.split(array, 4, axis=1)
            array[:] = np.concatenate([p @ np.linalg.inv(mix[h // 2]) for h, p in enumerate(parts)], axis=1)

    view = changed(checkpoint, rescale)
    for kind, mode in MODES:
        before, after = (
            criteria.get("magnitude").rank(context_of(c, kind, mode)) for c in (checkpoint, view)
        )
        np.testing.assert_array_equal(before.order, after.order)
        np.testing.assert_allclose(before.errors, after.errors, rtol=1e-4)
    down = torch.from_numpy(scale)
    plain = criteria.read_output(checkpoint, structure_of(checkpoint).ffn[1].output).norm(dim=0)
    assert not torch.equal(plain.argsort(), (plain / down).argsort())  # a norm of one matrix alone fails this


@pytest.mark.parametrize("name", (*NAMES[:3], "wanda"))
def test_permuting_channels_permutes_the_ranking(name):
    checkpoint = open_path(model_folder("llama"))
    order = np.random.default_rng(1).permutation(48)

    def permute(tensor, array):
        if ".1.mlp." in tensor:
            array[:] = array[:, order] if "down_proj" in tensor else array[order]

    rows = next(
        v for p, v in activations(checkpoint.folder)[1].items() if p.endswith("layers.1.mlp.down_proj")
    )
    before = criteria.get(name).rank(context_of(checkpoint, "ffn", "channels", rows=rows))
    view = changed(checkpoint, permute)
    after = criteria.get(name).rank(context_of(view, "ffn", "channels", rows=[row[:, order] for row in rows]))
    np.testing.assert_array_equal(order[after.order], before.order)


def test_standardised_scores_do_not_depend_on_the_scale_of_a_layer():
    checkpoint = open_path(model_folder("llama"))
    rows = next(
        v for p, v in activations(checkpoint.folder)[1].items() if p.endswith("layers.1.mlp.down_proj")
    )
    plain = context_of(checkpoint, "ffn", "channels", rows=rows)
    scaled = context_of(checkpoint, "ffn", "channels", rows=[32 * row for row in rows])
    np.testing.assert_allclose(flap.standardised(plain), flap.standardised(scaled), rtol=1e-9)
    assert abs(flap.standardised(plain).mean()) < 1e-12 and abs(flap.standardised(plain).std() - 1) < 1e-12
    shifted = [row.double() + 5 for row in rows]
    np.testing.assert_allclose(
        flap.standardised(plain),
        flap.standardised(context_of(checkpoint, "ffn", "channels", rows=shifted)),
        rtol=1e-4,
    )
    same = dataclasses.replace(plain, moments=dataclasses.replace(plain.moments, variance=np.zeros(48)))
    assert not flap.standardised(same).any()


# ---- FLAP's bias ---------------------------------------------------------------------------------


@pytest.mark.parametrize("family,extra", [("bert", ()), ("gpt2", ()), ("llama", BIASED)])
def test_constant_channels_leave_without_a_trace(family, extra):
    """Channels made constant through their producers; the stock model without them equals the one with."""
    checkpoint = open_path(model_folder(family, extra))
    structure = structure_of(checkpoint)
    ffn = structure.ffn[1]
    constant = [3, 4, 17]

    def freeze(name, array):
        for section in ffn.inputs:
            if name == section.tensor and array.ndim == 2:
                np.moveaxis(array, section.axis, 0)[[section.start + c for c in constant]] = 0

    view = changed(checkpoint, freeze)
    model = stock(checkpoint.folder)
    state = model.state_dict()
    for name, info in view.tensors.items():
        value = torch.from_numpy(view.read(name, 0, info.elements).reshape(info.shape).copy())
        if name in state:
            state[name].copy_(value)
    rows, place = [], next(m for n, m in model.named_modules() if n.endswith(ffn.output.module))
    handle = place.register_forward_pre_hook(lambda m, args: rows.append(args[0][0]))
    with torch.no_grad():
        before = [model.base_model(torch.from_numpy(s)[None]).last_hidden_state for s in texts()]
        handle.remove()
        context = context_of(view, "ffn", "channels", rows=rows)
        ranking = flap.CRITERION.rank(context)
        assert set(ranking.order[:3]) == set(constant) and ranking.error(ffn.width - 3) < 1e-9
        kept = ranking.kept(ffn.width - 3)
        added = flap.CRITERION.bias(context, kept)
        assert added is not None and added.dtype == torch.float32 and float(added.abs().max()) > 1e-3
        place.bias += added
        weight = place.weight if ffn.output.input_axis == 1 else place.weight.T
        weight[:, constant] = 0
        after = [model.base_model(torch.from_numpy(s)[None]).last_hidden_state for s in texts()]
    for one, other in zip(before, after, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_bias_is_the_mean_of_what_goes_for_heads():
    checkpoint = open_path(model_folder("llama"))
    context = context_of(checkpoint, "attention", "heads")
    rows = torch.cat(
        next(
            v for p, v in activations(checkpoint.folder)[1].items() if p.endswith("layers.1.self_attn.o_proj")
        )
    )
    kept = flap.CRITERION.rank(context).kept(1)
    gone = [column for head in range(4) if head not in kept for column in range(8 * head, 8 * head + 8)]
    wanted = (rows[:, gone] @ context.weight[:, gone].T).mean(0)
    torch.testing.assert_close(flap.CRITERION.bias(context, kept), wanted, rtol=1e-4, atol=1e-5)
    assert flap.CRITERION.bias(context, (0, 1, 2, 3)) is None


# ---- allocation ----------------------------------------------------------------------------------


def contexts_of(checkpoint, mode):
    return [
        context_of(checkpoint, kind, how, layer)
        for layer in range(structure_of(checkpoint).layers)
        for kind, how in (("attention", mode), ("ffn", "channels"))
    ]


@pytest.mark.parametrize("mode", ["groups", "heads"])
def test_allocation_is_one_threshold(mode):
    checkpoint = open_path(model_folder("llama"))
    contexts = contexts_of(checkpoint, mode)
    # hidden 32, head_dim 8: q and o of one head, k and v of one group, three matrices of a channel
    head, group, channel = 2 * 8 * 32, 2 * 8 * 32, 3 * 32
    cost = {"attention": 2 * head + group if mode == "groups" else 2 * head, "ffn": channel}
    assert {c.kind: flap.unit_parameters(c) for c in contexts} == cost
    pool = []
    for context in contexts:
        s = torch.from_numpy(context.moments.variance) * context.weight.double().square().sum(0)
        z = ((s - s.mean()) / s.std(correction=0)).reshape(context.units, -1).mean(1).numpy()
        if mode == "heads" and context.kind == "attention":
            z = np.sort(z.reshape(2, 2), axis=1).mean(0)
        pool += [(value, context.layer, context.kind) for value in np.sort(z)]
    total = sum(cost[kind] for _, _, kind in pool)
    for fraction in (0.0, 0.1, 0.3):
        found = flap.allocate(contexts, fraction, least=0)
        gone, removed = {}, 0
        for _, layer, kind in sorted(pool):
            if removed >= fraction * total:
                break
            gone[layer, kind] = gone.get((layer, kind), 0) + 1
            removed += cost[kind]
        assert {k: n - gone.get(k, 0) for k, n in flap.allocate(contexts, 0.0).items()} == found
        assert removed >= fraction * total
    floor = flap.allocate(contexts, 0.999)
    assert set(floor.values()) == {1}
    for bad in (-0.1, 1.0, float("nan")):
        with pytest.raises(UsageError, match="E276"):
            flap.allocate(contexts, bad)
    with pytest.raises(ValueError, match="twice"):
        flap.allocate([contexts[0], contexts[0]], 0.1)


# ---- all of them ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3"])
def test_rankings_are_complete_and_groups_stay_equal(name, family):
    checkpoint = open_path(model_folder(family))
    assert not criteria.get(name).solves
    for kind, mode in MODES:
        ranking = criteria.get(name).rank(context_of(checkpoint, kind, mode))
        everything = np.sort(ranking.order.reshape(-1))
        context = context_of(checkpoint, kind, mode)
        np.testing.assert_array_equal(everything, np.arange(context.units))
        assert ranking.errors[0] == 0 and ranking.errors[-1] == pytest.approx(1)
        assert (np.diff(ranking.errors) >= 0).all() and ranking.order.dtype == np.int32
        if kind == "attention":
            per_group = context.part.per_group
            for count in range(ranking.units + 1):
                left = np.bincount(
                    np.array(ranking.kept(count), int) // per_group, minlength=context.part.groups
                )
                assert set(left[left > 0]) <= {per_group if mode == "groups" else count}
                assert (left > 0).sum() == (count if mode == "groups" else context.part.groups * bool(count))


def test_what_needs_no_text_gets_none():
    checkpoint = open_path(model_folder("llama"))
    for name in NAMES:
        criterion = criteria.get(name)
        context = dataclasses.replace(context_of(checkpoint, "ffn", "channels"), moments=None)
        if criterion.needs:
            with pytest.raises(AssertionError):
                criterion.rank(context)
        else:
            assert criterion.rank(context).units == 48
            assert criterion.bias(context, (1, 2)) is None


def test_random_is_a_function_of_seed_and_module():
    checkpoint = open_path(model_folder("llama"))
    first, again, other, layer = (
        criteria.get("random")
        .rank(context_of(checkpoint, "ffn", "channels", number, seed=seed))
        .order.tolist()
        for number, seed in ((1, 0), (1, 0), (1, 1), (2, 0))
    )
    assert first == again and first != other and first != layer


def test_unit_that_writes_nothing_goes_first():
    """The identity layer of width pruning: every criterion that looks at the model takes it first."""
    checkpoint = open_path(model_folder("llama"))

    def clear(name, array):
        if ".1.mlp.down_proj" in name:
            array[:, 7] = 0
        if ".1.self_attn.o_proj" in name:
            array[:, 16:] = 0

    view = changed(checkpoint, clear)
    for name in ("magnitude", "wanda", "flap"):
        assert criteria.get(name).rank(context_of(view, "ffn", "channels")).order[0] == 7
        groups = criteria.get(name).rank(context_of(view, "attention", "groups"))
        assert groups.order.tolist() == [1, 0] and groups.errors[1] == 0


@pytest.mark.parametrize("family", ["llama", "bert", "gpt2"])
def test_hidden_channels_are_ranked_over_all_norms(family):
    folder = model_folder(family)
    model, found = stock(folder), {}
    for path, module in model.base_model.named_modules():
        if "norm" in type(module).__name__.lower():
            module.register_forward_hook(
                lambda m, a, out, p=path: found.setdefault(p, []).append(out[0].double().abs().mean(0))
            )
    with torch.no_grad():
        for sample in texts():
            model.base_model(torch.from_numpy(sample)[None])
    wanted = sum(torch.stack(rows).square().sum(0).sqrt() for rows in found.values())
    scores = minitron.hidden_scores(open_path(folder), texts(), ONE)
    np.testing.assert_allclose(scores, wanted.numpy(), rtol=1e-5)
    assert minitron.hidden_order(scores).tolist() == np.argsort(wanted.numpy(), kind="stable").tolist()


def test_hidden_channels_of_nothing():
    checkpoint = changed(open_path(model_folder("llama")), lambda name, array: None)
    checkpoint.config = {**checkpoint.config, "model_type": "unheard_of"}
    with pytest.raises(InputError, match="E365"):
        minitron.hidden_scores(checkpoint, texts(), ONE)
