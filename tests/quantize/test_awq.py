"""AWQ from a model to scales: against a search in plain torch, on planted outliers, interrupted and taken up again."""

from __future__ import annotations

import shutil
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "calibrate"))

from walk_models import Keeper, model_folder, texts

from surgeon.calibrate.matrices import matrices_of, read_matrix
from surgeon.calibrate.settings import Settings
from surgeon.calibrate.skeleton import Skeleton
from surgeon.calibrate.walk import Walk
from surgeon.checkpoint.checkpoint import open_path
from surgeon.errors import InputError, Interrupted
from surgeon.formats.scheme import Scheme
from surgeon.quantize import awq, rtn
from surgeon.quantize.awq_scales import Reader, error, proposals, sampled, search

EXTRA = (("hidden_size", 64), ("intermediate_size", 96))
TEXTS = texts((40,) * 8, seed=5)
OUTLIER = 7
NORM = "model.layers.1.input_layernorm"


def planted(place: Path, family="llama", factor=100.0) -> Path:
    """Return a model in which one channel behind one norm is much larger than the others."""
    folder = model_folder(family, EXTRA)
    shutil.copytree(folder, place)
    tensors = safetensors.torch.load_file(place / "model.safetensors")
    tensors[f"{NORM}.weight"][OUTLIER] *= factor
    safetensors.torch.save_file(tensors, place / "model.safetensors", {"format": "pt"})
    return place


def prepared(folder: Path, bits=4, group=32, symmetric=True):
    checkpoint = open_path(folder)
    layers = matrices_of(checkpoint, Skeleton(checkpoint, Settings()))
    schemes = {m.label: Scheme("int", bits, group, symmetric) for layer in layers for m in layer}
    return checkpoint, layers, schemes


def scale(folder, place, bits=4, group=32, symmetric=True, **options):
    checkpoint, layers, schemes = prepared(folder, bits, group, symmetric)
    options.setdefault("settings", Settings())
    view, record = awq.scaled(checkpoint, layers, schemes, TEXTS, options.pop("settings"), place, scale_dtype="F32", **options)  # fmt: skip
    return checkpoint, layers, view, record


def inputs_of(checkpoint, module) -> torch.Tensor:
    """Return what enters a module on all texts, float64 [tokens, in]."""
    keeper = Keeper(lambda name: name == module)
    with Walk(checkpoint, TEXTS, Settings(dtype="float64"), per_sample=True) as walk:
        walk.run(keeper)
    return torch.cat([keeper.inputs[key] for key in sorted(keeper.inputs)]).double()


def rounded(weight: torch.Tensor, bits: int, group: int, symmetric: bool) -> torch.Tensor:
    """Return a matrix rounded to nearest, group by group, in plain torch."""
    found = torch.empty_like(weight)
    top = 2**bits - 1
    for row in range(weight.shape[0]):
        for start in range(0, weight.shape[1], group):
            part = weight[row, start : start + group]
            if symmetric:
                step, zero = 2 * part.abs().max() / top, (top + 1) // 2
                step = (
                    step.float().double()
                )  # as it is stored: the extremes lie half a step beyond the last code
            else:
                low, high = min(float(part.min()), 0.0), max(float(part.max()), 0.0)
                step = torch.tensor((high - low) / top).float().double()
                zero = max(0, min(top, round(-low / float(step))))
            codes = torch.clamp(torch.round(part / step) + zero, 0, top)
            found[row, start : start + group] = (codes - zero) * step
    return found


def lost(weights, x, scales, bits, group, symmetric) -> float:
    """Return the mean relative output error over matrices, computed on the tokens themselves."""
    shares = []
    for weight in weights:
        difference = rounded(weight * scales, bits, group, symmetric) / scales - weight
        shares.append(float((x @ difference.T).square().sum() / (x @ weight.T).square().sum()))
    return sum(shares) / len(shares)


