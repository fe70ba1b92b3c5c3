"""Sparsity: exact counts, closed forms, brute force, and the library's own model as oracle of the sequential pass."""

from __future__ import annotations

import itertools
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "calibrate"))
from walk_models import model_folder, stock

from surgeon.calibrate.damping import damped
from surgeon.calibrate.matrices import matrices_of, read_matrix
from surgeon.calibrate.settings import Settings
from surgeon.calibrate.skeleton import Skeleton
from surgeon.calibrate.tokens import load_encoder
from surgeon.calibrate.walk import Walk
from surgeon.checkpoint.checkpoint import open_path
from surgeon.derive import Derived, Source, plan_of
from surgeon.errors import InputError, Interrupted, UsageError
from surgeon.execute import execute
from surgeon.kernels.cast import widen
from surgeon.prune.sparse import magnitude, owl, sparsegpt, wanda
from surgeon.prune.sparse.masks import Pattern, holds, smallest, smallest_groups, smallest_rows
from surgeon.prune.sparse.run import FEWEST_TOKENS, SparseOptions, download_bytes, sparsify
from surgeon.prune.sparse.view import SparseView

TRAINED = Path(__file__).resolve().parents[1] / "models" / "base"


def drawn(*shape, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).normal(size=shape))


def problem(rows=12, columns=24, tokens=60, seed=0):
    """A matrix, its inputs [tokens, in] with unequal scales and correlations, and their second moments."""
    inputs = drawn(tokens, columns, seed=seed + 1) @ (
        torch.eye(columns) + 0.4 * drawn(columns, columns, seed=seed + 2)
    )
    inputs = inputs * torch.exp(drawn(columns, seed=seed + 3))
    return drawn(rows, columns, seed=seed), inputs, inputs.T @ inputs / tokens


def loss(weight, result, hessian):
    lost = weight - result
    return float(((lost @ hessian) * lost).sum())


def values(checkpoint, name):
    info = checkpoint.tensors[name]
    return torch.from_numpy(widen(checkpoint.read(name, 0, info.elements), info.dtype).copy()).reshape(
        info.shape
    )


# ---- masks ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("kind", ["normal", "ties", "equal"])
def test_counts_are_exact_and_ties_go_to_the_lower_index(share, kind):
    scores = {
        "normal": drawn(7, 30).abs(),
        "ties": (drawn(7, 30) * 2).round().abs(),
        "equal": torch.ones(7, 30),
    }[kind]
    count = round(share * 210)
    expected = torch.zeros(210, dtype=torch.bool)
    expected[torch.sort(scores.reshape(-1), stable=True).indices[:count]] = True
    assert torch.equal(smallest(scores, count), expected.reshape(7, 30))
    found = smallest_rows(scores, round(share * 30))
    for row, chosen in zip(scores, found, strict=True):
        stable = set(torch.sort(row, stable=True).indices[: round(share * 30)].tolist())
        assert set(chosen.nonzero().flatten().tolist()) == stable
    assert int(magnitude.mask(scores, share).sum()) == count


def test_groups_of_inputs():
    scores = (drawn(5, 12) * 2).round().abs()
    found = smallest_groups(scores, Pattern(2, 4)).reshape(-1, 4)
    for group, chosen in zip(scores.reshape(-1, 4), found, strict=True):
        assert chosen.nonzero().flatten().tolist() == sorted(
            torch.sort(group, stable=True).indices[:2].tolist()
        )
    weight = drawn(5, 12).masked_fill(found.reshape(5, 12), 0)
    assert (
        holds(weight, Pattern(2, 4))
        and not holds(weight + 1, Pattern(2, 4))
        and not holds(weight, Pattern(3, 4))
    )


@pytest.mark.parametrize("text", ["2", "4:4", "0:4", "5:4", "a:4", "2:4:8"])
def test_patterns_that_are_none(text):
    with pytest.raises(UsageError) as caught:
        Pattern.parse(text)
    assert caught.value.code == "E266"


