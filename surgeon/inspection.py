"""What a checkpoint holds: sizes, family, layers, experts, statistics of its values.

Headers and JSON answer everything but the statistics, which stream the data once in blocks.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from surgeon import architectures, traits
from surgeon.architectures import naming
from surgeon.checkpoint.checkpoint import Checkpoint
from surgeon.checkpoint.companions import find_companions, missing_companions
from surgeon.checkpoint.dtypes import DTYPES
from surgeon.checkpoint.header import TensorInfo
from surgeon.checkpoint.strict_json import read_json_object
from surgeon.errors import InputError, SurgeonError
from surgeon.formats.account import Account, account_of
from surgeon.kernels import cast

MANIFEST = "surgeon.json"
BLOCK = 1 << 18
"""Elements read at once: little enough to stay in the processor's caches."""

Progress = Callable[[int, int], None]

_EXPERT = re.compile(r"^(?P<place>.*\.experts)\.(?P<number>\d+)\.(?P<rest>.+)$")
_FUSED = re.compile(r"^(?P<place>.*\.experts)\.(?P<rest>[a-z_]+(\.weight|\.bias)?)$|"
                    r"^(?P<block>.*\.block_sparse_moe)\.(?P<linear>(input|output)_linear\.weight)$")  # fmt: skip
_FEED_FORWARD = (
    ("mlp.gate_proj.weight", 0),
    ("mlp.up_proj.weight", 0),
    ("mlp.fc1.weight", 0),
    ("mlp.dense_h_to_4h.weight", 0),
    ("mlp.c_fc.weight", 1),
    ("feed_forward.w1.weight", 0),
    ("intermediate.dense.weight", 0),
    ("mlp.down_proj.weight", 1),
)


@dataclass
class Stats:
    """Figures of one tensor's finite values, or of several tensors together.

    Attributes:
        elements: all values.
        nonfinite: NaN and infinite ones, left out of everything else.
        zeros: exact zeros.
        total: sum.
        squares: sum of squares.
        max_abs: largest magnitude.
    """

    elements: int = 0
    nonfinite: int = 0
    zeros: int = 0
    total: float = 0.0
    squares: float = 0.0
    max_abs: float = 0.0

    def add(self, other: Stats) -> None:
        self.elements += other.elements
        self.nonfinite += other.nonfinite
        self.zeros += other.zeros
        self.total += other.total
        self.squares += other.squares
        self.max_abs = max(self.max_abs, other.max_abs)

    def figures(self) -> dict[str, Any]:
        """Return norm, largest magnitude, mean, share of zeros, count of non-finite values."""
        finite = self.elements - self.nonfinite
        return {
            "norm": math.sqrt(self.squares),
            "max_abs": self.max_abs,
            "mean": self.total / finite if finite else 0.0,
            "zeros": self.zeros / self.elements if self.elements else 0.0,
            "nonfinite": self.nonfinite,
        }


@dataclass
class Group:
    """Tensors counted together (a layer, what lies outside the layers)."""

    name: str
    tensors: int = 0
    parameters: int = 0
    bytes: int = 0
    stats: Stats | None = None

    def add(self, info: TensorInfo, stats: Stats | None) -> None:
        self.tensors += 1
        self.parameters += info.elements
        self.bytes += info.nbytes
        if stats is not None:
            self.stats = self.stats or Stats()
            self.stats.add(stats)

    def as_dict(self) -> dict[str, Any]:
        shown = {
            "name": self.name,
            "tensors": self.tensors,
            "parameters": self.parameters,
            "bytes": self.bytes,
        }
        return shown | (self.stats.figures() if self.stats else {})


@dataclass
class ExpertLayer:
    """The experts of one layer.

    Attributes:
        layer: the layer number, None where the name gives none.
        place: the module that holds them.
        experts: how many.
        storage: "per expert" or "fused".
        per_expert_bytes: bytes of one expert, None when they differ.
    """

    layer: int | None
    place: str
    experts: int
    storage: str
    parameters: int
    bytes: int
    per_expert_bytes: int | None


@dataclass
class Summary:
    """Everything headers and JSON files say about a checkpoint.

    Parameters are those of the plain model where a quantized one can be read, else stored values.
    """

    label: str
    kind: str
    files: int
    file_bytes: int
    tensors: int
    parameters: int
    bytes: int
    dtypes: dict[str, dict[str, int]]
    family: str | None
    family_from: str
    sizes: dict[str, int]
    tied: bool | None
    head_stored: bool
    quantized: str | None
    layers: dict[str, int]
    experts: dict[str, int] | None
    has_config: bool
    config_beside: bool
    known_architecture: bool
    companions: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    manifest: dict[str, Any] | None = None
    notes: list[str] = field(default_factory=list)
    quantization: Account | None = None

    def document(self) -> dict[str, Any]:
        """Return it as plain data; of a quantized model what it holds, without its single matrices."""
        found = asdict(replace(self, quantization=None))
        return found | {"quantization": self.quantization.document() if self.quantization else None}


