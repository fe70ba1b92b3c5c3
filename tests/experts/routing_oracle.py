"""Routing of a tiny model by plain loops: routers written again from logits, experts one token at a time.

The stock model runs with hooks; nothing of surgeon's passes is used. What the routed experts add to the stream is
measured: a layer runs again with routed and shared experts returning zero, and with only the shared ones doing so.
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "structure"))
import expert_models

SHARED = ("shared_expert", "shared_experts", "shared_mlp")
CORRECTIONS = ("e_score_correction_bias", "expert_bias")


@dataclass
class Choice:
    """One token in one layer.

    chosen: expert -> weight; norms and peaks: expert -> of its output; stream: direction of h; update: what the routed
    experts add, in units of the length of h; outputs: expert -> f.
    """

    chosen: dict[int, float]
    norms: dict[int, float]
    peaks: dict[int, float]
    outputs: dict[int, np.ndarray]
    stream: np.ndarray
    update: np.ndarray
    logits: list[float]


# ---- routers ---------------------------------------------------------------------------------------


def softmax(values):
    top = max(values)
    parts = [math.exp(value - top) for value in values]
    return [part / sum(parts) for part in parts]


def sigmoid(values):
    return [1 / (1 + math.exp(-value)) for value in values]


def best(values, count):
    return sorted(range(len(values)), key=lambda i: -values[i])[:count]


def allowed(scores, groups, kept, of_group):
    """Return the experts inside the best groups."""
    size = len(scores) // groups
    ranked = best([of_group(sorted(scores[g * size : (g + 1) * size])) for g in range(groups)], kept)
    return [i for i in range(len(scores)) if i // size in ranked]


def softmax_top(logits, k, config, correction):
    scores = softmax(logits)
    return {i: scores[i] for i in best(scores, k)}


def softmax_renormalised(logits, k, config, correction):
    chosen = softmax_top(logits, k, config, correction)
    return {i: weight / sum(chosen.values()) for i, weight in chosen.items()}


def top_then_softmax(logits, k, config, correction):
    ids = best(logits, k)
    return dict(zip(ids, softmax([logits[i] for i in ids]), strict=True))


def softmax_corrected(logits, k, config, correction):
    scores = softmax(logits)
    ids = best([s + c for s, c in zip(scores, correction, strict=True)], k)
    return {i: scores[i] / sum(scores[j] for j in ids) for i in ids}


def softmax_in_groups(logits, k, config, correction):
    scores = softmax(logits)
    inside = allowed(scores, config.n_group, config.topk_group, max)
    ids = best([s if i in inside else 0.0 for i, s in enumerate(scores)], k)
    return {i: scores[i] * config.routed_scaling_factor for i in ids}


def sigmoid_corrected(logits, k, config, correction):
    scores = sigmoid(logits)
    ids = best([s + c for s, c in zip(scores, correction, strict=True)], k)
    scale = getattr(config, "routed_scaling_factor", 1.0)
    return {i: scale * scores[i] / sum(scores[j] for j in ids) for i in ids}


def sigmoid_in_groups(logits, k, config, correction):
    scores = sigmoid(logits)
    for_choice = [s + c for s, c in zip(scores, correction, strict=True)]
    inside = allowed(for_choice, groups_of(config), config.topk_group, lambda ordered: sum(ordered[-2:]))
    ids = best([s if i in inside else -math.inf for i, s in enumerate(for_choice)], k)
    total = sum(scores[i] for i in ids) if config.norm_topk_prob else 1.0
    return {i: config.routed_scaling_factor * scores[i] / total for i in ids}


def groups_of(config):
    return getattr(config, "n_group", None) or config.num_expert_group


def sparsemixer(logits, k, config, correction):
    chosen, left = {}, list(logits)
    for _ in range(2):
        top = max(left)
        first = left.index(top)
        open_ = [
            v if (top - raw) / max(abs(raw), top) <= 2 * config.router_jitter_noise else -math.inf
            for v, raw in zip(left, logits, strict=True)
        ]
        chosen[first] = softmax(open_)[first]
        left[first] = -math.inf
    return chosen


def sigmoid_on_input(logits, k, config, correction):
    return {i: sigmoid(logits)[i] for i in best(logits, k)}


ROUTERS = {
    "mixtral": softmax_renormalised,
    "phimoe": sparsemixer,
    "minimax": softmax_renormalised,
    "minimax_m2": sigmoid_corrected,
    "qwen2_moe": softmax_top,
    "qwen3_moe": softmax_renormalised,
    "qwen3_next": softmax_renormalised,
    "qwen3_5_moe_text": softmax_renormalised,
    "olmoe": softmax_top,
    "deepseek_v2": softmax_in_groups,
    "deepseek_v3": sigmoid_in_groups,
    "glm4_moe": sigmoid_in_groups,
    "kimi_linear": sigmoid_in_groups,
    "nemotron_h": sigmoid_in_groups,
    "ernie4_5_moe": softmax_corrected,
    "hunyuan_v1_moe": softmax_renormalised,
    "lfm2_moe": sigmoid_corrected,
    "jamba": softmax_top,
    "granitemoe": top_then_softmax,
    "granitemoeshared": top_then_softmax,
    "granitemoehybrid": top_then_softmax,
    "gpt_oss": top_then_softmax,
    "llama4_text": sigmoid_on_input,
}


# ---- experts ---------------------------------------------------------------------------------------


def expert_output(experts, number, x, family):
    """Return one expert's output [d] for one token [d], float64."""
    w = {name: p.detach()[number].double().numpy() for name, p in experts.named_parameters(recurse=False)}
    if family == "nemotron_h":
        return w["down_proj"] @ np.maximum(w["up_proj"] @ x, 0) ** 2
    if family == "gpt_oss":
        both = x @ w["gate_up_proj"] + w["gate_up_proj_bias"]
        gate, up = np.minimum(both[::2], 7.0), np.clip(both[1::2], -7.0, 7.0)
        return ((up + 1) * gate / (1 + np.exp(-1.702 * gate))) @ w["down_proj"] + w["down_proj_bias"]
    if family == "llama4_text":
        gate, up = np.split(x @ w["gate_up_proj"], 2)
        return (gate / (1 + np.exp(-gate)) * up) @ w["down_proj"]
    gate, up = np.split(w["gate_up_proj"] @ x, 2)
    return w["down_proj"] @ (gate / (1 + np.exp(-gate)) * up)


