"""What a GGUF file of a model holds: architecture, keys, and each tensor as pieces of the checkpoint's.

llama.cpp reads head counts and FFN widths as arrays for every architecture, but only the graphs of
`deci` and `openelm` use the entry of each layer; `llama`, `qwen2` and `qwen3` take layer 0 for all. So
uniform models keep their own architecture and per-layer shapes go to one of those two. Facts about the
graphs were checked against transformers with every release named in the tests.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from surgeon.checkpoint.checkpoint import Checkpoint
from surgeon.checkpoint.header import printable
from surgeon.deploy import gguf_experts, per_layer
from surgeon.deploy.gguf_tensors import GgufLayout, GgufTensor, Piece
from surgeon.errors import InputError, Where
from surgeon.structure.cut import LayerShape

ZERO_FFN = 32
"""Channels of zeros written for a removed FFN: with width 0 the graph of `deci` drops the attention's output
as well, and in the last layer it aborts. 32 is a row of the smallest quantization block."""

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "mixtral", "qwen3_moe")
INTERLEAVED = frozenset({"llama", "deci"})
"""Architectures whose rotary embedding turns neighbouring pairs; rows of queries and keys are reordered for it."""


def architecture(config: Mapping[str, Any]) -> tuple[str | None, str]:
    """Return llama.cpp's architecture for a configuration and "", or None and the reason there is none."""
    family = per_layer.base_type(config)
    if family not in FAMILIES:
        return None, _FAMILY_REASONS.get(family, f"{printable(family)} models are not written as GGUF here")
    activation = config.get("hidden_act", "silu")
    if activation not in ("silu", "swish"):
        return None, f"its activation is {printable(str(activation))}, the graph of llama.cpp computes SiLU"
    if slides(config):
        return (
            None,
            f"it slides its attention window over {config['sliding_window']} tokens, which this architecture of llama.cpp does not",
        )
    if float(config.get("partial_rotary_factor") or 1.0) != 1.0:
        return None, "its rotary embedding covers a part of each head only"
    if family in gguf_experts.NAMES:
        return _with_experts(config)
    shapes = per_layer.block_shapes(config)
    own = is_uniform(shapes)
    if family == "qwen2":  # its graph takes hidden_size for the width of queries, whatever the head size
        own = own and shapes[0].heads * shapes[0].head_dim == int(config["hidden_size"])
    arch = {"mistral": "llama"}.get(family, family) if own else {"qwen3": "openelm"}.get(family, "deci")
    if arch == "openelm" and not config.get("tie_word_embeddings", False):
        return (
            None,
            "with layers of different sizes a qwen3 model fits only openelm, which ties its embeddings; this one does not",
        )
    if family == "qwen3" and config.get("attention_bias"):
        return None, "its attention has biases, which llama.cpp's qwen3 has not"
    return _turning(config, arch)


def _with_experts(config: Mapping[str, Any]) -> tuple[str | None, str]:
    if per_layer.is_per_layer(config):
        return None, "its layers differ in size, which no graph of llama.cpp with experts computes"
    arch = {"mixtral": "llama", "qwen3_moe": "qwen3moe"}[config["model_type"]]
    odd = gguf_experts.reason(config)
    if not odd and arch == "qwen3moe" and config.get("attention_bias"):
        odd = "its attention has biases, which llama.cpp's qwen3moe has not"
    return (None, odd) if odd else _turning(config, arch)


def _turning(config: Mapping[str, Any], arch: str) -> tuple[str | None, str]:
    """Return the architecture, or why it does not turn queries and keys as the model does."""
    kind = rope(config)["rope_type"]
    if kind not in ("default", "linear", "llama3"):
        return None, f"its rotary embedding is scaled by {printable(str(kind))}"
    if kind == "llama3" and arch not in INTERLEAVED:
        return None, f"llama.cpp's {arch} does not read the frequencies of llama3 scaling"
    return arch, ""


_FAMILY_REASONS = {
    "smollm3": "smollm3 leaves the rotary embedding out in some layers, which llama.cpp ties to the layer's number",
    **{name: f"{name} computes GELU and has norms behind its branches; no graph of llama.cpp does that for each layer"
       for name in ("gemma", "gemma2", "gemma3_text")},
    **{name: f"{name} routes experts in a way that is not written here" for name in ("qwen2_moe", "olmoe", "gpt_oss", "deepseek_v2", "deepseek_v3", "granitemoe")},
}  # fmt: skip


