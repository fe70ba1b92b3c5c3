"""mergekit files as people publish them: equal in meaning to mergekit, strict about mistakes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import yaml as pyyaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mergekit.config import MergeConfiguration
from mergekit.merge_methods.base import ParameterScope
from mergekit.merge_methods.registry import registered_methods

from surgeon.errors import UsageError
from surgeon.merge.spec import ModelRef, TokenSource
from surgeon.recipe.mergekit_reading import MERGEKIT_PARAMETERS
from surgeon.recipe.mergekit_yaml import METHODS, in_order, looks_like_mergekit, parse


@dataclass(frozen=True)
class P:
    name: str
    kind: str
    per_model: bool
    default: Any


def table() -> dict[str, dict[str, P]]:
    """What mergekit's own methods take."""
    return {
        entry.spec.name: {
            p.name: P(
                p.name,
                getattr(p.value_type, "__name__", "float").replace("Optional", "float"),
                p.scope != ParameterScope.SHARED,
                None if p.required else p.default,
            )
            for p in entry.spec.parameters
        }
        for entry in registered_methods()
    }


KNOWN = table()


def read(text: str):
    """One merge and its notes."""
    (spec,), notes = parse(text, "m.yml", known=KNOWN)
    return spec, notes


def refusals(text: str | bytes) -> list[UsageError]:
    with pytest.raises(UsageError) as caught:
        parse(text, "m.yml", known=KNOWN)
    return [caught.value, *caught.value.others]


def test_the_lists_of_names_are_mergekits():
    assert sorted(METHODS) == sorted(KNOWN)
    assert {name for parameters in KNOWN.values() for name in parameters} == MERGEKIT_PARAMETERS


GRADIENT_SLERP = """\
slices:
  - sources:
      - model: OpenPipe/mistral-ft-optimized-1218
        layer_range: [0, 32]
      - model: mlabonne/NeuralHermes-2.5-Mistral-7B
        layer_range: [0, 32]
merge_method: slerp
base_model: OpenPipe/mistral-ft-optimized-1218
parameters:
  t:
    - filter: self_attn
      value: [0, 0.5, 0.3, 0.7, 1]
    - filter: mlp
      value: [1, 0.5, 0.7, 0.3, 0]
    - value: 0.5
dtype: bfloat16
random_seed: 0
"""

FRANKEN = """\
slices:
- sources: [{model: 01-ai/Yi-34B, layer_range: [0, 16]}]
- sources:
  - model: NousResearch/Nous-Hermes-2-Yi-34B
    layer_range: [8, 24]
    parameters:
      scale:
        - {filter: o_proj, value: 0.0}
        - {filter: down_proj, value: 0.0}
        - value: 1.0
  residual_weight: 0.5
merge_method: passthrough
dtype: torch.float16
"""

DARE = """\
models:
  - model: mistralai/Mistral-7B-v0.1
    # no parameters necessary for the base model
  - {model: samir-fama/SamirGPT-v1, parameters: {density: 0.53, weight: 0.4}}
  - model: abacusai/Slerp-CM-mist-dpo@main
    parameters:
      density: 0.53
      weight: 0.3
merge_method: dare_ties
base_model: {model: {path: mistralai/Mistral-7B-v0.1}}
parameters:
  int8_mask: yes
  gamma: 0.01
dtype: bfloat16
tokenizer_source: union
chat_template: auto
"""

ANCHORED = """\
shared: &shared
  weight: 1e-1
merge_method: ties
"""

WITH_ANCHORS = """\
merge_method: ties
base_model: &base org/base@1e5
parameters: {normalize: on, lambda: 1}
slices:
  - sources:
      - {model: org/one+org/lora@0123456, layer_range: &all [0, 4], parameters: &p {weight: 1e-1, density: [0.2, 0.4]}}
      - {model: org/two, layer_range: *all, parameters: {<<: *p, weight: 0.3}}
      - {model: *base, layer_range: *all}
"""

