"""Do these checkpoints fit together? Everything that can be said from headers and configs.

All findings are collected before any is raised, so that one dry run shows them all.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from surgeon.architectures import conformance
from surgeon.architectures import get as architecture_of
from surgeon.checkpoint.checkpoint import Checkpoint
from surgeon.checkpoint.header import printable
from surgeon.errors import InputError, SurgeonError, Where, raise_all
from surgeon.formats.dequantized import plain_needed
from surgeon.traits import embedding_name, head_name, is_tied, quantized, text_section

_MUST_AGREE = ("rope", "head_dim", "sliding_window", "partial_rotary_factor")
"""Positions and heads mean something else where these differ: no weight average can be right."""

_SIZES = (
    "model_type", "hidden_size", "n_embd", "num_hidden_layers", "n_layer", "num_attention_heads", "n_head",
    "num_key_value_heads", "intermediate_size", "n_inner", "moe_intermediate_size", "num_experts", "num_local_experts",
    "n_routed_experts", "num_experts_per_tok", "head_dim",
)  # fmt: skip
_DEPTHS = {"num_hidden_layers", "n_layer"}
_NEVER_MATTERS = {
    "_name_or_path", "transformers_version", "torch_dtype", "dtype", "use_cache", "vocab_size",
    "tie_word_embeddings", "max_position_embeddings", "surgeon", "text_config", "vision_config",
}  # fmt: skip


@dataclass
class Findings:
    """Collected while planning."""

    errors: list[SurgeonError] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def check_inputs(checkpoints: Mapping[str, Checkpoint], findings: Findings, *, arithmetic: bool) -> None:
    """Check each input alone: complete for its config, and made of plain weights (faults E1-E4, D3, D4)."""
    for checkpoint in checkpoints.values():
        if checkpoint.config is not None:
            shapes = {n: (t.dtype, t.shape) for n, t in checkpoint.tensors.items()}
            kinds: dict[str, list[conformance.Finding]] = {}
            unknown: list[str] = []
            for finding in conformance.check(checkpoint.config, shapes):
                if finding.kind == "unexpected-tensor" and finding.tensor:
                    unknown.append(finding.tensor)
                else:
                    kinds.setdefault(finding.severity, []).append(finding)
            if unknown:
                # Fault E2: carried along, never dropped; what no loader reads must be said, though.
                listing = ", ".join(map(printable, unknown[:3])) + (", ..." if len(unknown) > 3 else "")
                findings.warnings.append(
                    f"{checkpoint.label}: {len(unknown)} tensors have no place in a model with this config.json; they are "
                    f"merged or copied like all others: {listing}"
                )
            for finding in kinds.get("error", []):
                findings.errors.append(
                    InputError("E343", f"{checkpoint.label}: {finding.message}",
                               where=Where(tensor=printable(finding.tensor)) if finding.tensor else None,
                               help="weights and config.json are from different versions, or the download is incomplete")
                )  # fmt: skip
            for finding in kinds.get("notice", []):
                if finding.message not in findings.notes:
                    findings.notes.append(finding.message)
        if tied_copies_differ(checkpoint):
            findings.errors.append(
                InputError("E346", f"{checkpoint.label} ties its embeddings but stores two different copies",
                           help="set tie_word_embeddings to false in its config.json if the output head is meant")
            )  # fmt: skip
        if arithmetic and quantized(checkpoint):
            findings.errors.append(plain_needed(checkpoint, "merging needs plain weights"))


def compare_configs(
    structure: str,
    checkpoints: Mapping[str, Checkpoint],
    findings: Findings,
    *,
    refuse: bool,
    sliced: bool = False,
) -> None:
    """Compare every config with the structure donor's (faults E11, rope and context conflicts).

    Args:
        refuse: disagreement about positions or heads is an error; else (mergekit YAML) a warning.
        sliced: layers are chosen one by one, so that models of different depth may take part.
    """
    reference = checkpoints[structure]
    if reference.config is None:
        return
    ours = text_section(reference.config)
    for key, other in checkpoints.items():
        if key == structure or other.config is None:
            continue
        theirs = text_section(other.config)
        sizes = [
            f"{k} {short(ours.get(k))} / {short(theirs.get(k))}"
            for k in _SIZES
            if ours.get(k) is not None and theirs.get(k) is not None and ours[k] != theirs[k]
            and not (sliced and k in _DEPTHS)
        ]  # fmt: skip
        if sizes:
            findings.errors.append(
                InputError("E344", f"{reference.label} and {other.label} are different architectures: {'; '.join(sizes)}",
                           help="weights can be merged only between checkpoints of one architecture and size")
            )  # fmt: skip
            continue
        conflicts = []
        mine, his = _positions(ours), _positions(theirs)
        for name in sorted({*mine, *his}):
            if mine.get(name) == his.get(name):
                continue
            text = f"{name} {short(mine.get(name))} / {short(his.get(name))}"
            if name == "rope_scaling" and refuse:
                # Context extension, often switched on without training: it comes with the context length.
                findings.warnings.append(
                    f"{reference.label} and {other.label} scale positions differently: {text}"
                )
            else:
                conflicts.append(text)
        kinds = ours.get("layer_types"), theirs.get("layer_types")
        if None not in kinds and kinds[0] != kinds[1] and not sliced:
            conflicts.append("layer_types (which layers see the whole context)")
        if conflicts:
            text = f"{reference.label} and {other.label} disagree about positions: {'; '.join(conflicts)}"
            if refuse:
                findings.errors.append(
                    InputError(
                        "E345",
                        text,
                        help="their weights mean different things; a merge of both would be wrong",
                    )
                )
            else:
                findings.warnings.append(text)
        context = ours.get("max_position_embeddings"), theirs.get("max_position_embeddings")
        if None not in context and context[0] != context[1]:
            findings.notes.append(
                f"max_position_embeddings: {reference.label} {context[0]}, {other.label} {context[1]}"
            )
        rest = [
            f"{k} {short(ours.get(k))} / {short(theirs.get(k))}"
            for k in sorted({*ours, *theirs} - _NEVER_MATTERS - (_DEPTHS if sliced else set()))
            if ours.get(k) != theirs.get(k) and not k.startswith((*_MUST_AGREE, "layer_types"))
        ]  # fmt: skip
        if rest:
            findings.notes.append(
                f"config fields that differ ({reference.label} / {other.label}): {'; '.join(rest)}"
            )


def short(value: Any) -> str:
    """Return a config value in a few characters."""
    text = json.dumps(value, sort_keys=True) if isinstance(value, (dict, list)) else str(value)
    return printable(text if len(text) <= 60 else text[:57] + "...")


def _positions(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the position-related settings in one spelling, whatever transformers version wrote them."""
    found: dict[str, Any] = {}
    rope = config.get("rope_parameters")
    nested = isinstance(rope, dict)
    theta = rope.get("rope_theta") if nested else None
    found["rope_theta"] = theta if theta is not None else config.get("rope_theta", 10000.0)
    scaling = rope if nested else config.get("rope_scaling")
    if isinstance(scaling, dict):
        plain = {k: v for k, v in scaling.items() if k not in {"rope_theta", "type", "rope_type"}}
        kind = scaling.get("rope_type", scaling.get("type", "default"))
        if kind not in {None, "default"} or plain:
            found["rope_scaling"] = {"rope_type": kind, **plain}
    heads = config.get("num_attention_heads")
    hidden = config.get("hidden_size")
    derived = hidden // heads if isinstance(heads, int) and isinstance(hidden, int) and heads else None
    found["head_dim"] = config.get("head_dim") or derived
    if config.get("use_sliding_window", True):
        found["sliding_window"] = config.get("sliding_window")
    found["partial_rotary_factor"] = config.get("partial_rotary_factor", 1.0) or 1.0
    if "rope_theta" not in config and not nested and "model_type" in config:
        record = architecture_of(config["model_type"])
        if record is not None and "rope_theta" not in getattr(record, "defaults", {}):
            found.pop("rope_theta")
    return found