@pytest.mark.parametrize(("bits", "symmetric"), [(4, True), (4, False), (5, True)])
def test_search_is_that_of_plain_torch(bits, symmetric, tmp_path):
    torch.manual_seed(bits)
    x = torch.randn(300, 64, dtype=torch.float64) * (torch.rand(64, dtype=torch.float64) * 3).exp()
    weights = [torch.randn(rows, 64, dtype=torch.float64) for rows in (48, 24, 24)]
    magnitude = x.abs().mean(0)
    best = None
    for step in range(20):
        scales = magnitude ** (step / 20)
        scales = (
            scales / (scales.max() * scales.min()).sqrt() if step else torch.ones(64, dtype=torch.float64)
        )
        scales = scales.float().double()  # kept so; which way the extremes are rounded hangs on the last bits
        found = lost(weights, x, scales, bits, 32, symmetric)
        if best is None or found < best[0]:
            best = found, step / 20, scales
    readers = [Reader(str(number), weight, x.T @ x, Scheme("int", bits, 32, symmetric), "F64", "m")
               for number, weight in enumerate(weights)]  # fmt: skip
    ours = search(readers, magnitude, torch.ones(64, dtype=torch.bool), "F32")
    assert best is not None and 0 < best[1] == ours.exponent
    assert torch.allclose(ours.scales.double(), best[2], rtol=1e-6)
    value = error(readers, ours.scales, "F32")
    assert value == pytest.approx(best[0], rel=1e-4)
    assert value < 0.95 * lost(weights, x, torch.ones(64), bits, 32, symmetric)


def test_search_rounds_as_the_result_will_be():
    """Up to 3 bits ranges are clipped, and the best exponent under clipping is another one."""
    torch.manual_seed(1)
    x = torch.randn(300, 64, dtype=torch.float64)
    x[:, OUTLIER] *= 100
    weight = torch.randn(48, 64, dtype=torch.float64)
    one = Reader("q", weight, x.T @ x, Scheme("int", 3, 32), "F64", "m")
    live, magnitude = torch.ones(64, dtype=torch.bool), x.abs().mean(0)
    errors = {}
    for exponent, scales in proposals(magnitude, live):
        codes = rtn.quantize(weight * scales, one.scheme, scale_dtype="F32")
        difference = torch.from_numpy(codes.values()).double() / scales - weight
        errors[exponent] = float((x @ difference.T).square().sum() / (x @ weight.T).square().sum())
    best = min(errors, key=errors.__getitem__)
    found = search([one], magnitude, live, "F32")
    assert found.exponent == best > 0.4 and error([one], found.scales, "F32") == pytest.approx(
        errors[best], rel=1e-3
    )


def test_parts_count_alike_and_experts_within_a_part_by_their_outputs():
    torch.manual_seed(0)
    x = torch.randn(100, 32, dtype=torch.float64)
    h, scheme = x.T @ x, Scheme("int", 3, 16)
    weights = [factor * torch.randn(8, 32, dtype=torch.float64) for factor in (1.0, 5.0, 100.0)]
    ones = torch.ones(32)
    energies = [float((x @ w.T).square().sum()) for w in weights]
    errors = [float((x @ (rounded(w, 3, 16, True) - w).T).square().sum()) for w in weights]
    readers = [Reader(part, w, h, scheme, "F64", "m") for part, w in zip("aab", weights, strict=True)]
    expected = ((errors[0] + errors[1]) / (energies[0] + energies[1]) + errors[2] / energies[2]) / 2
    assert error(readers, ones, "F32", clip=False) == pytest.approx(expected, rel=1e-4)


def test_proposals_leave_dead_and_hold_back_tiny_inputs():
    magnitude = torch.tensor([4.0, 1.0, 0.0, 1e-12], dtype=torch.float64)
    live = torch.tensor([True, True, False, True])
    found = dict(proposals(magnitude, live))
    assert len(found) == 20 and torch.equal(found[0.0], torch.ones(4))
    half = found[0.5]
    assert (
        half[2] == 1
        and float(half[0] / half[1]) == pytest.approx(2)
        and float(half[0] / half[3]) == pytest.approx(100)
    )
    live_half = half[live]
    assert float(live_half.max() * live_half.min()) == pytest.approx(1, rel=1e-5)


