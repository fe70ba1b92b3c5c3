"""``surgeon doctor``: what is here, and what can be done with a model."""

from __future__ import annotations

import tomllib
from pathlib import Path

import forge
import pytest
from commands import run

from surgeon.python import diagnosis as doctor
from surgeon.verify import readers


def test_the_report(capsys):
    ran = run(capsys, "doctor")
    assert ran.code == 0
    for text in ("surgeon", "cores", "memory", "disk", "hub", "numba", "numpy"):
        assert text in ran.out
    document = run(capsys, "doctor", "--json").document
    assert document["environment"]["cores"] >= 1
    assert document["environment"]["offline"] is True
    assert document["environment"]["disk_free_bytes"] > 0


def test_needed_versions_are_those_of_the_package():
    content = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    extras = (line for extra in content["optional-dependencies"].values() for line in extra)
    stated = {*content["dependencies"], *extras}
    for name, least, *_ in (*doctor.NEEDED, *doctor.OPTIONAL):
        assert f"{name}>={least}" in stated, name


@pytest.mark.parametrize(
    ("found", "least", "enough"),
    [("1.26.4", "1.26", True), ("2.13.0+cpu", "2.4", True), ("1.9", "1.26", False), ("unknown", "1", False)],
)
def test_versions_are_compared_as_numbers(found, least, enough):
    assert (doctor.release(found) >= doctor.release(least)) is enough


def abilities(capsys, *arguments) -> dict[str, bool]:
    rows = run(capsys, "doctor", "--json", *arguments).document["model"]["abilities"]
    return {row["what"]: row["possible"] for row in rows}


def test_what_can_be_done_with_a_model(capsys, scratch, monkeypatch):
    folder = forge.model_folder(scratch / "model", 1)
    monkeypatch.setattr(readers, "available", lambda: [])
    assert abilities(capsys, "--model", folder) == {
        "merge": True, "write it": True, "verify": True, "verify --load": True, "verify --generate": True,
    }  # fmt: skip
    monkeypatch.setattr(readers, "available", lambda: ["torch"])
    assert abilities(capsys, "--model", folder)["verify --load"] is False
    quantized = forge.model_folder(scratch / "q", 1, quantization_config={"quant_method": "fp8"})
    assert abilities(capsys, "--model", quantized)["merge"] is False
    file = forge.write(scratch / "x.safetensors", forge.llama_tensors(1))
    assert abilities(capsys, "--model", file)["verify --load"] is False


def test_a_model_that_cannot_be_read_is_refused(capsys, scratch):
    (scratch / "old").mkdir()
    (scratch / "old" / "pytorch_model.bin").write_bytes(b"x")
    ran = run(capsys, "doctor", "--model", scratch / "old")
    assert (ran.code, "E331" in ran.err) == (3, True)


def test_a_cache_folder_that_cannot_be_written(monkeypatch, tmp_path):
    monkeypatch.setenv("NUMBA_CACHE_DIR", "/proc/nowhere")
    assert doctor.writable(Path("/proc/nowhere")) is False
    assert doctor.writable(tmp_path / "new" / "folder") is True