MODULES = """\
merge_method: task_arithmetic
base_model: base
out_dtype: float32
modules:
  text_decoder:
    parameters: {weight: 0.5}
    slices:
      - base_model: base
        parameters: {weight: {filter: mlp, value: 1}}
        sources:
          - {model: a, layer_range: [0, 2]}
          - {model: base, layer_range: [0, 2]}
  vision_tower: {models: [{model: a}, {model: base, parameters: null}]}
tokenizer:
  source: {model: {path: org/tok, revision: 0123456}}
  pad_to_multiple_of: 64
  tokens:
    <|im_start|>: {source: a, force: yes}
    "<pad>": {source: {kind: zero}}
    <s>: {source: {kind: model_token, model: base, token: 1e5}}
    1: {source: {kind: model_token, model: {model: base}, token_id: 7}}
    <new>: {}
"""

KARCHER = "merge_method: karcher\nmodels: [model: a, model: b]\nparameters: {max_iter: '20', tol: 1e-6}\n"
STOCK = "merge_method: model_stock\nbase_model: c\nmodels: [{model: a}, {model: b}]\ntokenizer: {}\n"


def of_mergekit(config: MergeConfiguration) -> list:
    """Slices of mergekit's reading as [(model, layer_range)]."""
    modules = config.modules or {"": config}
    found = []
    for module in modules.values():
        for piece in module.slices or [None]:
            sources = piece.sources if piece else module.models
            found.append([(str(s.model), getattr(s, "layer_range", None)) for s in sources])
    return found


@pytest.mark.parametrize("text", [GRADIENT_SLERP, FRANKEN, DARE, WITH_ANCHORS, MODULES, KARCHER, STOCK])
def test_published_shapes_mean_what_they_mean_to_mergekit(text):
    spec, _ = read(text)
    theirs = MergeConfiguration.model_validate(
        pyyaml.safe_load(
            text.replace(" 1e5", " '1e5'").replace(" 0123456", " '0123456'").replace(" 1:", " '1':")
        )
    )
    assert spec.method == theirs.merge_method
    assert (str(spec.base_model) if spec.base_model else None) == (
        str(theirs.base_model) if theirs.base_model else None
    )
    ours = [
        [(str(s.model), s.layer_range) for s in piece.sources]
        for module in spec.modules
        for piece in module.slices
    ]
    assert ours == of_mergekit(theirs)
    assert spec.dtype == (theirs.dtype.removeprefix("torch.") if theirs.dtype else None)
    assert spec.out_dtype == theirs.out_dtype
    assert spec.chat_template == theirs.chat_template
    assert {str(model) for model in spec.models()} == {str(model) for model in theirs.referenced_models()} | {
        str(p.base_model) for m in spec.modules for p in m.slices if p.base_model
    }
    assert (spec.flavour, spec.precision, spec.source_text) == ("mergekit", "mergekit", text)
    assert looks_like_mergekit(text)


def test_gradients_and_filters_are_kept_unresolved():
    spec, notes = read(GRADIENT_SLERP)
    assert spec.parameters["t"][0] == {"filter": "self_attn", "value": [0, 0.5, 0.3, 0.7, 1]}
    assert [str(note) for note in notes] == [
        "m.yml:17:1: random_seed has no effect in a mergekit file; use --seed"
    ]
    assert str(spec.where[("parameters", "t", 1, "filter")]) == "m.yml:13:15"
    assert spec.modules[0].slices[0].sources[1].where.line == 6


def test_inert_keys_are_notes():
    assert [(n.message, n.where.line) for n in read(FRANKEN)[1]] == [
        ("residual_weight has no effect, in mergekit neither", 11)
    ]
    assert [n.message for n in read(DARE)[1]] == [
        "int8_mask has no effect on the result",
        "gamma has no effect with dare_ties",
    ]
    text = DARE.replace("weight: 0.3", "weight: 0.3\n      lambda: 2\n      t: 1").replace(
        "weight: 0.4", "weight: 0.4, t: 2"
    )
    notes = [n.message for n in read(text)[1]]
    assert "lambda has no effect below a single model; it belongs in the outer parameters" in notes
    assert "t has no effect with dare_ties (2 places)" in notes
    spec, notes = read(
        "merge_method: linear\nmodels:\n- model: {model: a, override_architecture: X}\n  parameters: {weight: 1}\n"
    )
    assert spec.models() == [ModelRef("a")]
    assert "override_architecture" in notes[0].message


