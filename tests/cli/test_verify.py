"""``surgeon verify``: one line per check, exit codes, JSON."""

from __future__ import annotations

import forge
import pytest
from commands import run

from surgeon.verify import readers


def test_a_sound_model_passes_line_by_line(capsys, scratch):
    folder = forge.model_folder(scratch / "model", 1, shards=2)
    ran = run(capsys, "verify", folder)
    assert ran.code == 0
    for check in ("structure", "index", "config", "tokenizer", "values"):
        assert any(line.startswith("ok") and check in line for line in ran.out.splitlines()), check
    assert "skipped  hashes" in ran.out


def test_json_is_one_document_with_all_checks(capsys, scratch):
    folder = forge.model_folder(scratch / "model", 1)
    document = run(capsys, "verify", folder, "--json", "--no-values").document
    assert document["status"] == "ok"
    results = {c["name"]: c["result"] for c in document["checks"]}
    assert results["values"] == "skipped"
    assert results["config"] == "ok"


def test_failures_are_exit_3_and_all_are_in_the_document(capsys, scratch):
    folder = forge.model_folder(scratch / "model", 1, hidden_size=16)
    config = (
        (folder / "config.json").read_text().replace('"intermediate_size": 24', '"intermediate_size": 32')
    )
    (folder / "config.json").write_text(config)
    ran = run(capsys, "verify", folder)
    assert ran.code == 3
    assert "FAILED   config" in ran.out
    assert "error[E343]" in ran.err
    document = run(capsys, "verify", folder, "--json").document
    assert (document["status"], document["exit_code"]) == ("failed", 3)
    assert document["error"]["code"] == "E343"
    assert len(document["error"]["others"]) >= 5


def test_a_reader_is_not_asked_about_a_model_that_failed(capsys, scratch, monkeypatch):
    folder = forge.model_folder(scratch / "model", 1, shards=2)
    (folder / "model-00001-of-00002.safetensors").unlink()
    monkeypatch.setattr(readers, "available", lambda: [])
    monkeypatch.setattr(readers, "_run", None)
    ran = run(capsys, "verify", folder, "--load")
    assert ran.code == 3
    assert "skipped  load" in ran.out


@pytest.mark.parametrize(
    ("arguments", "code", "text"),
    [
        (["nowhere"], 3, "E301"),
        (["MODEL", "--tolerance", "0.1"], 2, "E206"),
        (["MODEL+MODEL"], 2, "E207"),
        (["MODEL", "--timeout", "0"], 2, "timeout"),
        (["MODEL", "--memory-limit", "much"], 2, "E209"),
        (["MODEL", "--vaules"], 2, "--values"),
        (["MODEL", "--load", "--against", "nowhere"], 3, "E301"),
    ],
)
def test_wrong_use(capsys, scratch, arguments, code, text):
    folder = forge.model_folder(scratch / "model", 1)
    ran = run(capsys, "verify", *(a.replace("MODEL", str(folder)) for a in arguments))
    assert ran.code == code
    assert text in ran.err


def test_missing_packages_are_exit_5_with_the_command(capsys, scratch, monkeypatch):
    folder = forge.model_folder(scratch / "model", 1)
    monkeypatch.setattr(readers, "available", lambda: ["torch", "transformers"])
    ran = run(capsys, "verify", folder, "--load")
    assert ran.code == 5
    assert "pip install 'model-surgeon[run]'" in ran.err


def test_a_hostile_tensor_name_is_shown_escaped(capsys, scratch):
    tensors = forge.llama_tensors(1)
    tensors["evil\x1b[2J"] = next(iter(tensors.values()))
    folder = forge.model_folder(scratch / "model", tensors=tensors)
    ran = run(capsys, "verify", folder)
    assert "\\x1b" in ran.err or "?" in ran.err or ran.code == 3


def test_against_compares_tensors_and_logits(capsys, scratch):
    pytest.importorskip("transformers")
    first, second = forge.model_folder(scratch / "a", 1), forge.model_folder(scratch / "b", 2)
    ran = run(capsys, "verify", first, "--against", second, "--tolerance", "1e-6")
    assert ran.code == 3
    assert "E363" in ran.err
    document = run(capsys, "verify", first, "--against", first, "--generate", "--json").document
    figures = next(c for c in document["checks"] if c["name"] == "against")["figures"]
    assert figures["tensors"]["equal"] == figures["tensors"]["compared"] > 0
    assert figures["logits"]["max_difference"] == 0
