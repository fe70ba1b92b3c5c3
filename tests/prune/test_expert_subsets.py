"""NAEE and leave-one-out against the stock model with logits masked at minus infinity, every subset run for real."""

from __future__ import annotations

import contextlib
import itertools
import sys
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional

sys.path.insert(0, str(Path(__file__).resolve().parent))
from expert_folders import EXPERTS, STORAGES, TEXTS, loaded, moe_folder, opened

from surgeon.calibrate.settings import Settings
from surgeon.errors import EnvironmentFault, InputError, Interrupted, UsageError
from surgeon.prune.experts import subsets
from surgeon.prune.experts.subsets import best, gather, leave_one_out, naee

ONE = Settings(threads=1, batch_tokens=64)


@contextlib.contextmanager
def masked(model, layer: int, gone):
    """Set what the router's product gives some experts to -1e30, and their correction biases to -1e9."""
    block, plain = block_of(model, layer), functional.linear
    rows = next(
        m.weight
        for n, m in block.named_modules()
        if n in ("gate", "router", "gate.wg") and hasattr(m, "weight")
    )
    named = [*block.named_buffers(), *block.named_parameters()]
    biases = [b.data for n, b in named if n.endswith(("correction_bias", "expert_bias"))]
    before = [b.clone() for b in biases]

    def linear(x, weight, bias=None):
        out = plain(x, weight, bias)
        if weight.shape == rows.shape and bool((weight == rows).all()):
            out = out.clone()
            out[..., list(gone)] = -1e30
        return out

    functional.linear = linear
    try:
        for bias in biases:
            bias[..., list(gone)] = -1e9
        yield
    finally:
        functional.linear = plain
        for bias, kept in zip(biases, before, strict=True):
            bias.copy_(kept)


def block_of(model, layer: int):
    root = model.get_submodule(f"model.layers.{layer}")
    return next(
        getattr(root, name)
        for name in ("block_sparse_moe", "mlp", "feed_forward", "mixer")
        if hasattr(root, name)
    )


def run(block, x):
    out = block(x)
    return out[0] if isinstance(out, tuple) else out


@torch.no_grad()
def inputs_of(model, layer: int, texts=TEXTS) -> list[torch.Tensor]:
    """Return what a layer's block is given, all tokens in one."""
    found = []
    handle = block_of(model, layer).register_forward_pre_hook(lambda m, args: found.append(args[0].clone()))
    for ids in texts:
        model(input_ids=torch.from_numpy(ids)[None])
    handle.remove()
    return [
        torch.cat([x.reshape(1, -1, x.shape[-1]) for x in found], dim=1)
    ]  # blocks treat tokens one by one


@torch.no_grad()
def real_error(model, layer: int, kept, inputs) -> float:
    """Run the layer's block with and without the mask."""
    block = block_of(model, layer)
    gone = [e for e in range(EXPERTS) if e not in kept]
    total = 0.0
    for x in inputs:
        whole = run(block, x).double()
        with masked(model, layer, gone):
            total += float((run(block, x).double() - whole).square().sum())
    return total


