"""Sums over routing against loops over tokens and experts, on models whose routers are written again in Python."""

from __future__ import annotations

import dataclasses
import functools
import math
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))
import routing_oracle as oracle
from expert_models import EXPERTS, build, moe_folder

from surgeon.calibrate.data import Sample
from surgeon.calibrate.settings import Settings
from surgeon.checkpoint.checkpoint import open_path
from surgeon.errors import InputError, Interrupted
from surgeon.experts import statistics as module
from surgeon.experts.criteria import get, known
from surgeon.experts.statistics import SUMS, RoutingStatistics, collect_statistics, token_weight
from surgeon.structure.experts.find import experts_of

LENGTHS = (13, 14, 14, 5, 9)
DOMAINS = ("code", "prose", "code", "prose", "prose")
BATCHED = Settings(threads=1, batch_tokens=64)


def demos(lengths=LENGTHS, domains=DOMAINS, seed=3):
    drawn = np.random.default_rng(seed)
    return [Sample(drawn.integers(3, 67, n), 0, d) for n, d in zip(lengths, domains, strict=True)]


def measured(folder, samples=None, settings=BATCHED, **options):
    checkpoint = open_path(folder)
    return collect_statistics(checkpoint, samples or demos(), settings, experts_of(checkpoint), **options)


@functools.cache
def by_loops(family):
    """Return (domain, layer) -> name -> values of every expert, and (layer, sample) -> EASY-EP, by plain loops."""
    samples = demos()
    found, by_sample = {}, {}
    for number, layers in enumerate(oracle.routing(family, [s.ids for s in samples])):
        for layer, choices in layers.items():
            table = found.setdefault((samples[number].domain, layer), {
                name: [0.0] * EXPERTS for name in (*SUMS, "tokens", "peak")
            } | {"seen": 0})  # fmt: skip
            own = by_sample.setdefault((layer, number), [0.0] * EXPERTS)
            for choice in choices:
                table["seen"] += 1
                after = choice.stream + choice.update
                cosine = float(choice.stream @ after) / math.sqrt(float(after @ after))
                s = 1 - cosine
                for expert, g in choice.chosen.items():
                    f = choice.norms[expert]
                    for name, value in (("tokens", 1), ("gate", g), ("norm", f), ("norm2", f * f), ("gated", g * f),
                                        ("gated2", g * f * f), ("easy", g * f * s), ("easy_plain", g * s)):  # fmt: skip
                        table[name][expert] += value
                    table["peak"][expert] = max(table["peak"][expert], choice.peaks[expert])
                    own[expert] += g * f * s
    return found, by_sample


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize(
    ("family", "tokens"),
    [
        ("qwen2_moe", 1),
        ("qwen2_moe", 42),
        ("qwen2_moe", 64),
        ("deepseek_v3", 64),
        ("granitemoe", 64),
        ("minimax", 42),
    ],
)
def test_equals_loops_over_tokens_and_experts(family, tokens, stream):
    """Batches of one sample, of three (42 places) and padded ones (64); experts at once and one at a time."""
    settings = Settings(threads=1, batch_tokens=tokens, stream_experts=stream)
    found = measured(moe_folder(family), settings=settings)
    wanted, by_sample = by_loops(family)
    assert {(domain, layer) for domain in found.domains for layer in found.layers} == wanted.keys()
    for (domain, layer), table in wanted.items():
        own = found.domains[domain][layer]
        assert own.seen == table["seen"] and own.tokens.tolist() == table["tokens"]
        assert own.tokens.dtype == np.int64 and own.demos == DOMAINS.count(domain)
        for name in (*SUMS, "peak"):
            assert getattr(own, name).dtype == np.float64
            np.testing.assert_allclose(getattr(own, name), table[name], rtol=1e-5, atol=1e-7, err_msg=name)
        for row, number in zip(own.easy_by_sample, own.sample_numbers, strict=True):
            np.testing.assert_allclose(row, by_sample[layer, int(number)], rtol=1e-5, atol=1e-6)
        assert own.sample_tokens.tolist() == [LENGTHS[n] for n in own.sample_numbers]
    for layer in found.layers:
        total = found.total(layer)
        for name in (*SUMS, "tokens"):
            both = sum(np.asarray(wanted[domain, layer][name]) for domain in found.domains)
            np.testing.assert_allclose(getattr(total, name), both, rtol=1e-5, atol=1e-7)
        assert total.sample_numbers.tolist() == list(range(len(LENGTHS)))
        np.testing.assert_allclose(total.easy_by_sample.sum(0), total.easy, rtol=1e-5, atol=1e-6)
    assert found.model_layers == 3 and found.mixed_up == ()


