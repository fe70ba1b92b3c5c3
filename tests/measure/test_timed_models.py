"""What is run when a model is timed: real models, a clock that only counts."""

from __future__ import annotations

import inspect
import itertools
from pathlib import Path

import pytest
import torch

from surgeon.deploy.build import build, load
from surgeon.errors import EnvironmentFault, UsageError
from surgeon.measure.compare import Measured, accepts, generates, speed, speedup, stored_dtype, verdict
from surgeon.measure.conditions import Conditions
from surgeon.measure.differencing import Levels, measure_table
from surgeon.measure.environment import Environment, processor
from surgeon.measure.memory import peak
from surgeon.measure.models import RandomModels, Variant, random_model
from surgeon.measure.runner import Runner
from surgeon.measure.table import LatencyTable
from surgeon.measure.workload import Workload
from surgeon.structure.cut import LayerShape
from surgeon.structure.parts import Attention, Ffn, Output, Section, Structure

LONG = Path(__file__).parents[1] / "models" / "long"
QUICK = Conditions(threads=1, repeat=3, dtype="float32")
SHORT = Workload("mix", batch=2, context=6, generate=20)
LLAMA = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 64, "intermediate_size": 128, "head_dim": 16,
    "num_hidden_layers": 6, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 90, "rms_norm_eps": 1e-6,
    "max_position_embeddings": 256, "tie_word_embeddings": False, "dtype": "float32", "hidden_act": "silu",
}  # fmt: skip
BERT = {
    "model_type": "bert", "architectures": ["BertForMaskedLM"], "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3,
    "num_attention_heads": 2, "vocab_size": 50, "max_position_embeddings": 64, "type_vocab_size": 2,
}  # fmt: skip


