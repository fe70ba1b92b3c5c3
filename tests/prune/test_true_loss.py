"""True losses of many cuts in one pass, against the plain model with hooks and against masked models run alone."""

from __future__ import annotations

import math
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "structure"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "calibrate"))
from structure_models import both, ffn_cut, folder_of, groups_cut, heads_cut, opened, removed, stock, without
from walk_models import Nothing, texts

from surgeon.calibrate import head as head_module
from surgeon.calibrate import logit_divergence
from surgeon.calibrate.head import Head
from surgeon.calibrate.walk import Settings, Walk
from surgeon.checkpoint.checkpoint import open_path
from surgeon.checkpoint.memory import MemoryCheckpoint
from surgeon.errors import EnvironmentFault, InputError, Interrupted
from surgeon.prune.true_loss import Solved, TrueLoss
from surgeon.structure.cut import Cut, LayerCut
from surgeon.structure.find import structure_of
from surgeon.structure.views import MaskedView

ONE = Settings(threads=1, batch_tokens=64)
LENGTHS = (13, 17, 18, 5)


def some_cuts(structure):
    """Return cuts of every kind that a structure allows."""
    whole = Cut.whole(structure.layers)
    cuts = [whole, without(whole, 1)]
    attention = [a for a in structure.attention if a is not None]
    if attention:
        cuts += [groups_cut(structure), without(groups_cut(structure), 0)]
        if all(a.per_group > 1 for a in attention):
            cuts.append(heads_cut(structure))
        cuts.append(Cut((LayerCut(heads=()), *whole.layers[1:])))
    if all(f is not None for f in structure.ffn):
        cuts += [ffn_cut(structure), both(groups_cut(structure), ffn_cut(structure, 9))]
        cuts.append(Cut((*whole.layers[:-1], LayerCut(channels=()))))
        cuts.append(Cut((LayerCut((), ()), *whole.layers[1:])))
    return cuts


@torch.no_grad()
def plain_losses(folder, structure, cuts, samples):
    """Return the losses by the stock model, all logits at once, in float64."""
    model = stock(folder)
    language = model.get_output_embeddings() is not None and model.config.model_type != "bert"

    def outputs():
        ids = [torch.from_numpy(sample)[None] for sample in samples]
        if language:
            return [model(one).logits[0].double() for one in ids]
        return [model.base_model(one).last_hidden_state[0].double() for one in ids]

    dense = outputs()
    found = []
    for cut in cuts:
        with removed(model, structure, cut):
            pairs = list(zip(dense, outputs(), strict=True))
        if language:
            parts = [(a.softmax(-1) * (a.log_softmax(-1) - b.log_softmax(-1))).sum(-1) for a, b in pairs]
            found.append(float(torch.cat(parts).mean()))
        else:
            error = sum(float((a - b).square().sum()) for a, b in pairs)
            found.append(error / sum(float(a.square().sum()) for a, _ in pairs))
    return found