# ---- the token weight --------------------------------------------------------------------------------


def test_token_weight_of_orthogonal_outputs():
    """One token, h = H e_9, outputs n_i e_i: s = 1 - H / sqrt(H^2 + sum (g_i n_i)^2)."""
    g, n, height = [0.7, 0.3], [3.0, 5.0], 4.0
    residual = torch.zeros(1, 16)
    residual[0, 9] = height
    update = torch.zeros(1, 16)
    update[0, 1], update[0, 2] = g[0] * n[0], g[1] * n[1]
    wanted = 1 - height / math.sqrt(height**2 + sum((a * b) ** 2 for a, b in zip(g, n, strict=True)))
    assert float(token_weight(residual, update)) == pytest.approx(wanted, abs=1e-6)


@pytest.mark.parametrize("dense", [False, True])
def test_token_weight_keeps_its_digits_where_the_cosine_loses_them(dense):
    """|h| = 1e4, |r| = 1e-1 at a right angle: s = 5e-11, of which 1 - cos in float32 has not a digit."""
    if dense:
        generator = torch.Generator().manual_seed(0)
        h, r = torch.randn(2, 4096, generator=generator, dtype=torch.float64)
        r = r - (r @ h) / (h @ h) * h
    else:
        h, r = torch.eye(16, dtype=torch.float64)[:2]
    h, r = (1e4 * h / h.norm()).float()[None], (1e-1 * r / r.norm()).float()[None]
    assert float(token_weight(h, r)) == pytest.approx(5e-11, rel=1e-2)
    direct = 1 - torch.nn.functional.cosine_similarity(h, h + r).clamp(-1, 1)
    assert float(direct) != pytest.approx(5e-11, rel=0.5)


def test_token_weight_where_the_stream_is_nothing():
    h = torch.tensor([[0.0, 0.0], [1.0, 2.0], [1.0, 0.0], [0.0, 0.0]])
    r = torch.tensor([[1.0, 0.0], [-1.0, -2.0], [0.0, 1.0], [0.0, 0.0]])
    assert token_weight(h, r).tolist() == pytest.approx([0.0, 1.0, 1 - math.sqrt(0.5), 0.0])
    assert float(token_weight(torch.tensor([[1.0, 0.0]]), torch.tensor([[-3.0, 0.0]]))) == pytest.approx(2.0)


def test_sixteen_bits_are_widened_first():
    h = torch.full(
        (1, 64), 300.0, dtype=torch.bfloat16
    )  # its square overflows float16, its sum bfloat16's digits
    r = torch.zeros(1, 64, dtype=torch.bfloat16)
    r[0, 0] = 300.0
    wanted = 1 - (63 + 2) / math.sqrt(64) / math.sqrt(63 + 4)
    assert float(token_weight(h, r)) == pytest.approx(wanted, rel=1e-5)
    assert float(token_weight(h.half(), r.half())) == pytest.approx(wanted, rel=1e-5)


# ---- invariants ----------------------------------------------------------------------------------------


def saved(model, folder):
    model.save_pretrained(folder)
    return folder


def test_scaling_an_expert_scales_its_contribution(tmp_path):
    plain = measured(moe_folder("mixtral")).total(2)
    model = build("mixtral")
    with torch.no_grad():
        model.model.layers[2].mlp.experts.down_proj[3] *= 4
    scaled = measured(saved(model, tmp_path / "scaled")).total(2)
    factor = np.where(np.arange(EXPERTS) == 3, 4.0, 1.0)
    assert (scaled.tokens == plain.tokens).all() and plain.tokens[3] > 0
    np.testing.assert_allclose(scaled.gated, plain.gated * factor, rtol=1e-5)
    np.testing.assert_allclose(scaled.norm2, plain.norm2 * factor**2, rtol=1e-5)
    np.testing.assert_allclose(scaled.peak, plain.peak * factor, rtol=1e-5)


