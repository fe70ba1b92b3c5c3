"""What pydantic says about a request, in the form of every other refusal."""

from __future__ import annotations

import pytest

from surgeon import api
from surgeon.errors import UsageError, wrong_options
from surgeon.evaluate import request as evaluate


def test_every_wrong_option_is_named_with_its_value_and_none_is_lost():
    found = [
        {"type": "int_parsing", "loc": ("samples",), "msg": "Input should be a valid integer", "input": "many"},
        {"type": "value_error", "loc": ("batch_size",), "msg": "Value error, at least 1, or auto", "input": 0},
        {"type": "extra_forbidden", "loc": ("colour",), "msg": "Extra inputs are not permitted", "input": "red"},
    ]  # fmt: skip
    refused = wrong_options(found, code="E228", verb="eval", known=("samples", "batch_size"))
    assert (refused.code, refused.exit_code) == ("E228", 2)
    assert [error.message for error in (refused, *refused.others)] == [
        '--samples is "many": input should be a valid integer',
        "--batch-size is 0: at least 1, or auto",
        "eval has no option --colour",
    ]
    assert all(error.help == '"surgeon eval --help" says what each option takes' for error in (refused, *refused.others))  # fmt: skip


def test_a_misspelt_option_of_the_library_is_corrected():
    with pytest.raises(UsageError, match="merge has no option --desnity") as refused:
        api.build_request(models=("a", "b"), method="ties", desnity=0.2, text_fromm="x")
    assert refused.value.code == "E212" and refused.value.others[0].help == 'did you mean "text_from"?'


def test_a_request_keeps_what_its_own_check_said():
    with pytest.raises(UsageError, match="--batch-size is 0: at least 1, or auto"):
        evaluate.build(model="m", batch_size=0)