def gathered(family: str, settings: Settings = ONE, texts=TEXTS, storage: str = "hub", **options):
    checkpoint, experts = opened(moe_folder(family, storage=storage))
    found = {}

    def finished(number, outputs):
        every = [
            *itertools.islice(itertools.combinations(range(EXPERTS), 4), 0, None, 7),
            tuple(range(2, 8)),
            tuple(range(EXPERTS)),
        ]
        size = EXPERTS // experts.groups
        every = [
            s for s in every if len({sum(e // size == g for e in s) for g in range(experts.groups)}) == 1
        ]
        found[number] = {s: outputs.error(s) for s in every}, outputs.tokens, outputs.whole

    gather(checkpoint, texts, settings, experts, finished, **options)
    return experts, found


OTHERS = (
    "phimoe", "minimax", "minimax_m2", "deepseek_v2", "glm4_moe", "ernie4_5_moe", "hunyuan_v1_moe", "lfm2_moe", "jamba",
    "kimi_linear", "granitemoeshared", "granitemoehybrid", "qwen3_next", "nemotron_h",
)  # fmt: skip
"""Further kinds of routers: sparsemixer, biases of the block, biases with an axis more, group scores by the best."""


@pytest.mark.parametrize(("family", "storage"), [
    *STORAGES, *(pytest.param(f, "hub", marks=[] if f in ("minimax_m2", "ernie4_5_moe") else pytest.mark.slow) for f in OTHERS),
])  # fmt: skip
def test_errors_equal_running_the_masked_block(family, storage):
    experts, found = gathered(family, storage=storage)
    model = loaded(moe_folder(family, storage=storage))
    layer = experts.running[-1].index
    inputs = inputs_of(model, layer)
    errors, tokens, whole = found[layer]
    assert tokens == sum(map(len, TEXTS)) and len(errors) >= 4
    scale = max(errors.values())
    for kept, error in errors.items():
        assert error == pytest.approx(real_error(model, layer, kept, inputs), rel=1e-4, abs=1e-6 * scale), (
            kept
        )
    assert errors[tuple(range(EXPERTS))] == 0.0 and min(e for s, e in errors.items() if len(s) < EXPERTS) > 0
    assert whole > 0


@pytest.mark.parametrize("family", ["mixtral", pytest.param("gpt_oss", marks=pytest.mark.slow)])
def test_the_best_subset_is_the_best_of_all(family):
    checkpoint, experts = opened(moe_folder(family))
    cut, record = naee(checkpoint, TEXTS, ONE, experts, 6)
    assert record["search"] == "exhaustive"
    model = loaded(moe_folder(family))
    for layer in experts.running:
        inputs = inputs_of(model, layer.index)
        every = {
            s: real_error(model, layer.index, s, inputs) for s in itertools.combinations(range(EXPERTS), 6)
        }
        assert cut.kept[layer.index] == min(every, key=every.__getitem__)
        assert record["layers"][str(layer.index)]["subsets"] == 28
        with torch.no_grad():
            whole = sum(float(run(block_of(model, layer.index), x).square().sum()) for x in inputs)
        wanted = every[cut.kept[layer.index]] / whole
        assert record["layers"][str(layer.index)]["error"] == pytest.approx(wanted, rel=1e-3)


def test_groups_keep_equally_many():
    checkpoint, experts = opened(moe_folder("deepseek_v3"))
    cut, record = naee(checkpoint, TEXTS, ONE, experts, 4)
    model = loaded(moe_folder("deepseek_v3"))
    for layer in experts.running:
        inputs = inputs_of(model, layer.index)
        halves = list(itertools.combinations(range(4), 2))
        every = {
            (*a, *(e + 4 for e in b)): real_error(model, layer.index, (*a, *(e + 4 for e in b)), inputs) for a in halves for b in halves
        }  # fmt: skip
        assert record["layers"][str(layer.index)]["subsets"] == len(every) == 36
        assert cut.kept[layer.index] == min(every, key=every.__getitem__)


def test_greedy_removes_the_least_missed_one_after_the_other():
    checkpoint, experts = opened(moe_folder("mixtral"))
    cut, record = naee(checkpoint, TEXTS, ONE, experts, 4, search="greedy")
    assert record["search"] == "greedy"
    model = loaded(moe_folder("mixtral"))
    for layer in experts.running:
        inputs = inputs_of(model, layer.index)
        stays = list(range(EXPERTS))
        while len(stays) > 4:
            errors = {e: real_error(model, layer.index, [o for o in stays if o != e], inputs) for e in stays}
            stays.remove(min(errors, key=errors.__getitem__))
        assert cut.kept[layer.index] == tuple(stays)
        assert record["layers"][str(layer.index)]["subsets"] == 8 + 7 + 6 + 5


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3"])
def test_leave_one_out_equals_running_without_each(family):
    checkpoint, experts = opened(moe_folder(family))
    found = leave_one_out(checkpoint, TEXTS, ONE, experts)
    model = loaded(moe_folder(family))
    for layer in experts.running:
        inputs = inputs_of(model, layer.index)
        wanted = [
            real_error(model, layer.index, [o for o in range(EXPERTS) if o != e], inputs)
            for e in range(EXPERTS)
        ]
        np.testing.assert_allclose(
            found[layer.index], np.array(wanted) / sum(map(len, TEXTS)), rtol=1e-4, atol=1e-9
        )
        assert found[layer.index].dtype == np.float64


def test_an_expert_without_tokens_costs_nothing():
    checkpoint, experts = opened(moe_folder("mixtral"))
    text = [TEXTS[0][:2]]  # two tokens, at most four of eight experts
    found = leave_one_out(checkpoint, text, ONE, experts)
    for scores in found.values():
        assert np.isfinite(scores).all() and (scores == 0).sum() >= 4


def test_progressive_looks_at_what_pruned_layers_put_out():
    checkpoint, experts = opened(moe_folder("mixtral"))
    cut, record = naee(checkpoint, TEXTS, ONE, experts, 3, progressive=True)
    plain, _ = naee(checkpoint, TEXTS, ONE, experts, 3)
    assert record["progressive"] and cut.kept[0] == plain.kept[0]
    model = loaded(moe_folder("mixtral"))
    with contextlib.ExitStack() as stack:
        for layer in (0, 1, 2):
            inputs = inputs_of(model, layer)  # with the layers before it masked
            every = {
                s: real_error(model, layer, s, inputs) for s in itertools.combinations(range(EXPERTS), 3)
            }
            assert cut.kept[layer] == min(every, key=every.__getitem__)
            stack.enter_context(masked(model, layer, [e for e in range(EXPERTS) if e not in cut.kept[layer]]))
    # the mask is gone afterwards: the same run again gives the same
    assert naee(checkpoint, TEXTS, ONE, experts, 3, progressive=True) == (cut, record)


def test_batches_padding_and_blocks_do_not_matter(monkeypatch):
    _, wanted = gathered("deepseek_v3", replace(ONE, batch_tokens=1))
    monkeypatch.setattr(subsets, "AT_ONCE", 8 * 32 * 3)
    monkeypatch.setattr(subsets, "TOKENS_AT_ONCE", 5)
    _, found = gathered("deepseek_v3", replace(ONE, batch_tokens=4096))
    for layer, (errors, tokens, whole) in found.items():
        assert tokens == wanted[layer][1] and whole == pytest.approx(wanted[layer][2], rel=1e-5)
        for kept, error in errors.items():
            assert error == pytest.approx(wanted[layer][0][kept], rel=1e-4)


def test_fewer_tokens_are_taken_evenly():
    model = loaded(moe_folder("mixtral"))
    _, found = gathered("mixtral", texts=[TEXTS[1]], most_tokens=8)
    inputs = [x[:, ::3] for x in inputs_of(model, 0, [TEXTS[1]])]  # 23 tokens, every third
    errors, tokens, _ = found[0]
    assert tokens == 8
    for kept, error in list(errors.items())[:4]:
        assert error == pytest.approx(real_error(model, 0, kept, inputs), rel=1e-4)
    _, several = gathered("mixtral", replace(ONE, batch_tokens=1), most_tokens=24)
    assert several[0][1] == 24  # 72 tokens, every third, counted across samples


def test_protected_experts_stay():
    checkpoint, experts = opened(moe_folder("mixtral"))
    plain, _ = naee(checkpoint, TEXTS[:1], ONE, experts, 4)
    loser = next(e for e in range(EXPERTS) if e not in plain.kept[1])
    for search in ("exhaustive", "greedy"):
        cut, _ = naee(checkpoint, TEXTS[:1], ONE, experts, 4, search=search, protected={1: {loser}})
        assert loser in cut.kept[1]


def test_ties_keep_the_lower_numbers():
    class Equal:
        count = 6

        def error(self, kept):
            return 1.0

    assert best(Equal(), 3)[0] == (0, 1, 2)
    assert best(Equal(), 3, search="greedy")[0] == (0, 1, 2)


@pytest.mark.parametrize(("keep", "search", "message"), [
    (10, "exhaustive", "184,756 subsets"), (1, "auto", "a token uses 2"), (21, "auto", "cannot be kept"), (10, "all", "no way to search"),
])  # fmt: skip
def test_what_cannot_be_searched_is_refused_before_the_model_runs(keep, search, message):
    checkpoint, experts = opened(moe_folder("mixtral"))
    with pytest.raises(UsageError, match=message) as caught:
        naee(checkpoint, [], ONE, replace(experts, count=20), keep, search=search)
    assert caught.value.code == "E248"


def test_too_many_protected_are_refused():
    checkpoint, experts = opened(moe_folder("mixtral"))
    with pytest.raises(UsageError, match="protected"):
        naee(checkpoint, TEXTS, ONE, experts, 2, protected={0: {1, 2, 3}})


def test_experts_read_one_at_a_time_are_refused():
    checkpoint, experts = opened(moe_folder("mixtral"))
    with pytest.raises(EnvironmentFault, match="memory limit"):
        naee(checkpoint, TEXTS, replace(ONE, stream_experts=True), experts, 4)


def test_a_router_that_is_elsewhere_is_refused():
    checkpoint, experts = opened(moe_folder("mixtral"))
    record = experts.record.model_copy(
        update={"taps": experts.record.taps.model_copy(update={"router": "mlp.nothing"})}
    )
    with pytest.raises(InputError, match="cannot be repeated") as caught:
        naee(checkpoint, TEXTS, ONE, replace(experts, record=record), 4)
    assert caught.value.code == "E444"


def test_experts_with_weighted_inputs_are_refused():
    checkpoint, experts = opened(moe_folder("llama4_text"))
    with pytest.raises(InputError, match="weighted inputs") as caught:
        leave_one_out(checkpoint, TEXTS, ONE, experts)
    assert caught.value.code == "E444"


def test_it_can_be_stopped():
    checkpoint, experts = opened(moe_folder("mixtral"))
    stop = threading.Event()
    with pytest.raises(Interrupted):
        naee(
            checkpoint,
            TEXTS,
            ONE,
            experts,
            4,
            stop=stop,
            progress=lambda done, total: stop.set() if done == 2 else None,
        )


def test_threads_do_not_change_the_choice():
    checkpoint, experts = opened(moe_folder("mixtral"))
    one, two = (naee(checkpoint, TEXTS, replace(ONE, threads=n), experts, 4) for n in (1, 2))
    assert one[0] == two[0] and one == naee(checkpoint, TEXTS, ONE, experts, 4)