@pytest.mark.parametrize("bits", [3, 4])
def test_planted_outlier_costs_less(bits, tmp_path):
    folder = planted(tmp_path / "model")
    checkpoint, layers, schemes = prepared(folder, bits)
    wanted = {
        m.label: schemes[m.label] for m in layers[1] if m.module.endswith("q_proj")
    }  # queries, keys, values
    view, record = awq.scaled(
        checkpoint, layers, wanted, TEXTS, Settings(), tmp_path / "work", scale_dtype="F32"
    )
    site = next(entry for entry in record["sites"] if entry["site"] == NORM)
    assert site["exponent"] > 0 and site["scaled_error"] < 0.5 * site["error"]
    # The same from the tokens, by the shipped rounding of the view's matrices.
    readers = [
        m for m in layers[1] if m.module.endswith("q_proj")
    ]  # q, k, v read what is seen under q's name
    x, y = inputs_of(checkpoint, readers[0].module), inputs_of(view, readers[0].module)
    assert float(x[:, OUTLIER].abs().mean() / x.abs().mean()) > 5
    errors = {"plain": [], "scaled": []}
    for matrix in readers:
        weight = read_matrix(checkpoint, matrix).double()
        exact = x @ weight.T
        for name, source, given in (("plain", checkpoint, x), ("scaled", view, y)):
            codes = rtn.quantize(read_matrix(source, matrix), Scheme("int", bits, 32), scale_dtype="F32")
            out = given @ torch.from_numpy(codes.values()).double().T
            errors[name].append(float((out - exact).square().sum() / exact.square().sum()))
    assert np.mean(errors["plain"]) == pytest.approx(site["error"], rel=1e-3)
    assert np.mean(errors["scaled"]) == pytest.approx(site["scaled_error"], rel=1e-3)


