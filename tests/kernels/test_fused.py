"""Compiled kernels give the bits of the NumPy paths, for usual and for hostile numbers."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from surgeon.kernels import cast, fused, lanes
from surgeon.merge.method import Binding
from surgeon.merge.methods import catalogue
from surgeon.plan import Block, Operation

pytest.importorskip("numba")

COLUMNS = 97
ROWS = 83
SPECIAL = np.array(
    [0.0, -0.0, 1e-40, -1e-40, 1.4e-45, 1.1754944e-38, 2.0, -2.0, 65504.0, 3e38, -3e38], np.float32
)


@pytest.fixture(autouse=True)
def _restore():
    yield
    fused.enable(None)


def numbers(kind: str, seed: int, count: int = ROWS * COLUMNS) -> np.ndarray:
    """Return float32 values: "usual" weights, a coarse "ties" grid, or "hostile" magnitudes."""
    rng = np.random.default_rng(seed)
    if kind == "usual":
        shared = np.random.default_rng(99).normal(0, 0.02, count)
        return (shared + rng.normal(0, 4e-4, count)).astype(np.float32)
    if kind == "ties":
        return rng.integers(-3, 4, count).astype(np.float32) / 4
    values = rng.normal(0, 1, count).astype(np.float32) * np.float32(2.0) ** rng.integers(-140, 30, count)
    where = rng.integers(0, count, count // 3)
    values[where] = rng.choice(SPECIAL[:9], len(where))
    return values.astype(np.float32)


def bind(method: str, work: str, count: int, base: int | None, shared: dict, each: dict) -> Operation:
    found = catalogue(method)
    values = {p.name: p.default for p in found.parameters if not p.per_model} | shared
    per_model = []
    for i in range(count):
        own = {p.name: p.default for p in found.parameters if p.per_model}
        own |= {k: v[i] if isinstance(v, list) else v for k, v in each.items()}
        per_model.append(own)
    return found.bind(
        Binding("t", (ROWS, COLUMNS), count, base, values, tuple(per_model), work=work, ordinals=tuple(range(count)),
                input_names=("t",) * count, seed=3)
    )  # fmt: skip


def run(operation: Operation, raws: list[np.ndarray], codes: list[str], target: str, rows: int = 20):
    """Run all passes over blocks of whole rows; return the encoded result and what was carried last."""
    shape = (ROWS, COLUMNS)
    step = rows * COLUMNS
    ranges = [(s, min(s + step, ROWS * COLUMNS)) for s in range(0, ROWS * COLUMNS, step)]

    def blocks():
        for ordinal, (start, stop) in enumerate(ranges):
            yield Block("t", shape, [r[start:stop] for r in raws], codes, start, stop, ordinal, 0, target)

    carried = None
    for number in range(operation.reduces()):
        merged = None
        for block in blocks():
            state = operation.reduce(number, block, carried)
            merged = state if merged is None else operation.merge(number, merged, state)
        carried = operation.finish(number, merged, carried, math.prod(shape))
    with np.errstate(all="ignore"):
        parts = [operation.map(block, carried)[0] for block in blocks()]
    return np.concatenate([p if p.dtype.kind == "u" else cast.narrow(p, target) for p in parts]), carried


def bits(values: np.ndarray) -> np.ndarray:
    return values.view({2: np.uint16, 4: np.uint32, 8: np.uint64}[values.itemsize])


CASES = [
    ("linear", None, {}, {"weight": [0.3, 0.9, -0.1]}),
    ("linear", None, {"normalize": False}, {"weight": [1.0, 1.0, -1.0]}),
    ("task_arithmetic", 0, {"lambda": 0.7}, {"weight": [None, 0.6, 0.4]}),
    ("task_arithmetic", 1, {"normalize": True}, {"weight": [0.6, None, 0.4]}),
    ("ties", 0, {}, {"weight": [None, 1.0, 0.5], "density": [None, 0.2, 0.5]}),
    ("ties", 0, {"trim_ties": "all", "lambda": 0.3}, {"weight": 1.0, "density": 0.37}),
    ("ties", 0, {"rescale": True, "normalize": False}, {"weight": 1.0, "density": [None, 0.0, 0.6]}),
    ("ties", 0, {"rescale_rule": "inverse_density"}, {"weight": 1.0, "density": [None, 1.0, 0.6]}),
    ("dare_linear", 0, {}, {"weight": 0.5, "density": 0.7}),
    ("dare_ties", 0, {"lambda": 0.7}, {"weight": [None, 0.5, 1.5], "density": 0.53}),
    ("breadcrumbs", 0, {}, {"weight": 0.5, "density": 0.5, "gamma": 0.01}),
    ("breadcrumbs", 0, {}, {"weight": 0.5, "density": 0.1, "gamma": 0.5}),
    ("breadcrumbs", 0, {}, {"weight": 0.5, "density": 0.9, "gamma": 0.1}),
    ("breadcrumbs_ties", 0, {}, {"weight": 0.5, "density": 0.6, "gamma": 0.3}),
    ("della", 0, {}, {"weight": 0.5, "density": 0.5, "epsilon": 0.15}),
    ("della_linear", 0, {}, {"weight": 0.5, "density": [None, 0.4, 1.0], "epsilon": 0.1}),
    ("slerp", 0, {"t": 0.4}, {}),
    ("nuslerp", 2, {"nuslerp_flatten": True}, {"weight": [0.3, 0.7, None]}),
    ("model_stock", 0, {}, {}),
    ("karcher", None, {}, {}),
    ("sce", 0, {"select_topk": 0.3}, {}),
    ("sce", 0, {}, {}),
]


@pytest.mark.parametrize("kind", ["usual", "ties", "hostile"])
@pytest.mark.parametrize("stored,work,target", [
    ("BF16", "F32", "BF16"), ("BF16", "BF16", "BF16"), ("F32", "F32", "F32"), ("F16", "F32", "F16"),
    ("F32", "BF16", "BF16"), ("BF16", "F32", "F32"),
])  # fmt: skip
@pytest.mark.parametrize("case", CASES, ids=lambda c: c[0])
def test_compiled_equals_numpy(case, stored, work, target, kind):
    method, base, shared, each = case
    count = 2 if method == "slerp" else 3
    operation = bind(method, work, count, base, shared, each)
    with np.errstate(all="ignore"):
        raws = [cast.narrow(numbers(kind, i), stored) for i in range(count)]
    if stored == "F16":
        raws = [np.where(np.isfinite(r), r, np.float16(1)) for r in raws]
    fused.enable(True)
    assert fused.available()
    compiled, facts = run(operation, raws, [stored] * count, target)
    assert fused.available(), "a kernel failed"
    fused.enable(False)
    plain, expected = run(operation, raws, [stored] * count, target)
    wrong = np.flatnonzero(bits(compiled) != bits(plain))
    both_nan = np.isnan(cast.widen(compiled, target)) & np.isnan(cast.widen(plain, target))
    wrong = wrong[~both_nan[wrong]]
    assert not len(wrong), (len(wrong), wrong[:5], compiled[wrong[:5]], plain[wrong[:5]])
    assert repr(facts) == repr(expected)


def test_mixed_input_types_agree():
    operation = bind("ties", "F32", 3, 0, {}, {"weight": 1.0, "density": 0.3})
    codes = ["BF16", "F32", "F16"]
    raws = [cast.narrow(numbers("usual", i), code) for i, code in enumerate(codes)]
    fused.enable(True)
    compiled, _ = run(operation, raws, codes, "BF16")
    fused.enable(False)
    plain, _ = run(operation, raws, codes, "BF16")
    assert np.array_equal(compiled, plain)


def test_block_borders_do_not_matter():
    operation = bind("breadcrumbs_ties", "BF16", 3, 0, {}, {"weight": 0.5, "density": 0.6, "gamma": 0.3})
    raws = [cast.narrow(numbers("ties", i), "BF16") for i in range(3)]
    fused.enable(True)
    results = [run(operation, raws, ["BF16"] * 3, "BF16", rows)[0] for rows in (1, 7, 83)]
    assert np.array_equal(results[0], results[1]) and np.array_equal(results[0], results[2])


def test_lane_sums_follow_their_definition():
    values = np.random.default_rng(0).normal(0, 1, 1000) * 10.0 ** np.random.default_rng(1).integers(
        -9, 9, 1000
    )
    sums = [0.0] * lanes.LANES
    for k, value in enumerate(values):
        sums[k % lanes.LANES] += float(value)
    expected = 0.0
    for value in sums:
        expected += value
    assert lanes.total(values) == expected


@pytest.mark.parametrize("value", [0x7F80, 0xFF80, 0x7FC1, 0x7F7F, 0x0001, 0x8000])
def test_nonfinite_sees_what_numpy_sees(value):
    fused.enable(True)
    assert fused.available()
    raw = np.zeros(5000, np.uint16)
    raw[4321] = value
    assert fused.nonfinite(raw, "BF16") == (cast.nonfinite(raw, "BF16") is not None)


def test_without_numba_numpy_does_it(monkeypatch):
    monkeypatch.setattr(fused, "_module", None)
    monkeypatch.setattr(fused, "_broken", True)
    fused.enable(True)
    assert not fused.available()
    block = SimpleNamespace()
    assert fused.linear(block, (1.0,), True, "F32") is None


def test_a_failing_kernel_is_replaced_by_numpy(monkeypatch):
    operation = bind("linear", "F32", 2, None, {}, {"weight": 1.0})
    raws = [cast.narrow(numbers("usual", i), "BF16") for i in range(2)]
    fused.enable(False)
    plain, _ = run(operation, raws, ["BF16"] * 2, "BF16")
    fused.enable(True)
    assert fused.available()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(fused, "_broken", False)
    monkeypatch.setattr(fused, "_problem", "")
    monkeypatch.setattr(fused, "_module", SimpleNamespace(linear=full))
    found, _ = run(operation, raws, ["BF16"] * 2, "BF16")
    assert np.array_equal(found, plain)
    assert not fused.available()
    assert "No space left on device" in fused.problem()


def test_the_command_line_says_when_compiled_kernels_are_missing(tmp_path):
    models = Path(__file__).resolve().parents[1] / "models"
    program = (
        "import sys; sys.modules['numba'] = None\n"  # as if it were not installed
        "from surgeon.kernels import fused; fused.enable(True)\n"
        "from surgeon.cli.app import main; main(sys.argv[1:])"
    )
    words = [
        "merge",
        str(models / "long"),
        str(models / "short"),
        "--method",
        "linear",
        "-o",
        str(tmp_path / "out"),
        "--json",
    ]
    done = subprocess.run([sys.executable, "-c", program, *words], capture_output=True, text=True, check=True)
    assert "compiled kernels cannot be used here" in done.stderr
    assert json.loads(done.stdout)["compiled_kernels"] is False


def test_an_unusable_cache_folder_is_no_error(tmp_path):
    (tmp_path / "file").write_text("")
    program = (
        "from surgeon.kernels import fused; fused.enable(True); print(fused.available());"
        "import numpy as np; print(fused.nonfinite(np.zeros(4, np.uint16), 'BF16'))"
    )
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path / "file" / "below")}
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True
    )
    # numba may find another folder; if not, NumPy is asked.
    assert done.stdout.split() in (["False", "None"], ["True", "None"], ["True", "False"]), done.stderr


def test_small_runs_do_not_load_numba(monkeypatch):
    monkeypatch.setattr(fused, "_module", None)
    fused.prepare(1_000_000)
    assert not fused.available()
    fused.prepare(fused.WORTH_BYTES)
    assert fused.available()
