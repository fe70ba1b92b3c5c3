"""Every kind of damage makes exactly its own check fail, and no other one."""

from __future__ import annotations

import hashlib
import json
import struct
from pathlib import Path

import forge
import numpy as np
import pytest

from surgeon.verify.static import verify_path


def sums(folder: Path) -> None:
    names = sorted(p.name for p in folder.iterdir() if p.name != "SHA256SUMS")
    lines = [f"{hashlib.sha256((folder / n).read_bytes()).hexdigest()}  {n}\n" for n in names]
    (folder / "SHA256SUMS").write_text("".join(lines))


@pytest.fixture
def folder(scratch) -> Path:
    return forge.model_folder(scratch / "model", 1, shards=2)


def edit_json(file: Path, **changes) -> None:
    content = json.loads(file.read_text())
    file.write_text(json.dumps({**content, **changes}))


def damage(file: Path, position: int, content: bytes) -> None:
    data = bytearray(file.read_bytes())
    data[position : position + len(content)] = content
    file.write_bytes(data)


def data_start(file: Path) -> int:
    return 8 + struct.unpack("<Q", file.read_bytes()[:8])[0]


def first_shard(folder: Path) -> Path:
    return folder / "model-00001-of-00002.safetensors"


def cut(folder: Path) -> None:
    file = first_shard(folder)
    file.write_bytes(file.read_bytes()[:-100])


def lose_shard(folder: Path) -> None:
    first_shard(folder).unlink()


def lose_tensor(folder: Path) -> None:
    tensors = forge.llama_tensors(1)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    for file in folder.glob("*.safetensors"):
        file.unlink()
    forge.write_shards(folder, forge.split(tensors, 2))


def unlisted(folder: Path) -> None:
    forge.edit_index(folder, lambda c: c["weight_map"].pop("model.norm.weight"))


def wrong_size(folder: Path) -> None:
    edit_json(folder / "config.json", intermediate_size=25)


def fewer_layers(folder: Path) -> None:
    edit_json(folder / "config.json", num_hidden_layers=1)


def no_metadata(folder: Path) -> None:
    forge.edit_index(folder, lambda c: c.pop("metadata"))


def nan(folder: Path) -> None:
    damage(first_shard(folder), data_start(first_shard(folder)), b"\xc0\x7f")


def infinity(folder: Path) -> None:
    damage(first_shard(folder), data_start(first_shard(folder)), b"\x80\xff")


def broken_config(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": "llama",')


def foreign_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").write_text(json.dumps(forge.tokenizer_json(99)))


def foreign_stop_token(folder: Path) -> None:
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 4711}))


@pytest.mark.parametrize(
    ("corrupt", "check", "code"),
    [
        (cut, "structure", "E303"),
        (lose_shard, "structure", "E302"),
        (unlisted, "structure", "E309"),
        (broken_config, "structure", "E308"),
        (lose_tensor, "config", "E343"),
        (wrong_size, "config", "E343"),
        (fewer_layers, "config", "E343"),
        (no_metadata, "index", "E351"),
        (nan, "values", "E321"),
        (infinity, "values", "E321"),
        (foreign_tokenizer, "tokenizer", "E352"),
        (foreign_stop_token, "tokenizer", "E337"),
    ],
)
def test_each_corruption_fails_its_check_only(folder, corrupt, check, code):
    assert not verify_path(folder, values=True).errors
    corrupt(folder)
    report = verify_path(folder, values=True)
    assert set(report.failed) == {check}
    assert code in {e.code for e in report.errors}


def test_one_flipped_bit_fails_the_hashes_only(folder):
    sums(folder)
    assert "hashes" in verify_path(folder).checks
    file = first_shard(folder)
    position = data_start(file) + 2
    damage(file, position, bytes([file.read_bytes()[position] ^ 1]))
    report = verify_path(folder, values=True)
    assert set(report.failed) == {"hashes"}
    assert not verify_path(folder, values=True, hashes=False).errors


def test_a_manifest_without_checksums_is_compared_too(folder):
    digest = hashlib.sha256((folder / "config.json").read_bytes()).hexdigest()
    (folder / "surgeon.json").write_text(json.dumps({"files": {"config.json": digest}}))
    before = [e.message for e in verify_path(folder).errors]
    assert not any("config.json is not" in message for message in before)
    edit_json(folder / "config.json", _name_or_path="elsewhere")
    report = verify_path(folder)
    assert set(report.failed) == {"hashes"}
    assert any("config.json is not" in e.message for e in report.errors)


def test_a_missing_listed_file_and_an_unlisted_one(folder):
    sums(folder)
    (folder / "generation_config.json").unlink()
    (folder / "extra.json").write_text("{}")
    report = verify_path(folder)
    assert set(report.failed) == {"hashes"}
    assert any("extra.json" in w for w in report.warnings)


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "a/../../b"])
def test_recorded_names_never_lead_out_of_the_folder(folder, name):
    (folder / "SHA256SUMS").write_text(f"{'0' * 64}  {name}\n")
    report = verify_path(folder)
    assert set(report.failed) == {"hashes"}
    assert "outside" in report.errors[0].message


def test_a_manifest_of_the_wrong_shape_is_no_crash(folder):
    (folder / "surgeon.json").write_text('{"files": ["config.json"]}')
    assert set(verify_path(folder).failed) <= {"hashes"}


def test_a_failed_check_does_not_hide_the_next_one(folder):
    nan(folder)
    foreign_stop_token(folder)
    wrong_size(folder)
    assert set(verify_path(folder, values=True).failed) == {"config", "tokenizer", "values"}


def test_all_zero_matrices_are_a_warning(scratch):
    tensors = forge.llama_tensors(1)
    name = "model.layers.0.mlp.up_proj.weight"
    code, shape, content = forge.describe(tensors[name])
    tensors[name] = (code, shape, bytes(len(content)))
    folder = forge.model_folder(scratch / "model", tensors=tensors)
    report = verify_path(folder, values=True)
    assert not report.errors
    assert any(name in w and "zero" in w for w in report.warnings)


def test_values_count_every_non_finite_entry(scratch):
    values = np.array([[1, np.nan, np.inf], [-np.inf, 0, 2]], np.float32)
    file = forge.write(scratch / "x.safetensors", {"w": values})
    report = verify_path(file, values=True)
    assert "3 non-finite" in report.errors[0].message