def test_references_come_from_the_source_text():
    spec, _ = read(WITH_ANCHORS)
    one, two, base = spec.modules[0].slices[0].sources
    assert one.model == ModelRef("org/one", None, "org/lora", "0123456")
    assert base.model == spec.base_model == ModelRef("org/base", "1e5")
    assert two.parameters == {"weight": 0.3, "density": [0.2, 0.4]}
    assert one.parameters["weight"] == 0.1
    spec, _ = read("merge_method: passthrough\nmodels: [{model: no}]\n")
    assert spec.models() == [ModelRef("no")]
    spec, _ = read("merge_method: passthrough\nmodels: [{model: 1e5}]\n")
    assert spec.models() == [ModelRef("1e5")]
    spec, _ = read(
        "merge_method: passthrough\nmodels:\n"
        "- model: {model: {path: 'odd+na@me', revision: 0123456}, lora: {path: l, revision: 1e3}}\n"
    )
    assert spec.models() == [ModelRef("odd+na@me", "0123456", "l", "1e3")]


def test_tokenizer():
    spec, _ = read(MODULES)
    assert spec.tokenizer.source == ModelRef("org/tok", "0123456")
    assert spec.tokenizer.pad_to_multiple_of == 64
    assert spec.tokenizer.tokens == {
        "<|im_start|>": TokenSource("model", ModelRef("a"), force=True),
        "<pad>": TokenSource("zero"),
        "<s>": TokenSource("model_token", ModelRef("base"), token="1e5"),
        "1": TokenSource("model_token", ModelRef("base"), token_id=7),
        "<new>": TokenSource("model"),
    }
    assert read(STOCK)[0].tokenizer.source == "union"
    assert read(DARE)[0].tokenizer.source == "union"
    assert read(KARCHER)[0].tokenizer is None


def test_modules_and_slice_parameters():
    spec, _ = read(MODULES)
    text, vision = spec.modules
    assert (text.name, vision.name) == ("text_decoder", "vision_tower")
    assert text.parameters == {"weight": 0.5}
    assert text.slices[0].base_model == ModelRef("base")
    assert text.slices[0].parameters == {"weight": {"filter": "mlp", "value": 1}}
    assert vision.slices[0].sources[0].layer_range is None


def test_all_errors_of_a_file_in_one_pass_and_in_its_order():
    text = """\
merge_methd: ties
dtype: bf16
slices:
  - sources:
      - {model: a, layer_range: [0, 4], parameters: {desnity: 0.2}}
      - {model: b, layer_range: [0, 5]}
      - {layer_range: [3, 3], model: "a+b+c"}
chat_template: chatlm
"""
    found = refusals(text)
    assert [(error.code, error.where.line) for error in found] == [
        ("E210", 1), ("E255", 1), ("E212", 2), ("E214", 4), ("E214", 7), ("E204", 7), ("E212", 8),
    ]  # fmt: skip
    assert 'did you mean "merge_method"?' in found[0].help
    assert 'did you mean "bfloat16"?' in found[2].help
    assert all(error.exit_code == 2 and error.where.file == "m.yml" for error in found)


LINEAR = "merge_method: linear\nmodels: [{model: a, parameters: {weight: 1}}]\n"


