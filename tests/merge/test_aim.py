"""Activation-informed merging: the damping operation, factors from statistics, and whole models against hooks."""

from __future__ import annotations

import math
import pickle
from dataclasses import replace
from pathlib import Path

import merge_models as mm
import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from surgeon import engine
from surgeon.architectures import get
from surgeon.calibrate.settings import Settings
from surgeon.calibrate.statistics import MeanAbsolute, collect
from surgeon.calibrate.statistics_file import Statistics
from surgeon.checkpoint.checkpoint import open_path
from surgeon.checkpoint.memory import MemoryCheckpoint, MemoryWriter
from surgeon.copying import Copy
from surgeon.errors import InputError, UsageError
from surgeon.kernels import cast, fused
from surgeon.merge import aim, align
from surgeon.merge.combination import Combination, Fixed
from surgeon.merge.methods.dler import Dler, stochastic
from surgeon.merge.methods.linear import Linear
from surgeon.merge.methods.passthrough import Scaled
from surgeon.merge.planner import Options, assemble, draft
from surgeon.merge.request import MergeRequest, resolve
from surgeon.merge.task_vectors import TaskVectors
from surgeon.plan import Block, OutputModel, OutputTensor, Plan, Task, TensorRef, WorkItem, _canonical
from surgeon.seeds import uniform

MODELS = Path(__file__).parents[1] / "models"


def ties(density: float = 0.4, lam: float = 1.0, **changes) -> TaskVectors:
    return replace(
        TaskVectors(
            base=0, others=(1,), weights=(1.0,), densities=(density,), sparsifier="magnitude", elect=True,
            normalize=True, rescale="none", lam=lam, work="F32",
        ),
        **changes,
    )  # fmt: skip


def run(
    operation, inputs: list[np.ndarray], code: str, threads: int = 1, out: str | None = None
) -> np.ndarray:
    """Run one operation over one tensor through the engine; return the stored output's carrier values."""
    if code == "BF16":
        states = [{"x": torch.from_numpy(cast.bf16_bits(x).view(np.int16)).view(torch.bfloat16).view(x.shape)} for x in inputs]  # fmt: skip
    else:
        states = [
            {"x": x.astype({"F16": np.float16, "F32": np.float32, "F64": np.float64}[code])} for x in inputs
        ]
    checkpoints = {f"m{i}": MemoryCheckpoint(f"m{i}", s) for i, s in enumerate(states)}
    output = OutputTensor("x", out or code, inputs[0].shape)
    item = WorkItem(tuple(TensorRef(key, "x") for key in checkpoints), (Task(operation, (output,)),))
    plan = Plan("merge", checkpoints, (item,), {"": OutputModel("", None)}, {})
    writer = MemoryWriter([output], as_torch=True)
    engine.compute(plan, {"": writer}, threads=threads)
    tensor = writer.state()["x"]
    return (tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor).numpy()


def pair(shape, seed=0, scale=0.05):
    rng = np.random.default_rng(seed)
    base = rng.standard_normal(shape).astype(np.float32)
    return base, base + scale * rng.standard_normal(shape).astype(np.float32)


def statistics(**means) -> Statistics:
    values = {name.replace("__", "."): np.asarray(v, float) for name, v in means.items()}
    return Statistics("mean_absolute", values, dict.fromkeys(values, 8))


# ---- factors -----------------------------------------------------------------------------------


def test_channel_factors_are_those_of_the_paper():
    found = aim.channel_factors(np.array([0.0, 1.0, 2.0, 4.0]), 0.4)
    np.testing.assert_allclose(found, [1.0, 0.85, 0.7, 0.4], rtol=1e-7)
    assert found.dtype == np.float32


