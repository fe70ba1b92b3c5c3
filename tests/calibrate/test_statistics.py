"""Collectors and their file: definitions in float64, batching, resumption, modules nothing reached, whole models."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

from surgeon.calibrate import statistics
from surgeon.calibrate.settings import Settings
from surgeon.calibrate.statistics import (
    ChannelNorms,
    MeanAbsolute,
    OutputCapture,
    RouterCounts,
    SecondMoments,
)
from surgeon.calibrate.statistics_file import KEY, Statistics, load, save
from surgeon.checkpoint.checkpoint import open_path
from surgeon.errors import InputError

sys.path.insert(0, str(Path(__file__).parents[1] / "architectures"))
import tiny_models

MODELS = Path(__file__).parents[1] / "models"
COLLECTORS = [MeanAbsolute, ChannelNorms, SecondMoments]
A, B = "model.layers.0.mlp.up_proj", "model.layers.0.mlp.down_proj"


def activations(tokens: int, width: int = 6, seed: int = 0) -> torch.Tensor:
    return torch.randn(tokens, width, generator=torch.Generator().manual_seed(seed))


def by_definition(collector, x: np.ndarray) -> np.ndarray:
    return {
        "mean_absolute": lambda: np.abs(x).mean(0),
        "channel_norms": lambda: np.sqrt(np.square(x).sum(0)),
        "second_moments": lambda: x.T @ x,
    }[collector.kind]()


# ---- collectors --------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", COLLECTORS)
def test_sums_are_those_of_the_definition_for_any_batching(kind, dtype):
    x = (activations(1100) * 5).to(dtype)
    wanted = by_definition(kind, x.double().numpy())
    for cuts in ([1100], [1, 599, 500], [0, 700, 400]):
        collector = kind()
        for part in x.split(cuts):
            collector.observe(A, part, None, None)
        found = collector.finish()
        np.testing.assert_allclose(found.values[A], wanted, rtol=2e-6, atol=1e-6 * np.abs(wanted).max())
        assert found.values[A].dtype == np.float64
        assert found.tokens == {A: 1100} and found.kind == kind.kind


def test_half_precision_squares_do_not_overflow():
    x = torch.full((4, 2), 6e4, dtype=torch.float16)
    norms, moments = ChannelNorms(), SecondMoments()
    for collector in (norms, moments):
        collector.observe(A, x, None, None)
    np.testing.assert_allclose(norms.finish().values[A], 2 * float(x[0, 0]))
    np.testing.assert_allclose(moments.finish().values[A], 4 * float(x[0, 0]) ** 2)


def test_second_moments_keep_what_a_float32_sum_would_lose():
    one = torch.tensor([[1.0, 0.0]])
    collector = SecondMoments(slice_tokens=1)
    collector.observe(A, torch.tensor([[2.0**13, 0.0]]), None, None)
    for _ in range(100):
        collector.observe(A, one, None, None)
    total, tokens = collector.take(A)
    assert total[0, 0] == 2.0**26 + 100 and tokens == 101
    assert collector.finish().values == {}


@pytest.mark.parametrize("kind", COLLECTORS)
def test_what_no_token_reached_is_named_and_never_divided(kind):
    collector = kind()
    collector.observe(A, activations(3), None, None)
    collector.observe(B, activations(0), None, None)
    found = collector.finish([A, B])
    assert found.unreached == (B,) and set(found.values) == {A}


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("kind", COLLECTORS)
def test_activations_that_are_not_finite_name_their_module(kind, value):
    collector = kind()
    x = activations(3)
    x[1, 2] = value
    collector.observe(A, x, None, None)
    with pytest.raises(InputError) as caught:
        collector.finish()
    assert caught.value.code == "E384" and A in caught.value.message


@pytest.mark.parametrize("kind", COLLECTORS)
def test_a_restored_collector_goes_on_as_if_nothing_had_happened(kind):
    whole, first, second = kind(), kind(), kind()
    for collector in (whole, first):
        collector.observe(A, activations(7), None, None)
    second.restore({k: v.copy() for k, v in first.state().items()})
    first.observe(A, activations(9, seed=5), None, None)  # must not reach into the copy
    for collector in (whole, second):
        collector.observe(A, activations(4, seed=1), None, None)
        collector.observe(B, activations(2, seed=2), None, None)
    for name, value in whole.finish().values.items():
        np.testing.assert_array_equal(second.finish().values[name], value)
    assert second.finish().tokens == whole.finish().tokens


def test_embeddings_are_left_out_and_a_choice_is_kept_to():
    assert not MeanAbsolute().wants("model.embed_tokens") and not MeanAbsolute().wants("transformer.wte")
    assert MeanAbsolute().wants(A)
    assert not MeanAbsolute(lambda module: module == B).wants(A)


def test_router_counts_and_mass():
    block = "model.layers.1.mlp"
    counts = RouterCounts(3)
    assert counts.wants(f"{block}.gate") and counts.wants(f"{block}.experts.2.down_proj")
    assert not counts.wants(f"{block}.gate_proj") and not counts.wants(f"{block}.shared_expert_gate")
    for expert, tokens in ((0, 4), (2, 1)):
        for matrix in ("gate_proj", "up_proj", "down_proj"):
            counts.observe(f"{block}.experts.{expert}.{matrix}", activations(tokens), None, None)
    logits = activations(5, 3)
    counts.observe(f"{block}.gate", activations(5), logits, None)
    again = RouterCounts(3)
    again.restore(counts.state())
    for collector in (counts, again):
        found = collector.finish()
        np.testing.assert_array_equal(found.values[block], [4, 0, 1])
        assert found.tokens[block] == 5 and found.unreached == (f"{block}.experts.1",)
        np.testing.assert_allclose(
            collector.mass()[f"{block}.gate"], logits.double().softmax(-1).mean(0), rtol=1e-6
        )
    again.observe(f"{block}.experts.1.up_proj", activations(9), None, None)
    np.testing.assert_array_equal(
        again.finish().values[block], [4, 0, 1]
    )  # only one matrix of each is counted


def test_router_mass_of_sigmoids_is_divided_by_their_sum():
    counts = RouterCounts(4, "sigmoid")
    logits = activations(50, 4)
    for part in logits.split([20, 0, 30]):
        counts.observe("model.layers.1.mlp.gate", activations(len(part)), part, None)
    (mass,) = counts.mass().values()
    shares = 1 / (1 + np.exp(-logits.double().numpy()))
    np.testing.assert_allclose(mass, (shares / shares.sum(1, keepdims=True)).mean(0), rtol=1e-6)
    assert mass.sum() == pytest.approx(1.0, rel=1e-6)
    with pytest.raises(ValueError):
        RouterCounts(4, "sparsemax")


def test_captured_outputs_come_back_from_memory_and_from_files(tmp_path):
    capture = OutputCapture({A, B}, tmp_path, inputs={A}, memory_limit=100)
    wanted = {}
    for sample in range(4):
        for module in (A, B):
            x, y = (activations(3, seed=s).to(torch.bfloat16) for s in (sample, 10 + sample))
            capture.observe(module, x[:2], y[:2], sample)
            capture.observe(module, x[2:], y[2:], sample)
            wanted[module, sample] = x, y
    assert list(tmp_path.iterdir())
    for (module, sample), (x, y) in wanted.items():
        assert torch.equal(capture.take(module, sample), y)
        if module == A:
            assert torch.equal(capture.take(module, sample, "inputs"), x)
        with pytest.raises(KeyError):
            capture.take(module, sample)
    assert not list(tmp_path.iterdir())
    capture.observe(A, activations(50), activations(50), 0)
    capture.close()
    assert not list(tmp_path.iterdir())
    for outputs, sample in ((None, 0), (activations(1), None)):
        with pytest.raises(ValueError):
            capture.observe(A, activations(1), outputs, sample)


# ---- the file ----------------------------------------------------------------------------------


RECORD = Statistics(
    "mean_absolute",
    {B: np.array([1.5, 0.0]), A: np.array([[2.0]])},
    {A: 3, B: 4},
    ("model.x",),
    {"samples": 2},
)


def test_a_file_gives_back_what_was_written(tmp_path):
    path = tmp_path / "statistics.safetensors"
    save(path, RECORD)
    found = load(path, "mean_absolute")
    assert {k: v.tolist() for k, v in found.values.items()} == {
        k: v.tolist() for k, v in RECORD.values.items()
    }
    assert (found.kind, found.tokens, found.unreached, found.about) == (
        RECORD.kind, RECORD.tokens, RECORD.unreached, RECORD.about,
    )  # fmt: skip
    first = path.read_bytes()
    save(path, replace(RECORD, values=dict(reversed(RECORD.values.items()))))
    assert path.read_bytes() == first and [p.name for p in tmp_path.iterdir()] == [path.name]


def test_the_official_reader_accepts_it(tmp_path):
    from safetensors import safe_open
    from safetensors.numpy import load_file

    save(tmp_path / "s.safetensors", RECORD)
    assert load_file(tmp_path / "s.safetensors")[B].tolist() == [1.5, 0.0]
    with safe_open(tmp_path / "s.safetensors", "numpy") as file:
        assert json.loads(file.metadata()[KEY])["kind"] == "mean_absolute"


def test_other_files_are_refused(tmp_path):
    from safetensors.numpy import save_file

    path = tmp_path / "s.safetensors"
    save(path, RECORD)
    with pytest.raises(InputError, match="E388"):
        load(path, "second_moments")
    good = json.loads(_metadata(path))
    arrays = {A: np.zeros(1), B: np.zeros(1)}
    damaged: list[tuple[dict, dict]] = [
        (arrays, {}),
        (arrays, {KEY: "{"}),
        (arrays, {KEY: json.dumps({**good, "version": 2})}),
        (arrays, {KEY: json.dumps({**good, "tokens": {A: -1, B: 1}})}),
        (arrays, {KEY: json.dumps({**good, "tokens": {A: 1}})}),
        ({A: np.zeros(1)}, {KEY: json.dumps(good)}),
        ({**arrays, B: np.array([np.nan])}, {KEY: json.dumps(good)}),
        ({**arrays, B: np.zeros(1, np.float32)}, {KEY: json.dumps(good)}),
    ]
    for tensors, metadata in damaged:
        save_file(tensors, path, metadata or None)
        with pytest.raises(InputError, match="E388"):
            load(path)
    path.write_bytes(b"\x08")
    with pytest.raises(InputError, match="E303"):
        load(path)


def _metadata(path: Path) -> str:
    from safetensors import safe_open

    with safe_open(path, "numpy") as file:
        return file.metadata()[KEY]


def test_reading_a_file_needs_no_torch(tmp_path):
    save(tmp_path / "s.safetensors", RECORD)
    code = (
        "import sys; from pathlib import Path; from surgeon.calibrate.statistics_file import load;"
        f"load(Path({str(tmp_path / 's.safetensors')!r})); import surgeon.merge.aim, surgeon.merge.acm;"
        "sys.exit(any(m in sys.modules for m in ('torch', 'transformers', 'numba')))"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2]).returncode == 0


# ---- whole models ------------------------------------------------------------------------------


def hooked(model, samples, collector_kind) -> dict[str, np.ndarray]:
    """The statistics by brute force: forward hooks on every module with a weight, whole model, one sample at a time."""
    rows: dict[str, list[np.ndarray]] = {}

    def hook(name):
        def note(module, args, kwargs, output):
            x = args[0] if args else next(iter(kwargs.values()))
            rows.setdefault(name, []).append(x.detach().double().reshape(-1, x.shape[-1]).numpy())

        return note

    handles = [
        module.register_forward_hook(hook(name), with_kwargs=True)
        for name, module in model.named_modules()
        if isinstance(getattr(module, "weight", None), torch.nn.Parameter)
        and not isinstance(module, torch.nn.Embedding)
    ]
    with torch.no_grad():
        for ids in samples:
            model(input_ids=torch.from_numpy(ids)[None])
    for handle in handles:
        handle.remove()
    return {name: by_definition(collector_kind, np.concatenate(parts)) for name, parts in rows.items()}


def samples_of(vocabulary: int, lengths=(11, 7, 11, 3), seed: int = 0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.integers(3, vocabulary, n) for n in lengths]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """Build and save a tiny model once: family -> (folder, model)."""
    made = {}

    def get(family: str, **extra):
        key = (family, json.dumps(extra))
        if key not in made:
            transformers.utils.logging.disable_progress_bar()
            torch.manual_seed(0)
            model = tiny_models.build(family, **extra).float().eval()
            folder = tmp_path_factory.mktemp(family)
            model.save_pretrained(folder)
            made[key] = folder, model
        return made[key]

    return get


@pytest.mark.parametrize("kind", COLLECTORS)
def test_a_trained_model_gives_what_hooks_on_the_stock_model_give(kind):
    model = transformers.AutoModelForCausalLM.from_pretrained(MODELS / "base", dtype=torch.float32).eval()
    samples = samples_of(281)
    wanted = hooked(model, samples, kind)
    found = statistics.collect(open_path(MODELS / "base"), samples, Settings(batch_tokens=24), kind())
    assert set(found.values) == set(wanted) and not found.unreached
    for name, value in wanted.items():
        np.testing.assert_allclose(
            found.values[name], value, rtol=1e-4, atol=1e-5 * np.abs(value).max(), err_msg=name
        )
    assert found.tokens["model.layers.0.mlp.up_proj"] == 32


@pytest.mark.parametrize("family", ["gpt2", "qwen3", "phi", "gemma2"])
def test_other_dense_families_do_too(tiny, family):
    folder, model = tiny(family)
    samples = samples_of(67)
    wanted = hooked(model, samples, MeanAbsolute)
    found = statistics.collect(open_path(folder), samples, Settings(), MeanAbsolute())
    assert set(found.values) == set(wanted)
    for name, value in wanted.items():
        np.testing.assert_allclose(found.values[name], value, rtol=1e-4, atol=1e-6, err_msg=name)
    if family == "qwen3":  # one row per token and head
        assert found.tokens["model.layers.0.self_attn.q_norm"] == 4 * 32


def routed_rows(model, samples) -> dict[tuple[int, int], np.ndarray]:
    """The inputs of every expert, from the routers' own choices: (layer, expert) -> rows."""
    rows: dict[tuple[int, int], list[np.ndarray]] = {}

    def hook(layer):
        def note(module, args, output):
            hidden, (_, _, chosen) = args[0].reshape(-1, args[0].shape[-1]), output
            for token, experts in enumerate(chosen.tolist()):
                for expert in experts:
                    rows.setdefault((layer, expert), []).append(hidden[token].double().numpy())

        return note

    handles = [
        layer.mlp.gate.register_forward_hook(hook(number))
        for number, layer in enumerate(model.model.layers)
        if hasattr(layer.mlp, "experts")
    ]
    with torch.no_grad():
        for ids in samples:
            model(input_ids=torch.from_numpy(ids)[None])
    for handle in handles:
        handle.remove()
    return {key: np.stack(parts) for key, parts in rows.items()}


