"""Pickle checkpoints: refused by default, read without running anything when permitted (fault G1)."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from surgeon import api
from surgeon.checkpoint.checkpoint import open_path
from surgeon.errors import InputError

MODELS = Path(__file__).resolve().parents[1] / "models"


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    found = {}
    for file in folder.glob("*.safetensors"):
        found |= load_file(file)
    return found


@pytest.fixture()
def pickled(tmp_path) -> Path:
    """`tests/models/short` with its weights pickled in two files."""
    folder = tmp_path / "short"
    shutil.copytree(MODELS / "short", folder, ignore=shutil.ignore_patterns("*.safetensors*"))
    tensors = tensors_of(MODELS / "short")
    names = sorted(tensors)
    shards = {"pytorch_model-00001-of-00002.bin": names[::2], "pytorch_model-00002-of-00002.bin": names[1::2]}
    for file, part in shards.items():
        torch.save({name: tensors[name] for name in part}, folder / file)
    weight_map = {name: file for file, part in shards.items() for name in part}
    (folder / "pytorch_model.bin.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": weight_map})
    )
    return folder


def test_G1_refused_without_permission(pickled, tmp_path):
    with pytest.raises(InputError, match="pickle files can run code") as caught:
        api.merge([MODELS / "long", pickled], method="ties", output=tmp_path / "out")
    assert caught.value.code == "E331"
    assert not (tmp_path / "out").exists()


def test_permitted_pickles_give_the_same_weights_as_safetensors(pickled, tmp_path):
    plain = api.merge([MODELS / "long", MODELS / "short"], method="ties", output=tmp_path / "plain")
    other = api.merge([MODELS / "long", pickled], method="ties", output=tmp_path / "other", allow_pickle=True)
    assert (plain.path / "model.safetensors").read_bytes() == (other.path / "model.safetensors").read_bytes()
    assert other.manifests[""]["permissions"] == ["allow-pickle"]


def test_every_type_reads_as_stored(tmp_path):
    stored = {
        "f64": torch.randn(3, 5, dtype=torch.float64), "f32": torch.randn(7), "f16": torch.randn(4, 2).half(),
        "bf16": torch.randn(4, 3).bfloat16(), "i64": torch.arange(5), "u8": torch.arange(9, dtype=torch.uint8),
        "bool": torch.tensor([True, False, True]), "strided": torch.randn(4, 6).T, "scalar": torch.tensor(2.5),
    }  # fmt: skip
    torch.save(stored, tmp_path / "x.bin")
    view = open_path(tmp_path / "x.bin", allow_pickle=True)
    for name, value in stored.items():
        info = view.tensors[name]
        assert info.shape == tuple(value.shape)
        flat = value.contiguous().reshape(-1)
        raw = flat.view(torch.int16) if value.dtype == torch.bfloat16 else flat
        assert view.read_bytes(name, 0, info.nbytes).tobytes() == raw.numpy().tobytes()
        assert view.read(name, 1 if info.elements > 1 else 0, info.elements).nbytes


class Harmful:
    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self):
        return (Path.touch, (self.trace,))


def test_G1_a_harmful_pickle_leaves_no_trace_even_with_permission(tmp_path):
    trace = tmp_path / "trace"
    (tmp_path / "evil.bin").write_bytes(pickle.dumps({"w": Harmful(trace)}))
    torch.save({"w": Harmful(trace)}, tmp_path / "evil.pt")
    for name in ("evil.bin", "evil.pt"):
        with pytest.raises(InputError) as caught:
            open_path(tmp_path / name, allow_pickle=True)
        assert caught.value.code == "E331"
        assert not trace.exists()


def test_what_is_no_dictionary_of_tensors_is_refused(tmp_path):
    for content in (
        [torch.zeros(2)],
        {"epoch": 3, "w": torch.zeros(2)},
        {"q": torch.zeros(2, dtype=torch.complex128)},
    ):
        torch.save(content, tmp_path / "x.bin")
        with pytest.raises(InputError):
            open_path(tmp_path / "x.bin", allow_pickle=True)