def structure(config: dict) -> Structure:
    heads, width, layers = (
        config["num_attention_heads"],
        config["intermediate_size"],
        config["num_hidden_layers"],
    )
    groups, size = (
        config.get("num_key_value_heads", heads),
        config.get("head_dim", config["hidden_size"] // heads),
    )
    attention, ffn = [], []
    for i in range(layers):
        queries = (Section(f"model.layers.{i}.self_attn.q_proj.weight", 0, 0, heads * size, heads),)
        keys = (Section(f"model.layers.{i}.self_attn.k_proj.weight", 0, 0, groups * size, groups),)
        output = Output(f"model.layers.{i}.self_attn.o_proj.weight", 1, None)
        attention.append(Attention(i, heads, groups, size, output, queries, keys))
        up = (Section(f"model.layers.{i}.mlp.up_proj.weight", 0, 0, width, width),)
        ffn.append(Ffn(i, width, Output(f"model.layers.{i}.mlp.down_proj.weight", 1, None), up))
    return Structure(
        config["model_type"], "model.layers.", tuple(attention), tuple(ffn), config["hidden_size"]
    )


def counting():
    ticks = itertools.count()
    return lambda: float(next(ticks))


class Calls:
    """Notes what a model is called with, and lets a clock advance by the tokens it computes."""

    def __init__(self, model) -> None:
        self.seen: list[tuple[int, int, int]] = []
        self.time = 0.0
        inner, signature = model.forward, inspect.signature(model.forward)

        def forward(*args, **kwargs):
            cache = kwargs.get("past_key_values")
            before = cache.get_seq_length() if cache is not None else 0
            result = inner(*args, **kwargs)
            rows, columns = kwargs["input_ids"].shape
            self.seen.append((rows, columns, before))
            self.time += columns
            self.logits = result.logits
            return result

        forward.__signature__ = signature  # type: ignore[attr-defined]
        model.forward = forward


@pytest.mark.parametrize("window", [None, 8])
def test_a_sample_is_a_prefill_and_steps_with_a_cache_that_grows(window):
    config = {
        **LLAMA,
        "model_type": "mistral",
        "architectures": ["MistralForCausalLM"],
        "sliding_window": window,
    }
    model = build(config, dtype=torch.float32)
    calls = Calls(model)
    runner = Runner(model, SHORT, lambda: calls.time)
    steps = [(2, 1, 8 + i) for i in range(16)]  # 16 of 20 steps, around the middle length
    assert runner() == pytest.approx(6 + 20 * 1)  # a tick a token: prefill of 6, 20 steps
    assert calls.seen == [(2, 6, 0), (2, 8, 0), *steps]  # the cache is filled once, beside the clock
    assert calls.logits.shape[1] == 1
    first = calls.logits
    runner()
    assert calls.seen[18:] == [(2, 6, 0), *steps] and torch.equal(
        calls.logits, first
    )  # nothing of it was used up
    assert runner.prefills == [6.0, 6.0] and runner.steps == [1.0, 1.0]


def test_steps_compute_what_a_forward_over_everything_computes():
    model = build(LLAMA, dtype=torch.float32)
    calls = Calls(model)
    runner = Runner(model, Workload("decode", 1, 6, 20), counting())
    runner()
    with torch.inference_mode():
        whole = model(input_ids=runner.ids[:, :24]).logits[:, -1:]
    calls.seen.clear()
    runner()
    assert torch.allclose(calls.logits, whole, atol=1e-5)


def test_prefill_alone_and_encoders():
    model = build(LLAMA, dtype=torch.float32)
    calls = Calls(model)
    Runner(model, Workload("prefill", 3, 5), counting())()
    assert calls.seen == [(3, 5, 0)] and calls.logits.shape == (3, 1, 90)
    encoder = build(BERT, dtype=torch.float32)
    seen = Calls(encoder)
    Runner(encoder, Workload("prefill", 2, 7), counting())()
    assert seen.seen == [(2, 7, 0)] and seen.logits.shape == (2, 7, 50)
    with pytest.raises(UsageError, match="encoder"):
        Runner(encoder, Workload("mix"), counting())


def test_threads_are_restored_and_the_clock_fits():
    before = torch.get_num_threads()
    with Conditions(threads=before + 1).in_force():
        assert torch.get_num_threads() == before + 1
    assert torch.get_num_threads() == before
    assert Conditions(threads=1).clock()[0] == "CPU time of the thread"
    assert Conditions(threads=2).clock()[0] == "wall clock"


@pytest.mark.parametrize(
    "bad",
    [
        {"dtype": "int8"},
        {"device": "tpu"},
        {"precision": 0},
        {"time_limit": 0},
        {"threads": 0},
        {"repeat": 2},
    ],
)
def test_impossible_conditions_are_refused(bad):
    with pytest.raises(UsageError) as caught:
        Conditions(**bad)
    assert caught.value.code == "E281"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_missing_gpu_is_said():
    assert Conditions(device="auto").place == "cpu"
    with pytest.raises(EnvironmentFault) as caught:
        _ = Conditions(device="cuda").place
    assert caught.value.code == "E518"


def test_environment_names_this_machine():
    here = Environment.here(QUICK, dtype="float32", attention="sdpa")
    assert here.torch == torch.__version__ and here.threads == 1 and here.device_name == processor() != ""
    other = Environment.here(Conditions(threads=2), dtype="bfloat16", attention="sdpa")
    assert [d.split()[0] for d in here.differences(other)] == ["threads", "dtype", "clock"]
    here.check(Environment.from_document(here.document()), "it")


# ---- models of random weights ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "shape",
    [
        LayerShape(4, 2, 16, 128),
        LayerShape(2, 1, 16, 96),
        LayerShape(2, 2, 16, 128),
        LayerShape(0, 0, 0, 128),
        LayerShape(4, 2, 16, 0),
    ],
)
def test_variants_have_the_shapes_and_run(shape):
    models = RandomModels(LLAMA, structure(LLAMA), SHORT, QUICK)
    assert models.attention == "sdpa" and models.dtype == "float32"  # known before anything is built
    dense, runner = models.sample(Variant(models.deep, models.full)), models.sample(Variant(3, shape))
    layers = runner.model.model.layers
    assert len(layers) == 3
    for layer in layers:
        weights = dict(layer.named_parameters())
        assert weights.get("self_attn.q_proj.weight", torch.empty(0, 64)).shape == (16 * shape.heads, 64)
        assert weights.get("self_attn.k_proj.weight", torch.empty(0, 64)).shape == (16 * shape.groups, 64)
        assert weights.get("mlp.up_proj.weight", torch.empty(0, 64)).shape == (shape.ffn, 64)
    assert runner.model.get_input_embeddings() is dense.model.get_input_embeddings()
    assert runner.model.get_output_embeddings() is dense.model.get_output_embeddings()
    for name, parameter in runner.model.named_parameters():
        assert parameter.isfinite().all() and (parameter.abs() > 1e-30).float().mean() > 0.99, name
    assert runner() > 0
    with torch.inference_mode():
        assert runner.model(input_ids=runner.ids).logits.isfinite().all()