def test_an_expert_without_output_scores_nothing(tmp_path):
    model = build("mixtral")
    with torch.no_grad():
        model.model.layers[1].mlp.experts.down_proj[5] = 0
    found = measured(saved(model, tmp_path / "planted")).total(1)
    assert found.tokens[5] > 0
    for name in ("easy_ep", "reap", "rean", "ean", "man", "msan", "reap_l2"):
        scores = get(name).score(found)
        assert scores[5] == 0 and (np.delete(scores, 5)[np.delete(found.tokens, 5) > 0] > 0).all()


def test_permuting_experts_permutes_scores(tmp_path):
    order = torch.tensor([3, 0, 7, 1, 2, 6, 5, 4])
    plain = measured(moe_folder("minimax_m2"))
    model = build("minimax_m2")
    with torch.no_grad():
        for layer in model.model.layers:
            block = layer.mlp
            block.gate.weight.copy_(block.gate.weight[order])
            block.e_score_correction_bias.copy_(block.e_score_correction_bias[order])
            block.experts.gate_up_proj.copy_(block.experts.gate_up_proj[order])
            block.experts.down_proj.copy_(block.experts.down_proj[order])
    moved = measured(saved(model, tmp_path / "moved"))
    for layer in plain.layers:
        for name in (*SUMS, "tokens", "peak"):
            np.testing.assert_allclose(
                getattr(moved.total(layer), name),
                getattr(plain.total(layer), name)[order.numpy()],
                rtol=1e-5,
                atol=1e-7,
            )


def test_every_demonstration_twice_doubles_sums():
    once, twice = measured(moe_folder("mixtral")), measured(moe_folder("mixtral"), demos() + demos())
    for layer in once.layers:
        a, b = once.total(layer), twice.total(layer)
        assert (2 * a.tokens == b.tokens).all() and b.demos == 2 * a.demos
        np.testing.assert_allclose(b.easy, 2 * a.easy, rtol=1e-5, atol=1e-8)
        for name in ("reap", "man", "easy_ep_per_demo"):
            np.testing.assert_allclose(get(name).score(b), get(name).score(a), rtol=1e-5, atol=1e-8)


def test_experts_without_tokens_are_nothing_but_zeros():
    found = measured(moe_folder("mixtral"), [Sample(np.array([5, 9]), 0)])
    for layer in found.layers:
        one = found.total(layer)
        assert one.unused >= EXPERTS - 4 and one.tokens.sum() == 4
        for name in known():
            criterion = get(name)
            if criterion.needs == "routing":
                scores = criterion.score(one)
                assert scores.dtype == np.float64 and np.isfinite(scores).all()
                assert not scores[one.tokens == 0].any()


def test_gates_on_the_input_are_not_multiplied_twice():
    from surgeon.calibrate.routing import Routed

    batch = Routed(
        layer=0, samples=torch.zeros(1, dtype=torch.int64), positions=torch.zeros(1, dtype=torch.int64),
        index=torch.tensor([[2]]), weights=torch.tensor([[0.5]]), norms=torch.tensor([[3.0]]), peaks=torch.ones(1, 1),
        residual=torch.ones(1, 4), update=torch.ones(1, 4), on_input=True,
    )  # fmt: skip
    sums = module.RoutingSums([""], {0: 4})
    sums.routed(batch)
    found = sums.finish()[""][0]
    assert found.gated[2] == 3.0 and found.gate[2] == 0.5 and found.gated2[2] == 9.0


# ---- interruption and files ---------------------------------------------------------------------------