@pytest.mark.parametrize(
    "family", ["llama", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi", "phi3", "gpt2", "bert", "mixtral", "gpt_oss"]
)  # fmt: skip
def test_equals_the_plain_model_without_what_is_removed(family):
    checkpoint, structure = opened(family)
    samples, cuts = texts(LENGTHS), some_cuts(structure)
    wanted = plain_losses(folder_of(family), structure, cuts, samples)
    with TrueLoss(checkpoint, structure, samples, ONE) as loss:
        found = loss(cuts)
        assert loss.measure == ("nmse" if family == "bert" else "kl")
    assert wanted[0] == 0 == found[0]
    assert min(wanted[1:]) > 1e-4  # every other cut is felt
    assert found == pytest.approx(wanted, rel=1e-4, abs=1e-6)


def test_a_base_model_without_head_is_compared_by_its_states():
    folder = folder_of("llama", "LlamaModel")
    checkpoint = open_path(folder)
    structure = structure_of(checkpoint)
    samples, cuts = texts(LENGTHS), some_cuts(structure)
    with TrueLoss(checkpoint, structure, samples, ONE) as loss:
        assert loss.measure == "nmse"
        assert loss(cuts) == pytest.approx(plain_losses(folder, structure, cuts, samples), rel=1e-4, abs=1e-9)


def walked(checkpoint, samples):
    with Walk(checkpoint, samples, ONE) as walk:
        walk.run(Nothing())
        return torch.cat([states for _, states in walk.hidden()])


@torch.no_grad()
def masked_loss(checkpoint, masked, samples):
    """Return the loss of a masked model that is run on its own, with the head's logits as a whole."""
    logits = [Head(one, ONE).logits(walked(one, samples)).double() for one in (checkpoint, masked)]
    p, q = (one.log_softmax(-1) for one in logits)
    return float((p.exp() * (p - q)).sum(-1).mean())


def solved_weights(checkpoint, structure, cut, biases=()):
    """Return random weights for everything a cut removes from, as a checkpoint and as a function."""
    drawn = torch.Generator().manual_seed(3)
    tensors, table = {}, {}
    for number in cut.kept_layers:
        kept = cut.layers[number]
        for kind, part, units in (
            ("attention", structure.attention[number], kept.heads),
            ("ffn", structure.ffn[number], kept.channels),
        ):
            if not units:
                continue
            out = checkpoint.tensors[part.output.weight].shape[1 - part.output.input_axis]
            width = len(units) * (part.head_dim if kind == "attention" else 1)
            weight = 0.3 * torch.randn(out, width, generator=drawn)
            bias = torch.randn(out, generator=drawn) if kind in biases else None
            tensors[part.output.weight] = weight if part.output.input_axis == 1 else weight.T.contiguous()
            if bias is not None:
                tensors[part.output.module + ".bias"] = bias
            table[number, kind, units] = Solved(weight, bias)
    return MemoryCheckpoint("solved", tensors), lambda *key: table[key]


@pytest.mark.parametrize(
    ("family", "biases"), [("llama", ()), ("llama", ("attention", "ffn")), ("gpt2", ("ffn",)), ("phi3", ())]
)
def test_solved_weights_take_the_place_of_columns_as_in_the_masked_model(family, biases):
    checkpoint, structure = opened(family)
    samples = texts(LENGTHS)
    cut = without(both(groups_cut(structure), ffn_cut(structure)), 1)
    stored, weights = solved_weights(checkpoint, structure, cut, biases)
    masked = MaskedView(checkpoint, structure, cut, stored)
    with TrueLoss(checkpoint, structure, samples, ONE) as loss:
        plain, solved, again = loss([cut])[0], loss([cut], weights)[0], loss([cut])[0]
    assert plain == again != solved
    assert plain == pytest.approx(
        masked_loss(checkpoint, MaskedView(checkpoint, structure, cut), samples), rel=1e-4
    )
    assert solved == pytest.approx(masked_loss(checkpoint, masked, samples), rel=1e-4)


def test_the_model_is_whole_again_afterwards():
    """A bias that was lent to a module without one, and masked weights, are taken back."""
    checkpoint, structure = opened("llama")
    samples = texts(LENGTHS)
    cut = both(groups_cut(structure), ffn_cut(structure))
    _, weights = solved_weights(checkpoint, structure, cut, ("attention", "ffn"))
    whole = Cut.whole(structure.layers)
    with TrueLoss(checkpoint, structure, samples, ONE) as loss:
        assert loss([cut, whole], weights)[1] == 0.0
        assert loss([whole, cut])[0] == 0.0


def families_of_cuts(structure):
    """Cuts that agree in their first layers, in pairs and differently."""
    whole, small, smaller = Cut.whole(3).layers, ffn_cut(structure).layers, ffn_cut(structure, 5).layers
    layers = [
        (small[0], whole[1], whole[2]),
        (small[0], whole[1], smaller[2]),
        (small[0], None, smaller[2]),
        (small[0], None, None),
        (None, whole[1], smaller[2]),
        (whole[0], whole[1], smaller[2]),
        (small[0], smaller[1], smaller[2]),
        (None, small[1], None),
    ]
    return [Cut(tuple(one)) for one in layers]


def test_shared_beginnings_are_computed_once_and_change_nothing():
    checkpoint, structure = opened("llama")
    samples, cuts = texts(LENGTHS), families_of_cuts(structure)
    with TrueLoss(checkpoint, structure, samples, ONE) as loss:
        alone = [loss([cut])[0] for cut in cuts]
        moved = []
        advance = loss._sweep.advance
        loss._sweep.advance = lambda layer, moves, skipped: (
            moved.append(layer),
            advance(layer, moves, skipped),
        )
        together = loss([*cuts, cuts[0]])
        assert together == [*alone, alone[0]]
        # By layer, the different beginnings that a kept layer ends; dropped layers compute nothing.
        beginnings = [{cut.layers[: n + 1] for cut in cuts if cut.layers[n] is not None} for n in range(3)]
        assert [moved.count(n) for n in range(3)] == [len(found) for found in beginnings] == [2, 5, 6]
        passes = loss.passes
        assert loss(list(reversed(together and cuts))) == list(reversed(alone))
        assert loss.passes == passes + 1


@pytest.mark.parametrize("most", [1, 3])
def test_any_number_of_cuts_a_pass_gives_the_same(most):
    checkpoint, structure = opened("qwen3")
    samples, cuts = texts(LENGTHS), families_of_cuts(structure)
    with TrueLoss(checkpoint, structure, samples, ONE) as loss:
        wanted = loss(cuts)
    with TrueLoss(checkpoint, structure, samples, ONE, most=most) as loss:
        assert loss.at_once == most
        assert loss(cuts) == wanted
        assert loss.passes == 1 + math.ceil(len(cuts) / most)


def test_little_memory_means_fewer_cuts_a_pass_and_then_files(tmp_path):
    checkpoint, structure = opened("llama")
    samples, cuts = texts((60,) * 70), families_of_cuts(structure)
    with TrueLoss(checkpoint, structure, samples, ONE) as loss:
        wanted = loss(cuts)
    each = 60 * 70 * 48 * 4
    limited = Settings(threads=1, batch_tokens=64, memory_limit=1 + 5 * each * 20 // 3, spill=tmp_path)
    with TrueLoss(checkpoint, structure, samples, limited) as loss:
        assert loss.at_once == 3
        assert loss(cuts) == wanted
        assert loss.passes == 1 + 3
        assert not list(tmp_path.iterdir())
    tight = Settings(threads=1, batch_tokens=64, memory_limit=1 + 2 * each * 20 // 3, spill=tmp_path)
    with TrueLoss(checkpoint, structure, samples, tight) as loss:
        assert loss.at_once == 16
        assert loss(cuts) == wanted
        assert list(tmp_path.rglob("*.bin"))
    assert not list(tmp_path.iterdir())
    with pytest.raises(EnvironmentFault, match="E504"):
        TrueLoss(checkpoint, structure, samples, Settings(threads=1, memory_limit=1 << 16))


def test_experts_that_do_not_fit_are_streamed():
    checkpoint, structure = opened("mixtral")
    samples, cuts = texts(LENGTHS), some_cuts(structure)
    with TrueLoss(checkpoint, structure, samples, ONE) as loss:
        wanted = loss(cuts)
    streamed = Settings(threads=1, batch_tokens=64, stream_experts=True)
    with TrueLoss(checkpoint, structure, samples, streamed) as loss:
        assert loss(cuts) == pytest.approx(wanted, rel=1e-4, abs=1e-7)


def test_weights_are_asked_for_once_as_long_as_they_fit():
    checkpoint, structure = opened("llama")
    samples = texts(LENGTHS)
    cut = both(groups_cut(structure), ffn_cut(structure))
    _, weights = solved_weights(checkpoint, structure, cut)
    asked = []

    def counting(*key):
        asked.append(key)
        return weights(*key)

    with TrueLoss(checkpoint, structure, samples, ONE) as loss:
        first = loss([cut], counting)
        assert loss([without(cut, 0), without(cut, 2), cut], counting)[2:] == first
        assert len(asked) == len(set(asked)) == 6
        loss._solved._limit = 1  # nothing but the latest stays
        assert loss([cut], counting) == first
        assert len(asked) > 6


def test_gradients_and_threads_are_left_as_they_were():
    checkpoint, structure = opened("llama")
    before = torch.get_num_threads()
    with TrueLoss(checkpoint, structure, texts(LENGTHS), ONE) as loss:
        loss([Cut.whole(3)])
        assert torch.is_grad_enabled() and torch.get_num_threads() == before


def test_values_that_are_not_finite():
    """Of a cut they are an infinite loss; the dense model is refused."""
    checkpoint, structure = opened("llama")
    samples, cut = texts(LENGTHS), ffn_cut(structure)
    out = structure.hidden

    def broken(layer, kind, kept):
        return Solved(torch.full((out, len(kept)), math.nan)) if layer == 1 else None

    with TrueLoss(checkpoint, structure, samples, ONE) as loss:
        found = loss([cut, without(cut, 1)], broken)
        assert found[0] == math.inf and math.isfinite(found[1])
        _, wild = solved_weights(checkpoint, structure, cut)
        assert math.isfinite(loss([cut], wild)[0])
    state = {
        name: torch.from_numpy(checkpoint.read(name, 0, info.elements).copy()).reshape(info.shape)
        for name, info in checkpoint.tensors.items()
    }
    state["model.layers.1.mlp.down_proj.weight"][0, 0] = math.nan
    damaged = MemoryCheckpoint("damaged", state)
    damaged.config = checkpoint.config
    with TrueLoss(damaged, structure, samples, ONE) as loss, pytest.raises(InputError, match="E384"):
        loss([cut])


def test_stops_when_asked():
    checkpoint, structure = opened("llama")
    stop = threading.Event()
    seen = []

    def progress(done, total):
        seen.append((done, total))
        if len(seen) == 4:  # the dense model takes three
            stop.set()

    with TrueLoss(checkpoint, structure, texts(LENGTHS), ONE, progress=progress, stop=stop) as loss:
        with pytest.raises(Interrupted):
            loss([ffn_cut(structure)])
        assert seen == [(1, 3), (2, 3), (3, 3), (1, 3)]
        stop.clear()
        assert loss([ffn_cut(structure)])[0] > 0


def test_divergence_in_blocks_of_positions_and_vocabulary(monkeypatch):
    checkpoint, _ = opened("gemma2")
    drawn = torch.Generator().manual_seed(0)
    states = [3 * torch.randn(50, 48, generator=drawn) for _ in range(4)]
    head = Head(checkpoint, ONE)
    logits = [head.logits(one).double() for one in states]
    wanted = torch.stack([
        (logits[0].softmax(-1) * (logits[0].log_softmax(-1) - other.log_softmax(-1))).sum(-1) for other in logits
    ])  # fmt: skip
    monkeypatch.setattr(head_module, "BLOCK_BYTES", 11 * 48 * 4)  # 11 of 67 rows
    monkeypatch.setattr(logit_divergence, "PLACES", 7)
    found = logit_divergence.divergences(head, states[0], states)
    assert torch.allclose(found, wanted, rtol=1e-5, atol=1e-6)
    assert found[0].abs().max() == 0 and found[1:].min() > 0.01
    assert np.isfinite(found.numpy()).all()
