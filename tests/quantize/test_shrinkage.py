"""Hessians from few tokens: the count of weighted tokens, the choice of k, and errors on tokens nobody has seen."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from surgeon.formats.scheme import Scheme
from surgeon.quantize import gptq, moments, rtn, shrinkage
from surgeon.quantize.factor import Drawn
from surgeon.quantize.moments import Moments, held_out
from surgeon.quantize.output_error import energy, relative
from surgeon.quantize.shrinkage import MENU, closed_form

INPUTS, OUTPUTS = 128, 48
SCHEME = Scheme("int", 4, 32)


class Source:
    """Correlated inputs, as many as wanted, always of the same kind."""

    def __init__(self, seed=0, inputs=INPUTS):
        draw = torch.Generator().manual_seed(seed)
        spread = torch.exp(0.5 * torch.randn(inputs, generator=draw))
        self.mixing = torch.randn(inputs, inputs, generator=draw) / inputs**0.5 * spread
        self.noise = 0.3 * spread
        self.weight = torch.randn(OUTPUTS, inputs, generator=draw)

    def tokens(self, count, seed):
        draw = torch.Generator().manual_seed(1000 + seed)
        hidden = torch.randn(count, len(self.mixing), generator=draw)
        return hidden @ self.mixing + torch.randn(count, self.mixing.shape[1], generator=draw) * self.noise


def sums(tokens, gates=None):
    found = Moments.empty(tokens.shape[1])
    found.add(tokens, gates)
    return found


def split(tokens, samples=8, gates=None):
    """Two sums over the tokens of so many samples of equal length."""
    parts = Moments.empty(tokens.shape[1]), Moments.empty(tokens.shape[1])
    for number, here in enumerate(np.array_split(np.arange(len(tokens)), samples)):
        parts[held_out(number)].add(tokens[here], None if gates is None else gates[here])
    return parts


def test_a_quarter_of_the_samples_is_held_out():
    assert sum(map(held_out, range(100))) == 25
    train, held = split(Source().tokens(80, 1))
    assert (train.count, held.count) == (60, 20)


@pytest.mark.parametrize("slice_size", [4096, 7])
def test_sums_by_hand(slice_size, monkeypatch):
    monkeypatch.setattr(moments, "SLICE", slice_size)
    draw = np.random.default_rng(0)
    x, x0, g = draw.standard_normal((20, 6)), draw.standard_normal((20, 6)), draw.uniform(0, 1, 20)
    found = Moments.empty(6, cross=True)
    found.add(*(torch.from_numpy(a).float() for a in (x, g, x0)))
    hessian = sum(g[t] ** 2 * np.outer(x[t], x[t]) for t in range(20))
    cross = sum(g[t] ** 2 * np.outer(x0[t] - x[t], x[t]) for t in range(20))
    assert found.hessian.numpy() == pytest.approx(hessian, rel=1e-4, abs=1e-5)
    assert found.cross is not None and found.cross.numpy() == pytest.approx(cross, rel=1e-4, abs=1e-5)
    assert found.count == pytest.approx((g**2).sum() ** 2 / (g**4).sum(), rel=1e-6)
    both = found.merged(found)
    assert both.count == pytest.approx(2 * found.count)
    assert both.cross is not None and torch.equal(both.cross, 2 * found.cross)


def test_tokens_count_by_their_gates():
    x = Source().tokens(100, 1)
    assert sums(x).count == pytest.approx(100)
    assert sums(x, torch.full((100,), 0.125)).count == pytest.approx(100)
    gates = torch.full((100,), 1e-3)
    gates[:4] = 1.0  # ninety-six of them hardly matter
    assert sums(x, gates).count == pytest.approx(4, rel=1e-3)
    assert Moments.empty(3).count == 0


def test_the_cross_needs_the_inputs_of_the_original():
    with pytest.raises(ValueError, match="inputs of the original model"):
        Moments.empty(4, cross=True).add(torch.ones(2, 4))


def test_closed_form():
    assert closed_form(512, 0) == 1
    figures = [closed_form(512, n) for n in (8, 128, 256, 512)]
    assert figures == pytest.approx([0.97, 0.64, 0.444, 0.25], abs=0.005)


def shrunk(hessian, k):
    """(1 - k) H + k diag(H), by hand."""
    made = hessian * (1 - k)
    made.diagonal().copy_(hessian.diagonal())
    return made


def test_a_factor_is_that_of_the_drawn_hessian_and_its_errors_are_of_the_given_one():
    """Codes of a factor drawn by k are those of the matrix drawn by hand; the error on the Hessian as it was given comes
    out of the loop without a product."""
    source = Source()
    hessian = sums(source.tokens(50, 1)).hessian
    before = hessian.clone()
    drawn = Drawn(hessian)
    for k in (*MENU[:-1], 0.97):
        factor = drawn.factor(k)
        made, record = gptq.quantize_with(source.weight, factor, SCHEME, scale_dtype="BF16")
        by_hand, other = gptq.quantize(source.weight, shrunk(hessian, k), SCHEME, scale_dtype="BF16")
        assert (made.codes == by_hand.codes).all()
        assert record.damped_error == pytest.approx(other.damped_error, rel=1e-5)
        change = torch.from_numpy(made.values()) - source.weight
        assert record.error == pytest.approx(energy(change, hessian), rel=1e-4 / (1 - k))
        assert record.change == pytest.approx(float(change.square().sum()), rel=1e-5)
        assert record.shrinkage == k and made.loss == pytest.approx(record.error / record.energy)
    assert torch.equal(hessian, before)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_all_the_way_is_rounding_to_nearest(bits):
    source = Source()
    hessian = sums(source.tokens(40, 1)).hessian
    scheme = Scheme("int", bits, 32)
    made, _ = gptq.quantize(source.weight, shrunk(hessian, 1.0), scheme, scale_dtype="BF16")
    nearest = rtn.quantize(source.weight, scheme, scale_dtype="BF16")
    assert (made.codes == nearest.codes).all()


@pytest.mark.parametrize("bits", [2, 4])
def test_never_worse_on_the_samples_held_out_and_hardly_elsewhere(bits):
    """From 8 tokens to many; GPTQ on the bare Hessian is the control that fails, or the test shows nothing."""
    scheme = Scheme("int", bits, 32)
    bare, found = {}, {}
    for count in (8, 32, 64, 128, 256, 512, 2048):
        ratios = []
        for seed in range(3):
            source = Source(seed)
            test = sums(source.tokens(4000, 77)).hessian
            train, held = split(source.tokens(count, seed))
            nearest = relative(rtn.quantize(source.weight, scheme, scale_dtype="BF16"), source.weight, test)
            ((made, record),), choice = shrinkage.quantize(
                [source.weight], train, held, scheme, scale_dtype="BF16"
            )
            plain, _ = gptq.quantize(source.weight, train.merged(held).hessian, scheme, scale_dtype="BF16")
            ratios.append(
                (
                    relative(made, source.weight, test) / nearest,
                    relative(plain, source.weight, test) / nearest,
                )
            )
            if choice.how == "hold-out":
                assert choice.errors[choice.k] <= choice.errors[1.0]
                assert record.shrinkage == choice.k
        found[count], bare[count] = np.mean(ratios, axis=0)
    assert max(found.values()) <= 1.02, found
    assert max(bare.values()) > 1.1, bare
    assert found[2048] < 0.7 and found[2048] == bare[2048]


def test_the_errors_it_chooses_by_are_those_of_its_codes():
    """k by k again, by hand: train on three quarters, square the outputs on the rest."""
    source = Source()
    tokens = source.tokens(200, 1)
    train, held = split(tokens)
    weights = [source.weight[:20], source.weight[20:]]
    choice = shrinkage.choose(weights, train, held, SCHEME, scale_dtype="BF16")
    rest = torch.cat([tokens[75:100], tokens[175:200]])
    for k, error in choice.errors.items():
        by_hand = 0.0
        for weight in weights:
            made, _ = gptq.quantize(weight, shrunk(train.hessian, k), SCHEME, scale_dtype="BF16")
            by_hand += float((rest @ (torch.from_numpy(made.values()) - weight).T).square().sum())
        assert error == pytest.approx(by_hand, rel=1e-4)
    assert choice.k == min(choice.errors, key=lambda k: choice.errors[k])
    assert choice.count == pytest.approx(200)


def test_the_search_goes_downhill_and_always_tries_rounding_to_nearest():
    for errors, start, least, tries in (
        ([5, 4, 3, 4, 5, 9], 2, 2, 4),  # the guess, both neighbours, the end
        ([1, 2, 3, 4, 5, 9], 3, 0, 5),
        ([9, 8, 7, 6, 5, 4], 0, 5, 6),
        ([9, 8, 7, 6, 5, 4], 4, 5, 3),
        ([9, 8, 1, 6, 5, 4], 4, 5, 3),  # rounding to nearest is better than all that was tried on the way
        ([2, 2, 2, 2, 2, 2], 2, 5, 4),
    ):
        found = {}
        for place in shrinkage._downhill(MENU, start, found):
            assert MENU[place] not in found
            found[MENU[place]] = errors[place]
        assert min(found, key=lambda k: (found[k], -k)) == MENU[least] and len(found) == tries
        assert 1.0 in found and min(found.values()) <= errors[-1]


@pytest.mark.parametrize("count", [48, 160, 400])
def test_it_finds_what_trying_all_finds_or_nearly_so(count):
    worse = []
    for seed in range(4):
        source = Source(seed)
        train, held = split(source.tokens(count, seed))
        choice = shrinkage.choose([source.weight], train, held, SCHEME, scale_dtype="BF16")
        every = {}
        for k in MENU:
            made, _ = gptq.quantize(source.weight, shrunk(train.hessian, k), SCHEME, scale_dtype="BF16")
            every[k] = energy(torch.from_numpy(made.values()) - source.weight, held.hessian)
        assert {k: every[k] for k in choice.errors} == pytest.approx(choice.errors, rel=1e-4)
        assert every[choice.k] <= every[1.0] * (1 + 1e-6)
        worse.append(every[choice.k] / min(every.values()))
    assert np.mean(worse) < 1.01 and max(worse) < 1.05, worse


def test_matrices_rounded_together_have_the_bits_of_those_rounded_alone():
    """Of several experts: stacked column by column as on a GPU, and task by task with searches of different length."""
    sources = [Source(seed) for seed in range(5)]
    jobs = []
    for seed, source in enumerate(sources):
        factor = gptq.factorise(sums(source.tokens(90 + 40 * seed, seed)).hessian, k=0.2)
        bits, rows = (4, slice(None)) if seed != 3 else (3, slice(0, 20))  # one is not like the others
        job, _ = gptq.prepared(
            source.weight[rows], factor, Scheme("int", bits, 32), scale_dtype="BF16", block=48, clip=False
        )
        jobs.append(job)
    alone = [gptq.rounded(job) for job in jobs]
    for stack in (True, False):
        for one, other in zip(alone, gptq.rounded_together(jobs, stack=stack), strict=True):
            assert torch.equal(one.codes, other.codes)
            assert (one.error, one.damped_error, one.change) == (
                other.error,
                other.damped_error,
                other.change,
            )
    given = []
    for seed, source in enumerate(sources):
        train, held = split(source.tokens(40 + 120 * seed, seed))
        how = shrinkage.How(SCHEME, "BF16", module=str(seed))
        given.append(([source.weight[:30], source.weight[30:]], train, held, how))
    apart = [shrinkage.together([shrinkage.quantizing(*one)])[0] for one in given]
    asked = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shrinkage, "rounded_together",
                      lambda jobs: (asked.append(len(jobs)), gptq.rounded_together(jobs, stack=True))[1])  # fmt: skip
        beside = shrinkage.together([shrinkage.quantizing(*one) for one in given])
    assert max(asked) == 2 * len(given)
    for (first, choice), (second, same) in zip(apart, beside, strict=True):
        assert choice == same
        assert all((a.codes == b.codes).all() for (a, _), (b, _) in zip(first, second, strict=True))


def test_few_tokens_held_out_choose_among_large_k_only():
    source = Source()
    train, held = split(source.tokens(24, 1))
    least = closed_form(INPUTS, 24)
    choice = shrinkage.choose([source.weight], train, held, SCHEME, scale_dtype="BF16")
    assert held.count == 6 and list(choice.errors) == pytest.approx([least, 0.8, 1.0])
    train, held = split(source.tokens(32, 1))
    choice = shrinkage.choose([source.weight], train, held, SCHEME, scale_dtype="BF16")
    assert (
        held.count == 8 and set(choice.errors) <= set(MENU) and min(choice.errors) < closed_form(INPUTS, 32)
    )


def test_many_tokens_need_nothing():
    source = Source()
    train, held = split(source.tokens(4 * INPUTS, 1))
    (result,), choice = shrinkage.quantize([source.weight], train, held, SCHEME, scale_dtype="BF16")
    assert (choice.k, choice.how, choice.errors) == (0.0, "enough tokens", {})
    plain, record = gptq.quantize(source.weight, train.merged(held).hessian, SCHEME, scale_dtype="BF16")
    assert (result[0].codes == plain.codes).all() and result[1] == record
    train, held = split(source.tokens(4 * INPUTS - 8, 1))
    assert shrinkage.choose([source.weight], train, held, SCHEME, scale_dtype="BF16").how == "hold-out"


def test_gates_that_leave_few_tokens_need_it():
    source = Source()
    gates = torch.full((1000,), 1e-3)
    gates[::20] = 1.0
    train, held = split(source.tokens(1000, 1), gates=gates)
    choice = shrinkage.choose([source.weight], train, held, SCHEME, scale_dtype="BF16")
    assert choice.how == "hold-out" and choice.count == pytest.approx(50, rel=0.01) and choice.k > 0


def test_one_sample_only():
    source = Source()
    tokens = source.tokens(64, 1)
    choice = shrinkage.choose(
        [source.weight], sums(tokens), Moments.empty(INPUTS), SCHEME, scale_dtype="BF16"
    )
    assert choice.how == "closed form" and choice.k == pytest.approx((128 / 192) ** 2)
    ((made, record),), _ = shrinkage.quantize(
        [source.weight], Moments.empty(INPUTS), sums(tokens), SCHEME, scale_dtype="BF16"
    )
    assert record.shrinkage == pytest.approx((128 / 192) ** 2)
    hessian = tokens.T @ tokens
    assert made.loss == pytest.approx(relative(made, source.weight, hessian), rel=1e-4)
    assert record.error == pytest.approx(made.loss * record.energy, rel=1e-6)


def test_no_token_means_rounding_to_nearest_and_says_so():
    source = Source()
    nothing = Moments.empty(INPUTS)
    ((made, record),), choice = shrinkage.quantize(
        [source.weight], nothing, nothing, SCHEME, scale_dtype="BF16"
    )
    assert (made.codes == rtn.quantize(source.weight, SCHEME, scale_dtype="BF16").codes).all()
    assert (record.method, record.fallback, choice.how) == ("rtn", "no token reached it", "no tokens")
    assert math.isnan(made.loss)


def test_an_input_dead_in_training_only_keeps_its_weights():
    source = Source()
    tokens = source.tokens(120, 1)
    tokens[:, 5] = 0
    tokens[:, 9] = 0
    tokens[45:60, 9] = 30.0  # sample 3, held out
    train, held = split(tokens)
    ((made, record),), choice = shrinkage.quantize([source.weight], train, held, SCHEME, scale_dtype="BF16")
    assert choice.how == "hold-out" and record.dead == 1
    assert (made.values()[:, 5] == 0).all() and (made.values()[:, 9] != 0).any()
    # What it would cost to drop input 9 altogether is in none of the errors.
    dropped = float(15 * 900 * source.weight[:, 9].square().sum())
    assert max(choice.errors.values()) < dropped
