"""What the command line, a recipe step and the Python function can ask of a merge: one model.

`resolve` turns a request into a `MergeSpec`: method defaults of the command line, the base
rule for a long/short pair, weights by model. A mergekit YAML takes another way to the same type.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from surgeon.errors import UsageError, close_matches
from surgeon.merge.adjustments import Adjustments, CalibrationSource, split_method
from surgeon.merge.method import Method, Parameter
from surgeon.merge.methods import catalogue
from surgeon.merge.references import parse_model_ref
from surgeon.merge.spec import MergeSpec, ModelRef, Module, Slice, SliceSource, TokenizerSpec


class MergeRequest(BaseModel):
    """Options of ``surgeon merge``; every field is the option with underscores."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    models: tuple[str, ...] = Field(description="two or more models")
    method: str = "linear"
    base: str | None = None
    weight: tuple[float, ...] = ()
    density: tuple[float, ...] = ()
    lambda_: float | None = Field(default=None, alias="lambda")
    t: float | None = None
    normalize: bool | None = None
    param: dict[str, Any] = Field(default_factory=dict)
    layers: tuple[int, int] | None = None
    ignore: tuple[str, ...] = ()
    dense: tuple[str, ...] = ()
    dtype: Literal["float32", "float16", "bfloat16"] | None = None
    vocab: str | None = None
    tokenizer: str | None = None
    chat_template: str | None = None
    text_from: str | None = None
    aim: float | None = None
    acm: float | None = None
    acm_estimator: Literal["gaussian", "binned", "literal"] = "gaussian"
    sens: float | None = None
    fim: bool = False
    delta_rank: float | None = None
    layer_scores: str | None = None
    calibration: tuple[str, ...] = ()
    samples: int = 100
    sequence_length: int = 2048
    pack: bool = False
    device: str = "auto"
    sweep: tuple[str, ...] = ()
    seed: int = 0
    max_shard_size: int = 5_000_000_000
    weights: Literal["auto", "index", "single"] = "auto"
    config: str | None = None
    ignore_unlisted: bool = False
    allow_nonfinite: bool = False
    allow_pickle: bool = False
    dequantize: bool = False
    mergekit_quirks: bool = False
    strict: bool = False
    offline: bool = False

    @field_validator("max_shard_size")
    @classmethod
    def _positive(cls, value: int) -> int:
        if value < 1:
            raise ValueError("must be positive")
        return value


@dataclass(frozen=True)
class Resolved:
    """A request made definite.

    Attributes:
        spec: the merge.
        pair: (structure donor, text donor) when the base of a long/short pair was implied.
        notes: sentences for stderr.
        points: sweep points, name -> parameter values; empty without a sweep.
    """

    spec: MergeSpec
    pair: tuple[ModelRef, ModelRef] | None
    notes: tuple[str, ...]
    points: dict[str, dict[str, float]]


def resolve(request: MergeRequest) -> Resolved:
    """Turn a request into a spec with every default filled in.

    Raises:
        UsageError: unknown method or parameter, wrong counts, missing base.
    """
    name, implied = split_method(request.method)
    method = catalogue(name)
    adjust = adjustments_of(request, implied)
    models = [parse_model_ref(text) for text in request.models]
    base = parse_model_ref(request.base) if request.base is not None else None
    notes: list[str] = []
    pair = None
    if base is None and method.base == "required":
        if len(models) != 2:
            raise UsageError(
                "E205", f"{method.name.replace('_', '-')} needs a base and {len(models)} models were given",
                help="--base MODEL; only with exactly two models the last one is taken",
            )  # fmt: skip
        base = models[-1]
        pair = (models[-1], models[0])
        notes.append(
            f"{method.name.replace('_', '-')} needs a base; using {base} (last model). Set --base to choose another."
        )
    if base is None and adjust.active and len(models) == 2:
        shown = ", ".join(adjust.active).replace("_", "-")
        notes.append(
            f"{shown}: task vectors start at {models[-1]} (last model). Set --base to choose another."
        )
    if request.calibration and not set(adjust.measured) & {"aim", "acm", "sens"}:
        notes.append("--calibration is not read: only aim, acm and sens look at text")
    if base is not None and method.base == "forbidden":
        raise UsageError("E205", f"{method.name.replace('_', '-')} takes no base", help="leave out --base")
    if len(set(models)) != len(models):
        twice = next(str(m) for m in models if models.count(m) > 1)
        raise UsageError(
            "E206", f"{twice} is given twice", help="name each model once; --weight sets its share"
        )
    listed = models if base is None or base in models else [*models, base]
    _check_count(method, len(listed), base)
    others = [m for m in listed if m != base] if method.base in {"required", "optional"} else listed
    each = _per_model(request, method, others)
    shared = _shared(request, method)
    if adjust.fim and request.lambda_ is None and "lambda" in shared and "lambda" not in request.param:
        shared["lambda"] = (
            1.0  # FIM's strengths are the whole coefficient; a further 0.7 would halve them twice
        )
    if request.layers is not None and request.layers[0] >= request.layers[1]:
        raise UsageError("E214", f"--layers {request.layers[0]}:{request.layers[1]} is empty",
                         help="the upper end is exclusive")  # fmt: skip
    sources = tuple(SliceSource(m, None, each.get(m, {})) for m in listed)
    tokenizer = None
    if request.vocab:
        word = request.vocab
        tokenizer = TokenizerSpec(word if word in {"base", "union", "truncate"} else parse_model_ref(word))
    spec = MergeSpec(
        method=method.name,
        modules=(Module("", (Slice(sources),)),),
        base_model=base,
        parameters=shared,
        out_dtype=request.dtype,
        precision="float32",
        tokenizer=tokenizer,
        chat_template=request.chat_template,
        adjust=adjust,
        calibration=calibration_of(request),
        text_from=parse_model_ref(request.text_from) if request.text_from else None,
    )
    if spec.text_from is not None and spec.text_from not in listed:
        raise UsageError("E232", f"--text-from {spec.text_from} is not among the models",
                         help="name one of them; --tokenizer takes the tokenizer of any model")  # fmt: skip
    return Resolved(spec, pair, tuple(notes), sweep_points(request, method, adjust))