_VOCABULARY = re.compile(
    r"(^|\.)(embed_tokens|wte|word_embeddings|embed_in|embed_out|tok_embeddings|lm_head|output|decoder)\.(weight|bias)$"
    r"|^(cls\.predictions|lm_head)\.bias$"
)


def vocabulary_rows(checkpoint: Checkpoint) -> int:
    """Return the rows of the token embedding (0 when there is none)."""
    name = embedding_name(checkpoint.tensors)
    return checkpoint.tensors[name].shape[0] if name else 0


def is_vocabulary_tensor(name: str, checkpoint: Checkpoint, rows: int) -> bool:
    """Say whether axis 0 of a tensor is the vocabulary."""
    info = checkpoint.tensors.get(name)
    if info is None or not info.shape or info.shape[0] != rows:
        return False
    record = architecture_of((checkpoint.config or {}).get("model_type"))
    if record is not None and checkpoint.config is not None:
        listed = {n.rpartition("model.")[2] for n in record.vocabulary_tensors(checkpoint.config)}
        if name.rpartition("model.")[2] in listed:
            return True
    return bool(_VOCABULARY.search(name))


def tied_copies_differ(checkpoint: Checkpoint) -> bool:
    """Return True when a tied checkpoint stores two different copies (ruling: exit 3); reads both."""
    head, embedding = head_name(checkpoint.tensors), embedding_name(checkpoint.tensors)
    if not is_tied(checkpoint) or head is None or embedding is None:
        return False
    left, right = checkpoint.tensors[head], checkpoint.tensors[embedding]
    if left.shape != right.shape or left.dtype != right.dtype:
        return True
    computed = getattr(checkpoint, "computed", None)
    by_value = computed is not None and (computed(head) or computed(embedding))
    read, size = (checkpoint.read, left.elements) if by_value else (checkpoint.read_bytes, left.nbytes)
    step = 8 << 20
    for start in range(0, size, step):
        stop = min(start + step, size)
        if (read(head, start, stop) != read(embedding, start, stop)).any():
            return True
    return False


def check_result(config: Mapping[str, Any] | None, shapes: Mapping[str, tuple[str, tuple[int, ...]]]) -> None:
    """Raise when the planned tensors are not those its config asks for (slices of unlike models)."""
    if config is None or architecture_of(config.get("model_type")) is None:
        return
    errors = [
        InputError("E342", f"the result would be no valid model: {finding.message}",
                   help="the layers that are put together must have the same sizes")
        for finding in conformance.check(config, shapes)
        if finding.severity == "error" and finding.kind != "unexpected-tensor"
    ]  # fmt: skip
    raise_all(errors)
