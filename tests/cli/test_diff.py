"""``surgeon diff``: structure, settings, and every figure against brute force."""

from __future__ import annotations

import json
import math

import forge
import numpy as np
import pytest
from commands import run
from test_inspect import wide

from surgeon import comparison, inspection
from surgeon.checkpoint.checkpoint import open_path


def brute_energy(delta: np.ndarray, density: float) -> float:
    squares = np.sort(np.square(delta.reshape(-1)))[::-1]
    total = squares.sum()
    return float(squares[: max(1, int(density * squares.size))].sum() / total) if total else 1.0


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
@pytest.mark.parametrize("block", [7, 64, 1 << 20])
def test_values_equal_brute_force(scratch, monkeypatch, dtype, block):
    monkeypatch.setattr(inspection.block_ranges, "__defaults__", (1, block))
    models = [forge.llama_tensors(seed, dtype) for seed in (1, 2, 0)]
    files = [forge.write(scratch / f"{n}.safetensors", m) for n, m in enumerate(models)]
    first, second, base = map(open_path, files)
    found = comparison.compare_values(first, second, first.tensors, base=base, threads=2)
    for name in models[0]:
        a, b, c = (wide(m[name]).reshape(-1) for m in models)
        v, d = found[name], a - b
        assert v.relative == pytest.approx(np.linalg.norm(d) / np.linalg.norm(b), rel=1e-6)
        assert v.cosine == pytest.approx(a @ b / np.linalg.norm(a) / np.linalg.norm(b), rel=1e-9)
        assert v.max_abs == pytest.approx(np.abs(d).max(), rel=1e-6)
        assert v.changed == np.count_nonzero(d)
        x, y = (v32.astype(np.float32) for v32 in (a - c, b - c))
        figures = v.figures()
        assert figures["task_cosine"] == pytest.approx(
            float(
                np.dot(x.astype(np.float64), y)
                / np.linalg.norm(x.astype(np.float64))
                / np.linalg.norm(y.astype(np.float64))
            ),
            abs=1e-6,
        )
        assert v.conflicts == np.count_nonzero(x * y < 0)
        for entry, delta in ((figures["delta"], x), (figures["delta_second"], y)):
            assert entry["changed"] == np.count_nonzero(delta) / delta.size
            for density in comparison.DENSITIES:
                got = entry["densities"][f"{density:g}"]
                assert got["energy"] == pytest.approx(
                    brute_energy(delta.astype(np.float64), density), rel=1e-6
                )
                kept = min(max(1, int(density * delta.size)), np.count_nonzero(delta))
                assert got["kept"] == pytest.approx(kept / delta.size)


@pytest.mark.parametrize("size", [1, 2, 100, 10_000])
def test_the_energy_of_tied_and_sparse_deltas_is_exact(scratch, size):
    rng = np.random.default_rng(size)
    base = rng.standard_normal(size).astype(np.float32)
    step = np.float32(2.0**-9) * rng.integers(-2, 3, size).astype(np.float32) * (rng.random(size) < 0.3)
    first = forge.write(scratch / "a.safetensors", {"w": (base + step).astype(np.float32)})
    second = forge.write(scratch / "b.safetensors", {"w": base})
    found = comparison.compare_tensor("w", open_path(first), open_path(second))
    delta = ((base + step).astype(np.float32) - base).astype(np.float64)
    for density, entry in found.figures()["delta"]["densities"].items():
        assert entry["energy"] == pytest.approx(brute_energy(delta, float(density)), rel=1e-9)


def test_one_step_of_bfloat16_is_a_neighbour_on_the_number_line(scratch):
    first = np.array([0x3F80, 0x3F81, 0x8001, 0x0000, 0x7F7F, 0x0080], np.uint16)
    second = np.array([0x3F81, 0x3F83, 0x0000, 0x8000, 0x7F7F, 0x007F], np.uint16)
    files = [
        forge.write(scratch / f"{n}.safetensors", {"w": ("BF16", (6,), v.tobytes())})
        for n, v in enumerate((first, second))
    ]
    found = comparison.compare_tensor("w", *map(open_path, files))
    assert (found.one_step, found.stepped) == (
        3,
        6,
    )  # 1 step, 2 steps, through zero, -0 and 0, equal, subnormal
    assert found.changed == 4


def test_figures_do_not_depend_on_threads(scratch):
    files = [forge.write(scratch / f"{s}.safetensors", forge.llama_tensors(s)) for s in (1, 2)]
    results = []
    for threads in (1, 3):
        first, second = map(open_path, files)
        found = comparison.compare_values(first, second, first.tensors, threads=threads)
        results.append(comparison.total(found).figures())
    assert results[0] == results[1]


def test_groups_add_up(scratch):
    files = [forge.write(scratch / f"{s}.safetensors", forge.llama_tensors(s)) for s in (1, 2)]
    first, second = map(open_path, files)
    found = comparison.compare_values(first, second, first.tensors)
    for by in ("layer", "kind", "tensor"):
        groups = comparison.grouped(found, by)
        assert sum(g.elements for g in groups.values()) == comparison.total(found).elements
    assert set(comparison.grouped(found, "kind")) == {"embedding", "attention", "mlp", "norm", "head"}


def test_equal_models(capsys, long_short):
    long, _ = long_short
    ran = run(capsys, "diff", long, long, "--values", "--exit-code")
    assert ran.code == 0
    assert "no difference" in ran.out
    assert "no entry differs" in ran.out


