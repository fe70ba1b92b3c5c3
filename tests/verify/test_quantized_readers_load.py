"""Quantized folders and their stock readers: what they load is compared with the numbers the folders stand for."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks" / "quantization"))
from cells import IDS, Cell, source, write

from surgeon.checkpoint.checkpoint import open_path
from surgeon.deploy import quantized_check
from surgeon.errors import EnvironmentFault, InputError
from surgeon.formats.dequantized import dequantized
from surgeon.kernels.cast import widen
from surgeon.verify import quantized_child, readers
from surgeon.verify.static import verify_path

SAMPLES = [np.array(ids) for ids in IDS]
PACKAGES = {"int4g32": "compressed_tensors", "nf4": "bitsandbytes", "auto-round int4g32": "auto_round"}


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """Return a function that saves the random model of a family once."""
    made: dict[str, Path] = {}

    def of(family: str) -> Path:
        if family not in made:
            made[family] = source(family, tmp_path_factory.mktemp("source"))
        return made[family]

    return of


def written(folder: Path, model: Path, recipe: str, family: str) -> Path:
    """Return the quantized folder of a recipe."""
    return write(Cell(recipe, family), model, folder)[0]


def dense_copy(packed: Path, folder: Path) -> Path:
    """Write what a quantized folder stands for, decoded by our reader, as a plain one."""
    view, tensors = dequantized(open_path(packed, "packed")), {}
    for name, info in view.tensors.items():
        values = torch.from_numpy(widen(view.read(name, 0, info.elements), info.dtype).copy())
        tensors[name] = values.reshape(info.shape).to(
            {"BF16": torch.bfloat16, "F16": torch.float16}[info.dtype]
        )
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(view.config))
    return folder


def edited(packed: Path, folder: Path, change) -> Path:
    """Copy a folder, its tensors changed."""
    shutil.copytree(packed, folder)
    tensors = load_file(packed / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def reference(folder: Path):
    return dequantized(open_path(folder, "packed"))


# ---- one process each ------------------------------------------------------------------------------------


def test_a_folder_is_what_it_stands_for(sources, tmp_path):
    """The reader's float32 logits are those of our own decoder run layer by layer, which shares no code with it."""
    packed = written(tmp_path / "q", sources("llama"), "int4g32", "llama")
    found = quantized_check.check(packed, reference(packed), SAMPLES)
    assert found["relative difference"] < 1e-5 and found["as run"] < 0.03 and found["top1"] > 0.9
    assert found["modules"] == 14 and found["generated"] == 16 and found["tokens"] == 48
    assert (
        found["dtype"] == "bfloat16" and "compressed-tensors" in found["versions"] and "notice" not in found
    )


def test_a_reader_that_takes_it_for_other_numbers_is_found(sources, tmp_path):
    """Experts of two layers in different widths, written in spite of the refusal: they load without a word."""
    recipe = "experts int4g32 or int8g32 by layer"
    packed = written(tmp_path / "q", sources("qwen3_moe"), recipe, "qwen3_moe")
    with pytest.raises(InputError, match="computes something else") as caught:
        quantized_check.check(packed, reference(packed), SAMPLES)
    assert caught.value.code == "E482"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("recipe", "family", "as_run"),
    [("float8", "llama", 0.15), ("nf4", "qwen2, tied", 0.03), ("nf4, double quantization", "phi3", 0.03),
     ("int8 rows by bitsandbytes", "llama", 0.05), ("auto-round int3g32", "llama", 0.02),
     ("auto-round experts of 8, 3, 2 and 4 bits, each matrix its own", "mixtral", 0.5),
     ("experts mxfp4, other modules nvfp4", "deepseek_v3", 0.5)],
)  # fmt: skip
def test_every_form_is_what_it_stands_for(sources, tmp_path, recipe, family, as_run):
    packed = written(tmp_path / "q", sources(family), recipe, family)
    found = quantized_check.check(packed, reference(packed), SAMPLES)
    assert found["relative difference"] < 1e-4 and found["as run"] < as_run and found["modules"] > 0


@pytest.mark.slow
def test_a_reader_that_does_not_load_it(sources, tmp_path):
    packed = written(tmp_path / "q", sources("llama"), "int4g32", "llama")
    name = "model.layers.1.mlp.up_proj.weight_scale"
    lacking = edited(packed, tmp_path / "lacking", lambda tensors: tensors.pop(name))
    with pytest.raises(InputError, match="does not load") as caught:
        quantized_check.check(lacking, reference(packed), SAMPLES)
    assert caught.value.code == "E483" and "up_proj" in str([caught.value.message, *caught.value.others])


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["int4g32", "nf4", "auto-round int4g32"])
def test_one_wrong_row_of_scales_is_found(sources, tmp_path, recipe):
    """One output of one matrix twice as large."""
    packed = written(tmp_path / "q", sources("llama"), recipe, "llama")
    ending = {"int4g32": "weight_scale", "nf4": "weight.absmax", "auto-round int4g32": "scales"}[recipe]

    def double(tensors):
        scales = tensors[f"model.layers.0.self_attn.v_proj.{ending}"]
        scales[0 if ending != "scales" else (slice(None), 0)] *= 2

    wrong = edited(packed, tmp_path / "wrong", double)
    with pytest.raises(InputError, match="E482"):
        quantized_check.check(wrong, reference(packed), SAMPLES)


