"""ThinkEdit and projections against closed forms and hooks on the library's model."""

from __future__ import annotations

import edit_models as em
import numpy as np
import pytest
import torch

from surgeon.checkpoint.checkpoint import open_path
from surgeon.edit import project_out, thinkedit
from surgeon.edit.edited_view import EditedView, behind_norm
from surgeon.edit.thinkedit import Head
from surgeon.edit.writers import gain_of
from surgeon.errors import InputError, UsageError

HEADS = [Head(0, 1), Head(2, 0), Head(2, 3)]


def edited(family, strength=1.0, heads=HEADS, **options):
    checkpoint, stream = em.opened(family)
    directions = em.directions_for(checkpoint, stream, "layer" if family == "phi" else "attn")
    made = thinkedit.projections(checkpoint, stream, directions, heads, strength=strength, **options)
    return checkpoint, stream, directions, made, EditedView(checkpoint, made)


def parts(stream, layer):
    return next(w for w in stream.attention() if w.layer == layer)


def outputs_first(writer, matrix):
    return matrix.T if writer.output_axis == 1 else matrix


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2", "deepseek_v3", "phi"])
@pytest.mark.parametrize("strength", [1.0, 0.4, 2.0])
def test_projection_is_one_minus_strength(family, strength):
    checkpoint, stream, directions, _, view = edited(family, strength)
    for layer in range(3):
        writer = parts(stream, layer)
        v = em.unit(directions.vectors[layer])
        before = outputs_first(writer, em.tensor(checkpoint, writer.tensor))
        after = outputs_first(writer, em.tensor(view, writer.tensor))
        for head in range(writer.heads):
            place = writer.columns(head)
            if Head(layer, head) not in HEADS:
                assert np.array_equal(before[:, place], after[:, place])
                continue
            np.testing.assert_allclose(
                v @ after[:, place], (1 - strength) * (v @ before[:, place]), atol=1e-6
            )
            rest = np.eye(len(v)) - np.outer(v, v)
            np.testing.assert_allclose(rest @ after[:, place], rest @ before[:, place], atol=1e-6)


def test_full_removal_is_idempotent_and_reads_in_any_blocks():
    _, _, _, made, view = edited("qwen3")
    twice = EditedView(view, made)
    for name in made:
        once = em.tensor(view, name)
        np.testing.assert_allclose(em.tensor(twice, name), once, atol=1e-7)
        flat = once.reshape(-1)
        for start, stop in [(0, 1), (3, 77), (41, 42), (100, len(flat))]:
            assert np.array_equal(view.read(name, start, stop).astype(np.float64), flat[start:stop])


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2", "qwen2_moe"])
def test_equals_a_hook_on_the_library_model(family, scratch):
    """The output projection's input is split by head; each head's own contribution loses w v (v . c)."""
    checkpoint, stream, directions, _, view = edited(family, 0.7)
    model = em.stock(checkpoint.folder)
    writers = {w.layer: w for w in stream.attention()}

    def hook(layer):
        writer = writers[layer]
        matrix = torch.from_numpy(outputs_first(writer, em.tensor(checkpoint, writer.tensor))).float()
        v = torch.from_numpy(em.unit(directions.vectors[layer])).float()

        def run(module, args, output):
            for head in [h.head for h in HEADS if h.layer == layer]:
                place = writer.columns(head)
                c = args[0][..., place] @ matrix[:, place].T
                output = output - 0.7 * (c @ v)[..., None] * v
            return output

        return run

    for layer in {h.layer for h in HEADS}:
        module = model.get_submodule(writers[layer].module)
        module.register_forward_hook(hook(layer))
    result = em.saved(view, checkpoint, scratch / "out")
    expected = em.logits(model)
    assert (em.logits(result) - expected).abs().max() < 3e-6 * expected.abs().max()
    assert (em.logits(em.stock(checkpoint.folder)) - expected).abs().max() > 1e-3


def test_only_declared_tensors_change(scratch):
    checkpoint, _, _, made, view = edited("llama")
    em.saved(view, checkpoint, scratch / "out")
    result = open_path(scratch / "out")
    assert view.changed() == sorted(made)
    for name, info in checkpoint.tensors.items():
        same = np.array_equal(
            checkpoint.read_bytes(name, 0, info.nbytes), result.read_bytes(name, 0, info.nbytes)
        )
        assert same == (name not in made), name


