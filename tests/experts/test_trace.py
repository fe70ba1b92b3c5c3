"""The routing trace on disk: what it holds, how it grows, what is refused."""

from __future__ import annotations

import dataclasses
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent))
import routing_oracle as oracle
from expert_models import EXPERTS, moe_folder

from surgeon.calibrate.data import Sample
from surgeon.calibrate.routing import route
from surgeon.calibrate.settings import Settings
from surgeon.checkpoint.checkpoint import open_path
from surgeon.errors import EnvironmentFault, InputError, Interrupted
from surgeon.experts.statistics import collect_statistics
from surgeon.experts.trace import Trace, TraceWriter
from surgeon.structure.experts.find import experts_of

LENGTHS = (13, 14, 14, 5, 9)
BATCHED = Settings(threads=1, batch_tokens=64)


def texts(lengths=LENGTHS):
    drawn = np.random.default_rng(3)
    return [drawn.integers(3, 67, length) for length in lengths]


def written(path, family="qwen2_moe", settings=BATCHED, storage="hub", samples=None, **options):
    checkpoint = open_path(moe_folder(family, storage=storage))
    samples = texts() if samples is None else samples
    experts = experts_of(checkpoint)
    writer = TraceWriter(path, checkpoint, samples, settings, experts, **options)
    route(checkpoint, samples, settings, writer, experts=experts)
    assert writer.finish() == path
    return Trace.open(path, checkpoint)


@pytest.mark.parametrize("family", ["qwen2_moe", "deepseek_v3"])
def test_holds_what_was_routed(tmp_path, family):
    trace = written(tmp_path / "trace.safetensors", family, logits=True, about={"name": "words"})
    samples = texts()
    assert trace.offsets.tolist() == [0, *np.cumsum(LENGTHS)] and trace.samples == len(LENGTHS)
    assert trace.tokens.tolist() == np.concatenate(samples).tolist() and trace.tokens.dtype == np.int32
    assert trace.record["data"] == {"name": "words"} and trace.top_k == 2
    wanted = oracle.routing(family, samples)
    assert trace.layers == tuple(wanted[0]) and set(trace.experts.values()) == {EXPERTS}
    for layer in trace.layers:
        ids, weights, norms, logits = (
            trace.ids(layer),
            trace.weights(layer),
            trace.norms(layer),
            trace.logits(layer),
        )
        assert (ids.dtype, weights.dtype, norms.dtype, logits.dtype) == (
            np.uint16,
            np.float32,
            np.float32,
            np.float16,
        )
        choices = [choice for layers in wanted for choice in layers[layer]]
        assert len(choices) == len(ids) == sum(LENGTHS)
        for row, choice in enumerate(choices):
            found = dict(zip(ids[row].tolist(), zip(weights[row], norms[row], strict=True), strict=True))
            assert found.keys() == choice.chosen.keys()
            for expert, (weight, norm) in found.items():
                assert weight == pytest.approx(choice.chosen[expert], rel=1e-5)
                assert norm == pytest.approx(choice.norms[expert], rel=1e-5)
            np.testing.assert_allclose(logits[row], choice.logits, rtol=1e-3, atol=1e-3)
    trace.verify()
    from safetensors.numpy import load_file

    assert set(load_file(trace.path)) == {"offsets", "tokens"} | {
        f"{layer}.{name}" for layer in trace.layers for name in ("ids", "weights", "norms", "logits")
    }


def content(trace):
    return {
        (layer, name): getattr(trace, name)(layer)
        for layer in trace.layers
        for name in ("ids", "weights", "norms")
    }


def test_storage_and_streaming_change_no_bit_and_batches_next_to_nothing(tmp_path):
    whole = content(written(tmp_path / "a"))
    streamed = dataclasses.replace(BATCHED, stream_experts=True)
    for number, other in enumerate(
        (written(tmp_path / "b", storage="fused"), written(tmp_path / "c", settings=streamed))
    ):
        assert all(np.array_equal(value, whole[key]) for key, value in content(other).items()), number
    alone = content(written(tmp_path / "d", settings=dataclasses.replace(BATCHED, batch_tokens=1)))
    for key, value in alone.items():
        if key[1] == "ids":
            assert np.array_equal(value, whole[key])
        else:
            np.testing.assert_allclose(value, whole[key], rtol=1e-5, atol=1e-6)


def test_equal_runs_give_equal_bytes(tmp_path):
    written(tmp_path / "one")
    written(tmp_path / "two")
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "two"]


