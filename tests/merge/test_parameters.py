"""Parameter resolution, against closed forms and against mergekit's own resolver."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import yaml as pyyaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mergekit.common import ModelReference
from mergekit.config import ConfigReader, MergeConfiguration, OutputModuleDefinition
from mergekit.merge_methods.base import (
    MISSING,
    BasePolicy,
    InputContract,
    MergeMethodSpec,
    ParameterScope,
    ParameterSpec,
)
from mergekit.parameter_resolver import resolve_parameters

from surgeon.errors import UsageError, Where
from surgeon.merge.parameters import (
    gradient_position,
    resolve,
    resolve_tensor,
    slice_scopes,
    unmatched_filters,
)
from surgeon.merge.settings import faults_in
from surgeon.merge.spec import MergeSpec, ModelRef, Module, Slice, SliceSource
from surgeon.recipe.mergekit_yaml import parse


@dataclass(frozen=True)
class P:
    name: str
    kind: str = "float"
    per_model: bool = False
    default: Any = None


TABLE = {
    p.name: p
    for p in (
        P("weight", per_model=True),
        P("density", per_model=True, default=1.0),
        P("normalize", "bool", default=True),
        P("lambda", default=1.0),
        P("t"),
        P("steps", "int", default=10),
        P("mode", "str", default="plain"),
    )
}
A, B, C = ModelRef("a"), ModelRef("b"), ModelRef("c")


def spec_of(setting, **more) -> MergeSpec:
    """A merge of A and B whose global parameters are given."""
    piece = Slice((SliceSource(A), SliceSource(B)))
    return MergeSpec("ties", (Module("", (piece,)),), parameters=setting, **more)


def one(setting, kind="float", tensor="model.layers.0.mlp.up_proj.weight", t=0.0, default=None):
    return resolve(P("x", kind, default=default), slice_scopes(spec_of({"x": setting})), tensor, t).value


def test_gradient_over_four_layers():
    """The table of a run: embedding .1, layers .1/.3667/.6333/.9, final norm and head .1."""
    values = [one([0.1, 0.9], t=gradient_position(i, 4)) for i in range(4)]
    assert values == pytest.approx([0.1, 0.1 + 0.8 / 3, 0.1 + 1.6 / 3, 0.9])
    assert one([0.1, 0.9], t=0.0) == 0.1
    assert gradient_position(0, 1) == 1.0
    assert one([0.1, 0.9], t=gradient_position(0, 1)) == pytest.approx(0.9)


@pytest.mark.parametrize(
    ("setting", "kind", "t", "expected"),
    [
        (0.5, "float", 0, 0.5),
        (1, "float", 0, 1.0),
        ("1e-4", "float", 0, 1e-4),
        (" 0.5 ", "float", 0, 0.5),
        (3.0, "int", 0, 3),
        ("7", "int", 0, 7),
        ("true", "bool", 0, True),
        ("No", "bool", 0, False),
        (1.0, "bool", 0, True),
        (0, "bool", 0, False),
        ("sum", "str", 0, "sum"),
        ([0, "1e-1"], "float", 0.5, 0.05),
        ([0, 1, 0], "float", 0.25, 0.5),
        ([2], "float", 1.0, 2.0),
        ([1, 5], "int", 0.5, 3),
        ([True, False], "bool", 0.99, True),
        ([True, False], "bool", 1.0, False),
        ([0, 1, 1], "bool", 0.5, True),
        (["x", "y", "z"], "str", 0.5, "y"),
    ],
)
def test_scalars_and_gradients(setting, kind, t, expected):
    value = one(setting, kind, t=t)
    assert value == pytest.approx(expected) if kind == "float" else value == expected
    assert type(value) is type(expected)


def test_filters():
    setting = [
        {"filter": "self_attn", "value": [0, 1]},
        {"filter": "mlp", "value": "0.25"},
        {"value": 0.75},
    ]
    assert one(setting, tensor="model.layers.3.self_attn.q_proj.weight", t=0.5) == 0.5
    assert one(setting, tensor="model.layers.3.mlp.gate.weight") == 0.25
    assert one(setting, tensor="model.norm.weight") == 0.75
    assert one({"filter": "*", "value": 2}) == 2.0
    assert one([{"filter": None, "value": 3}]) == 3.0
    assert one([{"filter": "MLP", "value": 3}], default=9.0) == 9.0, "filters are case-sensitive"
    assert one([{"filter": "mlp.*", "value": 3}], default=9.0) == 9.0, "filters are no patterns"
    assert one([{"filter": "mlp", "value": []}, {"value": 1}], default=9.0) == 9.0, (
        "an empty value decides too"
    )
    assert one([], default=9.0) == 9.0


def test_scopes_in_order_and_where_a_value_came_from():
    source = SliceSource(A, parameters={"weight": [{"filter": "mlp", "value": 1}]})
    piece = Slice((source, SliceSource(B)), parameters={"weight": [{"filter": "attn", "value": 2}]})
    module = Module("text", (piece,), {"weight": {"filter": "norm", "value": 3}})
    spec = MergeSpec("ties", (Module("vision", ()), module), parameters={"weight": [4, 5]})
    scopes = slice_scopes(spec, 1, 0)
    found = {
        name: resolve(TABLE["weight"], scopes, name, 0.5, model=A) for name in ("mlp", "attn", "norm", "head")
    }
    assert {name: (r.value, r.level, r.filter, r.gradient) for name, r in found.items()} == {
        "mlp": (1.0, "source", "mlp", False),
        "attn": (2.0, "slice", "attn", False),
        "norm": (3.0, "module", "norm", False),
        "head": (4.5, "global", None, True),
    }
    assert found["mlp"].path == ("modules", "text", "slices", 0, "sources", 0, "parameters", "weight")
    assert resolve(TABLE["weight"], scopes, "mlp", model=B).value == 4.0, "another source's value is not seen"
    assert resolve(TABLE["weight"], scopes, "mlp", model=C).value == 4.0, (
        "an appended base sees the outer scopes"
    )
    assert resolve(TABLE["density"], scopes, "mlp", model=A).level == "default"


def test_shared_by_output_name_and_per_model_by_input_name():
    spec = spec_of(
        {
            "t": [{"filter": "layers.1.", "value": 0.25}, {"value": 0}],
            "weight": [{"filter": "layers.9.", "value": 5}, {"value": 1}],
        }
    )
    shared, per_model = resolve_tensor(
        slice_scopes(spec),
        {name: TABLE[name] for name in ("t", "weight")},
        output="layers.1.w",
        inputs={A: "layers.9.w", B: "layers.1.w", C: "layers.1.w"},
        base=C,
    )
    assert shared["t"].value == 0.25
    assert {model: values["weight"].value for model, values in per_model.items() if values} == {
        A: 5.0,
        B: 1.0,
    }


def test_a_missing_required_parameter_names_parameter_model_and_tensor():
    where = {("parameters", "weight"): Where("m.yml", 7, 3)}
    spec = spec_of({"weight": [{"filter": "mlp", "value": 1}]}, where=where)
    with pytest.raises(UsageError) as caught:
        resolve_tensor(slice_scopes(spec), {"weight": TABLE["weight"]}, output="norm", inputs={A: "norm"})
    error = caught.value
    assert (error.code, error.exit_code) == ("E257", 2)
    assert '"weight" of model a' in error.message and "tensor norm" in error.message
    assert (error.where.line, error.where.tensor) == (7, "norm")
    with pytest.raises(UsageError, match='"t" is not given for tensor norm'):
        resolve_tensor(slice_scopes(spec_of({})), {"t": TABLE["t"]}, output="norm", inputs={A: "norm"})


def test_an_optional_parameter_may_default_to_nothing():
    @dataclass(frozen=True)
    class Optional(P):
        required: bool = False

    assert resolve(Optional("scale"), slice_scopes(spec_of({})), "w").value is None


BAD = [
    ("float", "abc"), ("float", True), ("float", "010"), ("float", "1_0"), ("float", "12:30"), ("float", float("nan")),
    ("float", float("inf")), ("float", ".nan"), ("float", "-.inf"), ("float", "nan"), ("float", "1e999"),
    ("float", 10**400), ("float", None), ("float", {"value": [None]}), ("float", [0.5, [1]]), ("float", [0.5, "x"]),
    ("int", 2.5), ("int", "2.5"), ("int", False), ("bool", 2), ("bool", "maybe"), ("bool", 0.5), ("str", 5), ("str", True),
    ("float", [{"value": 1}, 2]), ("float", {"filter": "mlp"}), ("float", {"filter": "*", "value": "x"}),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "setting"), BAD)
def test_wrong_types_and_values_that_are_not_finite(kind, setting):
    assert list(faults_in(setting, P("x", kind))), "found without any tensor"
    with pytest.raises(UsageError) as caught:
        one(setting, kind)
    assert caught.value.code == "E212"
    assert caught.value.message.startswith("x: ")


@pytest.mark.parametrize(
    "setting", [{"filter": 5, "value": 1}, {"value": 1, "weight": 2}, [{"filtre": "a", "value": 1}]]
)
def test_malformed_entries(setting):
    assert list(faults_in(setting, None))


def test_an_interpolated_value_must_fit_too():
    with pytest.raises(UsageError, match=r"2\.5 is not a whole number"):
        one([2, 3], "int", t=0.5)


def test_unmatched_filters():
    text = """