# ---- running ---------------------------------------------------------------------------------------


def zeros(module, args, output):
    return torch.zeros_like(output)


def parts_of(layer):
    """Return (router, experts, shared, correction) of a layer, None without experts."""
    modules = dict(layer.named_modules())
    experts = next((m for name, m in modules.items() if name.rpartition(".")[2] == "experts"), None)
    if experts is None:
        return None
    count = expert_models.EXPERTS
    routers = [
        m for name, m in modules.items() if name.rpartition(".")[2] in ("gate", "router", "wg") and hasattr(m, "weight")
        and isinstance(m.weight, torch.Tensor) and m.weight.shape[0] == count
    ]  # fmt: skip
    assert len(routers) == 1
    shared = [m for name, m in modules.items() if name.rpartition(".")[2] in SHARED]
    held = [*layer.named_parameters(), *layer.named_buffers()]
    found = [t for name, t in held if name.rpartition(".")[2] in CORRECTIONS]
    correction = found[0].detach().reshape(-1).tolist() if found else [0.0] * count
    return routers[0], experts, shared, correction


def routing(family, samples, **overrides):
    """Return [sample][layer][token] -> Choice."""
    model = expert_models.build(family, **overrides)
    return [routing_of(model, family, sample) for sample in samples]


@torch.no_grad()
def routing_of(model, family, sample):
    base = getattr(model, "model", None) or model.base_model
    layers = base.layers
    calls, found = {}, {}
    handles = [
        layer.register_forward_pre_hook(
            lambda module, args, kwargs, n=n: calls.__setitem__(n, (args, kwargs)), with_kwargs=True
        )
        for n, layer in enumerate(layers)
    ]
    base(torch.from_numpy(sample)[None], use_cache=False)
    for handle in handles:
        handle.remove()
    for number, layer in enumerate(layers):
        parts = parts_of(layer)
        if parts is not None:
            found[number] = layer_routing(model, family, layer, parts, calls[number])
    return found


def layer_routing(model, family, layer, parts, call):
    router, experts, shared, correction = parts
    seen = {}
    args, kwargs = call

    def run(*silent):
        handles = [module.register_forward_hook(zeros) for module in silent]
        out = layer(*args, **kwargs)
        for handle in handles:
            handle.remove()
        return (out[0] if isinstance(out, tuple) else out)[0].double().numpy()

    def note(name):
        def hook(module, args, kwargs):
            value = args[0] if args else next(iter(kwargs.values()))
            seen[name] = value.reshape(-1, value.shape[-1]).double().numpy()

        return hook

    handles = [
        router.register_forward_pre_hook(note("router"), with_kwargs=True),
        experts.register_forward_pre_hook(note("experts"), with_kwargs=True),
    ]
    routed = run(*shared)
    for handle in handles:
        handle.remove()
    stream = run(experts, *shared)
    bias = getattr(router, "bias", None)
    bias = np.zeros(len(router.weight)) if bias is None else bias.double().numpy()
    weight = router.weight.double().numpy()
    config = model.config
    k = next(
        getattr(config, key) for key in ("num_experts_per_tok", "moe_topk", "moe_k") if hasattr(config, key)
    )
    choices = []
    for token in range(len(stream)):
        logits = [float(np.dot(row, seen["router"][token]) + b) for row, b in zip(weight, bias, strict=True)]
        chosen = ROUTERS[family](logits, k, config, correction)
        length = np.linalg.norm(stream[token])
        outputs = {}
        for expert, g in chosen.items():
            given = seen["router"][token] * g if family == "llama4_text" else seen["experts"][token]
            outputs[expert] = expert_output(experts, expert, given, family)
        choices.append(
            Choice(
                chosen,
                {e: float(np.sqrt((f**2).sum())) for e, f in outputs.items()},
                {e: float(np.abs(f).max()) for e, f in outputs.items()},
                outputs,
                stream[token] / length,
                (routed[token] - stream[token]) / length,
                logits,
            )
        )
    return choices
