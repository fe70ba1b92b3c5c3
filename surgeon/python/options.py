"""The options of the Python functions, for type checkers and editors; the names are those of the command line.

Each class has exactly the fields of the request model behind its command (a test compares names and types). Where a
request takes several values, one is as good: ``density=0.3`` is ``density=(0.3,)``. A path may be text or a `Path`.
"""

from __future__ import annotations

import inspect
import os
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, TypedDict, TypeVar

Dtype = Literal["float32", "float16", "bfloat16"]
RunDtype = Literal["auto", "float32", "bfloat16", "float16"]
Structure = Literal["heads", "ffn", "layers", "hidden"]
PathLike = str | os.PathLike[str]
Function = TypeVar("Function", bound=Callable[..., Any])


class MergeOptions(TypedDict, total=False):
    """Options of ``surgeon merge``; the fields of `surgeon.merge.request.MergeRequest`."""

    base: PathLike | Mapping[str, Any] | None
    weight: float | Sequence[float]
    density: float | Sequence[float]
    lambda_: float | None
    t: float | None
    normalize: bool | None
    param: Mapping[str, Any]
    layers: tuple[int, int] | None
    ignore: str | Sequence[str]
    dense: str | Sequence[str]
    dtype: Dtype | None
    vocab: str | None
    tokenizer: PathLike | None
    chat_template: PathLike | None
    text_from: PathLike | None
    aim: float | None
    acm: float | None
    acm_estimator: Literal["gaussian", "binned", "literal"]
    sens: float | None
    fim: bool
    delta_rank: float | None
    layer_scores: PathLike | None
    calibration: PathLike | Sequence[PathLike]
    samples: int
    sequence_length: int
    pack: bool
    device: str
    sweep: str | Sequence[str]
    seed: int
    max_shard_size: int
    weights: Literal["auto", "index", "single"]
    config: PathLike | None
    ignore_unlisted: bool
    allow_nonfinite: bool
    allow_pickle: bool
    dequantize: bool
    mergekit_quirks: bool
    strict: bool
    offline: bool


class PruneOptions(TypedDict, total=False):
    """Options of ``surgeon prune``; the fields of `surgeon.prune.request.PruneRequest` and of
    `surgeon.prune.experts.request.ExpertRequest` for mixtures of experts."""

    method: str | None
    criterion: str | None
    target_speedup: float | Sequence[float]
    target_params: float | Sequence[float]
    target_size: float | Sequence[float]
    sparsity: float | Sequence[float]
    keep_layers: int | Sequence[int]
    keep_experts: float | str | Sequence[float | str]
    pattern: str | None
    structures: Structure | Sequence[Structure] | None
    layout: Literal["uniform", "per-layer", "padded", "ragged"]
    round_to: int | Literal["auto"]
    protect_layers: int | Sequence[int]
    scores: PathLike | None
    protect: str | Sequence[str]
    no_protect: bool
    mix: Literal["auto", "mean", "max", "pool"]
    domain_weight: str | Sequence[str]
    scope: Literal["global", "per-layer", "per-expert"]
    router: Literal["representative", "average", "mass"] | None
    mtp: Literal["copy-last", "drop", "error"]
    expert_record: PathLike | None
    from_report: PathLike | None
    search: Literal["spdy", "dp"]
    search_budget: float
    sequential: bool
    damp: float
    allow_norm_approx: bool
    owl: bool
    mode: Literal["mix", "prefill", "decode"] | None
    batch: int
    context: int
    generate: int
    tolerance: float
    latency_table: PathLike | None
    table_anyway: bool
    measure: bool
    calibration: PathLike | Sequence[PathLike]
    samples: int | None
    sequence_length: int | None
    calibration_dtype: Dtype
    distill: bool
    distill_steps: int
    distill_batch: int
    distill_length: int
    learning_rate: float
    train: Literal["thresholds", "full"]
    bypass_rank: int
    nested: bool
    dtype: Dtype | None
    max_shard_size: int
    device: str
    threads: int | None
    memory_limit: int | None
    seed: int
    offline: bool
    dequantize: bool
    work: PathLike | None


class QuantizeOptions(TypedDict, total=False):
    """Options of ``surgeon quantize``; the fields of `surgeon.quantize.request.QuantizeRequest`."""

    scheme: str | Sequence[str]
    target_bits: float | None
    target_size: float | None
    target_kl: float | None
    plan: PathLike | None
    bits: int | Sequence[int]
    method: str | None
    group_size: int | None
    symmetric: bool
    format: str
    runtime: Literal["transformers", "vllm"]
    tensor_parallel: int
    double_quant: bool
    ignore: str | Sequence[str] | None
    sensitivity: str
    sensitivities: PathLike | None
    allocation: Literal["optimal", "pmq"]
    granularity: Literal["expert", "layer", "projection"]
    scope: Literal["layer", "model"]
    must_appear: int | Sequence[int]
    drop_experts: bool
    order: Literal["static-act", "group-aware", "none"]
    damp: float
    clip: bool | None
    true_sequential: bool | None
    target_shift: bool
    calibration: PathLike | Sequence[PathLike]
    samples: int
    sequence_length: int
    calibration_dtype: Dtype
    dtype: Dtype | None
    max_shard_size: int
    device: str
    threads: int | None
    memory_limit: int | None
    seed: int
    offline: bool
    dequantize: bool
    work: PathLike | None