@given(
    # Smaller numbers would be lost by the scaling itself.
    arrays.arrays(np.float64, st.integers(1, 40), elements=st.just(0.0) | st.floats(1e-200, 1e6)),
    st.floats(0, 1), st.sampled_from([2.0**-20, 3.7, 1e5]),
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_factors_lie_between_omega_and_one_and_only_ratios_count(activations, omega, scale):
    found = aim.channel_factors(activations, omega)
    assert (found <= 1).all() and (found >= np.float32(omega) - np.float32(1e-7)).all()
    np.testing.assert_allclose(aim.channel_factors(activations * scale, omega), found, rtol=1e-6, atol=1e-7)
    if activations.any():
        assert found.min() == pytest.approx(omega, abs=1e-6)


def test_a_module_that_only_saw_zeros_is_not_damped():
    np.testing.assert_array_equal(aim.channel_factors(np.zeros(3), 0.1), np.ones(3))


@pytest.mark.parametrize("omega", [-0.1, 1.01, math.nan])
def test_omega_out_of_range_is_refused(omega):
    with pytest.raises(UsageError) as caught:
        aim.channel_factors(np.ones(2), omega)
    assert caught.value.code == "E232"


@given(st.data())
@settings(max_examples=80, deadline=None)
def test_spread_is_a_slice_of_the_broadcast(data):
    shape = tuple(data.draw(st.lists(st.integers(1, 5), min_size=1, max_size=4)))
    kept = [data.draw(st.booleans()) for _ in shape]
    factors = np.random.default_rng(0).random([n if k else 1 for n, k in zip(shape, kept, strict=True)])
    drop = data.draw(st.integers(0, len(shape)))
    while drop and any(n != 1 for n in factors.shape[:drop]):
        drop -= 1
    short = factors.reshape(factors.shape[drop:])  # leading axes of length 1 may be left out
    whole = np.broadcast_to(factors, shape).reshape(-1)
    start = data.draw(st.integers(0, whole.size))
    stop = data.draw(st.integers(start, whole.size))
    np.testing.assert_array_equal(aim.spread(short, shape, start, stop), whole[start:stop])


# ---- the operation -----------------------------------------------------------------------------


@pytest.mark.parametrize("code", ["F32", "BF16", "F16"])
@pytest.mark.parametrize("compiled", [True, False])
def test_only_damped_channels_move_and_by_the_factor(code, compiled, monkeypatch):
    """One active channel: its column is b + omega (m - b), every other column is the inner merge's bits."""
    monkeypatch.setattr(fused, "_forced", compiled)
    base, tuned = pair((24, 16))
    factors = aim.channel_factors(np.eye(16)[5], 0.25).reshape(1, 16)
    plain = run(ties(), [base, tuned], code)
    found = run(aim.Damped(ties(), 0, factors), [base, tuned], code)
    others = np.arange(16) != 5
    np.testing.assert_array_equal(found[:, others], plain[:, others])
    stored = [cast.widen(cast.narrow(x.reshape(-1), code), code).reshape(x.shape) for x in (base, tuned)]
    merged = run(ties(), stored, "F32")[:, 5]  # not rounded to the output's type
    wanted = stored[0][:, 5] + (merged - stored[0][:, 5]) * np.float32(0.25)
    np.testing.assert_array_equal(
        found[:, 5].view(cast.narrow(wanted, code).dtype), cast.narrow(wanted, code)
    )


OPERATIONS = {
    "ties": ties(),
    "ties in bfloat16": ties(work="BF16"),
    "dare": ties(sparsifier="random", keys=(7,), rescale="inverse_density", elect=False),
    "della": ties(sparsifier="magprune", keys=(7,), epsilons=(0.1,)),
    "linear": Linear((0.5, 0.5), True, "F32"),
    "slerp-like": Combination(Fixed((0.3, 0.7)), (0, 1), None, "F32"),
    "in float64": ties(work="F64"),
}


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("code", ["F32", "BF16"])
@pytest.mark.parametrize("name", OPERATIONS)
def test_factors_of_one_give_the_inner_bits_and_of_zero_the_bases(name, code, compiled, monkeypatch):
    monkeypatch.setattr(fused, "_forced", compiled)
    base, tuned = pair((6, 40), seed=3)
    base[0, 0], base[1, 1] = -0.0, 0.0
    inner = OPERATIONS[name]
    ones, zeros = np.ones((1, 40), np.float32), np.zeros((1, 40), np.float32)
    np.testing.assert_array_equal(
        run(aim.Damped(inner, 0, ones), [base, tuned], code), run(inner, [base, tuned], code)
    )
    kept = run(aim.Damped(inner, 0, zeros), [base, tuned], code)
    stored = cast.narrow(base.reshape(-1), code).reshape(base.shape)
    assert kept.tobytes() == stored.tobytes()


def test_where_the_merge_is_the_base_the_bits_are_the_bases():
    base, _ = pair((8, 8))
    base[2, 3] = -0.0
    factors = np.random.default_rng(1).random((1, 8)).astype(np.float32)
    found = run(aim.Damped(ties(), 0, factors), [base, base], "F32")
    assert found.tobytes() == base.tobytes()


def test_the_partition_into_blocks_does_not_matter():
    base, tuned = pair((37, 29))
    factors = np.random.default_rng(1).random((37, 1)).astype(np.float32)
    operation = aim.Damped(Linear((1.0, 1.0), True, "F32"), 0, factors)
    whole = run(operation, [base, tuned], "F32")
    flat = [x.reshape(-1) for x in (base, tuned)]
    for cut in (1, 7, 29, 58, 333):
        parts = []
        for ordinal, start in enumerate(range(0, flat[0].size, cut)):
            stop = min(start + cut, flat[0].size)
            block = Block(
                "x", base.shape, [x[start:stop] for x in flat], ["F32"] * 2, start, stop, ordinal, 0, "F32"
            )
            parts.extend(operation.map(block, None))
        np.testing.assert_array_equal(np.concatenate(parts).reshape(base.shape), whole)


def test_threads_and_block_borders_do_not_change_bits(monkeypatch):
    monkeypatch.setattr("surgeon.plan.BLOCK_ELEMENTS", 1 << 10)
    base, tuned = pair((61, 53), seed=2)
    factors = np.random.default_rng(2).random((1, 53)).astype(np.float32)
    operation = aim.Damped(ties(0.3), 0, factors)
    found = [run(operation, [base, tuned], "BF16", threads=n) for n in (1, 4)]
    np.testing.assert_array_equal(*found)
    monkeypatch.undo()
    np.testing.assert_array_equal(run(operation, [base, tuned], "BF16"), found[0])


def test_ties_by_hand():
    """The definition, written out in NumPy with a full sort."""
    base, tuned = pair((30, 20), seed=5)
    delta = tuned - base
    kept = int(0.35 * delta.size)
    order = np.argsort(-np.abs(delta).reshape(-1), kind="stable")[:kept]
    mask = np.zeros(delta.size, bool)
    mask[order] = True
    merged = base + np.float32(0.9) * np.where(mask.reshape(delta.shape), delta, np.float32(0))
    activations = np.random.default_rng(6).random(20) * 3
    factors = 1 - activations / activations.max() * (1 - 0.4)
    wanted = base.astype(np.float64) + (merged.astype(np.float64) - base) * factors
    operation = aim.damped(ties(0.35, 0.9), 0, aim.channel_factors(activations, 0.4).reshape(1, 20))
    np.testing.assert_allclose(run(operation, [base, tuned], "F32"), wanted, rtol=3e-7, atol=3e-7)


def test_overflow_is_damped_away_only_where_the_factor_is_zero():
    base, tuned = np.full((1, 4), 6e4, np.float32), np.full((1, 4), -6e4, np.float32)
    huge = Scaled(3e34, "F32")
    zero = aim.Damped(huge, 0, np.zeros((1, 4), np.float32))
    np.testing.assert_array_equal(run(zero, [base, tuned], "F32"), base)
    half = aim.Damped(huge, 0, np.full((1, 4), 0.5, np.float32))
    with pytest.raises(InputError) as caught:
        run(half, [base, tuned], "F32")
    assert caught.value.code == "E322" and "scaled with aim" in caught.value.message


def test_stochastic_rounding_comes_after_damping():
    base, tuned = pair((16, 32), seed=8, scale=0.5)
    base = cast.widen(cast.bf16_bits(base.reshape(-1)), "BF16").reshape(base.shape)
    tuned = cast.widen(cast.bf16_bits(tuned.reshape(-1)), "BF16").reshape(base.shape)
    inner = Dler(
        base=0, others=(1,), weights=(1.0,), densities=(0.5,), sparsifier="magnitude", elect=False, normalize=False,
        rescale="none", lam=0.7, work="F32", report=True, stochastic=True, stored="BF16", rounding_key=11,
    )  # fmt: skip
    factors = np.random.default_rng(9).random((1, 32)).astype(np.float32) * 0.9
    operation = aim.damped(inner, 0, factors)
    exact = run(aim.Damped(replace(inner, stochastic=False), 0, factors), [base, tuned], "F32").reshape(-1)
    wanted = stochastic(exact, "BF16", uniform(11, 0, exact.size))
    found = run(operation, [base, tuned], "BF16").reshape(-1)
    np.testing.assert_array_equal(found.view(np.uint16), wanted)
    assert (found.view(np.uint16) != cast.bf16_bits(exact)).any()


def test_what_has_nothing_to_damp_is_not_wrapped():
    inner, ones = ties(), np.ones((1, 4), np.float32)
    assert aim.damped(inner, 0, None) is inner
    assert aim.damped(inner, 0, ones) is inner
    copy = Copy()
    assert aim.damped(copy, 0, ones * 0.5) is copy
    assert isinstance(aim.damped(inner, 0, ones * 0.5), aim.Damped)


def test_it_can_be_pickled_and_enters_the_plan_id():
    factors = np.linspace(0.5, 0.9, 4, dtype=np.float32)
    row, column = aim.Damped(ties(), 0, factors.reshape(1, 4)), aim.Damped(ties(), 0, factors.reshape(4, 1))
    again = pickle.loads(pickle.dumps(row))
    base, tuned = pair((4, 4))
    np.testing.assert_array_equal(run(again, [base, tuned], "F32"), run(row, [base, tuned], "F32"))
    assert _canonical(again) == _canonical(row)
    changed = [column, aim.Damped(ties(0.5), 0, row.factors), aim.Damped(ties(), 1, row.factors),
               aim.Damped(ties(), 0, row.factors * np.float32(0.5))]  # fmt: skip
    assert len({_canonical(x) for x in (row, *changed)}) == 5


def test_reports_and_passes_are_the_inner_ones():
    inner = replace(ties(sparsifier="outliers"), gammas=(0.1,), rescale="l1")
    operation = aim.Damped(inner, 0, np.full((1, 4), 0.5, np.float32))
    assert operation.reduces() == inner.reduces() == 3
    assert operation.unit == "element"
    assert aim.Damped(OPERATIONS["della"], 0, operation.factors).unit == "row"
    assert operation.scratch > inner.scratch and not operation.copies


# ---- which tensors -----------------------------------------------------------------------------


def shapes_of(family: str, **extra) -> tuple[dict, dict]:
    config = {**mm.FAMILIES[family], "model_type": family, "architectures": ["ForCausalLM"], **extra}
    record = get(family)
    return {n: e.shape for n, e in record.expected(config).items() if e.kind != "buffer"}, config


def means_for(tensors, channels: dict[str, int]) -> Statistics:
    """Statistics for every module: channel counts by the ending of its name, 32 otherwise."""
    rng = np.random.default_rng(0)
    values = {}
    for name, shape in tensors.items():
        module = name.removesuffix(".weight")
        count = next((n for ending, n in channels.items() if module.endswith(ending)), 32)
        values[module] = rng.random(shape[0] if len(shape) == 1 else count) + 0.1
    return Statistics("mean_absolute", values, dict.fromkeys(values, 5))


def test_matrices_and_norms_are_damped_embeddings_and_biases_are_not():
    tensors, config = shapes_of("qwen2")
    found = aim.damping(tensors, config, means_for(tensors, {"down_proj": 48}), 0.4, tied=False)
    untouched = set(tensors) - set(found.factors)
    assert untouched == {"model.embed_tokens.weight"} | {n for n in tensors if n.endswith(".bias")}
    assert found.factors["model.layers.0.mlp.down_proj.weight"].shape == (1, 48)
    assert found.factors["model.norm.weight"].shape == (32,)
    assert found.factors["lm_head.weight"].shape == (1, 32)
    assert not found.unreached and not found.silent


def test_a_tied_head_is_skipped_and_that_is_said():
    tensors, config = shapes_of("qwen2")
    found = aim.damping(tensors, config, means_for(tensors, {"down_proj": 48}), 0.4, tied=True)
    assert "lm_head.weight" not in found.factors
    assert any("output head" in note for note in found.notes())
    assert found.record()["tied_head_skipped"] is True


@pytest.mark.parametrize("known", [True, False])
def test_gpt2_stores_inputs_first_square_matrices_too(known):
    tensors, config = shapes_of("gpt2", tie_word_embeddings=True)
    channels = {"attn.c_proj": 32, "mlp.c_proj": 128}
    found = aim.damping(tensors, config if known else None, means_for(tensors, channels), 0.4, tied=True)
    assert found.factors["transformer.h.0.attn.c_proj.weight"].shape == (32, 1)
    assert found.factors["transformer.h.1.attn.c_attn.weight"].shape == (32, 1)
    assert found.factors["transformer.h.2.mlp.c_proj.weight"].shape == (128, 1)
    assert not [n for n in found.factors if "wte" in n or "wpe" in n or n.endswith("bias")]


def test_fused_experts_have_factors_each_and_unreached_ones_none():
    experts = "model.layers.0.mlp.experts"
    tensors = {f"{experts}.gate_up_proj": (3, 10, 4), f"{experts}.down_proj": (3, 4, 5)}
    means = statistics(**{
        f"{experts}.0.gate_proj": [1, 2, 4, 0], f"{experts}.2.up_proj": [4, 0, 0, 1],
        f"{experts}.0.down_proj": [0, 0, 0, 0, 0], f"{experts}.2.down_proj": [1, 1, 1, 1, 2],
    })  # fmt: skip
    found = aim.damping(tensors, None, means, 0.5, tied=False)
    inner, outer = (found.factors[n] for n in tensors)
    np.testing.assert_allclose(inner[:, 0], [[0.875, 0.75, 0.5, 1], [1, 1, 1, 1], [0.5, 1, 1, 0.875]])
    np.testing.assert_allclose(outer[:, 0], [[1] * 5, [1] * 5, [0.75, 0.75, 0.75, 0.75, 0.5]])
    assert inner.shape == (3, 1, 4) and outer.shape == (3, 1, 5)
    assert found.unreached == (f"{experts}.1.down_proj", f"{experts}.1.gate_proj")
    assert found.silent == (f"{experts}.0.down_proj",)


@pytest.mark.parametrize("width", [32, 16])  # 32: the stacks are cubes in both axes, only the record knows
def test_gpt_oss_stores_experts_transposed(width):
    config = {
        "model_type": "gpt_oss", "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "head_dim": 8,
        "num_key_value_heads": 2, "intermediate_size": width, "vocab_size": 20, "num_local_experts": 2,
    }  # fmt: skip
    record = get("gpt_oss")
    tensors = {n: e.shape for n, e in record.expected(config).items() if e.shape and not e.optional}
    experts = "model.layers.0.mlp.experts"
    means = {f"{experts}.{e}.{leaf}": np.arange(1, 1 + size) for e in range(2)
             for leaf, size in (("gate_proj", 32), ("up_proj", 32), ("down_proj", width))}  # fmt: skip
    found = aim.damping(tensors, config, statistics(**means), 0.4, tied=False)
    assert found.factors[f"{experts}.gate_up_proj"].shape == (2, 32, 1)
    assert found.factors[f"{experts}.down_proj"].shape == (2, width, 1)
    assert not [n for n in found.factors if "bias" in n or "sinks" in n]


def test_statistics_of_another_model_are_refused():
    tensors, config = shapes_of("qwen2")
    for means, code in (
        (statistics(other__layer=[1.0]), "E355"),
        (statistics(**{"model__layers__0__mlp__up_proj": np.ones(31)}), "E355"),
        (replace(means_for(tensors, {"down_proj": 48}), kind="channel_norms"), "E355"),
    ):
        with pytest.raises(InputError) as caught:
            aim.damping(tensors, config, means, 0.4, tied=False)
        assert caught.value.code == code


def test_omega_one_damps_nothing():
    tensors, config = shapes_of("qwen2")
    assert not aim.damping(tensors, config, means_for(tensors, {"down_proj": 48}), 1.0, tied=False).factors


def test_the_checkpoints_of_the_repository_have_no_unmapped_tensor():
    base = open_path(MODELS / "base")
    tensors = {n: t.shape for n, t in base.tensors.items()}
    found = aim.damping(tensors, base.config, means_for(tensors, {"down_proj": 432, "": 160}), 0.4, tied=True)
    assert set(tensors) - set(found.factors) == {"model.embed_tokens.weight"} | {n for n in tensors if n.endswith("bias")}  # fmt: skip


# ---- whole models ------------------------------------------------------------------------------


def planned(folders: list[Path], **options):
    """Return a drafted merge of folders (the last is the base), its inputs by key, and the base's key."""
    names = [str(f) for f in folders]
    resolved = resolve(MergeRequest(models=tuple(names), base=names[-1], **options))
    keys = {ref: f"model-{i}" for i, ref in enumerate(resolved.spec.models())}
    opened = {ref: open_path(Path(ref.path)) for ref in keys}
    drafted = draft(resolved.spec, opened, keys, Options(), align.Findings())
    return drafted, keys[resolved.spec.base_model]


def computed(drafted, items) -> dict[str, np.ndarray]:
    plan = replace(assemble(drafted, {"": OutputModel("", None)}, {}), items=tuple(items))
    writer = MemoryWriter(plan.outputs()[""], as_torch=True)
    engine.compute(plan, {"": writer}, threads=2)
    return {name: tensor.float().numpy() for name, tensor in writer.state().items()}


def hooked_means(model, samples) -> dict[str, np.ndarray]:
    """Mean |x| of each input channel by forward hooks on the stock model; fused experts from the router's choices."""
    rows: dict[str, list[np.ndarray]] = {}

    def note(name, x):
        rows.setdefault(name, []).append(np.abs(x.detach().double().reshape(-1, x.shape[-1]).numpy()))

    def experts_hook(name):
        def hook(module, args, output):
            hidden, chosen, _ = args
            for expert in range(module.num_experts):
                x = hidden[(chosen == expert).any(-1)]
                if len(x):
                    gate, up = (x @ module.gate_up_proj[expert].T).chunk(2, -1)
                    for leaf, value in (
                        ("gate_proj", x),
                        ("up_proj", x),
                        ("down_proj", module.act_fn(gate) * up),
                    ):
                        note(f"{name}.{expert}.{leaf}", value)

        return hook

    handles = []
    for name, module in model.named_modules():
        if name.endswith(".experts"):
            handles.append(module.register_forward_hook(experts_hook(name)))
        elif hasattr(module, "weight") and not isinstance(module, torch.nn.Embedding):
            handles.append(module.register_forward_hook(lambda m, args, out, name=name: note(name, args[0])))
    with torch.no_grad():
        for ids in samples:
            model(input_ids=torch.from_numpy(ids)[None])
    for handle in handles:
        handle.remove()
    return {name: np.concatenate(parts).mean(0) for name, parts in rows.items()}


@pytest.mark.parametrize("kind", ["qwen2 of the repository", "gpt2", "qwen3_moe"])
def test_a_damped_merge_of_whole_models_by_hand(kind):
    """Everything at once: statistics by the streamed walk, factors, ties, engine; against hooks and NumPy."""
    omega, rng = 0.4, np.random.default_rng(0)
    folders = (
        [MODELS / "long", MODELS / "base"] if "repository" in kind else mm.family(kind, "float32")[1::-1]
    )
    samples = [rng.integers(3, mm.ROWS, n) for n in (12, 5, 9)]
    base = open_path(folders[-1])
    tied = kind != "qwen3_moe"
    drafted, key = planned(folders, method="ties", density=(0.3,), dtype="float32")
    means = collect(base, samples, Settings(), MeanAbsolute())
    shapes = {n: t.shape for n, t in base.tensors.items()}
    found = aim.damping(shapes, base.config, means, omega, tied=tied)
    items, lacking = aim.damp_items(drafted.items, key, found)
    assert not lacking and not found.silent
    plain, result = computed(drafted, drafted.items), computed(drafted, items)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folders[-1], dtype=torch.float32, experts_implementation="eager"
    ).eval()
    wanted_means = hooked_means(model, samples)
    before = {n: base_tensor(base, n) for n in shapes}
    checked = set()
    for name, y in result.items():
        module = name.removesuffix(".weight")
        if module in wanted_means and not (tied and module == "lm_head"):
            a = wanted_means[module]
            f = 1 - a / a.max() * (1 - omega)
            transposed = kind == "gpt2" and y.ndim == 2
            f = f[:, None] if transposed else f
            wanted = before[name] + (plain[name] - before[name]) * f
            np.testing.assert_allclose(y, wanted, rtol=1e-5, atol=1e-7, err_msg=name)
            if (plain[name] != before[name]).any():
                assert (y != plain[name]).any(), name
            checked.add(name)
        else:
            np.testing.assert_array_equal(y, plain[name], err_msg=name)
    untouched = set(result) - checked
    assert all(
        "embed" in n or n.endswith("bias") or "wte" in n or "wpe" in n or "experts" in n for n in untouched
    )
    assert {n.removesuffix(".weight") for n in untouched if "experts" in n} <= set(found.unreached)
    assert {n.removesuffix(".weight") for n in checked} == set(wanted_means) - (
        {"lm_head"} if tied else set()
    )


