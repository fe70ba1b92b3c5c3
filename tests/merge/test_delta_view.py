"""Differences cut to low rank or scaled while they are read, against a full SVD of each matrix."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch

from surgeon import engine
from surgeon.checkpoint.checkpoint import Checkpoint
from surgeon.checkpoint.memory import MemoryCheckpoint, MemoryWriter
from surgeon.errors import InputError, UsageError
from surgeon.kernels import lowrank
from surgeon.merge import align, delta_view
from surgeon.merge.delta_view import DeltaView
from surgeon.merge.planner import Options, assemble, draft
from surgeon.merge.references import parse_model_ref
from surgeon.merge.request import MergeRequest, resolve
from surgeon.plan import OutputModel

F = np.float32


def pair(shape: tuple[int, ...], dtype: Any = F, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Return base and model."""
    rng = np.random.default_rng(seed)
    base = rng.normal(0, 0.1, shape)
    return base.astype(dtype), (base + rng.normal(0, 0.02, shape)).astype(dtype)


def view(base: Any, model: Any, **options: Any) -> DeltaView:
    return DeltaView(
        MemoryCheckpoint("long", {"w": model}), MemoryCheckpoint("short", {"w": base}), **options
    )


def whole(checkpoint: Checkpoint, name: str = "w") -> np.ndarray:
    info = checkpoint.tensors[name]
    return checkpoint.read(name, 0, info.elements).reshape(info.shape)


def truncated(delta: np.ndarray, rank: float) -> np.ndarray:
    """Return the best approximation of every matrix by a share of its rank."""
    u, s, vt = np.linalg.svd(delta.astype(np.float64), full_matrices=False)
    s[..., int(rank * min(delta.shape[-2:]) + 1e-9) :] = 0
    return (u * s[..., None, :]) @ vt


