"""Scores of expert channels against the paper's d x d form, closed forms, and the true loss of a trained model."""

from __future__ import annotations

import dataclasses
import json
import shutil
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from scipy.stats import spearmanr
from torch.overrides import TorchFunctionMode

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "calibrate"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "structure"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "prune"))
import trained_experts
from expert_cuts import stock as stock_folder
from expert_cuts import write
from walk_models import model_folder, stock

from surgeon.calibrate.activation_gradients import Gated
from surgeon.calibrate.settings import Settings
from surgeon.checkpoint.checkpoint import open_path
from surgeon.errors import InputError, UsageError
from surgeon.prune.experts.heapr import VARIANTS, ChannelScores, ChannelSums, about_of, channel_scores
from surgeon.prune.experts.widths import choose
from surgeon.structure.experts.find import experts_of
from surgeon.structure.experts.view import ExpertView

CPU = Settings(threads=1)
MEASURED = tuple(variant for variant in VARIANTS if variant != "random")


@dataclasses.dataclass(frozen=True)
class Sample:
    ids: np.ndarray
    answer_start: int = 0
    line: int = 0
    domain: str = ""


def some_samples(lengths=(17, 16, 17, 9, 18, 24, 23, 11), seed=3):
    drawn = np.random.default_rng(seed)
    return [Sample(drawn.integers(3, 67, n), 0, line) for line, n in enumerate(lengths, 1)]


def scores_of(folder, samples, settings=CPU, **options):
    checkpoint = open_path(folder)
    return channel_scores(checkpoint, samples, settings, experts_of(checkpoint), **options)


def from_rows(a, g, down, seen=None, variant="heapr"):
    """Return the scores of one expert from its activations and gradients, handed over in three uneven parts."""
    sums = ChannelSums([(0, 0)], a.shape[1])
    for part in (slice(0, 2), slice(2, 3), slice(3, None)):
        if len(a[part]):
            sums.gated(Gated(0, 0, torch.as_tensor(a[part]), torch.as_tensor(g[part]), torch.as_tensor(down)))
    found = ChannelScores(variant, {}, a.shape[1], seen or len(a), tokens=sums.tokens, **sums.sums)
    return found.scores[0, 0]


def assert_close(found, expected, rel):
    assert found.keys() == expected.keys()
    scale = max(float(np.abs(value).max()) for value in expected.values())
    for place, value in expected.items():
        assert found[place] == pytest.approx(value, rel=rel, abs=rel * scale * 1e-3), place


# ------------------------------------------------------------------------------------- the formula


def explicit(columns, outputs_gradient, a):
    """The paper's form, nothing simplified: 1/2 mean over tokens of e' G e with G [d, d], in plain loops over tokens."""
    gram = sum(np.outer(g, g) for g in outputs_gradient) / len(a)
    return np.array(
        [0.5 * sum((w * x[k]) @ gram @ (w * x[k]) for x in a) / len(a) for k, w in enumerate(columns.T)]
    )


def test_the_product_equals_the_explicit_matrix_form_in_float64():
    """A gated expert under a loss that is not linear, its gradients by autograd."""
    torch.manual_seed(0)
    x, weight = torch.randn(40, 6, dtype=torch.float64), torch.rand(40, 1, dtype=torch.float64)
    gate, up, down = (torch.randn(shape, dtype=torch.float64) for shape in ((5, 6), (5, 6), (7, 5)))
    a = (torch.nn.functional.silu(x @ gate.T) * (x @ up.T)).requires_grad_()
    out = a @ down.T
    out.retain_grad()
    (torch.tanh(out * weight + x.sum(1, keepdim=True)) ** 3).sum().backward()
    found = from_rows(a.detach().numpy(), a.grad.numpy(), down.numpy())
    assert found == pytest.approx(explicit(down.numpy(), out.grad.numpy(), a.detach().numpy()), rel=1e-12)