@pytest.mark.parametrize("share", [0.0, 0.3, 0.5, 1.0])
def test_global_magnitude_is_one_stable_sort_of_everything(share):
    parts = [(drawn(6, 10, seed=s) * 3).round().float() / 3 for s in range(3)]
    threshold = magnitude.GlobalThreshold(lambda: iter(parts), share)
    found = torch.cat([threshold.mask(part).reshape(-1) for part in parts])
    every = torch.cat([part.abs().reshape(-1) for part in parts])
    assert set(found.nonzero().flatten().tolist()) == set(
        torch.sort(every, stable=True).indices[: round(share * 180)].tolist()
    )


# ---- Wanda ------------------------------------------------------------------------------------------


def test_wanda_compares_within_rows_and_follows_inputs():
    weight, inputs, hessian = problem()
    norms = inputs.norm(dim=0)
    mask = wanda.mask(weight, norms, 0.5)
    assert mask.sum(1).tolist() == [12] * 12
    assert torch.equal(wanda.mask(weight[[3, 0]], norms, 0.5), mask[[3, 0]])
    scale = torch.exp(drawn(24, seed=9))
    assert torch.equal(wanda.mask(weight / scale, norms * scale, 0.5), mask)
    # the score squared is what dropping one weight costs when inputs are uncorrelated
    diagonal = torch.diag(hessian.diagonal())
    one = torch.zeros_like(weight)
    one[2, 5] = weight[2, 5]
    cost = loss(one, torch.zeros_like(one), diagonal) * len(inputs)
    assert cost == pytest.approx(float(wanda.scores(weight, norms)[2, 5] ** 2))
    assert int(wanda.mask(drawn(4, 10), torch.ones(10), 0.79).sum()) == 28  # rounded down


# ---- SparseGPT --------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", [0.0, 0.3, 0.5, 0.9, 1.0, "2:4", "3:8"])
def test_error_identity_and_exact_counts(target):
    weight, _, hessian = problem(20, 160, 400)
    pattern = Pattern.parse(target) if isinstance(target, str) else None
    solved = sparsegpt.solve(weight, hessian, None if pattern else target, pattern, damp=0.01)
    assert solved.error == pytest.approx(
        loss(weight, solved.weight, damped(hessian, 0.01)), rel=1e-9, abs=1e-12
    )
    zeros = solved.weight == 0
    if pattern is None:
        assert int(zeros.sum()) == round(target * weight.numel())
    else:
        assert (zeros.reshape(-1, pattern.group).sum(1) == pattern.zeros).all()
    kept = weight.masked_fill(zeros, 0.0)
    if target not in (0.0, 1.0):
        assert loss(weight, solved.weight, hessian) < 0.95 * loss(weight, kept, hessian)


def literal(weight, hessian, sparsity, block=128):
    """Algorithm 1 of the paper, column by column with the whole inverse, in float64; no shortcut."""
    weight = weight.clone()
    upper = torch.linalg.cholesky(torch.linalg.inv(hessian), upper=True)
    rows, columns = weight.shape
    mask = torch.zeros_like(weight, dtype=torch.bool)
    for j in range(columns):
        if j % block == 0:
            stop = min(j + block, columns)
            score = weight[:, j:stop] ** 2 / upper.diagonal()[j:stop] ** 2
            order = torch.sort(score.reshape(-1), stable=True).indices[: round(sparsity * rows * (stop - j))]
            part = torch.zeros(score.numel(), dtype=torch.bool)
            part[order] = True
            mask[:, j:stop] = part.reshape(score.shape)
        error = torch.where(mask[:, j], weight[:, j], 0.0) / upper[j, j]
        weight[:, j:] -= error[:, None] * upper[j, j:]
    return weight.masked_fill(mask, 0.0)


def test_equals_the_algorithm_written_out():
    weight, _, hessian = problem(10, 300, 700)
    expected = literal(weight, damped(hessian, 0.01), 0.5)
    found = sparsegpt.solve(weight, hessian, 0.5, damp=0.01).weight
    assert torch.equal(found == 0, expected == 0)
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-10)
    single = sparsegpt.solve(weight.float(), hessian.float(), 0.5, damp=0.01).weight
    assert ((single == 0) == (expected == 0)).float().mean() > 0.999
    assert loss(weight, single.double(), hessian) == pytest.approx(loss(weight, expected, hessian), rel=1e-3)