SHAPES = [(300, 40), (40, 300), (60, 60), (4, 30, 50), (3, 50, 30)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rank", [0.1, 0.3, 0.5, 0.7, 0.95])
def test_the_difference_is_truncated(shape, rank):
    base, model = pair(shape)
    cut = view(base, model, rank=rank)
    got = whole(cut)
    assert got.dtype == F
    wanted = base + truncated(model - base, rank)
    np.testing.assert_allclose(got, wanted, atol=2e-7)
    facts = cut.facts()["w"]
    delta = (model - base).astype(np.float64)
    share = np.square(truncated(model - base, rank)).sum() / np.square(delta).sum()
    assert facts["energy_kept"] == pytest.approx(share, abs=1e-6)
    assert (facts["rank"], facts["of"]) == (int(rank * min(shape[-2:]) + 1e-9), min(shape[-2:]))


def test_sixteen_bits_and_sixty_four():
    base, model = pair((60, 30), np.float64)
    got = whole(view(base, model, rank=0.2))
    assert got.dtype == np.float64
    np.testing.assert_allclose(got, base + truncated(model - base, 0.2), atol=1e-15)
    stored = [torch.from_numpy(v).to(torch.bfloat16) for v in (base, model)]
    wide = [t.float().numpy() for t in stored]
    got = whole(view(*stored, rank=0.2))
    assert got.dtype == F
    np.testing.assert_allclose(got, wide[0] + truncated(wide[1] - wide[0], 0.2), atol=2e-7)


def test_the_iteration_is_used_for_large_sides_and_is_as_good(monkeypatch):
    monkeypatch.setattr(lowrank, "SMALL_SIDE", 100)
    base, model = pair((400, 160))
    cut = view(base, model, rank=0.05)
    delta = (whole(cut) - base).astype(np.float64)
    assert cut.facts()["w"]["path"] == "subspace"
    best = np.square(model - base - truncated(model - base, 0.05), dtype=np.float64).sum()
    left = np.square(model - base - delta, dtype=np.float64).sum()
    assert left <= best * (1 + 2 * lowrank.TOLERANCE)
    assert np.linalg.matrix_rank(delta, tol=1e-4) == 8


@pytest.mark.parametrize("shape", [(50, 20), (20, 50), (7,), (2, 9, 8)])
def test_the_whole_rank_is_the_model_as_stored(shape):
    base, model = pair(shape)
    for options in ({}, {"rank": 1.0}, {"factor": lambda name: 1.0}):
        same = view(base, model, **options)
        assert not same.computed("w") and same.granularity("w") == 1 and same.memory("w") == 0
        assert whole(same).tobytes() == model.tobytes()
        assert same.read_bytes("w", 0, model.nbytes).tobytes() == model.tobytes()


def test_almost_the_whole_rank_is_almost_the_model():
    base, model = pair((64, 64))
    weakest = np.linalg.svd(model - base)[1][-1]
    got = whole(view(base, model, rank=0.99))
    assert np.linalg.norm(got - model) == pytest.approx(weakest, abs=1e-5)


def test_factors_scale_the_difference_of_everything():
    base, model = pair((30, 20))
    half = view(base, model, factor=lambda name: 0.5)
    np.testing.assert_array_equal(whole(half), base + (model - base) * F(0.5))
    assert half.computed("w")
    for rank in (0.2, 0.8):  # few directions are kept, or few are taken away
        both = view(base, model, rank=rank, factor=lambda name: -2.0)
        np.testing.assert_allclose(whole(both), base - 2 * truncated(model - base, rank), atol=3e-7)
    np.testing.assert_array_equal(whole(view(base, model, factor=lambda name: 0.0)), base)
    base, model = pair((20,))
    np.testing.assert_array_equal(
        whole(view(base, model, rank=0.1, factor=lambda n: 2.0)), base + 2 * (model - base)
    )


def test_what_is_no_matrix_keeps_its_whole_difference():
    for shape in ((12,), (1, 40), (40, 1), (64,)):
        base, model = pair(shape)
        assert not view(base, model, rank=0.1).computed("w")
    base, model = pair((40, 2, 3, 3))  # a convolution: [out, in * taps]
    flat = (model - base).reshape(40, 18)
    np.testing.assert_allclose(
        whole(view(base, model, rank=0.2)), base + truncated(flat, 0.2).reshape(base.shape), atol=2e-7
    )
    for dtype in (np.int64, np.bool_):
        numbers = np.arange(12).reshape(3, 4).astype(dtype)
        assert not view(numbers, numbers, rank=0.1, factor=lambda name: 0.5).computed("w")


def test_no_rank_and_no_difference_give_the_base():
    base, model = pair((6, 9))
    base[0, 0] = -0.0
    dropped = view(base, model, rank=0.1)  # a tenth of six directions is none
    assert dropped.dropped == ["w"]
    assert whole(dropped).tobytes() == base.tobytes()
    for shape in ((30, 40), (40, 30)):
        base = np.zeros(shape, F)
        base[1] = -0.0
        for rank in (0.1, 0.9):
            same = view(base, base.copy(), rank=rank)
            assert whole(same).tobytes() == base.tobytes() and same.dropped == []
            assert same.facts()["w"]["energy_kept"] == 1.0


@pytest.mark.parametrize("shape", [(45, 31), (31, 45), (3, 17, 10)])
def test_any_range_gives_the_same_bits(shape, monkeypatch):
    monkeypatch.setattr(delta_view, "CHUNK_ELEMENTS", 130)
    base, model = pair(shape)
    cut = view(base, model, rank=0.3)
    reference = whole(cut).reshape(-1)
    rng = np.random.default_rng(0)
    for _ in range(60):
        start, stop = sorted(rng.integers(0, base.size + 1, 2))
        np.testing.assert_array_equal(cut.read("w", int(start), int(stop)), reference[start:stop])
    assert cut.granularity("w") % shape[-1] == 0


# --- what it reads from the base ------------------------------------------------------------------


def test_tensors_the_base_lacks_pass_through():
    base, model = pair((20, 20))
    x = MemoryCheckpoint("long", {"w": model, "new": model})
    b = MemoryCheckpoint("short", {"w": base})
    cut = DeltaView(x, b, rank=0.2, factor=lambda name: 0.5)
    assert cut.computed("w") and not cut.computed("new")
    assert whole(cut, "new").tobytes() == model.tobytes()


def test_the_head_of_a_tied_base_is_its_embedding():
    base, model = pair((30, 20))
    x = MemoryCheckpoint("long", {"model.embed_tokens.weight": base, "lm_head.weight": model})
    b = MemoryCheckpoint("short", {"model.embed_tokens.weight": base})
    x.config = {"model_type": "llama", "tie_word_embeddings": False}
    b.config = {"model_type": "llama", "tie_word_embeddings": True}
    assert align.is_tied(b)
    got = whole(DeltaView(x, b, rank=0.2), "lm_head.weight")
    np.testing.assert_allclose(got, base + truncated(model - base, 0.2), atol=2e-7)


def test_what_does_not_fit_is_refused():
    base, model = pair((20, 20))
    with pytest.raises(InputError, match=r"\[20, 20\] in long, \[20, 10\] in short") as caught:
        whole(view(base[:, :10], model, rank=0.2))
    assert caught.value.code == "E342"
    for options in ({"rank": 0.0}, {"rank": 1.5}, {"rank": -0.1}, {"factor": lambda name: float("nan")}):
        with pytest.raises(UsageError) as wrong:
            view(base, model, **options)
        assert wrong.value.code == "E232"
    with pytest.raises(AssertionError):
        view(base, model, rank=0.2).read_bytes("w", 0, 4)


def test_nonfinite_values_name_the_model():
    for shape in ((20, 12), (12, 20)):
        base, model = pair(shape)
        for guilty, label in ((base, "short"), (model, "long")):
            kept = guilty[5, 5]
            guilty[5, 5] = np.nan
            with pytest.raises(InputError, match=f"^.*{label} has NaN or Inf in w") as caught:
                whole(view(base, model, rank=0.2))
            assert caught.value.code == "E321"
            guilty[5, 5] = kept


def test_views_stack_and_say_what_they_are():
    base, model = pair((40, 30))
    inner = view(base, model, factor=lambda name: 0.5)
    outer = DeltaView(inner, MemoryCheckpoint("short", {"w": base}), rank=0.2)
    np.testing.assert_allclose(whole(outer), base + 0.5 * truncated(model - base, 0.2), atol=2e-7)
    identities = {
        v.identity
        for v in (inner, outer, view(base, model), view(base, model, rank=0.2), view(base, model, rank=0.3),
                  view(base, model, rank=0.2, factor=lambda name: 0.5))
    }  # fmt: skip
    assert len(identities) == 6
    assert view(base, model, rank=0.2).identity == view(base, model, rank=0.2).identity
    assert isinstance(outer, Checkpoint)


# --- several readers at a time ----------------------------------------------------------------


def count_computations(cut: DeltaView, monkeypatch) -> list[tuple[str, int]]:
    computed: list[tuple[str, int]] = []
    plain = cut._compute

    def compute(name, change, index, spread):
        computed.append((name, index))
        return plain(name, change, index, spread)

    monkeypatch.setattr(cut, "_compute", compute)
    return computed


def read_by_six(cut: DeltaView, step: int = 400) -> dict[str, bytes]:
    """Read every tensor in short ranges on six threads."""

    def part(job: tuple[str, int]) -> bytes:
        name, start = job
        return cut.read(name, start, min(start + step, cut.tensors[name].elements)).tobytes()

    jobs = [(n, i) for n, info in cut.tensors.items() for i in range(0, info.elements, step)]
    got = dict.fromkeys(cut.tensors, b"")
    with ThreadPoolExecutor(6) as pool:
        for (name, _), content in zip(jobs, pool.map(part, jobs), strict=True):
            got[name] += content
    return got


def test_readers_share_one_computation_and_its_bits(monkeypatch):
    monkeypatch.setattr(lowrank, "STRIP", 32)
    monkeypatch.setattr(lowrank, "PANEL", 32)
    monkeypatch.setattr(lowrank, "SMALL_SIDE", 64)
    tensors = {name: pair(shape, seed=i) for i, (name, shape) in enumerate(
        {"tall": (400, 130), "wide": (130, 400), "experts": (5, 90, 80)}.items())}  # fmt: skip
    x = MemoryCheckpoint("long", {n: m for n, (_, m) in tensors.items()})
    b = MemoryCheckpoint("short", {n: base for n, (base, _) in tensors.items()})
    alone = DeltaView(x, b, rank=0.1)
    reference = {n: whole(alone, n).tobytes() for n in tensors}
    for _ in range(3):
        cut = DeltaView(x, b, rank=0.1)
        computed = count_computations(cut, monkeypatch)
        assert read_by_six(cut) == reference
        assert sorted(computed) == [("experts", i) for i in range(5)] + [("tall", 0), ("wide", 0)]
        assert cut.facts() == alone.facts()


def test_a_failure_reaches_every_reader_and_is_not_remembered(monkeypatch):
    base, model = pair((60, 40))
    cut = view(base, model, rank=0.2)
    plain = cut._compute

    def fail(*arguments):
        time.sleep(0.01)  # so that others come to wait
        raise MemoryError("no room")

    monkeypatch.setattr(cut, "_compute", fail)
    with ThreadPoolExecutor(3) as pool:
        found = [pool.submit(cut.read, "w", 0, 40) for _ in range(3)]
    assert all(isinstance(f.exception(), MemoryError) for f in found)
    monkeypatch.setattr(cut, "_compute", plain)
    np.testing.assert_allclose(whole(cut), base + truncated(model - base, 0.2), atol=2e-7)


def test_few_factors_are_kept_and_counted():
    tensors = {f"w{i}": pair((40, 30), seed=i) for i in range(8)}
    cut = DeltaView(
        MemoryCheckpoint("long", {n: m for n, (_, m) in tensors.items()}),
        MemoryCheckpoint("short", {n: b for n, (b, _) in tensors.items()}), rank=0.2,
    )  # fmt: skip
    for name in tensors:
        whole(cut, name)
    assert list(cut._slots) == ["w5", "w6", "w7"]
    assert len(cut.facts()) == 8
    for shape in ((40, 30), (30, 40), (4, 20, 30)):
        base, model = pair(shape)
        cut = view(base, model, rank=0.2)
        whole(cut)
        held = sum(
            f.right.nbytes + (0 if f.left is None else f.left.nbytes)
            for s in cut._slots["w"].values() if (f := s.factors) is not None
        )  # fmt: skip
        assert held == cut.kept_bytes("w") <= cut.memory("w")


# --- under the engine ---------------------------------------------------------------------------


def merged(tensors: dict[str, tuple[np.ndarray, np.ndarray]], threads: int, method: str, **options: Any):
    """Merge "long" under a view into "short"; return the state and the plan's id."""
    x = MemoryCheckpoint("long", {n: m for n, (_, m) in tensors.items()})
    b = MemoryCheckpoint("short", {n: base for n, (base, _) in tensors.items()})
    request = MergeRequest(models=("long", "short"), method=method, **options)
    resolved = resolve(request)
    refs = {parse_model_ref(n): n for n in ("long", "short")}
    cut = DeltaView(x, b, rank=0.1, factor=lambda name: 0.9)
    opened = {ref: cut if name == "long" else b for ref, name in refs.items()}
    planned = draft(resolved.spec, opened, refs, Options(), align.Findings())
    plan = assemble(planned, {"": OutputModel("", None)}, {"verb": "merge"})
    writer = MemoryWriter(plan.outputs()[""], False)
    engine.compute(plan, {"": writer}, threads=threads)
    return writer.state(), plan.plan_id()


def test_threads_change_neither_bits_nor_the_plan():
    """Tensors of several blocks, tall, wide and square, of a method with several passes."""
    tensors = {
        "model.layers.0.mlp.up_proj.weight": pair((1536, 800), seed=1),
        "model.layers.0.mlp.down_proj.weight": pair((800, 1536), seed=2),
        "model.layers.0.self_attn.q_proj.weight": pair((800, 800), seed=3),
        "model.layers.0.input_layernorm.weight": pair((800,), seed=4),
    }
    first, plan = merged(tensors, 1, "ties", density=(0.5,))
    for threads in (2, 3):
        again, same = merged(tensors, threads, "ties", density=(0.5,))
        assert same == plan
        assert all(again[n].tobytes() == first[n].tobytes() for n in tensors)


def test_task_arithmetic_of_a_view_is_twin_merging():
    tensors = {"up.weight": pair((90, 60), seed=1), "norm.weight": pair((60,), seed=2)}
    got, _ = merged(tensors, 2, "task_arithmetic", **{"lambda": 0.7})
    base, model = tensors["up.weight"]
    np.testing.assert_allclose(got["up.weight"], base + 0.63 * truncated(model - base, 0.1), atol=3e-7)
    base, model = tensors["norm.weight"]
    np.testing.assert_allclose(got["norm.weight"], base + 0.63 * (model - base), atol=1e-7)
