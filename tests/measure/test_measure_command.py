"""``surgeon measure`` from the command line: every mode, its document, refusals."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from surgeon.cli import app
from surgeon.measure.table import LatencyTable

MODELS = Path(__file__).parents[1] / "models"
SMALL = ("--threads", 1, "--context", 8, "--generate", 4, "--repeat", 3)


class Ran:
    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err

    @property
    def document(self):
        return json.loads(self.out)


@pytest.fixture
def measure(capsys, monkeypatch):
    monkeypatch.setitem(app.COMMANDS, "measure", app.COMMANDS.get("measure", "Measure."))

    def run(*arguments: object) -> Ran:
        code = app.run("measure", [str(a) for a in arguments])
        captured = capsys.readouterr()
        assert code != 1 and "Traceback" not in captured.err, captured.err
        return Ran(code, captured.out, captured.err)

    return run


def test_a_model_alone(measure, tmp_path):
    ran = measure(MODELS / "long", *SMALL, "-o", tmp_path / "r.json", "--json")
    assert ran.code == 0
    found = ran.document
    assert found["mode"] == "mix" and found["workload"]["context"] == 8 and found["model"]["name"] == "long"
    assert {"seconds", "prefill_seconds", "decode_seconds"} <= set(found["metrics"])
    assert all(0 < m["low"] <= m["value"] <= m["high"] and m["count"] == 3 for m in found["metrics"].values())
    saved = json.loads((tmp_path / "r.json").read_text())
    assert saved["command"] == "measure" and saved["metrics"] == found["metrics"]
    rate = found["metrics"]["prefill_tokens_per_second"]["value"]
    assert rate == pytest.approx(8 / found["metrics"]["prefill_seconds"]["value"])
    text = measure(MODELS / "long", *SMALL, "-o", tmp_path / "r.json").out  # our own result is replaced
    assert "mix: prefill of 8 tokens, then 4 generated, batch 1" in text
    assert "tokens/s" in text and "whole workload" in text and "1 thread" in text and "±" in text


def test_two_models(measure):
    ran = measure(MODELS / "short", "--baseline", MODELS / "long", "--mode", "prefill", *SMALL, "--json")
    found = ran.document
    assert found["baseline"]["name"] == "long" and found["metrics"]["speedup"]["value"] > 0
    assert set(found["comparison"]["parts"]) == {"prefill"}
    text = measure(MODELS / "short", "--baseline", MODELS / "long", "--mode", "decode", *SMALL).out
    assert "speedup" in text and "95 % interval" in text and "decode of 4 tokens after a context of 8" in text


def test_imprecise_figures_say_so(measure):
    ran = measure(
        MODELS / "long",
        "--threads",
        1,
        "--context",
        8,
        "--generate",
        4,
        "--precision",
        1e-9,
        "--time-limit",
        0.01,
    )
    assert ran.code == 0 and "warning: not measurable to that precision here" in ran.err


def test_table(measure, tmp_path):
    file = tmp_path / "table.json"
    ran = measure(MODELS / "long", "--mode", "table", *SMALL, "--round-to", 144, "-o", file, "--json")
    assert ran.code == 0, ran.err
    table = LatencyTable.load(file)
    assert table.document() == ran.document["table"]
    assert set(table.attention) == {(4, 2), (2, 1), (0, 0)} and set(table.ffn) == {432, 288, 144, 0}
    assert table.layers == 4 and table.environment.dtype == "bfloat16"
    text = measure(
        MODELS / "long",
        "--mode",
        "table",
        "--workload",
        "prefill",
        "--heads",
        "heads",
        *SMALL,
        "--round-to",
        432,
    ).out
    assert (
        "attention 2/2" in text
        and "rest of the model" in text
        and "shares" in text
        and "prefill of 8" in text
    )


@pytest.mark.slow
def test_memory(measure):
    found = measure(MODELS / "long", "--mode", "memory", *SMALL[:-2], "--json").document["metrics"]["memory"]
    assert found["libraries"] <= found["load"] <= found["total"]


@pytest.mark.parametrize(
    ("arguments", "code", "exit_code"),
    [
        (("--mode", "fast"), "E281", 2),
        (("--dtype", "int8"), "E281", 2),
        (("--device", "tpu"), "E281", 2),
        (("--precision", "2"), "E281", 2),
        (("--mode", "table", "--baseline", "x"), "E281", 2),
        (("--heads", "groups"), "E281", 2),
        (("--repeat", "5", "--precision", "0.1"), "E281", 2),
        (("--context", str(2**30)), "E280", 2),
        (("-o", "result.txt"), "E601", 6),
        (("--baseline", "./absent"), "E301", 3),
        (("--memory-limit", "1MB"), "E517", 5),
    ],
)
def test_refusals(measure, arguments, code, exit_code):
    ran = measure(MODELS / "long", "--threads", 1, *arguments, "--json")
    assert (ran.code, ran.document["error"]["code"]) == (exit_code, code), ran.err


def test_foreign_files_are_not_replaced(measure, tmp_path):
    (tmp_path / "r.json").write_text('{"mine": 1}')
    assert measure(MODELS / "long", *SMALL, "-o", tmp_path / "r.json").code == 6
    assert measure(MODELS / "long", *SMALL, "-o", tmp_path / "r.json", "--overwrite").code == 0