def test_identity_hessian_is_magnitude_by_block():
    weight = drawn(9, 256)
    found = sparsegpt.solve(weight, torch.eye(256, dtype=torch.float64), 0.5, damp=0.0).weight
    parts = [part.masked_fill(magnitude.mask(part, 0.5), 0.0) for part in weight.split(128, dim=1)]
    torch.testing.assert_close(found, torch.cat(parts, dim=1), rtol=0, atol=1e-15)


def test_a_twin_to_the_right_takes_the_weight_over():
    inputs = drawn(50, 3)
    inputs = torch.stack([inputs[:, 0], inputs[:, 1], inputs[:, 0]], dim=1)
    weight = torch.tensor([[0.5, 3.0, 2.0]], dtype=torch.float64)
    found = sparsegpt.solve(weight, inputs.T @ inputs / 50, 1 / 3, damp=1e-6).weight
    torch.testing.assert_close(found, torch.tensor([[0.0, 3.0, 2.5]], dtype=torch.float64), atol=1e-4, rtol=0)


@pytest.mark.parametrize("seed", range(5))
def test_between_the_optimum_and_magnitude(seed):
    """One row of six inputs: all 20 masks with their least-squares solutions, by brute force."""
    weight, _, hessian = problem(1, 6, 40, seed)

    def solution(kept):
        kept = list(kept)
        found = torch.zeros(1, 6, dtype=torch.float64)
        found[:, kept] = weight @ hessian[:, kept] @ torch.linalg.inv(hessian[kept][:, kept])
        return found

    best = min(loss(weight, solution(kept), hessian) for kept in itertools.combinations(range(6), 3))
    found = sparsegpt.solve(weight, hessian, 0.5, damp=1e-9).weight
    own_mask = solution((found[0] != 0).nonzero().flatten().tolist())
    simple = weight.masked_fill(magnitude.mask(weight, 0.5), 0.0)
    mine = loss(weight, found, hessian)
    assert best <= loss(weight, own_mask, hessian) * (1 + 1e-9) <= mine * (1 + 1e-6)
    assert mine <= loss(weight, simple, hessian)


def test_dead_inputs_go_first_and_do_not_dilute_the_damping():
    weight, _, hessian = problem(8, 40, 90)
    hessian[5], hessian[:, 5] = 0, 0
    found = sparsegpt.solve(weight, hessian, 0.5)
    assert (found.weight[:, 5] == 0).all() and int((found.weight == 0).sum()) == 160
    assert found.error == pytest.approx(loss(weight, found.weight, damped(hessian, 0.01)), rel=1e-9)
    alive = [j for j in range(40) if j != 5]
    other = sparsegpt.solve(weight[:, alive], hessian[alive][:, alive], (160 - 8) / (39 * 8))
    torch.testing.assert_close(found.weight[:, alive], other.weight, rtol=1e-8, atol=1e-10)


def test_singular_moments_take_more_damping_or_a_refusal():
    weight, inputs, _ = problem(4, 30, 90)
    few = inputs[:3]
    found = sparsegpt.solve(weight, few.T @ few / 3, 0.5, damp=0.0)
    assert found.damp > 0 and torch.isfinite(found.weight).all()
    with pytest.raises(InputError) as caught:
        sparsegpt.solve(weight, torch.full((30, 30), torch.nan, dtype=torch.float64), 0.5, module="m")
    assert caught.value.code == "E314"


# ---- OWL --------------------------------------------------------------------------------------------


def test_owl_keeps_the_weighted_mean():
    outliers, sizes = [3.0, 1.0, 0.5, 8.0], [100, 400, 50, 10]
    found = owl.sparsities(outliers, sizes, 0.7)
    assert np.average(found, weights=sizes) == pytest.approx(0.7, abs=1e-12)
    assert found[3] < found[0] < found[1] < found[2] and max(found) - min(found) == pytest.approx(0.16)
    assert owl.sparsities([2.0, 2.0], [1, 5], 0.7) == [0.7, 0.7]
    for target in (0.02, 0.95, 0.99):
        clipped = owl.sparsities(outliers, sizes, target)
        assert np.average(clipped, weights=sizes) == pytest.approx(target, abs=1e-9)
        assert min(clipped) >= -1e-12 and max(clipped) <= 1