def adjustments_of(request: MergeRequest, implied: dict[str, Any]) -> Adjustments:
    """Return the request's adjustments; what is given wins over what the method's name implies."""
    given = {
        "aim": request.aim, "acm": request.acm, "sens": request.sens, "fim": request.fim or None,
        "delta_rank": request.delta_rank, "layer_scores": request.layer_scores,
    }  # fmt: skip
    adjust = Adjustments(
        **{**implied, **{k: v for k, v in given.items() if v is not None}},
        acm_estimator=request.acm_estimator,
    )
    adjust.check()
    return adjust


def calibration_of(request: MergeRequest) -> CalibrationSource:
    source = CalibrationSource(
        sources=request.calibration, samples=request.samples, sequence_length=request.sequence_length,
        pack=request.pack, device=request.device,
    )  # fmt: skip
    source.check()
    return source


def _check_count(method: Method, count: int, base: ModelRef | None) -> None:
    least, most = method.models
    name = method.name.replace("_", "-")
    if count < least:
        raise UsageError("E205", f"{name} needs at least {least} models, {count} given",
                         help="name every model in one command; the base counts as well" if base is None else "name every model in one command")  # fmt: skip
    if most is not None and count > most:
        what = f"exactly {most}" if least == most else f"at most {most}"
        extra = ", the base included" if base is not None else ""
        raise UsageError("E205", f"{name} takes {what} models{extra}, {count} given",
                         help="merge in several steps, or use a method for any number: linear, ties, task-arithmetic")  # fmt: skip


def _values(count: int) -> str:
    return "1 value" if count == 1 else f"{count} values"


def _default(parameter: Parameter) -> Any:
    return parameter.default if parameter.cli is None else parameter.cli


def _per_model(
    request: MergeRequest, method: Method, others: list[ModelRef]
) -> dict[ModelRef, dict[str, Any]]:
    each: dict[ModelRef, dict[str, Any]] = {m: {} for m in others}
    given: dict[str, tuple[float, ...]] = {}
    for name in ("weight", "density"):
        values = getattr(request, name)
        if values and name not in method.table and name == "density" and "keep" in method.table:
            name = "keep"
        if values:
            given[name] = values
    for name, value in request.param.items():
        parameter = method.table.get(name)
        if parameter is not None and parameter.per_model:
            values = value if isinstance(value, (list, tuple)) else (value,)
            given[name] = tuple(coerce(parameter, v) for v in values)
    for name, values in given.items():
        parameter = method.table.get(name)
        if parameter is None:
            raise unknown_parameter(name, method)
        if not parameter.per_model:
            continue
        if name == "weight" and len(values) != len(others):
            raise UsageError(
                "E207", f"--weight has {_values(len(values))} for {len(others)} models",
                help="one for each model in order" + (" (the base has none)" if len(others) < len(request.models) or
                                                       request.base else ""),
            )  # fmt: skip
        if len(values) not in {1, len(others)}:
            raise UsageError("E207", f"--{name} has {_values(len(values))} for {len(others)} models",
                             help="one for all, or one for each model in order")  # fmt: skip
        for model, value in zip(others, values if len(values) > 1 else values * len(others), strict=True):
            parameter.check(value, method.name)
            each[model][name] = value
    for parameter in method.parameters:
        if parameter.per_model:
            for model in others:
                if parameter.name not in each[model] and _default(parameter) is not None:
                    each[model][parameter.name] = _default(parameter)
    return each