def test_bfloat16_result_keeps_little_of_the_direction(scratch):
    checkpoint, stream, directions, made, view = edited("llama")
    rows = thinkedit.effect(checkpoint, view, stream, made, HEADS, "BF16")
    em.saved(view, checkpoint, scratch / "out", "bfloat16")
    result = open_path(scratch / "out")
    for row in rows:
        writer = parts(stream, row["layer"])
        v = em.unit(directions.vectors[row["layer"]])
        stored = em.tensor(result, writer.tensor)[:, writer.columns(row["head"])]
        assert np.linalg.norm(v @ stored) == pytest.approx(row["after"], rel=1e-6)
        assert 0 < row["after"] < 0.01 * row["before"]


@pytest.mark.parametrize("family", ["gemma2", "gemma3_text"])
def test_behind_a_norm_all_heads_leave_nothing(family, scratch):
    """With all heads edited, what leaves the norm has no part along v; dividing v by g alone would leave more."""
    everything = [Head(1, head) for head in range(4)]
    checkpoint, stream, directions, _, view = edited(family, heads=everything)
    v = torch.from_numpy(em.unit(directions.vectors[1])).float()
    found = {}

    def measure(model):
        handle = model.model.layers[1].post_attention_layernorm.register_forward_hook(
            lambda module, args, output: found.update(part=(output @ v).abs().max().item())
        )
        em.logits(model)
        handle.remove()
        return found["part"]

    before, after = measure(em.stock(checkpoint.folder)), measure(em.saved(view, checkpoint, scratch / "out"))
    assert before > 0.1 and after < 1e-5 * before
    writer = parts(stream, 1)
    gain = gain_of(writer, checkpoint)
    stored = em.stock(checkpoint.folder).model.layers[1].post_attention_layernorm.weight.detach().numpy()
    np.testing.assert_allclose(gain, 1 + stored, rtol=1e-6)
    matrix = em.tensor(checkpoint, writer.tensor)
    naive = matrix - np.outer(v / gain, (v / gain) @ matrix) / np.linalg.norm(v / gain) ** 2
    assert np.linalg.norm((gain * v.numpy()) @ naive) > 1e-2


def test_a_channel_without_gain_is_left_alone():
    drawn = np.random.default_rng(0)
    v, gain = em.unit(drawn.normal(size=6)), drawn.normal(size=6)
    gain[2] = 0.0
    made = behind_norm(v, gain, 1.0, 0)
    matrix = drawn.normal(size=(6, 4))
    after = matrix - np.outer(made.write, made.read @ matrix)
    assert np.isfinite(after).all() and np.array_equal(after[2], matrix[2])
    np.testing.assert_allclose((gain * v) @ after, 0, atol=1e-12)


@pytest.mark.parametrize("family", ["qwen3", "gpt2", "gemma2"])
def test_scores_are_mean_contributions(family):
    """Against the contributions of every token, [tokens, heads, hidden], written out."""
    checkpoint, stream = em.opened(family)
    directions = em.directions_for(checkpoint, stream)
    drawn = np.random.default_rng(3)
    tokens = {w.layer: drawn.normal(size=(7, w.inputs)) for w in stream.attention()}
    directions.inputs.update({n: a.mean(0).astype(np.float32) for n, a in tokens.items()})
    found = thinkedit.scores(checkpoint, stream, directions)
    assert len(found) == 12
    for writer in stream.attention():
        matrix = outputs_first(writer, em.tensor(checkpoint, writer.tensor))
        v, gain = em.unit(directions.vectors[writer.layer]), gain_of(writer, checkpoint)
        for head in range(writer.heads):
            place = writer.columns(head)
            c = tokens[writer.layer][:, place] @ matrix[:, place].T
            if gain is not None:
                c = c * gain
            assert found[Head(writer.layer, head)] == pytest.approx((c @ -v).mean(), rel=1e-5)