def test_owl_patterns_keep_the_mean_of_equal_blocks():
    found = owl.patterns([1.0, 2.0, 3.0, 4.0], [10] * 4, Pattern(4, 8), spread=0.15)
    assert sum(p.zeros for p in found) == 16 and found[0].zeros > found[-1].zeros
    assert owl.patterns([1.0, 1.0], [10, 10], Pattern(2, 4)) == [Pattern(2, 4)] * 2


def test_outliers_are_counted_over_the_whole_block():
    counter = owl.Outliers(2.0)
    parts = [np.array([[1.0, 1.0], [1.0, 9.0]]), np.array([[0.5, 0.5, 8.0]])]
    for part in parts:
        counter.add(part)
    every = np.concatenate([part.reshape(-1) for part in parts])
    assert counter.percent() == pytest.approx(100 * np.mean(every > 2 * every.mean()))


# ---- a walk that changes layers ------------------------------------------------------------------------


def texts(count=6, length=20, seed=0):
    return [np.random.default_rng(seed + i).integers(3, 67, length) for i in range(count)]


class Seen:
    """Keeps the inputs of every module."""

    def __init__(self):
        self.inputs = {}

    def wants(self, module):
        return module.startswith(("model.layers", "transformer.h"))

    def observe(self, module, inputs, outputs, sample):
        self.inputs.setdefault(module, []).append(inputs.clone())


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3_moe", "granitemoe"])
def test_replaced_layers_feed_the_next_ones(family):
    """Every layer is seen with its old weights on the new layers before it; the end is the changed model's."""
    folder = model_folder(family)
    checkpoint = open_path(folder)
    changed = {}

    def replace(layer):
        found = {
            name: values(checkpoint, name) * 0.5
            for name, info in checkpoint.tensors.items()
            if name.startswith((f"model.layers.{layer}.", f"transformer.h.{layer}.")) and len(info.shape) > 1
        }
        changed.update(found)
        return found

    seen, samples = Seen(), texts()
    with Walk(checkpoint, samples, Settings()) as walk:
        walk.run(seen, replace=replace)
        final = [hidden.clone() for _, hidden in walk.hidden()]
    assert changed
    halved, mixed = stock(folder), stock(folder)
    first = (mixed.transformer.h if family == "gpt2" else mixed.model.layers)[0]
    layers = halved.transformer.h if family == "gpt2" else halved.model.layers
    for parameter in [*first.parameters(), *layers.parameters()]:
        if parameter.ndim > 1:
            parameter.data.mul_(0.5)
    with torch.no_grad():
        expected = halved.base_model(torch.from_numpy(np.stack(samples))).last_hidden_state
    torch.testing.assert_close(torch.stack(final), expected, rtol=1e-4, atol=2e-5)
    # layer 1 as it was, behind the halved layer 0
    path = "transformer.h.1" if family == "gpt2" else "model.layers.1"
    output = f"{path}.attn.c_proj" if family == "gpt2" else f"{path}.self_attn.o_proj"
    found = []
    dict(mixed.named_modules())[output].register_forward_pre_hook(lambda module, args: found.append(args[0]))
    with torch.no_grad():
        mixed(torch.from_numpy(np.stack(samples)))
    torch.testing.assert_close(torch.cat(seen.inputs[output]), found[0].flatten(0, 1), rtol=1e-4, atol=2e-5)


# ---- whole models -----------------------------------------------------------------------------------


def options(method, target, **more):
    where = {"pattern": Pattern.parse(target)} if isinstance(target, str) else {"sparsity": target}
    return SparseOptions(method, **where, **more)


MODELS = ["llama", "qwen3", "gpt2", "phi3", "deepseek_v3", "mixtral", "granitemoe", "gpt_oss"]