def test_another_attention_implementation_is_used_and_recorded():
    models = RandomModels(LLAMA, structure(LLAMA), SHORT, Conditions(threads=1, repeat=3, attention="eager"))
    assert models.attention == "eager"
    assert models.sample(Variant(2, models.full)).model.config._attn_implementation == "eager"


def test_heads_that_do_not_divide_the_width_are_built_all_the_same():
    config = {**LLAMA, "hidden_size": 64, "num_attention_heads": 8, "num_key_value_heads": 8, "head_dim": 8}
    models = RandomModels(config, structure(config), SHORT, QUICK)
    runner = models.sample(
        Variant(2, LayerShape(3, 3, 8, 128))
    )  # the stock llama class refuses 3 heads of 64
    assert runner.model.model.layers[0].self_attn.q_proj.weight.shape == (24, 64)


def test_depth_follows_the_memory():
    wide = {**LLAMA, "hidden_size": 1024, "intermediate_size": 16384, "num_hidden_layers": 9}
    layer = 4 * (2 * 64 * 1024 + 2 * 32 * 1024 + 3 * 16384 * 1024)  # a fifth of 1 GB

    def depth(limit: int) -> RandomModels:
        return RandomModels(wide, structure(wide), SHORT, Conditions(dtype="float32", memory_limit=limit))

    assert (depth(40 * layer).deep, depth(40 * layer).short) == (4, 2)
    assert depth(13 * layer).deep == 4 and depth(13 * layer).room() == 1 < depth(40 * layer).room()
    assert (depth(7 * layer).deep, depth(7 * layer).short) == (2, 1)
    with pytest.raises(EnvironmentFault) as caught:
        depth(4 * layer)
    assert caught.value.code == "E517"
    assert (
        RandomModels(LLAMA, structure(LLAMA), SHORT, QUICK).deep == 6
    )  # small models would fit into a cache at 4 layers


def test_one_layer_has_no_difference():
    single = {**LLAMA, "num_hidden_layers": 1}
    with pytest.raises(UsageError) as caught:
        RandomModels(single, structure(single), SHORT, QUICK)
    assert caught.value.code == "E284"


def test_a_table_of_a_real_model_is_whole_and_saved(tmp_path):
    found = structure(LLAMA)
    table = measure_table(LLAMA, found, SHORT, Levels.of(found, multiple=32), QUICK)
    assert set(table.attention) == {(4, 2), (2, 1), (0, 0)} and set(table.ffn) == {128, 96, 64, 32, 0}
    assert table.dense > 0 and table.environment.attention == "sdpa" and table.environment.dtype == "float32"
    assert table.timed_layers == 6
    table.save(tmp_path / "t.json")
    here = Environment.here(QUICK, dtype="float32", attention="sdpa")
    assert LatencyTable.load(tmp_path / "t.json", here, LLAMA, workload=SHORT) == table