class Outputs(TorchFunctionMode):
    """Keeps what experts' down projections get and give inside the library's own code."""

    def __init__(self, model):
        super().__init__()
        self.downs = {
            p.untyped_storage().data_ptr(): (int(n.split("layers.")[1].split(".")[0]), p)
            for n, p in model.named_parameters()
            if n.endswith("experts.down_proj")
        }
        self.seen = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func in (torch.nn.functional.linear, torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__):
            found = self.downs.get(args[1].untyped_storage().data_ptr())
            if found is not None:
                layer, whole = found
                expert = (args[1].data_ptr() - whole.data_ptr()) // (whole[0].numel() * whole.element_size())
                out.retain_grad()
                self.seen.append(((layer, expert), args[0].detach(), out))
        return out


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_scores_of_a_model_equal_the_explicit_form_on_the_stock_model(family):
    """The gradient of an expert's output contains the routing weight, whose product with it comes after."""
    folder, samples = model_folder(family), some_samples()
    model = stock(folder)
    model.set_experts_implementation("eager")
    model.requires_grad_(True)
    a, g = {}, {}
    for sample in samples:
        ids = torch.as_tensor(sample.ids)[None]
        with Outputs(model) as outputs:
            logits = model(input_ids=ids, use_cache=False).logits[0]
        torch.nn.functional.cross_entropy(logits[:-1], ids[0, 1:], reduction="sum").backward()
        for place, entering, out in outputs.seen:
            a.setdefault(place, []).append(entering.reshape(-1, entering.shape[-1]))
            g.setdefault(place, []).append(out.grad.reshape(-1, out.shape[-1]))
    downs = {layer: p.detach().double() for layer, p in outputs.downs.values()}
    expected = {}
    for layer, expert in a:
        down = downs[layer][expert].T if family == "gpt_oss" else downs[layer][expert]
        rows = [torch.cat(held[layer, expert]).double().numpy() for held in (g, a)]
        expected[layer, expert] = explicit(down.numpy(), *rows)
    found = scores_of(folder, samples)
    assert found.seen == sum(len(s.ids) for s in samples)
    assert {place: n for place, n in found.tokens.items() if n} == {
        p: sum(map(len, held)) for p, held in a.items()
    }
    assert_close({p: v for p, v in found.scores.items() if found.tokens[p]}, expected, 1e-4)
    worst = max(np.abs(found.scores[p] / expected[p] - 1).max() for p in expected)
    assert worst < 1e-4
    assert np.median([np.abs(found.scores[p] / expected[p] - 1).max() for p in expected]) < 1e-5


def test_a_case_by_hand():
    """d = 2, I = 3, an expert chosen for both tokens with weight 1, loss c . output: dL/da_k = w_k . c for every token."""
    x = torch.tensor([[1.0, 2.0], [3.0, -1.0]], dtype=torch.float64)
    up = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]], dtype=torch.float64)
    down = torch.tensor([[1.0, 0.0, 2.0], [0.0, 3.0, -1.0]], dtype=torch.float64)
    a = (x @ up.T).clamp(min=0).square().requires_grad_()  # [[1, 4, 9], [9, 0, 4]]
    (a @ down.T @ torch.tensor([2.0, 1.0], dtype=torch.float64)).sum().backward()
    # mean a^2 = 41, 8, 48.5; w . c = 2, 3, 3
    assert from_rows(a.detach().numpy(), a.grad.numpy(), down.numpy()) == pytest.approx([82.0, 36.0, 218.25], rel=1e-15)  # fmt: skip


def test_at_the_optimum_of_a_quadratic_loss_the_score_becomes_the_magnitude():
    """Loss |y - y*|^2 / 2 with unit noise in y*: G is the identity in the limit, so s_k tends to mean(a^2) |w|^2 / 2."""
    drawn = np.random.default_rng(0)
    down = drawn.normal(size=(8, 6))
    errors = []
    for tokens in (100, 10_000, 400_000):
        a = drawn.normal(size=(tokens, 6)) * np.arange(1, 7)
        g = drawn.normal(size=(tokens, 8)) @ down  # w_k . (y - y*)
        found, limit = (from_rows(a, g, down, variant=variant) for variant in ("heapr", "magnitude"))
        assert limit == pytest.approx(0.5 * (a**2).mean(0) * (down**2).sum(0), rel=1e-12)
        errors.append(np.abs(found / limit - 1).max())
    assert errors[2] < 0.01 < errors[0] and errors[2] < errors[1] < errors[0]


