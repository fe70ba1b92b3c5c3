"""J: calibration data that is empty, too short, of the wrong shape, or less than was asked for."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from surgeon.calibrate.data import load
from surgeon.errors import InputError

pytest.importorskip("transformers")
MODEL = Path(__file__).resolve().parents[1] / "models" / "long"


def written(folder: Path, records: list[dict]) -> str:
    file = folder / "data.jsonl"
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(file)


def refusal(source: str, **settings) -> InputError:
    with pytest.raises(InputError) as caught:
        load(source, MODEL, **settings)
    assert caught.value.exit_code == 3 and caught.value.help
    return caught.value


def test_J3_an_empty_file_is_refused(tmp_path):
    error = refusal(written(tmp_path, []))
    assert (error.code, error.message) == ("E372", "data.jsonl has no records")
    assert error.where.file == str(tmp_path / "data.jsonl")


def test_J3_records_without_text_are_refused(tmp_path):
    error = refusal(written(tmp_path, [{"text": ""}, {"text": " "}, {"prompt": "p", "response": ""}]))
    assert error.code == "E378"
    assert (
        error.message
        == "nothing of data.jsonl is left to calibrate with: 2 without any token but special ones, 1 of a single token"
    )


def test_J3_padding_alone_is_refused(tmp_path):
    error = refusal(written(tmp_path, [{"text": "<|pad|>" * 50}] * 4))
    assert (
        error.message
        == "nothing of data.jsonl is left to calibrate with: 4 without any token but special ones"
    )
    assert (
        refusal(written(tmp_path, [{"text": "<|pad|>" * 50}] * 4), pack=True, sequence_length=16).code
        == "E378"
    )


def test_J3_texts_too_short_to_predict_anything_are_refused(tmp_path):
    error = refusal(written(tmp_path, [{"text": "a"}] * 3))
    assert (error.code, error.message) == (
        "E378",
        "nothing of data.jsonl is left to calibrate with: 3 of a single token",
    )


def test_J3_answers_beyond_the_sequence_length_are_refused(tmp_path):
    error = refusal(written(tmp_path, [{"prompt": "p" * 100, "response": "r"}]), sequence_length=32)
    assert (
        error.message
        == "nothing of data.jsonl is left to calibrate with: 1 whose answer lies beyond 32 tokens"
    )


def test_J3_wrong_fields_are_refused_with_file_and_line(tmp_path):
    error = refusal(written(tmp_path, [{"text": "fine words"}, {"content": "x", "url": "y"}]))
    assert error.code == "E374" and error.where.line == 2
    assert error.message == "line 2 of data.jsonl cannot be used: it has neither text, messages nor prompt"
    assert "this one has content, url" in error.help


@pytest.mark.parametrize("pack", [False, True])
def test_J3_fewer_samples_than_asked_are_stated_in_the_record_and_as_a_warning(tmp_path, pack):
    made = load(
        written(tmp_path, [{"text": f"some words {i}"} for i in range(5)]),
        MODEL,
        samples=64,
        sequence_length=16,
        pack=pack,
    )
    assert made.record["requested"] == 64 and made.record["samples"] == len(made.samples) < 64
    unit = "blocks" if pack else "samples"
    assert f"data.jsonl gives {len(made.samples)} calibration {unit}, not 64" in made.warnings


def test_J3_a_set_too_small_to_say_much_is_used_with_a_warning(tmp_path):
    made = load(written(tmp_path, [{"text": "some words"}]), MODEL, samples=1)
    assert any(w.endswith("tokens in all; statistics over so few say little") for w in made.warnings)
    made = load(written(tmp_path, [{"text": "some words " * 400}] * 4), MODEL, samples=4)
    assert not made.warnings[1:], made.warnings  # only the shortened sequence length is told