def test_what_no_class_holds_is_left_out_of_an_encoders_table():
    found = structure(BERT)
    work = Workload("prefill", 1, 16)
    table = measure_table(BERT, found, work, Levels.of(found, multiple=16), QUICK)
    assert set(table.attention) == {(2, 2)} and set(table.ffn) == {64, 48, 32, 16}
    assert "1 heads with 1 key/value heads" in table.notes[0] and "an FFN of 0 channels" in table.notes[0]


# ---- models on disk ----------------------------------------------------------------------------------


def test_two_models_from_disk_are_timed_in_turns():
    found = speedup(LONG, LONG, SHORT, Conditions(threads=1, repeat=5))
    assert found.pairs == 5 and 0 < found.low <= found.ratio <= found.high
    assert found.environment.dtype == "bfloat16" == stored_dtype(LONG)
    assert set(found.parts) == {"prefill", "decode"} and all(
        s > 0 for pair in found.parts.values() for s in pair
    )
    assert SHORT.sentence() in found.sentence() and "interval" in found.sentence()
    assert generates(LONG)


def test_one_model_from_disk_has_its_own_times():
    found = speed(LONG, Workload("decode", 1, 6, 4), Conditions(threads=1, repeat=4, dtype="float32"))
    assert found.prefill is None and found.decode is not None and found.decode.count == 4
    assert found.seconds.value == pytest.approx(4 * found.decode.value)


def test_both_models_must_fit_into_memory():
    with pytest.raises(EnvironmentFault) as caught:
        speedup(LONG, LONG, SHORT, Conditions(threads=1, memory_limit=4 << 20))
    assert caught.value.code == "E517" and "both models" in caught.value.message


def _measured(ratio: float, half: float) -> Measured:
    here = Environment.here(QUICK, dtype="float32", attention="sdpa")
    return Measured(
        ratio, ratio - half, ratio + half, 9, ratio, 1.0, half / ratio <= 0.01, 0.01, SHORT, here, {}
    )


@pytest.mark.parametrize(
    ("ratio", "half", "expected"),
    [(1.5, 0.005, "met"), (1.45, 0.005, "too slow"), (1.45, 0.006, "met"), (1.55, 0.004, "too fast"), (1.55, 0.006, "met"),
     (1.5, 0.2, "not measurable"), (1.0, 0.6, "not measurable"), (2.0, 0.2, "too fast"), (1.2, 0.2, "too slow")],
)  # fmt: skip
def test_a_target_is_met_when_the_interval_meets_the_band(ratio, half, expected):
    found = _measured(ratio, half)
    assert verdict(found, 1.5) == expected
    assert accepts(found, 1.5) == (expected == "met")
    assert ("not measurable" in found.sentence()) == (half / ratio > 0.01)


def test_peak_memory_in_a_process_of_its_own():
    found = peak(LONG, Workload("mix", 1, 8, 4), Conditions(threads=1))
    assert 50 << 20 < found.libraries <= found.load <= found.prefill <= (found.decode or 0) == found.total
    weights = sum(p.numel() * p.element_size() for p in load(LONG).parameters())
    assert found.weights == weights and found.device is None


@pytest.mark.slow
def test_peak_memory_of_what_does_not_load_is_that_refusal(tmp_path):
    (tmp_path / "config.json").write_text((LONG / "config.json").read_text())
    with pytest.raises(Exception) as caught:
        peak(tmp_path, Workload("mix", 1, 8, 4), Conditions(threads=1, dtype="float32"))
    assert getattr(caught.value, "exit_code", None) == 3


def test_random_weights_are_cheap_and_varied():
    model = random_model(LLAMA, torch.float32, QUICK)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2:
            assert 0.015 < float(parameter.detach().std()) < 0.025, name