def test_nothing_is_scaled_when_there_is_nothing_to_gain(tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(model_folder("llama", EXTRA), folder)
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    generator = torch.Generator().manual_seed(0)
    for name, value in tensors.items():
        if name.endswith(
            "proj.weight"
        ):  # every group holds the ends of its grid, so all its values are on it
            codes = torch.randint(-8, 8, value.shape, generator=generator)
            codes.view(value.shape[0], -1, 32)[:, :, :2] = torch.tensor([-8, 7])
            value.copy_(codes / 64)
    safetensors.torch.save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    _, _, view, record = scale(folder, tmp_path / "work", symmetric=False)
    assert record["sites"] and view.changed() == []
    for entry in record["sites"]:
        assert entry["exponent"] == 0 and entry["error"] == entry["scaled_error"] == 0


def test_mixture_scales_everything_that_reads_the_norm(tmp_path):
    folder = model_folder("qwen2_moe")
    checkpoint, layers, schemes = prepared(folder, 4, -1)
    view, record = awq.scaled(checkpoint, layers, schemes, TEXTS, Settings(), tmp_path, scale_dtype="BF16")
    kinds = {(entry["kind"], entry["layer"]) for entry in record["sites"]}
    assert {("norm", 0), ("norm", 1), ("up", 1)} <= kinds
    routed = [
        e for e in record["sites"] if e["layer"] == 1 and e["site"].endswith("post_attention_layernorm")
    ]
    assert len(routed) == 1 and routed[0]["matrices"] == 2 * 4 + 2
    if routed[0]["exponent"]:
        assert {"model.layers.1.mlp.gate.weight", "model.layers.1.mlp.shared_expert_gate.weight"} <= set(
            view.changed()
        )
    before, after = (
        inputs_of(checkpoint, "model.layers.2.mlp.gate"),
        inputs_of(view, "model.layers.2.mlp.gate"),
    )
    head = [torch.cat([s for _, s in _final(v)]) for v in (checkpoint, view)]
    assert float((head[0] - head[1]).abs().max()) < 1e-4 * float(head[0].abs().max())
    assert before.shape == after.shape


def _final(checkpoint):
    with Walk(checkpoint, TEXTS, Settings(dtype="float64")) as walk:
        walk.run(Keeper(lambda name: False))
        return [(number, states.clone()) for number, states in walk.hidden()]


def test_experts_with_few_tokens_stay(tmp_path):
    folder = model_folder("mixtral", (("num_local_experts", 8),))
    checkpoint, layers, schemes = prepared(folder, 4, -1)
    _, record = awq.scaled(checkpoint, layers, schemes, TEXTS[:1], Settings(), tmp_path, scale_dtype="BF16")
    few = [entry for entry in record["kept"] if ".experts." in entry["site"]]
    assert few and all(entry["tokens"] < awq.FEWEST_TOKENS for entry in few)
    assert not {entry["site"] for entry in few} & {entry["site"] for entry in record["sites"]}


def test_results_are_taken_up(tmp_path, monkeypatch):
    folder = planted(tmp_path / "model")
    settings = Settings(spill=tmp_path / "spill")
    stop = threading.Event()

    def after_two(done, stages):
        if done == 3:  # the embedding and two layers
            stop.set()

    with pytest.raises(Interrupted):
        scale(folder, tmp_path / "work", settings=settings, progress=after_two, stop=stop)
    files = {file: file.stat().st_mtime_ns for file in (tmp_path / "work").rglob("*.safetensors")}
    assert len(files) == 2
    seen = []
    _, _, resumed, record = scale(folder, tmp_path / "work", settings=settings, progress=lambda done, n: seen.append(done))  # fmt: skip
    assert seen[0] == 4 and all(file.stat().st_mtime_ns == time for file, time in files.items())
    _, _, whole, other = scale(folder, tmp_path / "other")
    assert resumed.identity == whole.identity and record == other

    def refuse(*_, **__):
        raise AssertionError("the pass ran again")

    monkeypatch.setattr(awq, "Walk", refuse)
    _, _, again, _ = scale(folder, tmp_path / "work", settings=settings)
    assert again.identity == whole.identity
    with pytest.raises(AssertionError, match="ran again"):
        scale(folder, tmp_path / "work", bits=3, settings=settings)


def test_refusals(tmp_path):
    folder = model_folder("llama", EXTRA)
    checkpoint, layers, schemes = prepared(folder)
    nothing = {label: Scheme("float8", 8, 0) for label in schemes}
    with pytest.raises(InputError) as refused:
        awq.scaled(checkpoint, layers, nothing, TEXTS, Settings(), tmp_path, scale_dtype="BF16")
    assert refused.value.code == "E485" and "float8" in str(refused.value.message)
    with pytest.raises(InputError) as refused:
        awq.scaled(checkpoint, layers, {}, TEXTS, Settings(), tmp_path, scale_dtype="BF16")
    assert refused.value.code == "E485"
    partly = {label: scheme for label, scheme in schemes.items() if "q_proj" in label}
    view, record = awq.scaled(checkpoint, layers, partly, TEXTS, Settings(), tmp_path, scale_dtype="BF16")
    assert {entry["kind"] for entry in record["sites"]} == {"norm"} and len(record["sites"]) == 3
    assert all(entry["matrices"] == 1 for entry in record["sites"])
    assert not any("mlp" in name or "post_attention" in name for name in view.changed())


def test_a_matrix_no_token_reached_is_an_error(tmp_path, monkeypatch):
    folder = model_folder("llama", EXTRA)
    monkeypatch.setattr(awq._Run, "observe", lambda *_: None)
    with pytest.raises(InputError) as refused:
        scale(folder, tmp_path)
    assert refused.value.code == "E486"


def test_a_sample_of_rows_finds_what_all_rows_find():
    torch.manual_seed(2)
    x = torch.randn(300, 64) * (torch.rand(64) * 3).exp()
    weight, magnitude, live = torch.randn(3000, 64), x.abs().mean(0), torch.ones(64, dtype=torch.bool)
    few = sampled(weight, 1, False)
    assert len(few) == 512 and len(sampled(weight, 1, True)) == 64 and len(sampled(weight, 128, False)) == 16
    assert (
        torch.equal(few[0], weight[0]) and torch.equal(few[-1], weight[-1]) and sampled(few, 1, False) is few
    )
    one, all_rows = (Reader("q", part, x.T @ x, Scheme("int", 4, 32), "F32", "m") for part in (few, weight))
    found, best = search([one], magnitude, live, "F32"), search([all_rows], magnitude, live, "F32")
    assert found.exponent > 0
    assert error([all_rows], found.scales, "F32") <= 1.01 * error([all_rows], best.scales, "F32")