class EvaluateOptions(TypedDict, total=False):
    """Options of ``surgeon eval``; the fields of `surgeon.evaluate.request.EvalRequest`."""

    questions: PathLike | Sequence[PathLike]
    match: str | None
    length: bool
    perplexity: PathLike | None
    kl: PathLike | None
    text: PathLike | None
    tasks: str | Sequence[str]
    include_path: PathLike | None
    limit: int | None
    samples: int
    temperature: float | None
    top_p: float | None
    top_k: int | None
    max_new_tokens: int
    pass_at: int | Sequence[int]
    reflection_words: str | Sequence[str]
    template: bool
    sequence_length: int
    batch_size: int | Literal["auto"]
    baseline: PathLike | None
    gate: str | Sequence[str]
    gate_limited: bool
    samples_out: PathLike | None
    output: PathLike | None
    resume: bool
    overwrite: bool
    dtype: RunDtype
    device: str
    threads: int | None
    memory_limit: int | None
    seed: int
    offline: bool
    dequantize: bool


class MeasureOptions(TypedDict, total=False):
    """Options of ``surgeon measure``; the fields of `surgeon.measure.request.MeasureRequest`."""

    baseline: PathLike | None
    mode: Literal["table", "mix", "prefill", "decode", "memory"] | None
    workload: Literal["mix", "prefill", "decode"] | None
    batch: int | None
    context: int | None
    generate: int | None
    heads: Literal["groups", "heads"]
    round_to: int
    repeat: int | None
    precision: float
    time_limit: float
    threads: int | None
    device: str
    dtype: RunDtype
    attention: str | None
    memory_limit: int | None
    output: PathLike | None
    overwrite: bool
    seed: int
    offline: bool


class EditOptions(TypedDict, total=False):
    """Options of ``surgeon edit``; the fields of `surgeon.edit.request.EditRequest`."""

    method: typing.Required[Literal["thinkedit", "project-out", "steer", "rice"]]
    direction: PathLike | None
    save_direction: PathLike | None
    responses: PathLike | None
    long: PathLike | None
    short: PathLike | None
    thresholds: tuple[int, int]
    site: Literal["attn", "mlp", "layer"] | None
    window: Literal["response", "last"] | None
    samples: int
    sequence_length: int
    force: bool
    heads: str | Sequence[str]
    heads_fraction: float | None
    heads_count: int | None
    strength: float | None
    project_bias: bool
    matrices: str | Sequence[str]
    layer: int | None
    layers: tuple[int, int] | None
    gamma: float | None
    kl_budget: float | None
    relabel: Literal["auto", "never"]
    control_vector: PathLike | None
    markers: str | Sequence[str]
    beta: float | None
    experts_count: int | None
    scale_experts: str | Sequence[str]
    expert_record: PathLike | None
    calibration: PathLike | Sequence[PathLike]
    check: bool
    device: str
    dtype: Dtype | None
    max_shard_size: int
    allow_nonfinite: bool
    dequantize: bool
    seed: int
    offline: bool


class ExportOptions(TypedDict, total=False):
    """Options of ``surgeon export``; the fields of `surgeon.deploy.export_request.ExportRequest`."""

    to: Literal["safetensors", "gguf", "decilm"]
    member: str | None
    dtype: Dtype | None
    gguf_type: str | None
    gguf_override: str | Sequence[str]
    max_shard_size: int
    check: bool
    allow_pickle: bool
    allow_nonfinite: bool
    dequantize: bool
    ignore_unlisted: bool
    weights: Literal["auto", "index", "single"]
    offline: bool


class ExpertOptions(TypedDict, total=False):
    """Options of ``surgeon inspect --experts`` beside those of `surgeon.inspect`; those of `surgeon.api.inspect_experts`."""

    calibration: Sequence[str] | None
    expert_record: PathLike | None
    scores: PathLike | None
    samples: int
    sequence_length: int
    seed: int
    keep_experts: int | None
    criterion: str
    markers: Sequence[str]
    windows: Sequence[int]
    cache_ratios: Sequence[float]
    logits: bool
    device: str
    calibration_dtype: str
    memory_limit: int | None


_REQUIRED = "typing.Required["


class _Default:
    """Stands for a default that the request behind a function decides."""

    def __repr__(self) -> str:
        return "..."


def takes(options: type) -> Callable[[Function], Function]:
    """Show the options of a function that takes them as ``**options``: in help, in ``?``, in completion of a notebook."""

    def shown(function: Function) -> Function:
        found = inspect.signature(function)
        own = [p for p in found.parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
        for name, annotation in options.__annotations__.items():
            text = annotation.__forward_arg__ if isinstance(annotation, typing.ForwardRef) else annotation
            required = text.startswith(_REQUIRED)
            text = text.removeprefix(_REQUIRED).removesuffix("]") if required else text
            default = inspect.Parameter.empty if required else _Default()
            own.append(
                inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=text)
            )
        function.__signature__ = found.replace(parameters=own)  # type: ignore[attr-defined]
        return function

    return shown


def plain(options: Mapping[str, Any], *models: Any) -> dict[str, Any]:
    """Return the options that were given as requests take them: a path as text, one of several values as a tuple.

    Args:
        models: the request models; the first that knows a field says whether it takes several values.
    """
    found = {}
    for name, value in options.items():
        if value is None:
            continue  # as if it had not been given
        field = next((m.model_fields[name] for m in models if name in m.model_fields), None)
        several = field is not None and _several(field.annotation)
        if isinstance(value, os.PathLike):
            value = os.fspath(value)
        if isinstance(value, (list, tuple)):
            value = tuple(os.fspath(one) if isinstance(one, os.PathLike) else one for one in value)
        elif several:
            value = (value,)
        found[name] = value
    return found


def _several(annotation: Any) -> bool:
    """Say whether a field takes any number of values."""
    if typing.get_origin(annotation) is tuple:
        return typing.get_args(annotation)[-1] is Ellipsis
    return any(_several(one) for one in typing.get_args(annotation) if one is not type(None))