@pytest.mark.parametrize("family", MODELS)
@pytest.mark.parametrize(("method", "target"), [("magnitude", 0.5), ("wanda", "2:4"), ("sparsegpt", 0.5)])
def test_every_matrix_gets_its_zeros(family, method, target, scratch):
    checkpoint = open_path(model_folder(family))
    made = options(method, target, skip_incompatible=True)
    view, record = sparsify(checkpoint, texts(), Settings(), made, scratch)
    matrices = [m for layer in matrices_of(checkpoint, Skeleton(checkpoint, Settings())) for m in layer]
    facts = {fact["tensor"]: fact for fact in record["matrices"]}
    for matrix in matrices:
        after = read_matrix(view, matrix)
        if matrix.label in record["left_dense"]:
            assert matrix.columns % 4 and torch.equal(after, read_matrix(checkpoint, matrix))
            continue
        zeros = int((after == 0).sum())
        assert facts[matrix.label]["zeros"] == zeros
        assert zeros == matrix.elements // 2
        if method == "wanda":
            assert holds(after, Pattern(2, 4)) and facts[matrix.label]["holds"]
        if method != "sparsegpt":
            before = read_matrix(checkpoint, matrix)
            assert torch.equal(after[after != 0], before[after != 0])
    touched = {m.tensor for m in matrices if m.label not in record["left_dense"]}
    assert set(view.changed()) == touched
    assert not [
        n
        for n in touched
        if any(w in n for w in ("norm", "router", "embed", "lm_head", "bias", "mlp.gate.weight"))
    ]
    linear = sum(m.elements for m in matrices)
    assert record["sparsity"] == pytest.approx(record["zeros"] / linear)
    assert record["sparsity_of_all_parameters"] < record["sparsity"]


def test_wanda_sees_what_the_sparse_prefix_gives(scratch):
    """Layer by layer on the library's model with hooks: every mask equal, the dense prefix would give others."""
    checkpoint = open_path(model_folder("llama"))
    samples = texts()
    view, _ = sparsify(checkpoint, samples, Settings(), options("wanda", 0.5), scratch)
    model, ids = stock(checkpoint.folder), torch.from_numpy(np.stack(samples))
    dense = stock(checkpoint.folder)
    differences = 0
    for number in range(3):
        norms, dense_norms = {}, {}
        for target, source in ((norms, model), (dense_norms, dense)):
            handles = [
                module.register_forward_pre_hook(
                    lambda m, args, name=name, target=target: target.__setitem__(
                        name, args[0].flatten(0, 1).double().norm(dim=0)
                    )
                )
                for name, module in source.model.layers[number].named_modules()
                if isinstance(module, torch.nn.Linear)
            ]
            with torch.no_grad():
                source(ids)
            for handle in handles:
                handle.remove()
        for name, norm in norms.items():
            weight = model.model.layers[number].get_submodule(name).weight.data
            count = weight.shape[1] // 2
            score = weight.abs().double() * norm
            gone = torch.zeros_like(weight, dtype=torch.bool)
            gone.scatter_(1, torch.sort(score, dim=1, stable=True).indices[:, :count], True)
            other = torch.zeros_like(gone)
            other.scatter_(
                1,
                torch.sort(weight.abs().double() * dense_norms[name], dim=1, stable=True).indices[:, :count],
                True,
            )
            differences += int((gone != other).sum())
            weight.masked_fill_(gone, 0.0)
            found = values(view, f"model.layers.{number}.{name}.weight")
            assert (found != weight).float().mean() < 2e-3, name  # a tie within rounding may fall otherwise
    assert differences > 50


def sums(count, seed):
    """Sums as the small trained models write them, as tokens."""
    encoder = load_encoder(TRAINED)
    numbers = np.random.default_rng(seed).integers(100, 999, (count, 3)).tolist()
    return [
        encoder.exchange(({"role": "user", "content": f"Add {a}+{b}+{c}."},), f"{a}+{b}={a + b}\n{a + b}+{c}={a + b + c}\nanswer:{a + b + c}")[0]
        for a, b, c in numbers
    ]  # fmt: skip