def test_is_written_beside_statistics_in_one_pass(tmp_path):
    checkpoint = open_path(moe_folder("qwen2_moe"))
    experts = experts_of(checkpoint)
    writer = TraceWriter(tmp_path / "trace", checkpoint, texts(), BATCHED, experts)
    samples = [Sample(ids, 0) for ids in texts()]
    found = collect_statistics(checkpoint, samples, BATCHED, experts, also=[writer])
    writer.finish()
    trace = Trace.open(tmp_path / "trace")
    for layer in trace.layers:
        one = found.total(layer)
        ids = trace.ids(layer).reshape(-1)
        assert np.bincount(ids, minlength=EXPERTS).tolist() == one.tokens.tolist()
        products = (trace.weights(layer) * trace.norms(layer)).reshape(-1)
        np.testing.assert_allclose(np.bincount(ids, products, EXPERTS), one.gated, rtol=1e-6)
    with pytest.raises(InputError) as caught:
        trace.logits(0)
    assert caught.value.code == "E431"


def start(path, spill, stop_at=None, resume=False):
    """Run a pass with a spill folder; return its writer and the stages that ran."""
    checkpoint = open_path(moe_folder("qwen2_moe"))
    experts = experts_of(checkpoint)
    settings = dataclasses.replace(BATCHED, spill=spill)
    writer = TraceWriter(path, checkpoint, texts(), settings, experts)
    stop, stages = threading.Event(), []

    def progress(done, total):
        stages.append(done)
        if done == stop_at:
            stop.set()

    try:
        route(
            checkpoint,
            texts(),
            settings,
            writer,
            experts=experts,
            progress=progress,
            stop=stop,
            resume=resume,
        )
    except Interrupted:
        writer.close()
    return writer, stages


@pytest.mark.parametrize("damage", [False, True])
def test_an_interrupted_trace_is_continued_or_not_believed(tmp_path, damage):
    written(tmp_path / "whole")
    path = tmp_path / "trace"
    writer, stages = start(path, tmp_path / "spill", stop_at=3)
    assert stages == [1, 2, 3] and not path.exists()
    partial = next(tmp_path.glob(".trace.*.partial"))
    with pytest.raises(InputError):
        Trace.open(partial)  # the header is not there yet
    if damage:
        raw = bytearray(partial.read_bytes())
        raw[writer._places["0.weights"] + 5] ^= 1
        partial.write_bytes(raw)
    writer, stages = start(path, tmp_path / "spill", resume=True)
    assert stages == ([1, 2, 3, 4, 5] if damage else [4, 5])
    writer.finish()
    assert path.read_bytes() == (tmp_path / "whole").read_bytes() and not list(tmp_path.glob(".trace.*"))


def test_what_was_not_finished_can_be_thrown_away(tmp_path):
    checkpoint = open_path(moe_folder("qwen2_moe"))
    writer = TraceWriter(tmp_path / "trace", checkpoint, texts(), BATCHED, experts_of(checkpoint))
    with pytest.raises(RuntimeError, match="were not run"):
        writer.finish()
    writer.discard()
    assert not list(tmp_path.iterdir())


def test_a_trace_of_another_model_is_refused(tmp_path):
    written(tmp_path / "trace")
    other = open_path(moe_folder("qwen2_moe", seed=1))
    with pytest.raises(InputError) as caught:
        Trace.open(tmp_path / "trace", other)
    assert caught.value.code == "E432"
    assert Trace.open(tmp_path / "trace", other, force=True).samples == len(LENGTHS)


def test_damage_is_found(tmp_path):
    trace = written(tmp_path / "trace")
    raw = bytearray(trace.path.read_bytes())
    raw[-2] ^= 1
    trace.path.write_bytes(raw)
    with pytest.raises(InputError) as caught:
        Trace.open(trace.path).verify()
    assert caught.value.code == "E431"
    trace.path.write_bytes(raw[:-40])
    with pytest.raises(InputError):
        Trace.open(trace.path)
    with pytest.raises(InputError) as caught:
        Trace.open(moe_folder("mixtral") / "model.safetensors")
    assert caught.value.code == "E431"


def test_a_folder_that_cannot_be_written_to_is_an_environment_fault(tmp_path):
    (tmp_path / "file").write_text("")
    checkpoint = open_path(moe_folder("mixtral"))
    with pytest.raises(EnvironmentFault) as caught:
        TraceWriter(tmp_path / "file" / "trace", checkpoint, texts(), BATCHED, experts_of(checkpoint))
    assert caught.value.code == "E501"