def _shared(request: MergeRequest, method: Method) -> dict[str, Any]:
    given: dict[str, Any] = {}
    if request.lambda_ is not None:
        given["scale" if "lambda" not in method.table and "scale" in method.table else "lambda"] = (
            request.lambda_
        )
    if request.t is not None:
        given["t"] = request.t
    if request.normalize is not None:
        given["normalize"] = request.normalize
    if request.density and "density" not in method.table and "keep" in method.table:
        given["keep"] = request.density[0]
    for name, value in request.param.items():
        parameter = method.table.get(name)
        if parameter is None:
            raise unknown_parameter(name, method)
        if not parameter.per_model:
            given[name] = coerce(parameter, value)
    for name, value in given.items():
        if name not in method.table:
            raise unknown_parameter(name, method)
        method.table[name].check(value, method.name)
    for parameter in method.parameters:
        if not parameter.per_model and parameter.name not in given and _default(parameter) is not None:
            given[parameter.name] = _default(parameter)
    return given


def unknown_parameter(name: str, method: Method) -> UsageError:
    takes = ", ".join(p.name for p in method.parameters if not p.inert)
    near = close_matches(name, method.table)
    return UsageError(
        "E211", f'unknown parameter "{name}" for method {method.name.replace("_", "-")}',
        help=(near + " " if near else "") + f"{method.name.replace('_', '-')} takes {takes or 'none'}",
    )  # fmt: skip


def coerce(parameter: Parameter, value: Any) -> Any:
    """Turn a command-line text into the parameter's kind."""
    if not isinstance(value, str):
        return value
    try:
        if parameter.kind == "float":
            return float(value)
        if parameter.kind == "int":
            return int(value)
    except ValueError:
        raise UsageError(
            "E212", f'{parameter.name} is "{value}"', help=f"it must be a {parameter.kind}"
        ) from None
    if parameter.kind == "bool":
        words = {
            "true": True,
            "yes": True,
            "on": True,
            "1": True,
            "false": False,
            "no": False,
            "off": False,
            "0": False,
        }
        if value.lower() not in words:
            raise UsageError("E212", f'{parameter.name} is "{value}"', help="it must be true or false")
        return words[value.lower()]
    return value


def sweep_points(request: MergeRequest, method: Method, adjust: Adjustments) -> dict[str, dict[str, float]]:
    """Expand ``NAME=START:STOP:STEP`` (both ends included) and ``NAME=A,B,C`` into named points."""
    axes: list[tuple[str, list[float]]] = []
    for text in request.sweep:
        name, _, span = text.partition("=")
        name = name.strip()
        if name == "aim" and adjust.aim is not None:
            axes.append((name, _span(text, span)))
            continue
        if hasattr(adjust, name) and name not in method.table:
            raise UsageError("E215", f"--sweep {name}: of the adjustments only aim can be swept, and it must be in use",
                             help="run once for each value")  # fmt: skip
        if name not in method.table:
            raise unknown_parameter(name, method)
        if method.table[name].kind not in {"float", "int"}:
            raise UsageError(
                "E215", f"--sweep {name}: only numbers can be swept", help="run once for each value"
            )
        axes.append((name, _span(text, span)))
    if len({name for name, _ in axes}) != len(axes):
        raise UsageError(
            "E215", "--sweep names one parameter twice", help="give all values of a parameter in one --sweep"
        )
    points: dict[str, dict[str, float]] = {}
    if axes:
        points[""] = {}
    for name, values in axes:
        for value in values:
            if name in method.table:
                method.table[name].check(value, method.name)
            else:
                replace(adjust, **{name: value}).check()
        points = {
            (f"{key},{name}={value:g}" if key else f"{name}={value:g}"): {**point, name: value}
            for key, point in points.items()
            for value in values
        }
    if len(points) > 64:
        raise UsageError(
            "E215", f"the sweep has {len(points)} points", help="at most 64 outputs are written at once"
        )
    return points


def _span(text: str, span: str) -> list[float]:
    import math

    try:
        if ":" in span:
            start, stop, step = (float(part) for part in span.split(":"))
            if not all(map(math.isfinite, (start, stop, step))) or step == 0 or (stop - start) / step < 0:
                raise ValueError
            count = math.floor((stop - start) / step + 1e-9) + 1
            if count > 1000:
                raise ValueError
            return [round(start + i * step, 12) for i in range(count)]
        values = [float(part) for part in span.split(",")]
        if not values or not all(map(math.isfinite, values)) or len(set(values)) != len(values):
            raise ValueError
        return values
    except ValueError:
        raise UsageError("E215", f"--sweep {text} cannot be read",
                         help="NAME=START:STOP:STEP (ends included), or NAME=A,B,C") from None  # fmt: skip