def base_tensor(checkpoint, name: str) -> np.ndarray:
    info = checkpoint.tensors[name]
    return cast.widen(checkpoint.read(name, 0, info.elements), info.dtype).reshape(info.shape)


def test_omega_one_is_the_merge_bit_for_bit():
    folders = [MODELS / "long", MODELS / "base"]
    base = open_path(folders[-1])
    drafted, key = planned(folders, method="ties", density=(0.3,))
    shapes = {n: t.shape for n, t in base.tensors.items()}
    means = means_for(shapes, {"down_proj": 432, "": 160})
    items, _ = aim.damp_items(drafted.items, key, aim.damping(shapes, base.config, means, 1.0, tied=True))
    assert items == drafted.items
    explicit = [  # the operation itself, with factors of exactly 1
        replace(i, tasks=tuple(replace(t, operation=aim.Damped(t.operation, 1, np.ones(i.tasks[0].outputs[0].shape[-1:], np.float32))) for t in i.tasks))
        for i in items
    ]  # fmt: skip
    for name, value in computed(drafted, explicit).items():
        np.testing.assert_array_equal(value, computed(drafted, drafted.items)[name])
        break


def test_one_active_channel_in_a_whole_model_moves_one_column():
    folders = mm.family("llama", "float32")[1::-1]
    base = open_path(folders[-1])
    drafted, key = planned(folders, method="task_arithmetic", **{"lambda": 0.7})
    shapes = {n: t.shape for n, t in base.tensors.items()}
    name = "model.layers.1.self_attn.o_proj.weight"
    found = aim.damping(
        shapes, base.config, statistics(**{name.removesuffix(".weight"): np.eye(32)[7]}), 0.25, tied=False
    )
    items, _ = aim.damp_items(drafted.items, key, found)
    plain, result = computed(drafted, drafted.items), computed(drafted, items)
    b = base_tensor(base, name)
    np.testing.assert_allclose(result[name][:, 7], b[:, 7] + 0.25 * (plain[name][:, 7] - b[:, 7]), rtol=1e-6)
    plain[name][:, 7] = result[name][:, 7]
    for other, value in plain.items():
        np.testing.assert_array_equal(result[other], value)
    assert len(found.unreached) == len([n for n in shapes if "embed" not in n]) - 1