def summarize(checkpoint: Checkpoint, path: Path) -> Summary:
    """Describe a checkpoint from its headers and JSON files.

    Args:
        checkpoint: open.
        path: the folder or file it was opened from.
    """
    tensors = checkpoint.tensors
    dtypes: dict[str, dict[str, int]] = {}
    for info in tensors.values():
        entry = dtypes.setdefault(info.dtype, {"tensors": 0, "parameters": 0, "bytes": 0})
        entry["tensors"] += 1
        entry["parameters"] += info.elements
        entry["bytes"] += info.nbytes
    config = checkpoint.config
    model_type = traits.text_section(config).get("model_type") if config else None
    record = architectures.get((config or {}).get("model_type"))
    if config is not None:
        family = str((config.get("model_type") or model_type) or "unnamed")
        origin, sizes = "config", configured_sizes(config)
    else:
        family, sizes = guess_family(tensors)
        origin = "names"
    experts = expert_layers(tensors)
    counts = sorted({e.experts for e in experts})
    summary = Summary(
        label=checkpoint.label,
        kind="folder" if path.is_dir() else "file",
        files=len(checkpoint.headers),
        file_bytes=sum(h.stamp.size for h in checkpoint.headers),
        tensors=len(tensors),
        parameters=sum(t.elements for t in tensors.values()),
        bytes=sum(t.nbytes for t in tensors.values()),
        dtypes=dict(sorted(dtypes.items(), key=lambda item: -item[1]["bytes"])),
        family=family,
        family_from=origin,
        sizes=sizes,
        tied=_tied(checkpoint),
        head_stored=traits.head_name(tensors) is not None,
        quantized=traits.quantized(checkpoint),
        layers=naming.stacks(tensors),
        experts={"layers": len(experts), "least": counts[0], "most": counts[-1]} if counts else None,
        has_config=config is not None,
        config_beside=path.is_file() and path.with_name("config.json").is_file(),
        known_architecture=record is not None,
        notes=list(getattr(checkpoint, "notes", ())),
    )
    if summary.quantized is not None:
        try:
            summary.quantization = account_of(checkpoint)
            summary.parameters = summary.quantization.parameters
        except InputError as error:
            summary.notes.append(error.message)
    _companions(summary, path)
    if not _generates(config):
        summary.missing = [m for m in summary.missing if m not in {"generation_config.json", "chat template"}]
    return summary


def _model_class(config: Mapping[str, Any] | None) -> str:
    named = (config or {}).get("architectures")
    return str(named[0]) if isinstance(named, list) and named else ""


def _generates(config: Mapping[str, Any] | None) -> bool:
    """Say whether a config names a class that writes text; True where it names none."""
    name = _model_class(config)
    return not name or name.endswith(("ForCausalLM", "LMHeadModel", "ForConditionalGeneration"))


def _tied(checkpoint: Checkpoint) -> bool | None:
    if checkpoint.config is not None:
        name = _model_class(checkpoint.config)
        return None if name.endswith("Model") and "Head" not in name else traits.is_tied(checkpoint)
    embedded = traits.embedding_name(checkpoint.tensors) is not None
    return None if not embedded else traits.head_name(checkpoint.tensors) is None


def _companions(summary: Summary, path: Path) -> None:
    if path.is_dir():
        try:
            found = find_companions(path)
            summary.companions = [c.name for c in found.files]
            summary.missing = list(missing_companions([*summary.companions], path))
        except SurgeonError as error:
            summary.notes.append(error.message)
        file = path / MANIFEST
    else:
        file = path.with_name(f"{path.name}.{MANIFEST}")
    if not file.is_file():
        return
    try:
        body = read_json_object(file)
    except SurgeonError as error:
        summary.notes.append(error.message)
        return
    recipe = body.get("recipe")
    program = body.get("program")
    inputs = body.get("inputs")
    summary.manifest = {
        "verb": body.get("verb"),
        "method": recipe.get("method") if isinstance(recipe, dict) else None,
        "program": program.get("version") if isinstance(program, dict) else None,
        "inputs": sorted(inputs) if isinstance(inputs, dict) else [],
        "plan": body.get("plan"),
        "seed": body.get("seed"),
    }


_SIZE_KEYS = {
    "layers": ("num_hidden_layers", "n_layer", "num_layers"),
    "hidden": ("hidden_size", "n_embd", "d_model"),
    "ffn": ("intermediate_size", "n_inner", "ffn_dim"),
    "expert ffn": ("moe_intermediate_size",),
    "heads": ("num_attention_heads", "n_head"),
    "kv": ("num_key_value_heads",),
    "head_dim": ("head_dim",),
    "experts": ("num_experts", "num_local_experts", "n_routed_experts"),
    "active": ("num_experts_per_tok",),
    "vocab": ("vocab_size",),
    "context": ("max_position_embeddings", "n_positions"),
}


