"""GGUF in the table: families, types of llama.cpp, and what its runtime computes from a file of each.

A cell is a family and a type of all matrices in its layers. Types that `surgeon quantize` writes go through its form, as codes
rounded to nearest; those that ggml alone makes go the way of `surgeon export --gguf-type`. llama.cpp answers in a process of
its own; what it says is compared with torch on the numbers the blocks stand for.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from safetensors.torch import load_file, save_file

import surgeon
from surgeon.checkpoint import tensor_file
from surgeon.checkpoint.checkpoint import Checkpoint, open_path
from surgeon.deploy import ggml_activations, gguf, gguf_rows, per_layer
from surgeon.deploy.build import build, load
from surgeon.deploy.llama_cpp import LlamaCpp
from surgeon.errors import SurgeonError
from surgeon.formats import float4
from surgeon.formats.compressed_runtimes import Reader
from surgeon.formats.gguf_blocks import QUANTIZED, TYPES
from surgeon.formats.scheme import Scheme
from surgeon.quantize import forms, rtn
from surgeon.traits import part_of

ROOT = Path(__file__).resolve().parents[2]
TOKENIZER = ROOT / "tests" / "models" / "base"
VOCABULARY = 281

SCHEMES = {
    "Q4_0": Scheme("int", 4, 32), "Q4_1": Scheme("int", 4, 32, False), "Q5_0": Scheme("int", 5, 32),
    "Q5_1": Scheme("int", 5, 32, False), "Q8_0": Scheme("int", 8, 32), "MXFP4": float4.MXFP4,
}  # fmt: skip
"""Type -> scheme of ``surgeon quantize``; the others are those of ``surgeon export --gguf-type``."""

MIXED = "mixed"
"""Column in which neighbouring matrices differ in type, and a head that is a matrix of its own has Q8_0."""
COLUMNS = (*SCHEMES, *(kind for kind in QUANTIZED if kind not in SCHEMES), MIXED)

SIZES = {
    "hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 8, "num_key_value_heads": 4,
    "head_dim": 32, "vocab_size": VOCABULARY, "max_position_embeddings": 256, "rms_norm_eps": 1e-6, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2, "tie_word_embeddings": False, "sliding_window": None,
}  # fmt: skip
LLAMA3 = {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 64}  # fmt: skip
ROUTED = {"num_experts_per_tok": 2, "moe_intermediate_size": 256, "num_experts": 4, "norm_topk_prob": True}
VARIED = ((8, 4, 256), (16, 4, 512), (8, 2, 768))
"""Query heads, key/value heads and channels of each layer."""

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama, tied": ("llama", {"tie_word_embeddings": True}),
    "llama, llama3 scaling": ("llama", {"rope_parameters": LLAMA3}),
    "mistral": ("mistral", {}),
    "qwen2, tied": ("qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("qwen3", {}),
    "mixtral": ("mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen3_moe": ("qwen3_moe", ROUTED),
    "llama, layers of different sizes": ("llama", {"block_configs": VARIED}),
    "mistral, layers of different sizes": ("mistral", {"block_configs": VARIED}),
    "qwen2, layers of different sizes": ("qwen2", {"block_configs": VARIED}),
    "qwen3, tied, layers of different sizes": ("qwen3", {"block_configs": VARIED, "tie_word_embeddings": True}),
    "qwen3, layers of different sizes": ("qwen3", {"block_configs": VARIED}),
    "mistral, sliding window": ("mistral", {"sliding_window": 16}),
    "llama, yarn scaling": ("llama", {"rope_parameters": {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0,
                                                          "original_max_position_embeddings": 64}}),
    "qwen3_moe, weights not summing to one": ("qwen3_moe", {**ROUTED, "norm_topk_prob": False}),
    "smollm3": ("smollm3", {}),
    "gemma2": ("gemma2", {"query_pre_attn_scalar": 32, "sliding_window": 16, "tie_word_embeddings": True}),
    "phi3": ("phi3", {"head_dim": None}),
    "olmoe": ("olmoe", {"num_experts": 4, "num_experts_per_tok": 2, "head_dim": None}),
    "deepseek_v3": ("deepseek_v3", {
        "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 256, "first_k_dense_replace": 1,
        "n_shared_experts": 1, "q_lora_rank": 64, "kv_lora_rank": 64, "qk_nope_head_dim": 32, "qk_rope_head_dim": 32,
        "v_head_dim": 32, "n_group": 2, "topk_group": 1, "head_dim": None, "num_key_value_heads": 8,
    }),
    "gpt_oss": ("gpt_oss", {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 16}),
    "gpt2": ("gpt2", {}),
}  # fmt: skip
"""Name -> (model_type, what differs from `SIZES`)."""

LENGTHS, NEW = (3, 5, 8, 12, 40), 4
"""Tokens of the prompts, and those generated after each."""
SAMPLED = 24
"""Token that llama.cpp is told to sample where nobody looks at it: a whole character."""

EXACT, FLIPPED = 1e-4, 0.06
"""Relative differences of logits from a reference that rounds inputs as ggml does: at most, after the prompt they differ least after,
and after all. One input that is rounded the other way moves those of all later layers; a short prompt has none."""

CLOSE = 0.1
"""Nats: the cache changes how many inputs are rounded together, and near ties go the other way."""


@dataclass(frozen=True)
class GgufCell:
    """One case of the table."""

    family: str
    kind: str

    def __str__(self) -> str:
        return f"gguf: {self.kind}: {self.family}"


@dataclass
class GgufResult:
    """What came of one cell.

    Attributes:
        refused: why it is not written; None when it is.
        error: of llama.cpp.
        way: the command that writes it.
        as_run: relative difference of its logits from torch's on the numbers of the file.
        alike, exact: the same where torch rounds inputs as ggml does, for all prompts, and for that with the smallest.
        tokens: that it generated with its cache.
        generates: each of them is, without the cache, as probable as the best but for `CLOSE`.
        same: those that torch, rounding inputs so, would have taken after the same tokens.
    """

    refused: str | None = None
    error: str | None = None
    way: str = ""
    as_run: float = float("nan")
    alike: float = float("nan")
    exact: float = float("nan")
    tokens: int = 0
    generates: bool = False
    same: int = 0

    @property
    def read(self) -> bool:
        """Whether llama.cpp computes what is meant."""
        return self.error is None and self.exact <= EXACT and self.alike <= FLIPPED


def cells() -> list[GgufCell]:
    """Return every case, family by family; families that are refused have one for each type, too."""
    return [GgufCell(family, kind) for family in FAMILIES for kind in COLUMNS]


def source(family: str, folder: Path) -> Path:
    """Save the random bfloat16 model of a family in its hub layout, with the tokenizer of the test models."""
    model_type, more = FAMILIES[family]
    sizes = {
        key: value for key, value in {**SIZES, **more}.items() if value is not None or key == "sliding_window"
    }
    shapes = sizes.pop("block_configs", ())
    if shapes:
        sizes["num_hidden_layers"] = len(shapes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(sorted(FAMILIES).index(family))
        config: Any = transformers.AutoConfig.for_model(model_type, **sizes)
        model: Any
        kind: Any = transformers.AutoModelForCausalLM._model_mapping[type(config)]
        config.architectures = [kind.__name__]
        if shapes:
            config = per_layer_config(config.to_dict(), shapes)
            model = build(config, dtype=torch.float32)
        else:
            model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        for name, parameter in model.named_parameters():
            spread = 0.3 if parameter.ndim == 1 else 0.06
            parameter.data = torch.randn_like(parameter) * spread + (1.0 if "norm" in name else 0.0)
    model.to(torch.bfloat16).save_pretrained(folder)
    if shapes:
        finish(folder, {**config, "dtype": "bfloat16"})
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TOKENIZER / name, folder)
    return folder


def per_layer_config(config: dict[str, Any], shapes: Any) -> dict[str, Any]:
    """Return config.json of a model whose layers differ in heads and channels."""
    blocks = [
        {"attention": {"no_op": False, "num_attention_heads": q, "num_key_value_heads": k},
         "ffn": {"no_op": False, "intermediate_size": f}}
        for q, k, f in shapes
    ]  # fmt: skip
    return {**config, "block_configs": blocks}


def types_of(kind: str, shapes: dict[str, tuple[int, ...]], form: forms.Form) -> dict[str, str]:
    """Return matrix -> type for a column: all matrices of layers; of mixed ones as the form lets them differ, the head, too."""
    inside = {
        name: shape
        for name, shape in shapes.items()
        if part_of(name) not in ("embedding", "head", "router", "norm")
    }
    if kind != MIXED:
        return dict.fromkeys(inside, kind)
    found = {}
    for place, choice in enumerate(
        form.choices(inside, [None])[0]
    ):  # seven to a layer, so layers differ, too
        found |= dict.fromkeys(choice.names, list(SCHEMES)[place % len(SCHEMES)])
    return found | {name: "Q8_0" for name in shapes if part_of(name) == "head"}


def refused_by(model: Path, kind: str, command: str) -> str | None:
    """Return what ``quantize`` or ``export`` says when it is asked for a type, None where it would write the file."""
    out = model.with_name(f"{model.name}-{kind}.gguf")
    try:
        if command == "quantize":
            surgeon.quantize(
                model,
                out,
                format="gguf",
                scheme=kind if kind in SCHEMES else "Q4_0",
                method="rtn",
                dry_run=True,
            )
        else:
            surgeon.export(model, out, to="gguf", gguf_type=kind if kind in TYPES else "q4_0", dry_run=True)
    except SurgeonError as error:
        return error.message.replace(str(model), "the model").replace(f"of {model.name} ", "of the model ")
    return None


def way_of(model: Path, kind: str) -> tuple[str | None, str | None]:
    """Return which command writes a model in a type, or None and why none does."""
    said: dict[str, str] = {}
    for command in ("quantize", "export"):
        if command == "quantize" and kind not in (*SCHEMES, MIXED):
            continue
        found = refused_by(model, kind, command)
        if found is None:
            return command, None
        said.setdefault(found, command)
    return None, "; ".join(f"{command}: {found}" for found, command in said.items())


def rows_of(checkpoint: Checkpoint, kind: str, folder: Path, way: str) -> dict[str, gguf_rows.Rows]:
    """Return the blocks of all matrices that a column quantizes, made as the command makes them."""
    config = checkpoint.config or {}
    shapes = {
        name: info.shape
        for name, info in checkpoint.tensors.items()
        if len(info.shape) == 2
        and name.endswith(".weight")
        and not (config["tie_word_embeddings"] and part_of(name) == "head")
    }
    form = forms.get("gguf", Reader("transformers", "BF16"), config.get("model_type"))
    types = types_of(kind, shapes, form)
    parts, held = {}, load_file(Path(str(checkpoint.folder)) / "model.safetensors")
    for name, own in types.items():
        if way == "export":
            continue
        scheme, weight = SCHEMES[own], held[name].float()
        if scheme.kind == "int":
            parts |= form.pack(name, rtn.quantize(weight, scheme, scale_dtype=form.scale_dtype, clip=False))
        else:
            parts |= form.encode(name, weight.numpy(), scheme)[0]
    rows = gguf_rows.rounded(checkpoint, types if way == "export" else {})
    if parts:
        file = folder / "layers.safetensors"
        tensor_file.write(file, parts, {"key": kind})
        rows |= gguf_rows.stored(open_path(file))
    assert rows.keys() == types.keys()
    return rows


def run(cell: GgufCell, model: Path, folder: Path) -> GgufResult:
    """Write one cell, have llama.cpp run it, and compare."""
    folder.mkdir(parents=True)
    way, refused = way_of(model, cell.kind)
    if way is None:
        return GgufResult(refused)
    checkpoint = open_path(model)
    result, rows = GgufResult(way=way), rows_of(checkpoint, cell.kind, folder, way)
    written = gguf.write(checkpoint, folder / "m.gguf", dtype="float32", quantized=rows)
    plain = _plain(gguf_rows.Dequantized(checkpoint, rows), folder / "plain")
    prompts = [np.random.default_rng(n).integers(6, VOCABULARY, n).tolist() for n in LENGTHS]
    try:
        with LlamaCpp(written.path) as runtime:
            found = [runtime.logprobs(ids, VOCABULARY, sampled=SAMPLED) for ids in prompts]
            new = [runtime.generate(ids, NEW) for ids in prompts]
            steps = []  # of every token: its own log-probability without the cache, and the largest
            for ids, tokens in zip(prompts, new, strict=True):
                for place, token in enumerate(tokens):
                    row = runtime.logprobs([*ids, *tokens[:place]], VOCABULARY, sampled=SAMPLED)
                    steps.append((row[token], row.max()))
    except SurgeonError as error:
        result.error = error.message
        return result
    reference: Any = load(plain, dtype=torch.float32)
    result.as_run = apart(found, [_logprobs(reference, ids)[-1] for ids in prompts])
    with ggml_activations.Rounding(reference, rows):
        wanted = [_logprobs(reference, [*ids, *tokens]) for ids, tokens in zip(prompts, new, strict=True)]
    last = [rows[len(ids) - 1] for rows, ids in zip(wanted, prompts, strict=True)]
    result.alike = apart(found, last)
    result.exact = min(apart([one], [other]) for one, other in zip(found, last, strict=True))
    result.tokens = len(steps)
    result.generates = 2 * result.tokens > NEW * len(prompts) and all(
        own >= most - CLOSE for own, most in steps
    )
    best = [
        row.argmax() for rows, ids in zip(wanted, prompts, strict=True) for row in rows[len(ids) - 1 : -1]
    ]
    result.same = sum(
        int(token == own) for token, own in zip((t for tokens in new for t in tokens), best, strict=True)
    )
    return result


def apart(found: Sequence[np.ndarray], wanted: Sequence[np.ndarray]) -> float:
    """Return the relative difference of logits: of log-probabilities, each row less its mean."""
    one, other = (np.array([row - row.mean() for row in rows]) for rows in (found, wanted))
    return float(np.linalg.norm(one - other) / np.linalg.norm(other))


@torch.no_grad()
def _logprobs(model: Any, ids: Sequence[int]) -> np.ndarray:
    """Return the log-probabilities after every token [tokens, vocabulary]."""
    return torch.log_softmax(model(input_ids=torch.tensor([ids])).logits[0].double(), -1).numpy()


def _plain(view: Checkpoint, folder: Path) -> Path:
    """Write what a file stands for as a folder that transformers loads, in float32."""
    folder.mkdir()
    tensors = {}
    for name, info in view.tensors.items():
        raw = np.array(view.read(name, 0, info.elements)).reshape(info.shape)
        plain = (
            torch.from_numpy(raw.view(np.int16)).view(torch.bfloat16)
            if info.dtype == "BF16"
            else torch.from_numpy(raw)
        )
        tensors[name] = plain.float()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    finish(folder, {**(view.config or {}), "dtype": "float32"})
    return folder


def finish(folder: Path, config: dict[str, Any]) -> None:
    """Write config.json, and the modelling code of a model whose layers differ."""
    companions = ()
    if per_layer.is_per_layer(config):
        config, companions = per_layer.finish(config)
    (folder / "config.json").write_text(json.dumps(config))
    for name, content in companions:
        (folder / name).write_bytes(content)
