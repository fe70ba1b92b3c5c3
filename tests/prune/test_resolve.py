"""Solved weights: alone against the closed form, in sequence against stock models run by hand."""

from __future__ import annotations

import functools
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "calibrate"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "architectures"))
from walk_models import model_folder, stock, texts

from surgeon.calibrate.data import load
from surgeon.calibrate.settings import Settings
from surgeon.checkpoint.checkpoint import open_path
from surgeon.errors import Interrupted, UsageError
from surgeon.prune.database import build
from surgeon.prune.resolve import resolve, sequential
from surgeon.prune.true_loss import TrueLoss
from surgeon.structure.cut import Cut, LayerCut
from surgeon.structure.find import structure_of
from surgeon.structure.views import MaskedView, PrunedView

ONE = Settings(threads=1, batch_tokens=64)
BASE = Path(__file__).resolve().parents[1] / "models" / "base"
TEXTS = texts((30, 24, 24, 17, 31))


def setting(folder, family="llama", **options):
    """Return (checkpoint, structure, database)."""
    checkpoint = open_path(model_folder(family))
    structure = structure_of(checkpoint)
    return checkpoint, structure, build(checkpoint, structure, TEXTS, ONE, folder=folder / "work", **options)


def cut_of(database, structure, heads=1, channels=20, mode="groups", layers=None):
    """Cut every layer, or those given, by their rankings."""
    return Cut(
        tuple(
            LayerCut(
                database.ranking(layer, "attention", mode).kept(heads) if heads is not None else None,
                database.ranking(layer, "ffn").kept(channels) if channels is not None else None,
            )
            if layers is None or layer in layers
            else LayerCut()
            for layer in range(structure.layers)
        )
    )


def matrix(checkpoint, output):
    """Return a stored output matrix as float64 [out, in]."""
    info = checkpoint.tensors[output.weight]
    values = np.array(checkpoint.read(output.weight, 0, info.elements)).reshape(info.shape).astype(np.float64)
    return torch.from_numpy(values if output.input_axis == 1 else values.T.copy())


def columns(part, kept):
    size = getattr(part, "head_dim", 1)
    return [unit * size + place for unit in kept for place in range(size)]


def closed(weight, hessian, kept, damp=1e-2):
    matrix = hessian.double() + damp * hessian.diagonal().double().mean() * torch.eye(len(hessian))
    return weight @ matrix[:, kept] @ torch.linalg.inv(matrix[kept][:, kept])


# ---- alone -------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "phi3", "gpt2"])
def test_weights_are_the_closed_form_under_the_names_and_in_the_orientation_of_the_source(family, tmp_path):
    checkpoint, structure, database = setting(tmp_path, family)
    cut = cut_of(database, structure)
    steps = []
    solved = resolve(
        database,
        checkpoint,
        structure,
        cut,
        tmp_path / "s.safetensors",
        progress=lambda *step: steps.append(step),
    )
    assert steps[-1] == ("solving weights", 6, 6)
    wanted = set()
    for layer, own in enumerate(cut.layers):
        for part, kind, kept in (
            (structure.attention[layer], "attention", own.heads),
            (structure.ffn[layer], "ffn", own.channels),
        ):
            wanted.add(part.output.weight)
            chosen = columns(part, kept)
            expected = closed(matrix(checkpoint, part.output), database.hessian(layer, kind), chosen)
            np.testing.assert_allclose(matrix(solved, part.output), expected, atol=2e-5)
            assert solved.tensors[part.output.weight].shape[part.output.input_axis] == len(chosen)
            assert solved.tensors[part.output.weight].dtype == "F32"
    assert set(solved.tensors) == wanted
    MaskedView(checkpoint, structure, cut, solved)
    PrunedView(checkpoint, structure, cut, solved)


def test_errors_of_rankings_are_those_of_the_solved_outputs(tmp_path):
    checkpoint, structure, database = setting(tmp_path)
    model, rows = stock(checkpoint.folder), []
    model.model.layers[1].mlp.down_proj.register_forward_pre_hook(
        lambda module, args: rows.append(args[0][0])
    )
    with torch.no_grad():
        for sample in TEXTS:
            model(torch.from_numpy(sample)[None])
    x = torch.cat(rows).double()
    ranking, part = database.ranking(1, "ffn"), structure.ffn[1]
    for count in (40, 20, 5):
        kept = ranking.kept(count)
        weight, bias = database.solution(1, "ffn", kept)
        dense = x @ matrix(checkpoint, part.output).T
        error = (x[:, list(kept)] @ weight.double().T - dense).square().sum() / dense.square().sum()
        assert bias is None and ranking.error(count) == pytest.approx(float(error), rel=1e-3)