def test_fused_storage_is_damped_as_the_single_experts_are(tmp_path):
    """The same weights stored per expert and stacked give the same numbers."""
    folders = mm.family("qwen3_moe", "float32")[1::-1]
    for folder in folders:
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        model.save_pretrained(tmp_path / folder.name, save_original_format=False)
    samples = [np.random.default_rng(1).integers(3, mm.ROWS, 6)]
    results = []
    for chosen in (folders, [tmp_path / f.name for f in folders]):
        base = open_path(chosen[-1])
        drafted, key = planned(chosen, method="task_arithmetic", **{"lambda": 0.7})
        means = collect(base, samples, Settings(), MeanAbsolute())
        shapes = {n: t.shape for n, t in base.tensors.items()}
        found = aim.damping(shapes, base.config, means, 0.3, tied=False)
        results.append(computed(drafted, aim.damp_items(drafted.items, key, found)[0]))
    single, fused_ = results
    fused_names = [n for n in fused_ if n.endswith(("gate_up_proj", "down_proj"))]
    assert len(fused_names) == 4
    for name in fused_names:
        for expert in range(4):
            parts = ("gate_proj", "up_proj") if name.endswith("gate_up_proj") else ("down_proj",)
            place = f"{name.rpartition('.')[0]}.{expert}"
            wanted = np.concatenate([single[f"{place}.{part}.weight"] for part in parts])
            np.testing.assert_allclose(fused_[name][expert], wanted, rtol=1e-6, atol=1e-7)


