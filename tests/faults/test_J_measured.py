"""Faults of measuring on models: channels and experts that no token reaches (J4)."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "merge"))

import merge_models as mm


@pytest.fixture
def run(capsys):
    def go(*arguments: object):
        from surgeon.cli import app

        code = app.run("merge", [str(a) for a in arguments])
        return code, capsys.readouterr().err

    return go


def test_J4_experts_without_a_token_are_reported_and_stay_as_merged(run, tmp_path):
    base, a, *_ = mm.family("mixtral")
    text = tmp_path / "t.jsonl"
    text.write_text(json.dumps({"text": "a"}) + "\n" + json.dumps({"text": "bc"}) + "\n")
    common = (a, base, "--method", "task-arithmetic", "--dtype", "float32")
    assert run(*common, "-o", tmp_path / "plain")[0] == 0
    code, said = run(*common, "--aim", "0.2", "--calibration", text, "-o", tmp_path / "aim")
    assert code == 0, said
    assert "no calibration token reached" in said
    record = json.loads((tmp_path / "aim" / "surgeon.json").read_text())["recipe"]["measured"]["aim"]
    unreached = [m for m in record["unreached"] if ".experts." in m]
    assert unreached
    plain, damped = mm.tensors(tmp_path / "plain"), mm.tensors(tmp_path / "aim")
    for name, value in damped.items():
        assert torch.isfinite(value).all(), name
        if name.removesuffix(".weight") in unreached:
            assert torch.equal(value, plain[name]), name
    assert any(not torch.equal(damped[n], plain[n]) for n in plain)