def test_what_is_whole_or_gone_is_not_solved(tmp_path):
    checkpoint, structure, database = setting(tmp_path)
    out = tmp_path / "s.safetensors"
    kept = database.ranking(1, "ffn").kept(24)
    cut = Cut((LayerCut((), ()), LayerCut(None, kept), None))
    solved = resolve(database, checkpoint, structure, cut, out)
    assert set(solved.tensors) == {"model.layers.1.mlp.down_proj.weight"}
    every = LayerCut(tuple(range(4)), tuple(range(48)))
    for nothing in (Cut.whole(3), Cut((every, every, every)), Cut((LayerCut((), ()),) * 3)):
        assert resolve(database, checkpoint, structure, nothing, out) is None
        assert sequential(database, checkpoint, structure, nothing, out, TEXTS, ONE) is None
    assert database.weights(1, "ffn", tuple(range(48))) is None
    assert database.weights(1, "ffn", ()) is None


def test_a_criterion_without_compensation_solves_nothing(tmp_path):
    checkpoint, structure, database = setting(tmp_path, method="magnitude")
    cut = cut_of(database, structure)
    assert resolve(database, checkpoint, structure, cut, tmp_path / "s.safetensors") is None
    assert database.weights(0, "ffn", cut.layers[0].channels) is None
    assert not (tmp_path / "s.safetensors").exists()


@pytest.mark.parametrize("family", ["llama", "gpt2"])  # without biases that the class can have, and with
def test_flap_gives_biases_that_keep_the_mean_output(family, tmp_path):
    checkpoint, structure, database = setting(tmp_path, family, method="flap")
    cut = cut_of(database, structure)
    solved = resolve(database, checkpoint, structure, cut, tmp_path / "s.safetensors")
    assert set(solved.tensors) == {
        f"{part.output.module}.bias" for part in (*structure.attention, *structure.ffn)
    }
    part, kept = structure.ffn[1], cut.layers[1].channels
    mean = torch.from_numpy(database.context(1, "ffn", "channels").moments.mean)
    gone = [channel for channel in range(len(mean)) if channel not in kept]
    wanted = matrix(checkpoint, part.output)[:, gone] @ mean[gone]
    if part.output.bias:
        wanted += torch.from_numpy(np.array(checkpoint.read(part.output.bias, 0, len(wanted)), np.float64))
    found = solved.read(f"{part.output.module}.bias", 0, len(wanted))
    np.testing.assert_allclose(found, wanted, atol=1e-5)
    MaskedView(checkpoint, structure, cut, solved)
    weights = database.weights(1, "ffn", kept)
    np.testing.assert_allclose(weights.weight, matrix(checkpoint, part.output)[:, list(kept)], atol=1e-6)
    np.testing.assert_allclose(weights.bias, wanted, atol=1e-5)
    assert not any("no bias" in note for note in database.notes)


def test_flap_says_where_a_family_has_no_biases(tmp_path):
    checkpoint, structure, database = setting(tmp_path, "mistral", method="flap")
    cut = cut_of(database, structure)
    assert resolve(database, checkpoint, structure, cut, tmp_path / "s.safetensors") is None
    assert any("attention and FFNs have no bias in this family" in note for note in database.notes)


def test_solving_stops_when_asked_and_leaves_no_file(tmp_path):
    checkpoint, structure, database = setting(tmp_path)
    cut = cut_of(database, structure)
    for run in (
        lambda out, **more: resolve(database, checkpoint, structure, cut, out, **more),
        lambda out, **more: sequential(database, checkpoint, structure, cut, out, TEXTS, ONE, **more),
    ):
        stop = threading.Event()
        with pytest.raises(Interrupted):
            run(tmp_path / "s.safetensors", stop=stop, progress=lambda *step: stop.set())  # noqa: B023
        assert {path.name for path in tmp_path.iterdir()} == {"work"}


# ---- in sequence ---------------------------------------------------------------------------------


def test_on_equal_streams_it_is_the_closed_form(tmp_path):
    checkpoint, structure, database = setting(tmp_path)
    for heads, channels, layer in ((1, None, 0), (None, 20, 0), (None, 20, 2)):
        cut = cut_of(database, structure, heads, channels, layers={layer})
        alone = resolve(database, checkpoint, structure, cut, tmp_path / "a.safetensors")
        found = sequential(database, checkpoint, structure, cut, tmp_path / "b.safetensors", TEXTS, ONE)
        assert set(alone.tensors) == set(found.tensors) and len(found.tensors) == 1
        for name, info in alone.tensors.items():
            np.testing.assert_allclose(
                found.read(name, 0, info.elements), alone.read(name, 0, info.elements), atol=2e-5
            )