def test_a_planted_head_ranks_first(scratch):
    from surgeon.checkpoint.memory import MemoryCheckpoint

    checkpoint, stream = em.opened("qwen3")
    directions = em.directions_for(checkpoint, stream)
    writer = parts(stream, 1)
    state = {name: em.tensor(checkpoint, name).astype(np.float32) for name in checkpoint.tensors}
    state[writer.tensor][:, writer.columns(2)] = 0
    v = em.unit(directions.vectors[1])
    state[writer.tensor][:, writer.columns(2).start] = -100 * v  # its output is -v, whatever else it reads
    directions.inputs[1][writer.columns(2).start] = 1.0
    planted = MemoryCheckpoint("planted", state)
    planted.config = checkpoint.config
    scored = thinkedit.scores(planted, stream, directions)
    assert thinkedit.choose(scored, count=1) == [Head(1, 2)]
    assert scored[Head(1, 2)] == pytest.approx(100, rel=1e-5)


def test_choice_counts_and_ties():
    scored = {Head(layer, head): 1.0 for layer in range(28) for head in range(12)}
    scored[Head(9, 4)] = 2.0
    assert len(thinkedit.choose(scored)) == 13  # 4 % of 336
    assert thinkedit.choose(scored, count=3) == [Head(9, 4), Head(0, 0), Head(0, 1)]
    assert len(thinkedit.choose(scored, fraction=1e-9)) == 1
    for bad in (0.0, 1.5, None):
        with pytest.raises(UsageError, match="fraction of heads"):
            thinkedit.choose(scored, fraction=bad)
    with pytest.raises(UsageError, match="of 336"):
        thinkedit.choose(scored, count=337)


@pytest.mark.parametrize(
    ("heads", "message"),
    [([Head(3, 0)], "no head 3:0"), ([Head(0, 4)], "no head 0:4")],
)
def test_heads_that_are_not_there(heads, message):
    checkpoint, stream = em.opened("qwen3")
    with pytest.raises(UsageError, match=message):
        thinkedit.projections(checkpoint, stream, em.directions_for(checkpoint, stream), heads)


def test_biases_change_only_when_asked():
    checkpoint, stream, directions, made, _ = edited("gpt2")
    assert not any(name.endswith("bias") for name in made)
    _, _, _, made, view = edited("gpt2", project_bias=True)
    bias = parts(stream, 2).bias
    v = em.unit(directions.vectors[2])
    assert abs(v @ em.tensor(view, bias)) < 1e-6 < abs(v @ em.tensor(checkpoint, bias))


@pytest.mark.parametrize("family", ["llama", "gpt2", "granitemoe", "gpt_oss", "mixtral"])
def test_one_direction_out_of_every_writer_leaves_the_stream_without_it(family, scratch):
    checkpoint, stream = em.opened(family)
    directions = em.directions_for(checkpoint, stream)
    made = project_out.projections(
        checkpoint, stream, directions, matrices=project_out.MATRICES, layer=1, project_bias=True
    )
    view = EditedView(checkpoint, made)
    v = torch.from_numpy(em.unit(directions.vectors[1])).float()
    stacked_biases = family == "gpt_oss"  # experts' biases are stacked and stay
    model = em.saved(view, checkpoint, scratch / "out")
    if family == "gpt2":  # learned positions start the stream, too
        model.transformer.wpe.weight.data.zero_()
    with torch.no_grad():
        hidden = model(em.IDS, output_hidden_states=True).hidden_states[:-1]
    parts_left = [(h @ v).abs().max().item() for h in hidden]
    assert max(parts_left[:1] if stacked_biases else parts_left) < 1e-4
    with torch.no_grad():
        original = em.stock(checkpoint.folder)(em.IDS, output_hidden_states=True).hidden_states[1]
    assert (original @ v).abs().max() > 0.1


def test_project_out_refusals():
    checkpoint, stream = em.opened("llama")
    directions = em.directions_for(checkpoint, stream)
    for options, message in [
        ({"matrices": ("router",)}, "matrices are router"),
        ({"matrices": ("embedding",)}, "belongs to no layer"),
        ({"layer": 9}, "no direction for layer 9"),
        ({"layers": (2, 2)}, "layers 2:2 of 3"),
    ]:
        with pytest.raises(UsageError, match=message):
            project_out.projections(checkpoint, stream, directions, **options)


def test_encoders_are_refused():
    with pytest.raises(InputError, match="normalises its residual stream"):
        em.opened("bert")