def is_uniform(shapes: Sequence[LayerShape]) -> bool:
    """Say whether all layers are alike and have both branches."""
    return len(set(shapes)) == 1 and shapes[0].heads > 0 and shapes[0].ffn > 0


def slides(config: Mapping[str, Any]) -> bool:
    """Say whether any layer looks at the last tokens only."""
    window = config.get("sliding_window")
    if not window:
        return False
    kinds = config.get("layer_types")
    if kinds is not None:
        return "sliding_attention" in kinds
    if per_layer.base_type(config) in ("mistral", "mixtral"):
        return window < config.get("max_position_embeddings", 131_072)
    return bool(config.get("use_sliding_window"))


def rope(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the rotary embedding's parameters under their newer names: rope_type, rope_theta, factor, ..."""
    given = {**(config.get("rope_scaling") or {}), **(config.get("rope_parameters") or {})}
    given.setdefault("rope_type", given.get("type", "default"))
    theta = given.get("rope_theta", config.get("rope_theta"))
    given["rope_theta"] = 10_000.0 if theta is None else theta
    return given


def plan(checkpoint: Checkpoint) -> GgufLayout:
    """Return what a GGUF file of a checkpoint holds, its tokenizer apart.

    Raises:
        InputError: E328 llama.cpp has no graph for the model (the reason is named); E365 a tensor is missing
            or its shape does not fit the configuration.
    """
    config = checkpoint.config
    if config is None:
        raise InputError(
            "E328",
            f"{checkpoint.label} has no config.json",
            where=Where(checkpoint.label),
            help="give the model folder",
        )
    arch, reason = architecture(config)
    if arch is None:
        raise InputError("E328", f"{checkpoint.label} cannot be written as GGUF: {reason}", where=Where(checkpoint.label),
                         help="keep the safetensors folder, which transformers loads")  # fmt: skip
    stacked = gguf_experts.is_stacked(checkpoint.tensors) if _routes(config) else None
    if stacked is not None:
        raise InputError("E328", f"{checkpoint.label} cannot be written as GGUF: {stacked}", where=Where(checkpoint.label),
                         help="save it with transformers 5, which writes every expert by itself")  # fmt: skip
    shapes = _written(arch, per_layer.block_shapes(config), per_layer.head_dim(config))
    tensors = list(_Names(checkpoint, config, arch).tensors(shapes))
    _check(checkpoint, tensors)
    return GgufLayout(
        arch,
        _keys(config, arch, shapes),
        tuple(tensors),
        tuple(quantization_notes(shapes, int(config["hidden_size"]), _expert_width(config))),
    )


def _routes(config: Mapping[str, Any]) -> bool:
    return per_layer.base_type(config) in gguf_experts.NAMES


def _expert_width(config: Mapping[str, Any]) -> int | None:
    return gguf_experts.width(config) if _routes(config) else None


def _written(arch: str, shapes: Sequence[LayerShape], head: int) -> list[LayerShape]:
    """Return the sizes as the file says them: branches of zeros where the graph needs one."""
    written = []
    for number, shape in enumerate(shapes):
        heads, groups, ffn = shape.heads, shape.groups, shape.ffn
        # Without heads in layer 0 deci forgets the head size; openelm has no layer without attention at all.
        if not heads and (number == 0 or arch == "openelm"):
            heads = groups = 1
        if not ffn and (heads or number == len(shapes) - 1):
            ffn = ZERO_FFN
        written.append(LayerShape(heads, groups, head if heads else 0, ffn))
    return written


def _keys(config: Mapping[str, Any], arch: str, shapes: Sequence[LayerShape]) -> dict[str, Any]:
    uniform = is_uniform(shapes) and arch not in ("deci", "openelm")

    def sizes(values: list[int]) -> int | list[int]:
        return values[0] if uniform else values

    size = per_layer.head_dim(config)
    turning = rope(config)
    keys: dict[str, Any] = {
        "context_length": int(config.get("max_position_embeddings", 2048)),
        "embedding_length": int(config["hidden_size"]),
        "block_count": len(shapes),
        "feed_forward_length": sizes([shape.ffn for shape in shapes]),
        "attention.head_count": sizes([shape.heads for shape in shapes]),
        "attention.head_count_kv": sizes([shape.groups for shape in shapes]),
        "attention.key_length": size,
        "attention.value_length": size,
        "attention.layer_norm_rms_epsilon": float(config.get("rms_norm_eps", 1e-6)),
        "rope.dimension_count": size,
        "rope.freq_base": float(turning["rope_theta"]),
        "vocab_size": int(config["vocab_size"]),
    }
    if turning["rope_type"] == "linear":
        keys["rope.scaling.type"] = "linear"
        keys["rope.scaling.factor"] = float(turning["factor"])
    if _routes(config):
        keys |= gguf_experts.keys(config)
    return {f"{arch}.{key}": value for key, value in keys.items()}


def llama3_factors(size: int, parameters: Mapping[str, Any]) -> tuple[float, ...]:
    """Return by what llama3 scaling divides each rotary frequency, [head_dim / 2].

    Long wavelengths are divided by ``factor``, short ones stay, those between go over smoothly.
    """
    factor, low, high = (float(parameters[key]) for key in ("factor", "low_freq_factor", "high_freq_factor"))
    context, theta = float(parameters["original_max_position_embeddings"]), float(parameters["rope_theta"])
    found = []
    for place in range(0, size, 2):
        length = 2 * math.pi * theta ** (place / size)
        if length < context / high:
            found.append(1.0)
        elif length > context / low:
            found.append(factor)
        else:
            smooth = (context / length - low) / (high - low)
            found.append(1.0 / ((1 - smooth) / factor + smooth))
    return tuple(found)


def quantization_notes(shapes: Sequence[LayerShape], hidden: int, expert: int | None = None) -> Iterator[str]:
    """Yield what a later llama-quantize will run into: rows that are no multiple of its blocks."""
    widths = {shape.ffn for shape in shapes} if expert is None else {expert}
    rows = {"FFN width": widths, "heads x head_dim": {s.heads * s.head_dim for s in shapes}, "hidden_size": {hidden}}  # fmt: skip
    for block, what in ((256, "K-quants"), (32, "Q8_0, Q5 and Q4")):
        odd = {name: sorted(size for size in found if size % block) for name, found in rows.items()}
        named = "; ".join(f"{name} {', '.join(map(str, sizes[:4]))}" for name, sizes in odd.items() if sizes)
        if named:
            yield f"{what} need rows in multiples of {block}; llama-quantize will fall back to larger types for {named}"


class _Names:
    """The tensors of a file, from the names a checkpoint of these families uses."""

    def __init__(self, checkpoint: Checkpoint, config: Mapping[str, Any], arch: str) -> None:
        self.held = checkpoint.tensors
        self.config = config
        self.arch = arch
        self.size = per_layer.head_dim(config)
        self.hidden = int(config["hidden_size"])
        self.prefix = "model." if "model.embed_tokens.weight" in checkpoint.tensors else ""

    def tensors(self, shapes: Sequence[LayerShape]) -> Iterator[GgufTensor]:
        vocabulary = int(self.config["vocab_size"])
        yield self._matrix("token_embd.weight", f"{self.prefix}embed_tokens.weight", vocabulary, self.hidden)
        yield self._vector("output_norm.weight", f"{self.prefix}norm.weight", self.hidden)
        if not self.config.get("tie_word_embeddings", False):
            yield self._matrix("output.weight", "lm_head.weight", vocabulary, self.hidden)
        parameters = rope(self.config)
        if parameters["rope_type"] == "llama3":
            values = llama3_factors(self.size, parameters)
            yield GgufTensor("rope_freqs.weight", (len(values),), values=values)
        for number, shape in enumerate(shapes):
            yield from self._attention(number, shape)
            yield from self._ffn(number, shape)

    def _attention(self, number: int, shape: LayerShape) -> Iterator[GgufTensor]:
        if not shape.heads:
            return
        place, block = f"{self.prefix}layers.{number}.", f"blk.{number}."
        absent = f"{place}self_attn.q_proj.weight" not in self.held
        yield self._vector(
            f"{block}attn_norm.weight", f"{place}input_layernorm.weight", self.hidden, absent, 1.0
        )
        rows = {"q": shape.heads * self.size, "k": shape.groups * self.size, "v": shape.groups * self.size}
        turned = self.size if self.arch in INTERLEAVED else 0
        parts = {
            part: Piece(
                None if absent else f"{place}self_attn.{part}_proj.weight",
                count,
                turned if part != "v" else 0,
            )
            for part, count in rows.items()
        }
        if self.arch == "openelm":
            yield GgufTensor(
                f"{block}attn_qkv.weight", (sum(rows.values()), self.hidden), tuple(parts.values())
            )
        else:
            for part, piece in parts.items():
                yield GgufTensor(f"{block}attn_{part}.weight", (piece.rows, self.hidden), (piece,))
                bias = f"{place}self_attn.{part}_proj.bias"
                if bias in self.held:
                    yield GgufTensor(
                        f"{block}attn_{part}.bias", (piece.rows,), (Piece(bias, piece.rows, piece.head_dim),)
                    )
        if self.arch in ("openelm", "qwen3", "qwen3moe"):
            for part in ("q", "k"):
                yield self._vector(
                    f"{block}attn_{part}_norm.weight",
                    f"{place}self_attn.{part}_norm.weight",
                    self.size,
                    absent,
                    1.0,
                )
        yield GgufTensor(f"{block}attn_output.weight", (self.hidden, rows["q"]),
                         (Piece(None if absent else f"{place}self_attn.o_proj.weight", self.hidden),))  # fmt: skip
        yield from self._bias(f"{block}attn_output.bias", f"{place}self_attn.o_proj.bias", self.hidden)

    def _ffn(self, number: int, shape: LayerShape) -> Iterator[GgufTensor]:
        if not shape.ffn:
            return
        place, block = f"{self.prefix}layers.{number}.", f"blk.{number}."
        routed = _routes(self.config)
        absent = not routed and f"{place}mlp.down_proj.weight" not in self.held
        yield self._vector(
            f"{block}ffn_norm.weight", f"{place}post_attention_layernorm.weight", self.hidden, absent, 1.0
        )
        if routed:
            yield from gguf_experts.tensors(self.config, place, block)
            return
        for part, rows, columns in (
            ("gate", shape.ffn, self.hidden),
            ("up", shape.ffn, self.hidden),
            ("down", self.hidden, shape.ffn),
        ):
            source = None if absent else f"{place}mlp.{part}_proj.weight"
            yield GgufTensor(f"{block}ffn_{part}.weight", (rows, columns), (Piece(source, rows),))
            yield from self._bias(f"{block}ffn_{part}.bias", f"{place}mlp.{part}_proj.bias", rows)

    def _bias(self, name: str, source: str, rows: int) -> Iterator[GgufTensor]:
        if source in self.held:
            yield GgufTensor(name, (rows,), (Piece(source, rows),))

    def _matrix(self, name: str, source: str, rows: int, columns: int) -> GgufTensor:
        return GgufTensor(name, (rows, columns), (Piece(source, rows),))

    def _vector(
        self, name: str, source: str, rows: int, absent: bool = False, value: float = 0.0
    ) -> GgufTensor:
        return GgufTensor(name, (rows,), (Piece(None if absent else source, rows, value=value),))


def _check(checkpoint: Checkpoint, tensors: Sequence[GgufTensor]) -> None:
    """Compare with what the checkpoint holds: nothing missing, nothing left over, every shape as configured."""
    used = set()
    for tensor in tensors:
        for piece in tensor.pieces:
            if piece.source is None:
                continue
            used.add(piece.source)
            wanted = (piece.rows, tensor.columns) if len(tensor.shape) > 1 else (piece.rows,)
            info = checkpoint.tensors.get(piece.source)
            if info is None or info.shape != wanted:
                fact = (
                    "is missing"
                    if info is None
                    else f"has shape {list(info.shape)}, config.json says {list(wanted)}"
                )
                raise InputError("E365", f"{printable(piece.source)} of {checkpoint.label} {fact}",
                                 where=Where(checkpoint.label, tensor=printable(piece.source)),
                                 help="surgeon verify shows every disagreement")  # fmt: skip
    spare = {"lm_head.weight"}  # a tied copy
    left = sorted(
        name
        for name in checkpoint.tensors
        if name not in used | spare and not name.endswith("rotary_emb.inv_freq")
    )
    if left:
        raise InputError("E328", f"{checkpoint.label} holds {printable(left[0])}, which llama.cpp's graph has no place for",
                         where=Where(checkpoint.label, tensor=printable(left[0])), help="keep the safetensors folder; surgeon verify says whether the tensor belongs to the model")  # fmt: skip