@pytest.mark.parametrize(
    ("text", "code", "words"),
    [
        (LINEAR.replace("linear", "dare-ties"), "E201", 'did you mean "dare_ties"'),
        (LINEAR.replace("linear", "Linear"), "E201", 'did you mean "linear"'),
        (LINEAR.replace("linear", "[x]"), "E212", "a list"),
        (LINEAR.replace("weight", "wieght"), "E211", 'did you mean "weight"'),
        (LINEAR + "dtyp: float16\n", "E210", 'did you mean "dtype"'),
        (LINEAR + "weight: 1\n", "E210", "belongs in parameters"),
        (
            LINEAR.replace("{model: a,", "{model: a, layer_range: [0, 1],"),
            "E210",
            "belongs in an entry of sources",
        ),
        (LINEAR + "slices: [{sources: [{model: a, layer_range: [0, 1]}]}]\n", "E255", "models and slices"),
        ("merge_method: linear\n", "E255", "found none"),
        ("merge_method: linear\nmodels: []\n", "E255", "found none"),
        ("merge_method: linear\nmodels: {a: 1}\n", "E212", "a list of models"),
        ("merge_method: linear\nmodels: [a]\n", "E212", "an entry of models"),
        ("merge_method: linear\nmodels: [{parameters: {weight: 1}}]\n", "E255", "needs a model"),
        ("merge_method: linear\nmodels: [{model: a}, {model: a}]\n", "E206", "listed twice"),
        ("merge_method: linear\nmodels: [{model: [a]}]\n", "E204", "a list where a model"),
        ("merge_method: linear\nmodels: [{model: {path: a}}]\n", "E210", "belongs in a model path"),
        ("merge_method: linear\nmodels: [{model: {model: {revision: x}}}]\n", "E255", "needs a path"),
        ("merge_method: linear\nmodels: [{model: {model: a+b}}]\n", "E204", "under lora"),
        ("merge_method: linear\nmodels: [{model: a@b@c}]\n", "E204", "one revision"),
        ("merge_method: linear\nslices: [{sources: []}]\n", "E255", "list of sources"),
        ("merge_method: linear\nslices: [{sources: [{model: a}]}]\n", "E214", "needs a layer_range"),
        (
            "merge_method: linear\nslices: [{sources: [{model: a, layer_range: [0, 1.5]}]}]\n",
            "E214",
            "whole numbers",
        ),
        (
            "merge_method: linear\nslices: [{sources: [{model: a, layer_range: [-1, 2]}]}]\n",
            "E214",
            "no layer",
        ),
        ("merge_method: linear\nslices: [{sources: [{model: a, layer_range: 010}]}]\n", "E214", "two whole"),
        ("merge_method: linear\nmodules: {x: {parameters: {}}}\n", "E255", "either models or slices"),
        ("merge_method: linear\nmodules: [x]\n", "E212", "modules by name"),
        (LINEAR + "parameters: [1]\n", "E212", "parameters by name"),
        (LINEAR + "parameters: {normalize: perhaps}\n", "E212", "neither true nor false"),
        (LINEAR + "dtype: float15\n", "E212", 'did you mean "float16"'),
        (LINEAR + "tokenizer_source: base\ntokenizer: {source: union}\n", "E255", "both given"),
        (LINEAR + "tokenizer: union\n", "E212", "use tokenizer_source"),
        (LINEAR + "tokenizer: {sorce: union}\n", "E210", 'did you mean "source"'),
        (LINEAR + "tokenizer: {pad_to_multiple_of: 0}\n", "E212", "from 1 up"),
        (LINEAR + "tokenizer: {tokens: {a: {source: {kind: zeros}}}}\n", "E212", "model_token or zero"),
        (LINEAR + "tokenizer: {tokens: {a: {source: {kind: model_token, model: a}}}}\n", "E255", "neither"),
        (
            LINEAR + "tokenizer: {tokens: {a: {source: {kind: model_token, token: x}}}}\n",
            "E255",
            "needs a model",
        ),
        (LINEAR + "tokenizer: {tokens: {a: b}}\n", "E212", "force"),
        (LINEAR + "chat_template: 5\n", "E212", "unknown chat_template"),
        ("just text\n", "E212", "where a merge is expected"),
        ("", "E254", "empty"),
    ],
)
def test_mistakes(text, code, words):
    found = refusals(text)
    matching = [e for e in found if e.code == code and words in f"{e.message} {e.help}"]
    assert matching, [str(error) for error in found]
    assert matching[0].where.line >= 1


def test_without_a_table_the_installed_methods_are_asked():
    (spec,), notes = parse(LINEAR + "parameters: {t: 1}\n")
    assert spec.method == "linear"
    assert [note.message for note in notes] == ["t has no effect with linear"]
    for name in ("slurp", "Linear", "../linear", "__init__"):
        with pytest.raises(UsageError, match="unknown merge method"):
            parse(LINEAR.replace("linear", name))


