"""Every way a request of `surgeon quantize` is refused: by one sentence, with the right exit code, before anything runs."""

from __future__ import annotations

import pytest

from surgeon.errors import UsageError
from surgeon.formats.scheme import Scheme
from surgeon.quantize import request
from surgeon.quantize.scheme_names import by_name, candidates, parse

OPTIONS = [
    ("E221", {"format": "gptq"}, 'no format "gptq"'),
    ("E221", {"format": "compressed-tensor"}, "no format"),
    ("E216", {"target_bits": 4, "target_size": 5e9}, "each decide about all matrices"),
    ("E216", {"target_bits": 4, "scheme": ("W4A16",)}, "each decide about all matrices"),
    ("E216", {"plan": "x", "target_kl": 0.1}, "each decide about all matrices"),
    ("E216", {"scheme": ("W4A16", "W8A16")}, "2 schemes for all matrices"),
    ("E216", {"scheme": ("=W4A16",)}, "has no pattern"),
    ("E217", {"method": "gtpq"}, 'unknown method of quantizing "gtpq"'),
    ("E217", {"target_bits": 4, "sensitivity": "fischer"}, 'unknown sensitivity "fischer"'),
    ("E217", {"sensitivity": "kl"}, "--sensitivity has no effect without a target"),
    ("E217", {"bits": (2, 4)}, "--bits has no effect"),
    ("E217", {"target_bits": 4, "bits": (1, 4)}, "--bits 1"),
    ("E217", {"target_bits": 0}, "--target-bits"),
    ("E217", {"target_kl": float("nan")}, "--target-kl"),
    ("E217", {"runtime": "tensorrt"}, "--runtime"),
    ("E217", {"runtime": "vllm", "format": "bitsandbytes"}, "--runtime vllm has no effect"),
    ("E217", {"tensor_parallel": 2}, "--tensor-parallel matters to vLLM"),
    ("E217", {"double_quant": True}, "--double-quant has no effect"),
    ("E217", {"method": "rtn", "target_shift": True}, "--target-shift has no effect"),
    ("E217", {"method": "gptq", "format": "bitsandbytes"}, "tables of numbers of its own"),
    ("E217", {"sequence_lengths": 12}, "no option --sequence-lengths"),
    ("E231", {"group_size": 0}, "--group-size 0"),
]


@pytest.mark.parametrize(("code", "options", "said"), OPTIONS)
def test_what_does_not_go_together_is_refused(code, options, said):
    with pytest.raises(UsageError) as caught:
        request.build(model="m", **options)
    assert caught.value.code == code and said in caught.value.message and caught.value.help


def test_a_request_without_anything_is_the_usual_scheme_of_the_form():
    assert request.build(model="m").wishes == [(None, "W4A16")]
    assert request.build(model="m", format="bitsandbytes").wishes == [(None, "NF4")]
    named = request.build(model="m", scheme="re:.*down_proj=W8A16")
    assert named.wishes == [("re:.*down_proj", "W8A16"), (None, "W4A16")]
    targeted = request.build(model="m", target_size=5e9, scheme="lm_head=W8A16")
    assert targeted.wishes == [("lm_head", "W8A16")] and targeted.target == ("size", 5e9)


NAMES = [
    ("W4A16", Scheme("int", 4, 128)),
    ("w3a16_asym", Scheme("int", 3, 128, False)),
    ("W8A16-g32", Scheme("int", 8, 32)),
    ("int5g64", Scheme("int", 5, 64)),
    ("int8c", Scheme("int", 8, -1)),
    ("FP8", Scheme("float8", 8, -1)),
    ("nvfp4", Scheme("nvfp4", 4, 0)),
    ("Q4_1", Scheme("int", 4, 32, False)),
    ("none", None),
]


@pytest.mark.parametrize(("text", "scheme"), NAMES)
def test_names_of_schemes(text, scheme):
    found = parse(text, "compressed-tensors", group_size=None, symmetric=True).scheme
    assert found == scheme
    if scheme is not None:
        assert by_name(scheme.name) == scheme


def test_int8_is_a_kind_of_its_own_for_bitsandbytes_alone():
    assert parse("INT8", "bitsandbytes", group_size=None, symmetric=True).scheme == Scheme("int8", 8, 0)
    assert parse("INT8", "auto-round", group_size=64, symmetric=True).scheme == Scheme("int", 8, 64)


@pytest.mark.parametrize("text", ["W8A8", "W9A16", "W1A16", "4bit", "int4g0", "Q4_K", ""])
def test_what_is_no_scheme_is_refused(text):
    with pytest.raises(UsageError) as caught:
        parse(text, "compressed-tensors", group_size=None, symmetric=True)
    assert caught.value.code == "E231" and caught.value.help


def test_open_group_sizes_try_the_large_ones_first():
    open_one = parse("W4A16", "compressed-tensors", group_size=None, symmetric=True)
    assert [s.group for s in candidates(open_one) if s] == [128, 64, 32, -1]
    said = parse("W4A16", "compressed-tensors", group_size=64, symmetric=True)
    assert candidates(said) == [Scheme("int", 4, 64)]