def test_a_head_that_the_base_ties_is_damped_by_its_own_factors():
    head, embedding = "lm_head.weight", "model.embed_tokens.weight"
    damping = aim.Damping(0.5, {head: np.full((1, 4), 0.5, np.float32)})
    items = [
        WorkItem((TensorRef("long", out), TensorRef("base", embedding)), (Task(ties(base=1, others=(0,)), (OutputTensor(out, "F32", (6, 4)),)),))
        for out in (head, embedding)
    ]  # fmt: skip
    (first, second), _ = aim.damp_items(items, "base", damping)
    assert isinstance(first.tasks[0].operation, aim.Damped) and first.tasks[0].operation.base == 1
    assert second is not None and isinstance(second.tasks[0].operation, TaskVectors)


def test_a_sweep_over_omega_and_tensors_without_the_base():
    tensor = "model.norm.weight"
    by_point = {"a": aim.Damping(0.5, {tensor: np.full(4, 0.5, np.float32)}), "b": aim.Damping(1.0, {})}
    tasks = tuple(
        Task(Linear((1.0, 1.0), True, "F32"), (OutputTensor(tensor, "F32", (4,), key),)) for key in by_point
    )
    items = [
        WorkItem((TensorRef("base", tensor), TensorRef("long", tensor)), tasks),
        WorkItem((TensorRef("long", tensor),), tasks),
    ]
    (both, alone), lacking = aim.damp_items(items, "base", by_point)
    assert [isinstance(t.operation, aim.Damped) for t in both.tasks] == [True, False]
    assert alone == items[1] and lacking == [tensor]