def configured_sizes(config: Mapping[str, Any]) -> dict[str, int]:
    """Return the sizes a config.json states, under common names."""
    section = traits.text_section(config)
    sizes = {}
    for name, keys in _SIZE_KEYS.items():
        value = next((section[k] for k in keys if type(section.get(k)) is int), None)
        if value is not None:
            sizes[name] = value
    return sizes


def guess_family(tensors: Mapping[str, TensorInfo]) -> tuple[str | None, dict[str, int]]:
    """Guess a model family and its sizes from names and shapes alone.

    Head counts are given only where a tensor states the head size; ``q_rows`` and ``kv_rows``
    are what the projections show otherwise.
    """
    sizes: dict[str, int] = {}
    stacks = {s: n for s, n in naming.stacks(tensors).items() if not naming.is_auxiliary(s)}
    main = max(stacks, key=lambda s: stacks[s], default=None)
    if main is not None:
        sizes["layers"] = stacks[main]
    embedding = traits.embedding_name(tensors)
    if embedding is not None and len(tensors[embedding].shape) == 2:
        sizes["vocab"], sizes["hidden"] = tensors[embedding].shape
    rests = {}
    for name, info in tensors.items():
        place = naming.layer_of(name)
        if place is not None and place.stack == main:
            rests.setdefault(place.rest, info.shape)
    for ending, axis in _FEED_FORWARD:
        shape = next((s for rest, s in rests.items() if rest.endswith(ending) and ".experts." not in rest), None)  # fmt: skip
        if shape is not None and len(shape) == 2:
            sizes["ffn"] = shape[axis]
            break
    experts = expert_layers(tensors)
    if experts:
        sizes["experts"] = max(e.experts for e in experts)
    _heads(rests, sizes)
    return _family(rests, set(tensors)), sizes


def _heads(rests: Mapping[str, tuple[int, ...]], sizes: dict[str, int]) -> None:
    q, k = rests.get("self_attn.q_proj.weight"), rests.get("self_attn.k_proj.weight")
    if not q or not k:
        return
    norm = rests.get("self_attn.q_norm.weight")
    frequencies = rests.get("self_attn.rotary_emb.inv_freq")
    size = norm[0] if norm and norm[0] != q[0] else 2 * frequencies[0] if frequencies else 0
    if size and q[0] % size == 0 and k[0] % size == 0:
        sizes["head_dim"], sizes["heads"], sizes["kv"] = size, q[0] // size, k[0] // size
    else:
        sizes["q_rows"], sizes["kv_rows"] = q[0], k[0]


def _family(rests: Mapping[str, Any], names: set[str]) -> str | None:
    """Return the model type whose tensor names these are; "llama or mistral" where names cannot tell."""

    def has(text: str) -> bool:
        return any(text in rest for rest in rests)

    rules = (
        ("deepseek_v3", has("kv_a_proj") and has("e_score_correction_bias")),
        ("deepseek_v2", has("kv_a_proj")),
        ("gpt_oss", has("self_attn.sinks")),
        ("mixtral", has("block_sparse_moe.experts.")),
        ("granitemoe", has("block_sparse_moe.input_linear")),
        ("qwen2_moe", has("mlp.experts.") and has("shared_expert")),
        ("qwen3_moe or olmoe", has("mlp.experts.") and has("q_norm")),
        ("gemma3_text", has("pre_feedforward_layernorm") and has("q_norm")),
        ("gemma2", has("pre_feedforward_layernorm")),
        ("phi3", has("self_attn.qkv_proj") and has("gate_up_proj")),
        ("phi", has("self_attn.dense.")),
        ("gpt2", has("attn.c_attn")),
        ("bert", has("attention.self.query")),
        ("qwen3", has("self_attn.q_norm") and has("mlp.gate_proj") and has("input_layernorm")),
        ("qwen2", has("self_attn.q_proj.bias") and not has("self_attn.o_proj.bias")),
        ("llama or mistral", has("self_attn.q_proj.weight") and has("mlp.gate_proj.weight")),
    )
    found = next((family for family, fits in rules if fits), None)
    if found is None and any(".lora_A." in name for name in names):
        return "a LoRA adapter"
    return found


