"""Models without a record: what is still checked, and names that must never be looked up."""

from __future__ import annotations

import subprocess
import sys

import pytest
import tiny_models

from surgeon import architectures
from surgeon.architectures.conformance import check

HOSTILE = [
    "../x",
    "../architectures/llama",
    "os.system",
    "os",
    "llama.py",
    "surgeon.architectures.llama",
    "llama\n",
    "LLAMA",
    "llama ",
    "ｌｌａｍａ",
    "",
    "base",
    "conformance",
    "naming",
    "__init__",
    "__pycache__",
    "/etc/passwd",
    "llama\x00",
    None,
    7,
    ["llama"],
    {"llama": 1},
]


@pytest.mark.parametrize("name", HOSTILE, ids=repr)
def test_G5_names_are_only_compared_with_our_own_modules(name, monkeypatch):
    if not (isinstance(name, str) and name.isidentifier() and name.islower() and name.isascii()):
        monkeypatch.setattr("importlib.import_module", lambda *_: pytest.fail("imported"))
    assert architectures.get(name) is None
    findings = check({"model_type": name, "num_hidden_layers": 1}, {"layers.0.weight": ("F32", (1,))})
    assert [finding.kind for finding in findings] == ["unknown-architecture"]


def test_G5_known_names_are_found():
    for name in architectures.known():
        assert architectures.get(name).model_type == name


def test_records_need_neither_torch_nor_transformers():
    code = (
        "import sys; from surgeon import architectures; from surgeon.architectures import conformance;"
        "architectures.known(); print(sorted({'torch', 'transformers', 'numpy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def model(**change) -> tuple[dict, tiny_models.Header]:
    config, header = tiny_models.saved("llama", tie_word_embeddings=False, num_hidden_layers=4)
    return {**config, "model_type": "brand_new", **change}, header


def test_E1_unknown_type_gives_a_notice_and_nothing_else():
    (finding,) = check(*model())
    assert (finding.kind, finding.severity) == ("unknown-architecture", "notice")
    assert "brand_new" in finding.message


def test_E1_absent_type_gives_a_notice():
    config, header = model()
    del config["model_type"]
    (finding,) = check(config, header)
    assert "no model_type" in finding.message


@pytest.mark.parametrize("count", [3, 5])
def test_E1_E4_layer_count_is_checked_without_a_record(count):
    config, header = model(num_hidden_layers=count)
    assert [finding.kind for finding in check(config, header)] == [
        "config-contradiction",
        "unknown-architecture",
    ]


def test_E1_E3_a_missing_layer_is_found_without_a_record():
    config, header = model()
    header = {name: entry for name, entry in header.items() if ".1." not in name}
    finding = check(config, header)[0]
    assert (finding.kind, finding.expected, finding.found) == ("missing-layer", 4, 3)


def test_E1_E3_each_tensor_missing_from_one_layer_is_found_without_a_record():
    config, header = model()
    for name in header:
        if "layers.2." not in name:
            continue
        rest = {other: entry for other, entry in header.items() if other != name}
        finding = check(config, rest)[0]
        assert (finding.kind, finding.tensor) == ("uneven-layers", name)


def test_E1_E2_a_tensor_in_one_layer_only_is_a_warning():
    config, header = model()
    header["model.layers.3.extra.weight"] = ("F32", (1,))
    finding = check(config, header)[0]
    assert (finding.kind, finding.severity) == ("uneven-layers", "warning")


@pytest.mark.parametrize(
    "explanation",
    [
        {"layer_types": ["a", "a", "b", "a"]},
        {"first_k_dense_replace": 1},
        {"attn_layer_period": 2},
        {"text_config": {"full_attention_interval": 4}},
    ],
)
def test_E1_layers_that_differ_by_design_are_not_reported(explanation):
    config, header = model(**explanation)
    del header["model.layers.2.mlp.gate_proj.weight"]
    assert [finding.kind for finding in check(config, header)] == ["unknown-architecture"]


def test_E1_a_gap_beside_the_main_stack_is_a_warning():
    config, header = model()
    header |= {f"projector.layers.{number}.weight": ("F32", (1,)) for number in (0, 2)}
    finding = check(config, header)[0]
    assert (finding.kind, finding.severity) == ("missing-layer", "warning")


def test_E1_no_tensors_at_all():
    assert [finding.kind for finding in check({"model_type": "x", "num_hidden_layers": 2}, {})] == [
        "unknown-architecture"
    ]
    assert check({"model_type": "llama"}, {})[0].kind == "config-invalid"