def test_a_trained_model_loses_least_with_sparsegpt(scratch):
    """Divergence from the dense model on other sums than those it was calibrated on."""
    checkpoint = open_path(TRAINED)
    samples, others = sums(48, 0), sums(24, 1)

    def probabilities(source):
        model = stock(TRAINED, dtype=torch.float32)
        for name, parameter in model.named_parameters():
            parameter.data.copy_(values(source, name))
        with torch.no_grad():
            return [model(torch.from_numpy(ids)[None]).logits[0].double().log_softmax(-1) for ids in others]

    before = probabilities(checkpoint)
    distance = {}
    for method in ("magnitude", "wanda", "sparsegpt"):
        view, record = sparsify(checkpoint, samples, Settings(), options(method, 0.5), scratch / method)
        after = probabilities(view)
        distance[method] = float(
            torch.cat([(p.exp() * (p - q)).sum(-1) for p, q in zip(before, after, strict=True)]).mean()
        )
    assert distance["sparsegpt"] < 0.5 * min(distance["wanda"], distance["magnitude"]), distance
    assert all(0 < fact["relative_error"] < 0.5 for fact in record["matrices"])


def test_owl_differs_by_layer_and_keeps_the_total(scratch):
    checkpoint = open_path(model_folder("llama"))
    _, record = sparsify(
        checkpoint, texts(), Settings(), options("wanda", 0.6, owl=True, owl_threshold=2.0), scratch
    )
    assert len(set(record["layers"])) == 3 and len(record["outliers"]) == 3
    assert record["sparsity"] == pytest.approx(0.6, abs=0.02)  # rows are rounded down
    _, exact = sparsify(
        checkpoint, texts(), Settings(), options("sparsegpt", 0.6, owl=True, owl_threshold=2.0), scratch
    )
    assert exact["sparsity"] == pytest.approx(0.6, abs=2e-4) and exact["layers"] == record["layers"]
    for layer in range(3):
        zeros = [fact for fact in exact["matrices"] if fact["tensor"].startswith(f"model.layers.{layer}.")]
        assert sum(f["zeros"] for f in zeros) / sum(f["elements"] for f in zeros) == pytest.approx(
            exact["layers"][layer], abs=1e-3
        )


