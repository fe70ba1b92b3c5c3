"""surgeon.merge over state dicts equals the merge of the same tensors in files."""

from __future__ import annotations

import merge_models as mm
import numpy as np
import pytest
import torch

import surgeon
from surgeon.errors import InputError, UsageError


def states(dtype: str = "float32"):
    return [mm.tensors(f) for f in mm.family("llama", dtype)[:3]]


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("linear", {"weight": (1.0, 3.0)}),
        ("ties", {"density": (0.3,), "lambda_": 0.8}),
        ("slerp", {"t": 0.3}),
        ("dare_ties", {"density": (0.5,), "seed": 7}),
        ("dler", {"param": {"scope": "global"}}),
        ("task_arithmetic", {"ignore": ("lm_head.weight",), "layers": (1, 3)}),
    ],
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_result_is_that_of_the_files(method, options, dtype, tmp_path):
    _base, a, b = mm.family("llama", dtype)[:3]
    files = [f / "model.safetensors" for f in (a, b)]
    surgeon.merge(files, method=method, output=tmp_path / "out.safetensors", threads=1, **options)
    wanted = mm.load_file(tmp_path / "out.safetensors")
    got = surgeon.merge([mm.load_file(f) for f in files], method=method, **options)
    assert list(got) == list(mm.load_file(files[1 if "task" in method or method == "ties" else 0]))
    assert mm.deviation(got, wanted).unequal == 0


def test_numpy_arrays_give_numpy_arrays():
    _base, a, b = ({n: t.numpy() for n, t in s.items()} for s in states())
    before = {n: x.copy() for n, x in a.items()}
    got = surgeon.merge([a, b], method="linear")
    for name, array in got.items():
        assert isinstance(array, np.ndarray) and array.dtype == np.float32
        np.testing.assert_array_equal(array, (a[name] + b[name]) / 2)
        np.testing.assert_array_equal(a[name], before[name])
        assert a[name].flags.writeable and array.flags.writeable
        assert not np.shares_memory(array, a[name])


def test_a_base_of_its_own_and_threads_and_types():
    base, a, b = states()
    one = surgeon.merge([a, b], method="ties", base=base, density=(0.4,), threads=1, dtype="bfloat16")
    two = surgeon.merge([a, b], method="ties", base=base, density=(0.4,), threads=4, dtype="bfloat16")
    assert {t.dtype for t in one.values()} == {torch.bfloat16}
    assert mm.deviation(one, two).unequal == 0
    listed = surgeon.merge([base, a, b], method="ties", base=base, density=(0.4,), dtype="bfloat16")
    assert mm.deviation(one, listed).unequal == 0


def test_a_sweep_gives_one_state_for_each_point():
    _base, a, b = states()
    points = surgeon.merge([a, b], method="slerp", sweep=("t=0.2,0.8",))
    assert sorted(points) == ["t=0.2", "t=0.8"]
    for name, state in points.items():
        alone = surgeon.merge([a, b], method="slerp", t=float(name[2:]))
        assert mm.deviation(state, alone).unequal == 0


def test_strided_and_gradient_tensors_and_integers():
    wide = torch.randn(8, 10)
    x = {"w": wide.t(), "g": torch.nn.Parameter(torch.ones(3)), "i": torch.arange(4)}
    y = {"w": torch.zeros(10, 8), "g": torch.zeros(3), "i": torch.arange(4)}
    got = surgeon.merge([x, y], method="linear")
    torch.testing.assert_close(got["w"], wide.t() / 2)
    assert got["g"].tolist() == [0.5] * 3 and torch.equal(got["i"], torch.arange(4))


def test_what_does_not_fit_is_refused():
    _base, a, b = states()
    with pytest.raises(InputError, match="different shapes"):
        surgeon.merge([{"w": np.ones(3, np.float32)}, {"w": np.ones(4, np.float32)}])
    with pytest.raises(InputError, match="missing"):
        surgeon.merge([a, {n: t for n, t in b.items() if "norm" not in n}])
    with pytest.raises(InputError, match="neither"):
        surgeon.merge([{"w": [1.0]}, {"w": [2.0]}])
    with pytest.raises(InputError, match="NaN"):
        surgeon.merge([{"w": np.full(3, np.nan, np.float32)}, {"w": np.ones(3, np.float32)}])
    with pytest.raises(UsageError, match="each other"):
        surgeon.merge([a, "folder"])
    with pytest.raises(UsageError, match="not a file"):
        surgeon.merge([a, b], output="merged")
    with pytest.raises(UsageError, match="model folders"):
        surgeon.merge([a, b], vocab="union")
    with pytest.raises(UsageError, match="returns one of the models"):
        surgeon.merge([a, b], method="slerp", t=0.0)