MULTI = """\
name: first
merge_method: linear
models: [{model: org/a, parameters: {weight: 1}}, {model: second, parameters: {weight: 1}}]
---
name: second
merge_method: passthrough
models: [{model: org/b}]
---
merge_method: slerp
base_model: first
models: [{model: first}, {model: second+org/lora}]
parameters: {t: 0.5}
"""


def test_several_documents():
    specs, _ = parse(MULTI, known=KNOWN)
    assert [spec.name for spec in specs] == ["first", "second", None]
    assert [spec.name for spec in in_order(specs)] == ["second", "first", None]
    assert "".join(spec.source_text for spec in specs) == MULTI
    assert specs[2].where[("parameters", "t")].line == 12
    assert looks_like_mergekit(MULTI)


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("name: second", "name: first", 'two merges are called "first"'),
        ("name: second\n", "", "only the final merge"),
        ("org/b", "first", "need each other"),
        ("org/b", "second", "need each other"),
    ],
)
def test_names_and_circles_of_documents(old, new, words):
    (error,) = refusals(MULTI.replace(old, new))
    assert error.code == "E256"
    assert words in error.message


def test_errors_of_all_documents_are_reported_together():
    found = refusals(MULTI.replace("weight", "wieght").replace("t: 0.5", "tt: 0.5"))
    assert [error.where.line for error in found] == [3, 3, 12]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("merge_method: [unclosed\n", True),
        ("\ufeffmerge_method: linear\n", True),
        ("{merge_method: linear}", True),
        ("a: 1\n---\nb: 2\n", True),
        ("version: 1\nsteps: [{merge: {merge_method: ties}}]\n", False),
        ("steps:\n  - merge_method: ties\n", False),
        ("[unclosed", False),
        (b"\xff\xfe\x00", False),
        ("", False),
    ],
)
def test_recognition(text, expected):
    assert looks_like_mergekit(text) is expected


junk = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(-9, 99),
        st.floats(),
        st.sampled_from(["a", "a+b", "union", "", "1e5"]),
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(
            st.sampled_from(
                [
                    "model",
                    "models",
                    "slices",
                    "sources",
                    "layer_range",
                    "parameters",
                    "weight",
                    "value",
                    "filter",
                    "path",
                    "revision",
                    "lora",
                    "source",
                    "tokens",
                    "kind",
                    "token",
                    "token_id",
                    "force",
                    "modules",
                    "x",
                ]
            ),
            inner,
            max_size=3,
        ),
    ),
    max_leaves=12,
)


@settings(max_examples=300, deadline=2000, suppress_health_check=list(HealthCheck))
@given(
    st.fixed_dictionaries(
        {},
        optional={
            "merge_method": st.one_of(st.sampled_from(METHODS), junk),
            **{
                key: junk
                for key in [
                    "base_model",
                    "models",
                    "slices",
                    "modules",
                    "parameters",
                    "dtype",
                    "out_dtype",
                    "tokenizer_source",
                    "tokenizer",
                    "chat_template",
                    "name",
                ]
            },
        },
    )
)
def test_any_mapping_is_a_merge_or_a_refusal(config):
    """What we accept, mergekit accepts too; the rest is refused with a position."""
    text = pyyaml.safe_dump(config)
    try:
        parse(text, "fuzz.yml", known=KNOWN)
    except UsageError as error:
        for found in (error, *error.others):
            assert isinstance(found, UsageError)
            assert found.where is not None and found.where.line is not None
    else:
        MergeConfiguration.model_validate(pyyaml.safe_load(text))


def test_messages_stay_short_and_printable():
    for text in (
        f"? {'x' * 100_000}\n: 1\n",
        f"merge_method: {'x' * 100_000}\n",
        '"\\e[31m": 1\n',
        LINEAR.replace("weight", '"\\e]0;owned\\a"'),
    ):
        for error in refusals(text):
            assert len(str(error)) < 250
            assert str(error).isprintable()