def test_every_criterion_is_what_its_formula_says():
    drawn = np.random.default_rng(1)
    a, g, down = drawn.normal(size=(9, 4)), drawn.normal(size=(9, 4)), drawn.normal(size=(5, 4))
    seen = 30
    for k in range(4):
        a2, g2 = sum(a[:, k] ** 2) / 9, sum(g[:, k] ** 2) / 9
        both = sum((a[t, k] * g[t, k]) ** 2 for t in range(9))
        expected = {
            "heapr": a2 * g2 / 2, "heapr-all": a2 * g2 / 2 * 9 / 30, "joint": both / 9 / 2, "joint-all": both / 30 / 2,
            "magnitude": a2 * sum(down[:, k] ** 2) / 2,
        }  # fmt: skip
        assert expected.keys() == set(MEASURED)
        for variant, value in expected.items():
            assert from_rows(a, g, down, seen, variant)[k] == pytest.approx(value, rel=1e-13), variant


def test_sums_are_kept_in_float64():
    """A million and then ones: float32 would lose the ones, as it would squares of 1e-25."""
    a = np.array([[4096.0]] + [[1.0]] * 3000, dtype=np.float32)
    g = np.full((3001, 1), 1e-25, dtype=np.float32)
    sums = ChannelSums([(0, 0)], 1)
    for row in range(0, 3001, 500):
        sums.gated(Gated(0, 0, *(torch.from_numpy(v[row : row + 500]) for v in (a, g)), torch.ones(1, 1)))
    assert sums.sums["a2"][0, 0][0] == 4096.0**2 + 3000
    assert sums.sums["g2"][0, 0][0] == pytest.approx(3001 * 1e-50, rel=1e-6)


# ------------------------------------------------------------------------------------ brute force