def test_experts_with_few_tokens_fall_back(scratch):
    checkpoint = open_path(model_folder("mixtral"))
    _, record = sparsify(checkpoint, texts(2, 8), Settings(), options("sparsegpt", 0.5), scratch)
    assert record["fallbacks"] and all(".experts." in name for name in record["fallbacks"])
    assert all(f["zeros"] == f["elements"] // 2 for f in record["matrices"]) and FEWEST_TOKENS == 32


def test_result_is_written_and_loaded(scratch):
    checkpoint = open_path(model_folder("qwen3"))
    view, record = sparsify(
        checkpoint, texts(), Settings(), options("sparsegpt", "2:4", skip_incompatible=True), scratch / "work"
    )
    derived = {"": Derived(view, {"method": "sparsegpt", **record["options"]}, "sparsegpt", {}, "sparse")}
    execute(
        plan_of(Source("m", checkpoint, "m"), derived, verb="prune", dtype="bfloat16"),
        scratch / "out",
        threads=1,
    )
    result = open_path(scratch / "out")
    for name in view.changed():
        stored = values(result, name)
        assert holds(stored, Pattern(2, 4)) and torch.equal(stored == 0, values(view, name) == 0)
    for name in set(checkpoint.tensors) - set(view.changed()):
        assert torch.equal(values(result, name), values(checkpoint, name).bfloat16().float())
    model, info = type(stock(scratch / "out")).from_pretrained(scratch / "out", output_loading_info=True)
    assert (
        not info["missing_keys"]
        and not info["unexpected_keys"]
        and torch.isfinite(model(torch.tensor([[5, 6]])).logits).all()
    )


def test_bfloat16_models_keep_their_type(scratch):
    folder = scratch / "half"
    stock(model_folder("llama")).to(torch.bfloat16).save_pretrained(folder)
    checkpoint = open_path(folder)
    view, record = sparsify(checkpoint, texts(), Settings(), options("sparsegpt", 0.5), scratch / "work")
    name = "model.layers.1.mlp.down_proj.weight"
    assert view.tensors[name].dtype == "BF16" and int((values(view, name) == 0).sum()) == 32 * 48 // 2
    assert record["sparsity"] == pytest.approx(0.5)


def test_same_bits_in_memory_from_files_and_after_an_interruption(scratch, monkeypatch):
    checkpoint = open_path(model_folder("llama"))
    made, samples = options("sparsegpt", 0.5), texts()
    plain, record = sparsify(checkpoint, samples, Settings(), made, scratch / "a")
    import threading

    stop = threading.Event()

    def after_two(title, done, total):
        if done == 3:  # the embedding and two layers
            stop.set()

    spilled = Settings(spill=scratch / "spill")
    with pytest.raises(Interrupted):
        sparsify(checkpoint, samples, spilled, made, scratch / "b", progress=after_two, stop=stop)
    solved = []
    original = sparsegpt.solve
    monkeypatch.setattr(sparsegpt, "solve", lambda *a, **k: solved.append(k["module"]) or original(*a, **k))
    view, again = sparsify(checkpoint, samples, spilled, made, scratch / "b")
    assert {name.split(".")[2] for name in solved} == {"2"}
    assert again == record and view.identity == plain.identity
    for name in view.changed():
        info = view.tensors[name]
        assert np.array_equal(
            view.read_bytes(name, 0, info.nbytes), plain.read_bytes(name, 0, info.nbytes)
        ), name
    solved.clear()
    next(
        (scratch / "b").glob("sparse-*/layer-0000.safetensors")
    ).unlink()  # what the pass continued from is gone
    sparsify(checkpoint, samples, spilled, made, scratch / "b")
    assert {name.split(".")[2] for name in solved} == {"0"}


def test_nothing_and_everything(scratch):
    checkpoint = open_path(model_folder("llama"))
    none, record = sparsify(checkpoint, (), Settings(), options("magnitude", 0.0), scratch)
    assert record["zeros"] == 0 and all(
        torch.equal(values(none, n), values(checkpoint, n)) for n in none.changed()
    )
    _, record = sparsify(checkpoint, (), Settings(), options("magnitude", 1.0), scratch)
    assert record["sparsity"] == 1.0


def test_global_scope_and_ignored_tensors(scratch):
    checkpoint = open_path(model_folder("llama"))
    view, record = sparsify(
        checkpoint,
        (),
        Settings(),
        options("magnitude", 0.3, scope="global", ignore=("*.o_proj.weight",)),
        scratch,
    )
    assert not [name for name in view.changed() if "o_proj" in name]
    every = torch.cat([values(checkpoint, n).abs().reshape(-1) for n in view.changed()])
    assert record["zeros"] == round(0.3 * len(every))
    left = torch.cat([values(view, n).abs().reshape(-1) for n in view.changed()])
    assert left[left > 0].min() >= torch.sort(every).values[record["zeros"] - 1]


def test_refusals(scratch):
    checkpoint = open_path(model_folder("qwen3"))
    with pytest.raises(InputError, match="2:3 does not divide") as caught:
        sparsify(checkpoint, texts(), Settings(), options("wanda", "2:3"), scratch)
    assert caught.value.code == "E318" and caught.value.others
    for bad in [{"method": "x", "sparsity": 0.5}, {"method": "wanda"}, {"method": "wanda", "sparsity": 1.5},
                {"method": "wanda", "sparsity": 0.5, "scope": "global"}, {"method": "magnitude", "sparsity": 0.5, "owl": True},
                {"method": "wanda", "sparsity": 0.5, "pattern": Pattern(2, 4)}]:  # fmt: skip
        with pytest.raises(UsageError):
            SparseOptions(**bad)
    with pytest.raises(InputError) as caught:
        sparsify(checkpoint, (), Settings(), options("magnitude", 0.5, ignore=("*",)), scratch)
    assert caught.value.code == "E317"


def test_download_estimate_and_view_checks(scratch):
    checkpoint = open_path(model_folder("llama"))
    dense = sum(info.nbytes for info in checkpoint.tensors.values())
    name = "model.layers.1.mlp.down_proj.weight"
    assert download_bytes(checkpoint, [{"tensor": name, "elements": 1536, "zeros": 0}]) == dense
    assert download_bytes(checkpoint, [{"tensor": name, "elements": 1536, "zeros": 768}]) == dense - (
        768 * 4 - 192
    )
    from safetensors.torch import save_file

    save_file({name: torch.zeros(3, 3)}, scratch / "wrong.safetensors")
    with pytest.raises(ValueError, match="not F32"):
        SparseView(checkpoint, [scratch / "wrong.safetensors"])
