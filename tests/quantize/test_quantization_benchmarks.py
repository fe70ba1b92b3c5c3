"""The benchmarks of quantization: they read their arguments, count as formats do, and their pages are tables."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks" / "quantization"


@pytest.fixture
def script(monkeypatch):
    """Return a function that imports a script of the folder, as running it there would."""
    monkeypatch.syspath_prepend(str(FOLDER))
    before = set(sys.modules)
    yield importlib.import_module
    for name in set(sys.modules) - before:
        if getattr(sys.modules[name], "__file__", None) and str(FOLDER) in str(sys.modules[name].__file__):
            del sys.modules[name]


def test_scripts_read_their_arguments(script):
    speed = script("layer_speed").parser().parse_args(["peers", "--shapes", "512x256", "--rounds", "1"])
    assert (speed.shapes, speed.rounds, speed.threads) == (["512x256"], 1, 1)
    rows = script("kl_vs_size").parser().parse_args(["model", "--output", "out", "--only", "uniform"])
    assert (rows.only, rows.peers) == (["uniform"], None)
    audit = script("audit").parser().parse_args(["model", "gguf", "Q4_0"])
    assert audit.words == ["gguf", "Q4_0"]
    with pytest.raises(SystemExit):
        script("kl_vs_size").parser().parse_args(["model"])


def test_every_row_is_a_request_the_program_takes(script):
    from surgeon.deploy import export_request
    from surgeon.quantize import request

    module = script("kl_vs_size")
    results = {row.name: {"file_bytes": 1000, "folder": "."} for row in module.rows()}
    for row in module.rows():
        if row.program != "surgeon" or "{plan}" in row.options:
            continue
        line = module.command(row, Path("m"), Path("c"), Path("o"), None, 1, results, Path("top"))
        options = line[line.index("-o") + 2 :]
        pairs, place = {}, 0
        while place < len(options):
            name = options[place].removeprefix("--")
            if name in ("json", "clip", "no-clip"):
                pairs |= {} if name == "json" else {"clip": name == "clip"}
                place += 1
                continue
            pairs[options[place].removeprefix("--").replace("-", "_")] = options[place + 1]
            place += 2
        pairs["bits"] = tuple(map(int, pairs["bits"].split(","))) if "bits" in pairs else ()
        assert request.build(model="m", **pairs).group_size == module.GROUP
    for options in script("audit").CASES.values():
        if "to" in options:
            assert export_request.build(model="m", **options).to == "gguf"
        else:
            assert request.build(model="m", method="rtn", **options).method == "rtn"


def test_the_audit_has_every_format_width_and_type(script):
    from surgeon.formats.compressed_runtimes import Reader
    from surgeon.quantize import forms, scheme_names

    cases, seen = script("audit").CASES, {}
    for options in cases.values():
        if "scheme" in options:
            form = options.get("format", "compressed-tensors")
            scheme = scheme_names.parse(options["scheme"], form, group_size=64, symmetric=True).scheme
            assert scheme is not None
            seen.setdefault(form, set()).add((scheme.kind, scheme.bits))
    for name in forms.NAMES:
        form = forms.get(name, Reader(), "llama")
        widths = {("int", bits) for bits in form.widths}
        assert widths <= seen[name] and {kind for kind, _ in seen[name]} == set(form.kinds), name
    from surgeon.formats.gguf_blocks import QUANTIZED

    assert all(any(kind in name for name in cases if name.startswith("gguf")) for kind in QUANTIZED)


AUDITED = ("gguf MXFP4", "gguf Q8_0, down projections Q4_K, by export")


def _audited(script, tmp_path, name):
    for tool in ("gguf", "xllamacpp"):
        pytest.importorskip(tool)
    source = script("gguf_cells").source("llama", tmp_path / "source")
    module, output = script("audit"), tmp_path / "output"
    output.mkdir()
    found = module.measured(name, source, output)
    assert found["good"], (name, found)
    assert list(output.glob("*.gguf*")) == []


@pytest.mark.parametrize("name", AUDITED)
def test_a_size_is_what_is_stored(script, tmp_path, name):
    _audited(script, tmp_path, name)


@pytest.mark.slow
def test_every_size_is_what_is_stored(script, tmp_path):
    for number, name in enumerate(script("audit").CASES):
        if name not in AUDITED and "bytes" not in name:
            (tmp_path / str(number)).mkdir()
            _audited(script, tmp_path / str(number), name)


def test_rows_refer_to_rows_before_them(script):
    seen: set[str] = set()
    for row in script("kl_vs_size").rows():
        assert row.name not in seen
        assert row.like is None or row.like in seen
        seen.add(row.name)


def test_sizes_are_those_of_the_tensors(script, tmp_path):
    source, made = tmp_path / "source", tmp_path / "made"
    source.mkdir(), made.mkdir()
    name = "model.layers.0.mlp.up_proj"
    save_file({f"{name}.weight": torch.zeros(64, 128), "model.embed_tokens.weight": torch.zeros(10, 128),
               "model.norm.weight": torch.zeros(128)}, source / "model.safetensors")  # fmt: skip
    save_file({f"{name}.weight_packed": torch.zeros(64, 16, dtype=torch.int32), f"{name}.weight_scale": torch.zeros(64, 2, dtype=torch.bfloat16),
               f"{name}.weight_shape": torch.zeros(2, dtype=torch.int64), "model.embed_tokens.weight": torch.zeros(10, 128)},
              made / "model.safetensors")  # fmt: skip
    found = script("kl_vs_size").sizes(made, source)
    assert found["linear_bytes"] == 64 * 16 * 4 + 64 * 2 * 2 + 16
    assert found["parameters"] == 64 * 128
    assert found["bits"] == pytest.approx(8 * found["linear_bytes"] / found["parameters"])
    assert found["file_bytes"] == (made / "model.safetensors").stat().st_size


def test_the_plan_of_autoround_becomes_schemes(script, tmp_path):
    config = {"quantization_config": {"bits": 2, "extra_config": {"a.q_proj": {"bits": 4}, "a.k_proj": {"bits": 2}, "b.o_proj": {"bits": 16},
                                                                  "lm_head": {"bits": 16}}}}  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    found = script("kl_vs_size").plan_of(tmp_path)
    assert found == ["--scheme", "W2A16", "--scheme", "a.q_proj.weight=W4A16", "--scheme", "b.o_proj.weight=none"]  # fmt: skip


def test_paired_differences_are_called_what_they_are(script):
    module = script("kl_vs_size")
    draw = np.random.default_rng(0)
    base = draw.gamma(4.0, 1e-3, 80)

    def one(blocks):
        return {"kl": float(blocks.mean()), "blocks": blocks.tolist()}

    assert module.paired(one(base * 0.8), one(base)) == "0.80, lower"
    assert module.paired(one(base * 1.3), one(base)) == "1.30, higher"
    assert "not distinguishable" in module.paired(one(base + draw.normal(0, 1e-3, 80)), one(base))
    low, high = module.interval(base)
    assert low < base.mean() < high
    assert (high - low) == pytest.approx(2 * 1.96 * base.std() / 80**0.5, rel=0.2)


def test_surgeon_s_worker_gives_the_codes_of_the_method(script, tmp_path):
    from surgeon.formats.scheme import Scheme
    from surgeon.quantize import gptq

    worker, speed = script("layer_worker"), script("layer_speed")
    draw = torch.Generator().manual_seed(0)
    weight, x = speed.weights(24, 128, draw), speed.activations(128, 600, draw)
    hessian = x[:400].float().T @ x[:400].float() / 400
    job = {"bits": 4, "group": 64, "clip": False, "damp": 0.01}
    program = worker.Surgeon()
    codes, scales = program.result(program.matrix(program.prepare(weight, job), hessian, job), job)
    made, _ = gptq.quantize(weight, hessian, Scheme("int", 4, 64), scale_dtype="BF16", clip=False)
    values = codes.float() * scales.repeat_interleave(64, 1)
    assert (values.numpy() == made.values()).all()
    file, out = tmp_path / "p.safetensors", tmp_path / "o.safetensors"
    save_file({"weight.w": weight, "held.x": x[400:].contiguous()}, file)
    save_file({"codes.w": codes, "scales.w": scales}, out)
    held = x[400:].float()
    exact = float(
        (held @ (values - weight.float()).T).square().sum() / (held @ weight.float().T).square().sum()
    )
    found = speed.error_of(out, {"problem": str(file), "feeds": {"w": "x"}, "group": 64})
    assert found == pytest.approx(exact, rel=1e-4)


@pytest.mark.parametrize("page", sorted(FOLDER.glob("RESULTS*.md")), ids=lambda page: page.stem)
def test_pages_are_tables_with_their_command_and_machine(page):
    text = page.read_text()
    assert text.startswith("# ")
    assert "python benchmarks/quantization/" in text
    width = None
    for line in text.splitlines():
        if not line.startswith("|"):
            width = None
            continue
        cells = line.count("|")
        assert width in (None, cells), line
        width = cells
        assert "nan" not in line.lower().split(), line