def expert_layers(tensors: Mapping[str, TensorInfo]) -> list[ExpertLayer]:
    """Return the experts of every layer, for both storages: one tensor each, or fused on axis 0."""
    single: dict[str, dict[int, list[TensorInfo]]] = {}
    fused: dict[str, list[TensorInfo]] = {}
    for name, info in tensors.items():
        found = _EXPERT.match(name)
        if found:
            single.setdefault(found["place"], {}).setdefault(int(found["number"]), []).append(info)
            continue
        found = _FUSED.match(name)
        if found and len(info.shape) >= 2:
            fused.setdefault(found["place"] or found["block"], []).append(info)
    layers = []
    for place, members in single.items():
        sizes = {sum(t.nbytes for t in infos) for infos in members.values()}
        every = [t for infos in members.values() for t in infos]
        layers.append(_layer(place, len(members), "per expert", every, sizes))
    for place, infos in fused.items():
        count = Counter(t.shape[0] for t in infos).most_common(1)[0][0]
        total = sum(t.nbytes for t in infos)
        layers.append(
            _layer(place, count, "fused", infos, {total // count} if count and total % count == 0 else set())
        )
    return sorted(layers, key=lambda e: (e.layer if e.layer is not None else -1, e.place))


def _layer(place: str, count: int, storage: str, infos: list[TensorInfo], sizes: set[int]) -> ExpertLayer:
    at = naming.layer_of(f"{place}.weight")
    return ExpertLayer(
        at.index if at else None,
        place,
        count,
        storage,
        sum(t.elements for t in infos),
        sum(t.nbytes for t in infos),
        next(iter(sizes)) if len(sizes) == 1 else None,
    )


def by_layer(tensors: Mapping[str, TensorInfo], stats: Mapping[str, Stats] | None = None) -> list[Group]:
    """Return one group per layer of every stack, and one for what lies outside."""
    groups: dict[tuple[str, int], Group] = {}
    for name, info in tensors.items():
        place = naming.layer_of(name)
        key = (place.stack, place.index) if place else ("", -1)
        group = groups.setdefault(key, Group(f"{key[0]}.{key[1]}" if place else "outside layers"))
        group.add(info, stats.get(name) if stats else None)
    return [groups[key] for key in sorted(groups)]


def block_ranges(elements: int, granularity: int = 1, block: int = BLOCK) -> Iterator[tuple[int, int]]:
    """Yield [start, stop) ranges of at most about ``block`` elements, borders on multiples of the granularity."""
    step = max(granularity, block // granularity * granularity)
    for start in range(0, elements, step):
        yield start, min(start + step, elements)


def each_tensor(
    names: Iterable[str],
    work: Callable[[str], Any],
    cost: Callable[[str], int],
    threads: int = 1,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Apply ``work`` to every name on a few threads; results in the order of the names.

    Each tensor is done by one thread in file order, so results do not depend on the number of threads.
    """
    names = list(names)
    total, done = sum(map(cost, names)), 0
    results = {}
    with ThreadPoolExecutor(max_workers=max(1, threads)) as pool:
        try:
            for name, result in zip(names, pool.map(work, names), strict=True):
                results[name] = result
                done += cost(name)
                if progress is not None:
                    progress(done, total)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return results


def statistics(
    checkpoint: Checkpoint,
    names: Iterable[str] | None = None,
    *,
    threads: int = 1,
    progress: Progress | None = None,
) -> dict[str, Stats]:
    """Read tensors of float types once, in blocks, and return their figures; other types are left out."""
    chosen = [
        n
        for n in (checkpoint.tensors if names is None else names)
        if DTYPES[checkpoint.tensors[n].dtype].family == "float"
    ]
    return each_tensor(
        chosen,
        lambda name: _stats(checkpoint, name),
        lambda name: checkpoint.tensors[name].nbytes,
        threads,
        progress,
    )


def _stats(checkpoint: Checkpoint, name: str) -> Stats:
    info = checkpoint.tensors[name]
    found = Stats(elements=info.elements)
    for start, stop in block_ranges(info.elements, checkpoint.granularity(name)):
        raw = checkpoint.read(name, start, stop)
        mask = cast.nonfinite(raw, info.dtype)
        values = cast.widen(raw, info.dtype)
        if mask is not None:
            found.nonfinite += int(mask.sum())
            values = values[~mask]
        if not values.size:
            continue
        found.zeros += int(values.size - np.count_nonzero(values != 0))
        found.total += float(values.sum(dtype=np.float64))
        found.squares += product(values, values)
        found.max_abs = max(found.max_abs, float(np.abs(values).max()))
    return found


def product(first: np.ndarray, second: np.ndarray) -> float:
    """Return the sum of products in float64, always added in the same order (a BLAS dot is neither)."""
    return float(np.einsum("i,i->", first, second, dtype=np.float64, casting="unsafe"))


def require_values(checkpoint: Checkpoint) -> None:
    """Refuse a checkpoint without any float tensor where values were asked for."""
    if not any(DTYPES[t.dtype].family == "float" for t in checkpoint.tensors.values()):
        raise InputError("E311", f"{checkpoint.label} holds no plain float tensors; its values cannot be read",
                         help="use the checkpoint it was quantized from")  # fmt: skip