def same_bits(a, b):
    assert a.record == b.record and a.domains.keys() == b.domains.keys()
    for domain, table in a.domains.items():
        for layer, one in table.items():
            for field in dataclasses.fields(one):
                x, y = getattr(one, field.name), getattr(b.domains[domain][layer], field.name)
                assert np.array_equal(x, y) and np.asarray(x).dtype == np.asarray(y).dtype, field.name


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
def test_an_interrupted_pass_ends_with_the_same_bits(tmp_path, stream):
    settings = Settings(threads=1, batch_tokens=64, stream_experts=stream)
    whole = measured(moe_folder("qwen2_moe"), settings=settings)
    settings = dataclasses.replace(settings, spill=tmp_path)
    stop, stages = threading.Event(), []
    with pytest.raises(Interrupted):
        measured(moe_folder("qwen2_moe"), settings=settings, stop=stop,
                 progress=lambda done, total: stop.set() if done == 2 else None)  # fmt: skip
    found = measured(moe_folder("qwen2_moe"), settings=settings, resume=True,
                     progress=lambda done, total: stages.append(done))  # fmt: skip
    assert stages == [3, 4, 5]
    same_bits(found, whole)


def test_other_domains_do_not_take_up_a_pass(tmp_path):
    settings = dataclasses.replace(BATCHED, spill=tmp_path)
    measured(moe_folder("mixtral"), settings=settings)
    others = demos(domains=("a", "b", "b", "b", "b"))
    found = measured(moe_folder("mixtral"), others, settings, resume=True)
    assert list(found.domains) == ["a", "b"] and found.domains["a"][0].seen == LENGTHS[0]


@pytest.fixture(scope="module")
def kept():
    return measured(moe_folder("qwen2_moe"), about={"name": "words", "sha256": "1" * 64})


def test_a_file_gives_everything_back(tmp_path, kept):
    file = tmp_path / "new" / "scores.safetensors"
    kept.save(file)
    loaded = RoutingStatistics.load(file, open_path(moe_folder("qwen2_moe")))
    same_bits(loaded, kept)
    assert loaded.record["data"]["name"] == "words" and loaded.record["dtype"] == "float32"
    again = tmp_path / "again.safetensors"
    loaded.save(again)
    assert again.read_bytes() == file.read_bytes()
    assert str(tmp_path) not in str(loaded.record)
    from safetensors.numpy import load_file

    assert set(load_file(file)) == {
        f"{number}.{layer}.{name}" for number in range(2) for layer in (0, 2) for name in module.ARRAYS
    }


def test_a_file_of_another_model_is_refused(tmp_path, kept):
    file = tmp_path / "scores.safetensors"
    kept.save(file)
    other = open_path(moe_folder("qwen2_moe", seed=1))
    with pytest.raises(InputError) as caught:
        RoutingStatistics.load(file, other)
    assert caught.value.code == "E432" and "another model" in caught.value.message
    same_bits(RoutingStatistics.load(file, other, force=True), kept)
    same_bits(RoutingStatistics.load(file), kept)


def flip(raw, place):
    changed = bytearray(raw)
    changed[place] ^= 1
    return bytes(changed)


def test_damaged_files_are_refused(tmp_path, kept):
    file = tmp_path / "scores.safetensors"
    kept.save(file)
    raw = file.read_bytes()
    for broken in (flip(raw, len(raw) - 3), flip(raw, len(raw) // 2), raw[:-8]):
        file.write_bytes(broken)
        with pytest.raises(InputError):
            RoutingStatistics.load(file)
    file.write_bytes(flip(raw, len(raw) - 3))
    with pytest.raises(InputError) as caught:
        RoutingStatistics.load(file)
    assert caught.value.code == "E431"
    with pytest.raises(InputError) as caught:
        RoutingStatistics.load(moe_folder("mixtral") / "model.safetensors")
    assert caught.value.code == "E431" and "holds no measurements" in caught.value.message


def test_the_precision_is_the_settings(kept):
    """bfloat16 changes sums a little; norms are still taken in float32."""
    found = measured(moe_folder("qwen2_moe"), settings=dataclasses.replace(BATCHED, dtype="bfloat16"))
    assert found.record["dtype"] == "bfloat16"
    a, b = found.total(0), kept.total(0)
    assert abs(a.tokens - b.tokens).sum() <= 6
    np.testing.assert_allclose(a.norm.sum(), b.norm.sum(), rtol=0.02)
    assert not np.array_equal(a.norm, b.norm)