def test_exit_code_only_when_asked_for(capsys, long_short):
    long, short = long_short
    assert run(capsys, "diff", long, short, "--values").code == 0
    ran = run(capsys, "diff", long, short, "--values", "--exit-code", "--json")
    assert ran.code == 4
    assert (ran.document["status"], ran.document["differs"]) == ("gate-failed", True)
    ran = run(capsys, "diff", long, short, "--exit-code")
    assert ran.code == 0
    assert "values were not compared" in ran.err


def test_structure_and_settings_are_listed(capsys, scratch):
    tensors = forge.llama_tensors(1)
    del tensors["lm_head.weight"]
    tensors["extra"] = np.ones(3, np.float32)
    tensors["model.norm.weight"] = np.ones(16, np.float32)
    first = forge.model_folder(scratch / "a", tensors=tensors, rope_theta=5.0)
    second = forge.model_folder(scratch / "b", 1, _name_or_path="x")
    (second / "generation_config.json").write_text('{"eos_token_id": 3}')
    ran = run(capsys, "diff", first, second)
    for text in (
        "only in A: 1",
        "only in B: 1",
        "1 tensors F32 / BF16",
        "rope_theta  5.0 / 10000.0",
        "eos_token_id  2 / 3",
    ):
        assert text in ran.out, text
    document = run(capsys, "diff", first, second, "--json").document
    assert document["structure"]["only_first"] == ["extra"]
    assert {c["key"]: c["cosmetic"] for c in document["config"]} == {
        "rope_theta": False,
        "_name_or_path": True,
    }


def test_cosmetic_settings_are_no_difference(capsys, scratch):
    first = forge.model_folder(scratch / "a", 1)
    second = forge.model_folder(scratch / "b", 1, transformers_version="9")
    content = json.loads((second / "config.json").read_text())
    content["dtype"] = content.pop("torch_dtype")
    (second / "config.json").write_text(json.dumps(content))
    assert run(capsys, "diff", first, second, "--values", "--exit-code").code == 0


def test_tokenizers_and_templates(capsys, scratch):
    first, second = forge.model_folder(scratch / "a", 1), forge.model_folder(scratch / "b", 1)
    content = forge.tokenizer_json(24)
    content["model"]["vocab"] = {
        ("other" if t == "w5" else t): n for t, n in content["model"]["vocab"].items()
    }
    (second / "tokenizer.json").write_text(json.dumps(content))
    (second / "chat_template.jinja").write_text("another")
    ran = run(capsys, "diff", first, second, "--exit-code")
    assert ran.code == 4
    assert "1 ids differ (ordinary tokens): id 8: 'w5' / 'other'" in ran.out
    assert "chat template  differs" in ran.out


def test_non_finite_entries_are_left_out_and_counted(capsys, scratch):
    a = forge.write(scratch / "a.safetensors", {"w": np.array([1, np.nan, 3, np.inf], np.float32)})
    b = forge.write(scratch / "b.safetensors", {"w": np.array([1, np.nan, 2, 5], np.float32)})
    ran = run(capsys, "diff", a, b, "--values", "--json")
    total = ran.document["values"]["total"]
    assert total["nonfinite"] == 2
    assert total["changed"] == 0.5
    assert total["max_abs"] == 1
    assert math.isfinite(total["relative"])
    assert "2 entries are not finite" in ran.err


def test_other_types_are_compared_by_their_bytes(scratch):
    a = {"i": np.arange(6, dtype=np.int64), "c": ("F8_E4M3", (4,), b"\x01\x02\x03\x04")}
    b = {"i": np.array([0, 1, 9, 3, 4, 5]), "c": ("F8_E4M3", (4,), b"\x01\x02\x03\x05")}
    files = [forge.write(scratch / f"{n}.safetensors", t) for n, t in enumerate((a, b))]
    found = comparison.compare_values(*map(open_path, files), ["i", "c"])
    assert {n: v.changed for n, v in found.items()} == {"i": 1, "c": 1}


def test_a_tensor_the_base_lacks_is_compared_without_it(capsys, scratch):
    tensors = forge.llama_tensors(0)
    del tensors["lm_head.weight"]
    files = [forge.write(scratch / f"{n}.safetensors", t) for n, t in
             enumerate((forge.llama_tensors(1), forge.llama_tensors(2), tensors))]  # fmt: skip
    ran = run(capsys, "diff", files[0], files[1], "--base", files[2], "--values", "--by", "kind")
    assert ran.code == 0
    assert "1 tensors are not in the base" in ran.err


@pytest.mark.parametrize(
    ("arguments", "code", "text"),
    [
        (["A", "nowhere"], 3, "E301"),
        (["A"], 2, "Missing argument"),
        (["A", "B", "--by", "colour"], 2, "E209"),
        (["A", "B", "--values", "--sort", "colour"], 2, "E209"),
        (["A", "B", "--base", "A"], 2, "E206"),
        (["A", "B", "--sort", "max"], 2, "E206"),
        (["A", "B", "--values", "--tensors", "nothing"], 2, "E218"),
        (["A", "B", "--plot", "x.svg"], 2, "No such option"),
    ],
)
def test_wrong_use(capsys, long_short, arguments, code, text):
    places = {"A": long_short[0], "B": long_short[1]}
    ran = run(capsys, "diff", *(places.get(a, a) for a in arguments))
    assert ran.code == code
    assert text in ran.err


def test_sorting_puts_the_largest_difference_first(capsys, long_short):
    groups = run(capsys, "diff", *long_short, "--values", "--by", "tensor", "--sort", "relative", "--json").document["values"]["groups"]  # fmt: skip
    figures = [g["relative"] for g in groups]
    assert figures == sorted(figures, reverse=True)