@pytest.mark.parametrize("stream", [False, True])
def test_experts_see_only_their_tokens_and_idle_ones_are_named(tiny, stream):
    folder, model = tiny("qwen3_moe")
    samples = samples_of(67, (1, 1))
    wanted = routed_rows(model, samples)
    checkpoint, conditions = open_path(folder), Settings(stream_experts=stream)
    found = statistics.collect(checkpoint, samples, conditions, MeanAbsolute())
    for layer in (0, 2):
        for expert in range(4):
            for matrix in ("gate_proj", "up_proj"):
                name = f"model.layers.{layer}.mlp.experts.{expert}.{matrix}"
                if (layer, expert) not in wanted:
                    assert name in found.unreached and name not in found.values
                    continue
                x = wanted[layer, expert]
                assert found.tokens[name] == len(x)
                np.testing.assert_allclose(found.values[name], np.abs(x).mean(0), rtol=1e-4)
    assert len(wanted) < 8, "the samples reach every expert: nothing idle is tested"
    counter = RouterCounts(4)
    statistics.Walk(checkpoint, samples, conditions).run(counter)
    for layer in (0, 2):
        counts = [len(wanted.get((layer, expert), ())) for expert in range(4)]
        np.testing.assert_array_equal(counter.finish().values[f"model.layers.{layer}.mlp"], counts)
        np.testing.assert_allclose(counter.mass()[f"model.layers.{layer}.mlp.gate"].sum(), 1, rtol=1e-6)


def test_what_is_measured_goes_into_the_file_without_paths(tiny, tmp_path):
    folder, _ = tiny("qwen3")
    found = statistics.collect(
        open_path(folder), samples_of(67), Settings(), MeanAbsolute(), about={"name": "text", "sha256": "00"}
    )
    save(tmp_path / "s.safetensors", found)
    about = load(tmp_path / "s.safetensors").about
    assert about["samples"] == 4 and about["tokens"] == 32 and about["data"]["name"] == "text"
    assert str(folder) not in json.dumps(about) and len(about["model"][0]) == 64