merge_method: ties
models:
  - model: a
    parameters: {weight: [{filter: self_Attn, value: 1}, {value: 2}]}
  - model: b
    parameters: {weight: {filter: "mlp.*", value: 1}}
parameters:
  t: [{filter: norm, value: 1}, {filter: "*", value: 2}, {filter: expert, value: 3}]
"""
    (spec,), _ = parse(text, "m.yml", known={"ties": TABLE})
    outputs = ["layers.0.mlp.w", "layers.0.self_attn.w", "norm.w"]
    found = unmatched_filters(spec, outputs, {A: ["layers.0.experts.w"]})
    assert [(message.split('"')[1], where.line) for message, where in found] == [
        ("self_Attn", 5),
        ("mlp.*", 7),
    ]
    assert "not patterns" in found[1][0]
    assert [m.split('"')[1] for m, _ in unmatched_filters(spec, outputs) if "expert" in m] == ["expert"]


# --- against mergekit -----------------------------------------------------------------------

KINDS = {"float": float, "int": int, "bool": bool, "str": str}
ORACLE = MergeMethodSpec(
    "ties",
    tuple(
        ParameterSpec(
            p.name,
            KINDS[p.kind],
            ParameterScope.NON_BASE if p.per_model else ParameterScope.SHARED,
            MISSING if p.default is None else p.default,
        )
        for p in TABLE.values()
    ),
    InputContract(base=BasePolicy.REQUIRED),
)
NAMES = ["embed.weight", "layers.0.mlp.w", "layers.1.mlp.w", "layers.1.self_attn.q", "norm.w"]
numbers = st.one_of(
    st.floats(-2, 2).map(lambda x: round(x, 3)),
    st.integers(-3, 3),
    st.sampled_from(["1e-3", "0.5", "-2", "1E1"]),
)
scalars = {
    "float": numbers,
    "int": st.integers(0, 3).flatmap(lambda n: st.sampled_from([n, str(n), float(n)])),
    "bool": st.sampled_from([True, False, 1, 0, 1.0, "true", "off", "Yes", "n"]),
    "str": st.sampled_from(["sum", "mean", "1e", "no"]),
}


def settings_for(kind: str):
    value = st.one_of(scalars[kind], st.lists(scalars[kind], max_size=1 if kind == "int" else 4))
    filters = st.sampled_from([None, "*", "mlp", "layers.1", "self_attn", "none such", "w"])
    entry = st.one_of(
        st.fixed_dictionaries({"filter": filters, "value": value}), st.fixed_dictionaries({"value": value})
    )
    return st.one_of(value, entry, st.lists(entry, min_size=1, max_size=3))


maps = st.fixed_dictionaries({}, optional={p.name: settings_for(p.kind) for p in TABLE.values()})
maybe = st.one_of(st.just({}), maps)


@st.composite
def configurations(draw):
    """A mergekit configuration with one slice, in one of the three forms, base model c."""
    form = draw(st.sampled_from(["models", "slices", "modules"]))
    sources = [{"model": name, "parameters": draw(maybe)} for name in ("a", "b", "c")]
    config = {"merge_method": "ties", "base_model": "c", "parameters": draw(maybe)}
    if form == "models":
        return {**config, "models": sources}
    for source in sources:
        source["layer_range"] = [0, 3]
    slices = [{"sources": sources, "parameters": draw(maybe)}]
    if form == "slices":
        return {**config, "slices": slices}
    return {**config, "modules": {"text": {"slices": slices, "parameters": draw(maybe)}}}


def ask_mergekit(text: str, output: str, inputs: dict[str, str], t: float):
    config = MergeConfiguration.model_validate(pyyaml.safe_load(text))
    module = None
    if config.modules:
        module = config.modules["text"]
        piece = module.slices[0]
    elif config.slices:
        piece = config.slices[0]
    else:
        # What its planner does with a plain models list.
        sources = [
            {"model": m.model, "layer_range": [0, 3], "parameters": m.parameters} for m in config.models
        ]
        module = OutputModuleDefinition(slices=[{"sources": sources}])
        piece = module.slices[0]
    reader = ConfigReader(config=config, t=t, slice_out=piece, module=module)
    shared, per_model = resolve_parameters(
        ORACLE,
        tensor_name=output,
        inputs={ModelReference.parse(name): tensor for name, tensor in inputs.items()},
        sources=reader.parameter_sources,
        base_model=reader.base_model,
        t=t,
    )
    return shared, {str(model): values for model, values in per_model.items()}


def ask_surgeon(text: str, output: str, inputs: dict[str, str], t: float):
    (spec,), _ = parse(text, known={"ties": TABLE})
    shared, per_model = resolve_tensor(
        slice_scopes(spec),
        TABLE,
        output=output,
        inputs={ModelRef(name): tensor for name, tensor in inputs.items()},
        t=t,
        base=spec.base_model,
    )
    return (
        {name: found.value for name, found in shared.items()},
        {str(m): {name: found.value for name, found in values.items()} for m, values in per_model.items()},
    )


@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    configurations(),
    st.sampled_from(NAMES),
    st.lists(st.sampled_from(NAMES), min_size=3, max_size=3),
    st.sampled_from([0.0, 1 / 3, 0.5, 2 / 3, 1.0]),
    st.booleans(),
)
def test_equal_to_mergekit(config, output, names, t, complete):
    if complete:  # most random configurations lack a required value
        config = {**config, "parameters": {"weight": 0.5, "t": [0, 1], **config["parameters"]}}
    text = pyyaml.safe_dump(config, sort_keys=False)
    inputs = dict(zip("abc", names, strict=True))
    try:
        expected = ask_mergekit(text, output, inputs, t)
    except RuntimeError as error:
        assert "Missing required" in str(error)
        with pytest.raises(UsageError) as caught:
            ask_surgeon(text, output, inputs, t)
        assert caught.value.code == "E257"
        return
    assert ask_surgeon(text, output, inputs, t) == expected


def test_spec_without_positions_resolves_as_well():
    spec = replace(spec_of({"weight": "x"}), where={})
    with pytest.raises(UsageError) as caught:
        resolve(TABLE["weight"], slice_scopes(spec), "w", model=A)
    assert caught.value.where == Where(tensor="w")