@pytest.mark.slow
@pytest.mark.parametrize("recipe", list(PACKAGES))
def test_verify_against_its_own_numbers_and_against_the_source(sources, tmp_path, recipe):
    """Its own dense copy has to agree; the source may differ."""
    packed = written(tmp_path / "q", sources("qwen3"), recipe, "qwen3")
    dense = dense_copy(packed, tmp_path / "dense")
    own = readers.read_with_transformers(packed, generate=True, against=dense)
    assert not own.errors
    figures = own.checks["against"]
    assert figures["own"] and figures["relative"] < 1e-4 and own.checks["generate"]["tokens"] == 16
    other = readers.read_with_transformers(packed, against=sources("qwen3"))
    assert not other.errors
    assert not other.checks["against"]["own"] and other.checks["against"]["relative"] > 0.01


# ---- without a reader ------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", list(PACKAGES))
def test_a_missing_package_is_named(sources, tmp_path, monkeypatch, recipe):
    packed = written(tmp_path / "q", sources("llama"), recipe, "llama")
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == PACKAGES[recipe] else real(name)
    )
    package = PACKAGES[recipe].replace("_", "-")
    with pytest.raises(EnvironmentFault) as caught:
        readers.read_with_transformers(packed)
    assert (caught.value.code, caught.value.help) == ("E512", f"pip install {package}")
    found = quantized_check.check(packed, reference(packed), SAMPLES)
    assert found["notice"].startswith(f"not checked: {package} is not installed")
    assert readers.missing_package(sources("llama")) is None


def test_its_own_numbers_are_recognised(sources, tmp_path):
    packed = written(tmp_path / "q", sources("llama"), "nf4", "llama")
    dense = dense_copy(packed, tmp_path / "dense")
    stored = open_path(packed, "packed")
    assert readers.holds_the_same(stored, open_path(dense, "dense"))
    assert not readers.holds_the_same(stored, open_path(sources("llama"), "source"))
    assert not readers.holds_the_same(stored, stored)
    assert not readers.holds_the_same(open_path(dense, "dense"), stored)

    def nudge(tensors):
        tensors["model.layers.1.mlp.down_proj.weight"][3, 5] += 0.5

    wrong = edited(dense, tmp_path / "wrong", nudge)
    assert not readers.holds_the_same(stored, open_path(wrong, "wrong"))
    lacking = edited(dense, tmp_path / "lacking", lambda tensors: tensors.pop("model.norm.weight"))
    assert not readers.holds_the_same(stored, open_path(lacking, "lacking"))


def test_how_far_is_too_far():
    assert readers.too_far(0.0, 0.09, "float32") is None
    assert "0.002" in str(readers.too_far(0.002, 0.0, "float32"))
    assert readers.too_far(0.05, 0.05, "bfloat16") is None
    assert "0.2" in str(readers.too_far(0.2, 0.2, "bfloat16"))
    assert "kernels" in str(readers.too_far(0.0, 0.9, "float32"))
    assert readers.too_far(float("nan"), 0.0, "float32") and readers.too_far(0.0, float("nan"), "float32")


class _Linear4bit(torch.nn.Linear):
    """Stands for a module of bitsandbytes, whose decoder is replaced."""


def test_decoding_leaves_the_model_as_it_was(monkeypatch):
    _Linear4bit.__module__, _Linear4bit.__name__ = "bitsandbytes.nn.modules", "Linear4bit"
    torch.manual_seed(0)
    plain, packed = torch.nn.Linear(8, 8), _Linear4bit(8, 8)
    packed.quantization_scheme = None  # type: ignore[assignment]
    plain.quantization_scheme = object()  # type: ignore[assignment]
    model = torch.nn.Sequential(plain, packed).to(torch.bfloat16)
    model.register_buffer("positions", torch.arange(3.0))
    model.dtype = torch.bfloat16  # type: ignore[assignment]
    monkeypatch.setitem(
        quantized_child._DECODERS, "Linear4bit", lambda module: torch.eye(8, dtype=torch.bfloat16) * 2
    )
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    x = torch.randn(2, 8)
    assert quantized_child.quantized_modules(model) == {"Linear4bit": 1}
    with quantized_child.decoded(model) as precision:
        assert precision == "float32" and plain.quantization_enabled is False
        assert {p.dtype for p in model.parameters()} == {torch.float32}
        wide = torch.nn.functional.linear(x, before["0.weight"].float(), before["0.bias"].float())
        assert torch.equal(model(x), 2 * wide + before["1.bias"].float())
    assert plain.quantization_enabled is True and "forward" not in vars(packed)
    for name, tensor in model.state_dict().items():
        assert tensor.dtype == before[name].dtype and torch.equal(tensor, before[name]), name


@pytest.mark.parametrize(
    "recipe", ["int4g32", "nf4", "auto-round int4g32", "float8", "int8 rows by bitsandbytes"]
)
def test_static_checks_know_quantized_folders(sources, tmp_path, recipe):
    """Complete, and with the digests that lie beside it; one changed byte is found."""
    packed = written(tmp_path / "q", sources("llama"), recipe, "llama")
    files = sorted(p for p in packed.iterdir() if p.is_file())
    lines = [f"{hashlib.sha256(p.read_bytes()).hexdigest()}  {p.name}\n" for p in files]
    (packed / "SHA256SUMS").write_text("".join(lines))
    report = verify_path(packed, values=True)
    assert report.errors == [] and {"structure", "config", "hashes", "values"} <= set(report.checks)
    weights = bytearray((packed / "model.safetensors").read_bytes())
    weights[-5] ^= 1
    (packed / "model.safetensors").write_bytes(weights)
    assert "E353" in {error.code for error in verify_path(packed).errors}