@pytest.fixture(scope="module")
def trained():
    """The trained model's folder, 64 sequences, and scores and true losses for both ways to count the loss."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    folder = trained_experts.trained_folder()
    data = trained_experts.text(32, 5)
    model = transformers.Qwen3MoeForCausalLM.from_pretrained(folder).eval()
    model.set_experts_implementation("eager")
    yield folder, data, Brute(model, data)
    torch.set_num_threads(before)


class Brute:
    """The true loss of the stock model without some channels, for the whole text or its second halves."""

    def __init__(self, model, data):
        self.model, self.ids = model, torch.from_numpy(data)
        self.downs = [layer.mlp.experts.down_proj.detach() for layer in model.model.layers]
        self.places = [(n, e, k) for n in range(2) for e in range(8) for k in range(trained_experts.WIDTH)]

    def losses(self, channels=()):
        kept = [
            (down, e, k, down[e, :, k].clone())
            for down, e, k in ((self.downs[n], e, k) for n, e, k in channels)
        ]
        for down, e, k, _ in kept:
            down[e, :, k] = 0
        with torch.no_grad():
            logits = self.model(input_ids=self.ids, use_cache=False).logits[:, :-1]
        for down, e, k, value in kept:
            down[e, :, k] = value
        each = torch.nn.functional.cross_entropy(logits.transpose(1, 2), self.ids[:, 1:], reduction="none")
        return np.array([each.mean().item(), each[:, trained_experts.ANSWER - 1 :].mean().item()])

    def single(self):
        """Return the loss without each channel, [channels, 2]."""
        base = self.losses()
        return np.array([self.losses([place]) - base for place in self.places])

    def without(self, values, share):
        """Return the increase of the losses when the share of lowest values goes."""
        order = np.argsort(values, kind="stable")[: int(share * len(values))]
        return self.losses([self.places[n] for n in order]) - self.losses()


def test_scores_find_the_channels_of_a_trained_model_that_matter(trained):
    folder, data, brute = trained
    true = brute.single()
    shares = (0.25, 0.5)
    drawn = np.random.default_rng(0)
    chance = {share: np.mean([brute.without(drawn.random(len(true)), share) for _ in range(5)], axis=0) for share in shares}  # fmt: skip
    for way, start in ((0, 0), (1, trained_experts.ANSWER)):
        measured = scores_of(folder, [Sample(ids, start) for ids in data])
        assert measured.loss / measured.counted == pytest.approx(brute.losses()[way], rel=1e-5)
        rank, rise = {}, {}
        for variant in MEASURED:
            found = measured.by(variant).scores
            values = np.array([found[n, e][k] for n, e, k in brute.places])
            rank[variant] = spearmanr(values, true[:, way]).statistic
            rise[variant] = {
                share: brute.without(values, share)[way] / chance[share][way] for share in shares
            }
        for variant in ("heapr", "heapr-all", "joint", "joint-all"):
            assert rank[variant] >= (0.35 if way == 0 else 0.25), (way, rank)
            assert max(rise[variant].values()) <= 0.8, (way, rise)
        if way == 1:  # only gradients know that the first halves do not count
            assert rank["heapr"] > rank["magnitude"] + 0.05, rank
            assert sum(rise["heapr"].values()) < sum(rise["magnitude"].values()), rise


# ------------------------------------------------------------------------- planted and invariances


def edited(folder, scratch, edit, name="edited"):
    """Return a copy of a model folder whose tensors went through ``edit(state)``; config keys may be returned."""
    copy = scratch / name
    shutil.copytree(folder, copy)
    state = load_file(copy / "model.safetensors")
    changed = edit(state) or {}
    save_file({n: v.contiguous() for n, v in state.items()}, copy / "model.safetensors", {"format": "pt"})
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, **changed}))
    return copy


EXPERT = "model.layers.1.block_sparse_moe.experts.2."


def test_a_channel_split_in_two_scores_a_quarter_twice(scratch):
    folder, samples = model_folder("mixtral"), some_samples()

    def split(state):
        for name in list(state):
            if ".experts." in name and name.endswith(("w1.weight", "w3.weight")):
                state[name] = torch.cat([state[name], state[name][4:5]])
            elif ".experts." in name:
                halved = state[name].clone()
                halved[:, 4] /= 2
                state[name] = torch.cat([halved, halved[:, 4:5]], dim=1)
        return {"intermediate_size": 49}

    before = scores_of(folder, samples).scores
    after = scores_of(edited(folder, scratch, split), samples).scores
    for place, old in before.items():
        expected = np.append(old, old[4] / 4)
        expected[4] /= 4
        assert after[place] == pytest.approx(expected, rel=1e-4, abs=1e-6 * old.max()), place


def test_channels_that_do_nothing_score_zero_and_go_first(scratch):
    folder, samples = model_folder("mixtral"), some_samples()

    def plant(state):
        state[EXPERT + "w2.weight"][:, 7] = 0
        state[EXPERT + "w1.weight"][11] = 0
        state[EXPERT + "w3.weight"][30] = 0

    copy = edited(folder, scratch, plant)
    found = scores_of(copy, samples)
    scores = found.scores[1, 2]
    assert not scores[[7, 11, 30]].any() and (np.delete(scores, [7, 11, 30]) > 0).all()
    chosen = choose(found, experts_of(open_path(copy)), sparsity=3.5 / (3 * 4 * 48), layout="ragged")
    assert chosen.cut.channels == {(1, 2): tuple(k for k in range(48) if k not in (7, 11, 30))}


def test_permuted_channels_have_permuted_scores(scratch):
    folder, samples = model_folder("mixtral"), some_samples()
    order = torch.randperm(48, generator=torch.Generator().manual_seed(0))

    def permute(state):
        for part in ("w1", "w3"):
            state[f"{EXPERT}{part}.weight"] = state[f"{EXPERT}{part}.weight"][order]
        state[EXPERT + "w2.weight"] = state[EXPERT + "w2.weight"][:, order]

    before = scores_of(folder, samples).scores
    after = scores_of(edited(folder, scratch, permute), samples).scores
    before[1, 2] = before[1, 2][order.numpy()]
    assert_close(after, before, 1e-4)


def test_moving_a_factor_from_down_to_up_changes_no_score_but_both_means(scratch):
    folder, samples = model_folder("mixtral"), some_samples()

    def scale(state):
        state[EXPERT + "w3.weight"][5] *= 8
        state[EXPERT + "w2.weight"][:, 5] /= 8

    before = scores_of(folder, samples)
    after = scores_of(edited(folder, scratch, scale), samples)
    for variant in MEASURED:
        assert_close(after.by(variant).scores, before.by(variant).scores, 1e-5)
    assert after.a2[1, 2][5] == pytest.approx(64 * before.a2[1, 2][5], rel=1e-5)
    assert after.g2[1, 2][5] == pytest.approx(before.g2[1, 2][5] / 64, rel=1e-5)


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3"])
def test_the_division_into_batches_and_padding_do_not_matter(family):
    folder, samples = model_folder(family), some_samples()
    one = scores_of(folder, samples, Settings(threads=1, batch_tokens=1))
    for tokens in (40, 72, 1000):
        other = scores_of(folder, samples, Settings(threads=1, batch_tokens=tokens))
        assert other.tokens == one.tokens and other.seen == one.seen
        for variant in MEASURED:
            for place, values in one.by(variant).scores.items():
                difference = np.linalg.norm(other.by(variant).scores[place] - values)
                assert difference <= 1e-6 * np.linalg.norm(values), (tokens, variant, place)
    halves = [scores_of(folder, part) for part in (samples[:4], samples[4:])]
    for place in one.a2:
        for name in ("a2", "g2", "joint"):
            parts = sum(getattr(half, name).get(place, 0) for half in halves)
            assert getattr(one, name)[place] == pytest.approx(parts, rel=1e-5), (place, name)


def test_streamed_experts_give_the_same_scores():
    folder, samples = model_folder("qwen3_moe"), some_samples()
    whole = scores_of(folder, samples)
    streamed = scores_of(folder, samples, Settings(threads=1, stream_experts=True))
    assert_close(streamed.scores, whole.scores, 1e-5)


# ----------------------------------------------------------------------------------- rare experts


def test_experts_without_tokens_score_zero_without_a_warning_and_are_named():
    folder = model_folder("qwen3_moe", (("num_experts", 9),))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = scores_of(folder, some_samples(lengths=(3,)))
        assert found.unrouted
        for variant in VARIANTS:
            scores = found.by(variant).scores
            assert scores.keys() == {(layer, e) for layer in (0, 2) for e in range(9)}
            for place, values in scores.items():
                assert values.shape == (20,) and np.isfinite(values).all()
                if place in found.unrouted and variant != "random":
                    assert not values.any()
    notes = found.notes()
    assert len(notes) == 2
    assert f"{len(found.unrouted)} (" in notes[0] and "were given no token" in notes[0]
    assert set(found.unrouted) | set(found.poor) == set(scores)
    assert "fewer than 32 tokens" in notes[1]
    assert found.by("random").notes() == []


def test_well_supplied_experts_are_not_flagged():
    found = scores_of(model_folder("mixtral"), some_samples(lengths=(30,) * 8))
    assert all(n >= 32 for n in found.tokens.values())
    assert found.poor == found.unrouted == [] and found.notes() == []


def test_random_scores_depend_on_the_seed_and_need_no_pass(monkeypatch):
    checkpoint = open_path(model_folder("mixtral"))
    experts = experts_of(checkpoint)
    monkeypatch.setattr("surgeon.prune.experts.heapr.activation_gradients", None)
    one, same, other = (
        channel_scores(checkpoint, [], CPU, experts, variant="random", seed=seed).scores for seed in (1, 1, 2)
    )
    assert all(np.array_equal(one[p], same[p]) and not np.array_equal(one[p], other[p]) for p in one)
    assert len({tuple(values) for values in one.values()}) == 12


# ------------------------------------------------------------------------------------------- file


def test_a_file_gives_back_every_criterion(scratch):
    folder, samples = model_folder("mixtral"), some_samples()
    found = scores_of(folder, samples)
    found.save(scratch / "scores.safetensors")
    about = about_of(open_path(folder), samples, CPU)
    read = ChannelScores.load(scratch / "scores.safetensors", about, variant="joint-all")
    assert (read.seen, read.loss, read.counted, read.tokens) == (
        found.seen,
        found.loss,
        found.counted,
        found.tokens,
    )
    for variant in VARIANTS:
        expected = found.by(variant, seed=4).scores
        assert all(np.array_equal(v, expected[p]) for p, v in read.by(variant, seed=4).scores.items())
    found.save(scratch / "again.safetensors")
    assert (scratch / "again.safetensors").read_bytes() == (scratch / "scores.safetensors").read_bytes()


def test_a_file_of_something_else_is_refused_by_what_differs(scratch):
    folder, samples = model_folder("mixtral"), some_samples()
    scores_of(folder, samples).save(scratch / "s")
    checkpoint = open_path(folder)
    shorter = [Sample(s.ids[:-1], 0, s.line) for s in samples]
    answers = [Sample(s.ids, 4, s.line) for s in samples]
    for about, word in (
        (about_of(checkpoint, shorter, CPU), "samples"),
        (about_of(checkpoint, answers, CPU), "samples"),
        (about_of(checkpoint, samples, Settings(dtype="bfloat16")), "dtype"),
        (about_of(open_path(model_folder("qwen3_moe")), samples, CPU), "model, config"),
    ):
        with pytest.raises(InputError, match=rf"E436.*something else: {word} differ"):
            ChannelScores.load(scratch / "s", about)
    ChannelScores.load(scratch / "s")  # nothing asked for


def test_damaged_files_are_refused(scratch):
    found = scores_of(model_folder("mixtral"), some_samples())
    found.save(scratch / "s")
    content = (scratch / "s").read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    (scratch / "nan").write_bytes(content[:start] + np.full(1, np.nan).tobytes() + content[start + 8 :])
    (scratch / "version").write_bytes(content.replace(b'\\"version\\": 1', b'\\"version\\": 9'))
    (scratch / "kind").write_bytes(content.replace(b"channel scores", b"kennel scores!", 1))
    (scratch / "count").write_bytes(content.replace(b'\\"0:0\\": ', b'\\"0:9\\": ', 1))
    save_file({"x": torch.zeros(2)}, scratch / "other")
    for name in ("nan", "version", "kind", "count", "other"):
        assert (scratch / name).read_bytes() != content
        with pytest.raises(InputError, match="E436"):
            ChannelScores.load(scratch / name)


def test_an_interrupted_measurement_continues(scratch):
    folder, samples = model_folder("mixtral"), some_samples()
    whole = scores_of(folder, samples)
    settings = Settings(threads=1, spill=scratch)

    class Stop(Exception):
        pass

    def stop_at_six(done, total):
        if done == 6:  # embedding, three forward, loss, one back
            raise Stop

    with pytest.raises(Stop):
        scores_of(folder, samples, settings, progress=stop_at_six)
    steps = []
    found = scores_of(folder, samples, settings, resume=True, progress=lambda done, _: steps.append(done))
    assert steps == [7, 8]
    for name in ("a2", "g2", "joint", "norm2"):
        assert all(np.array_equal(v, getattr(whole, name)[p]) for p, v in getattr(found, name).items())
    assert (found.tokens, found.loss) == (whole.tokens, whole.loss)


# --------------------------------------------------------------------------------- whole way, refusals


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "gpt_oss", "deepseek_v3"])
def test_a_narrowed_model_loads_and_equals_the_stock_model_with_channels_masked(scratch, family):
    folder, samples = model_folder(family), some_samples()
    checkpoint = open_path(folder)
    experts = experts_of(checkpoint)
    chosen = choose(scores_of(folder, samples), experts, sparsity=0.3, round_to=4)
    masked, pruned = (
        stock_folder(folder),
        stock_folder(write(ExpertView(checkpoint, experts, chosen.cut), scratch / "out")),
    )
    whole = stock_folder(folder)
    for name, parameter in masked.named_parameters():
        if name.endswith("experts.down_proj"):
            layer = int(name.split("layers.")[1].split(".")[0])
            for expert in range(experts.count):
                gone = np.setdiff1d(np.arange(experts.width), chosen.cut.channels[layer, expert])
                with torch.no_grad():
                    (parameter[expert].T if family != "gpt_oss" else parameter[expert])[gone] = 0
    ids = torch.as_tensor(samples[0].ids)[None]
    with torch.no_grad():
        expected, found, before = (m(input_ids=ids, use_cache=False).logits for m in (masked, pruned, whole))
    assert (expected - found).abs().max() < 1e-5 * expected.abs().max()
    assert (expected - before).abs().max() > 1e-3 * expected.abs().max()
    shapes = {tuple(p.shape) for n, p in pruned.named_parameters() if n.endswith("experts.down_proj")}
    width = next(iter(chosen.stored.values()))
    assert width < experts.width and all(width in shape for shape in shapes)


def test_quantized_experts_and_unknown_criteria_are_refused():
    checkpoint = open_path(model_folder("mixtral"))
    experts = experts_of(checkpoint)
    coded = dataclasses.replace(experts, layers=(experts.layers[0], dataclasses.replace(experts.layers[1], quantized="fp8")))  # fmt: skip
    with pytest.raises(InputError, match=r"E435.*layer 1 are quantized \(fp8\)"):
        channel_scores(checkpoint, some_samples(), CPU, coded)
    with pytest.raises(UsageError, match="E245") as refusal:
        channel_scores(checkpoint, some_samples(), CPU, experts, variant="hepar")
    assert 'did you mean "heapr"?' in (refusal.value.help or "")


def test_a_model_without_a_language_model_loss_is_refused():
    with pytest.raises(InputError, match=r"E380.*no language-model head"):
        scores_of(model_folder("mixtral", (), True, "MixtralModel"), some_samples())