def by_hand(checkpoint, structure, cut, damp=1e-2):
    """Solve in sequence with two stock models in float64 and hooks, module after module, whole passes each time."""
    dense, pruned = (stock(checkpoint.folder, dtype=torch.float64) for _ in range(2))
    found = {}

    def module_of(model, part):
        return next(m for path, m in model.named_modules() if path.endswith(part.output.module))

    def inputs(model, part):
        rows = []
        handle = module_of(model, part).register_forward_pre_hook(
            lambda module, args: rows.append(args[0].reshape(-1, args[0].shape[-1]))
        )
        with torch.no_grad():
            for sample in TEXTS:
                model(torch.from_numpy(sample)[None])
        handle.remove()
        return torch.cat(rows)

    for layer, own in enumerate(cut.layers):
        for part, kept in ((structure.attention[layer], own.heads), (structure.ffn[layer], own.channels)):
            chosen = columns(part, kept)
            wide = part.output.input_axis == 1
            own_weight = module_of(pruned, part).weight
            weight = module_of(dense, part).weight.detach()
            weight = weight if wide else weight.T
            x0, x = inputs(dense, part), inputs(pruned, part)
            ridge = damp * x.square().mean(0).mean() * len(x)
            kept_x = x[:, chosen]
            solved = (weight @ x0.T @ kept_x + ridge * weight[:, chosen]) @ torch.linalg.inv(
                kept_x.T @ kept_x + ridge * torch.eye(len(chosen))
            )
            full = torch.zeros_like(weight)
            full[:, chosen] = solved
            with torch.no_grad():
                own_weight.copy_(full if wide else full.T)
            found[part.output.weight] = solved if wide else solved.T
    return found


@pytest.mark.parametrize(("family", "mode"), [("llama", "heads"), ("gpt2", "groups"), ("bert", "groups")])
def test_in_sequence_it_is_what_two_stock_models_give(family, mode, tmp_path):
    checkpoint, structure, database = setting(tmp_path, family)
    cut = cut_of(database, structure, mode=mode)
    steps = []
    found = sequential(
        database, checkpoint, structure, cut, tmp_path / "s.safetensors", TEXTS, ONE,
        progress=lambda *step: steps.append(step),
    )  # fmt: skip
    assert steps[-1] == ("solving weights in sequence", 3, 3)
    wanted = by_hand(checkpoint, structure, cut)
    assert set(found.tensors) == set(wanted)
    for name, values in wanted.items():
        info = found.tensors[name]
        own = found.read(name, 0, info.elements).reshape(info.shape)
        np.testing.assert_allclose(own, values, atol=1e-3 * float(values.abs().max()))


@functools.cache
def trained():
    """The small trained model, calibration texts, texts held out."""
    picked = [sample.ids for sample in load(None, BASE, samples=48, sequence_length=96, offline=True).samples]
    return open_path(BASE), picked[:32], picked[32:]


def test_solving_helps_a_trained_model_on_text_it_was_not_solved_on(tmp_path):
    checkpoint, calibration, held_out = trained()
    structure = structure_of(checkpoint)
    settings = Settings(threads=1)
    database = build(checkpoint, structure, calibration, settings, folder=tmp_path / "work")
    cut = cut_of(database, structure, heads=1, channels=288, mode="heads")
    alone = resolve(database, checkpoint, structure, cut, tmp_path / "a.safetensors")
    chain = sequential(
        database, checkpoint, structure, cut, tmp_path / "b.safetensors", calibration, settings
    )

    def weights(solved):
        def of(layer, kind, kept):
            from surgeon.prune.true_loss import Solved

            part = (structure.attention if kind == "attention" else structure.ffn)[layer]
            return Solved(matrix(solved, part.output).float())

        return of

    with TrueLoss(checkpoint, structure, held_out, settings) as loss:
        masked, by_database = (loss([cut], *more)[0] for more in ((), (database.weights,)))
        separate, in_sequence = (loss([cut], weights(solved))[0] for solved in (alone, chain))
    assert separate == pytest.approx(by_database, rel=1e-4)
    assert separate < 0.5 * masked and in_sequence < 0.5 * masked
    assert in_sequence < separate


def test_a_cut_of_the_residual_stream_is_refused(tmp_path):
    checkpoint, structure, database = setting(tmp_path)
    cut = Cut(cut_of(database, structure).layers, tuple(range(16)))
    with pytest.raises(UsageError) as caught:
        sequential(database, checkpoint, structure, cut, tmp_path / "s.safetensors", TEXTS, ONE)
    assert caught.value.code == "E260"
