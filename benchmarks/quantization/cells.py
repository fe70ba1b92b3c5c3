"""What is written and loaded: families, recipes of schemes, and the folders of a cell, the quantized one and what it means.

A cell is a form, a recipe and a family. Its model is built from a configuration with random weights, quantized by rounding,
stored through the form as `surgeon quantize` stores it, and written once more as the plain numbers it stands for.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import transformers
from safetensors.torch import load_file, save_file

from surgeon.errors import SurgeonError
from surgeon.formats import bnb, float4, float8_dynamic
from surgeon.formats.compressed_runtimes import EXPERT, Reader, Runtime
from surgeon.formats.scheme import Codes, Scheme
from surgeon.quantize import forms, rtn
from surgeon.traits import part_of

SIZES = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 16, "vocab_size": 96, "max_position_embeddings": 64, "initializer_range": 0.1, "tie_word_embeddings": False,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
ROUTED = {"num_experts_per_tok": 2, "moe_intermediate_size": 64}

FAMILIES: dict[str, tuple[str, dict]] = {
    "llama": ("llama", {}),
    "llama, tied": ("llama", {"tie_word_embeddings": True}),
    "qwen2, tied": ("qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("qwen3", {}),
    "mistral": ("mistral", {"sliding_window": 8}),
    "gemma2, tied": ("gemma2", {"tie_word_embeddings": True, "sliding_window": 8, "query_pre_attn_scalar": 16}),
    "phi3": ("phi3", {"head_dim": None}),
    "qwen3_moe": ("qwen3_moe", {**ROUTED, "num_experts": 8}),
    "mixtral": ("mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 64}),
    "olmoe": ("olmoe", {"num_experts": 8, "num_experts_per_tok": 2, "intermediate_size": 64, "head_dim": None}),
    "deepseek_v3": ("deepseek_v3", {
        **ROUTED, "n_routed_experts": 8, "num_key_value_heads": 4, "first_k_dense_replace": 1, "n_shared_experts": 1,
        "q_lora_rank": 64, "kv_lora_rank": 64, "qk_nope_head_dim": 16, "qk_rope_head_dim": 32, "v_head_dim": 16,
        "n_group": 2, "topk_group": 1, "head_dim": None, "num_hidden_layers": 3,
    }),
}  # fmt: skip
"""Name -> (model_type, what differs from `SIZES`)."""

MIXTURES = ("qwen3_moe", "mixtral", "olmoe", "deepseek_v3")
IDS = np.random.default_rng(7).integers(3, 96, (2, 24)).tolist()
"""Tokens every model is shown."""

Choose = Callable[[str], Scheme | None]
"""Name of a linear module in the source -> its scheme; asked of no router, and of the head only where it may be quantized."""


def integer(bits: int, group: int = 32, symmetric: bool = True) -> Scheme:
    return Scheme("int", bits, group, symmetric)


def _cycle(*schemes: Scheme | None) -> Choose:
    """Return a choice in which neighbours differ, by layer and by matrix."""

    def choose(name: str) -> Scheme | None:
        numbers = [int(n) for n in re.findall(r"\d+", name)]
        last = name.rpartition(".")[2]
        kinds = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "qkv_proj", "gate_up_proj",
                 "w1", "w3", "w2", "q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj")  # fmt: skip
        return schemes[(sum(numbers) + kinds.index(last)) % len(schemes)]

    return choose


def _experts(dense: Scheme | Choose | None, experts: Scheme | Callable[[int, int, str], Scheme | None] | None) -> Choose:  # fmt: skip
    """Return a choice that treats routed experts on their own: by (layer, expert, gate, up or down)."""
    plain = {"w1": "gate", "w3": "up", "w2": "down"}

    def choose(name: str) -> Scheme | None:
        match = EXPERT.match(name)
        if match is None:
            return dense(name) if callable(dense) else dense
        layer = int(re.findall(r"\.(\d+)\.", name)[0])
        kind = plain.get(match["matrix"], match["matrix"].removesuffix("_proj"))
        return experts(layer, int(match["expert"]), kind) if callable(experts) else experts

    return choose


@dataclass(frozen=True)
class Recipe:
    """Which scheme each module gets.

    Attributes:
        form: of ``--format``.
        choose: as `Choose` says.
        mixtures: for mixtures of experts alone; None for every family.
        head: the output head is quantized, too, by this.
        embedding: the embedding is quantized by this.
        tied: True: of tied models alone; False: of others alone.
        double: double quantization of bitsandbytes.
        forced: written in spite of refusals, the reader has to fail or to compute something else.
    """

    form: str
    choose: Choose
    mixtures: bool | None = None
    head: Scheme | None = None
    embedding: Scheme | None = None
    tied: bool | None = None
    double: bool = False
    forced: bool = True


def _all(scheme: Scheme | None) -> Choose:
    return lambda name: scheme


CT, AR, BNB = "compressed-tensors", "auto-round", "bitsandbytes"
FLOAT8, NVFP4, MXFP4 = float8_dynamic.FLOAT8, float4.NVFP4, float4.MXFP4
INT4, INT8 = integer(4), integer(8)


def _widths(layer: int, expert: int, kind: str) -> Scheme:
    return integer((8, 3, 2, 4)[(layer + expert + (kind == "down")) % 4])


def _odd_widths(layer: int, expert: int, kind: str) -> Scheme:
    return integer((5, 7, 6, 4)[(layer + expert + (kind == "down")) % 4])


RECIPES: dict[str, Recipe] = {
    **{f"int{bits}g32": Recipe(CT, _all(integer(bits))) for bits in range(2, 9)},
    "int4, a scale a row": Recipe(CT, _all(integer(4, -1))),
    "int4g32, head int8": Recipe(CT, _all(INT4), head=integer(8, -1), tied=False),
    "int8 rows, int4g32, int4g64, int3g32, int2g32 mixed": Recipe(
        CT, _cycle(integer(8, -1), INT4, integer(4, 64), integer(3), integer(2)), mixtures=False),
    "float8": Recipe(CT, _all(FLOAT8)),
    "nvfp4": Recipe(CT, _all(NVFP4), mixtures=False),
    "mxfp4": Recipe(CT, _all(MXFP4)),
    "float8, nvfp4, mxfp4, int4g32 mixed": Recipe(CT, _cycle(FLOAT8, NVFP4, MXFP4, INT4), mixtures=False),
    "experts int3g32, other modules int8": Recipe(CT, _experts(integer(8, -1), integer(3)), mixtures=True),
    "experts int4 rows, other modules mixed": Recipe(
        CT, _experts(_cycle(integer(8, -1), INT4, integer(4, 64), integer(3)), integer(4, -1)), mixtures=True),
    "experts int4g32, other modules plain": Recipe(CT, _experts(None, INT4), mixtures=True),
    "experts mxfp4, other modules nvfp4": Recipe(CT, _experts(NVFP4, MXFP4), mixtures=True),
    "experts plain, other modules float8": Recipe(CT, _experts(FLOAT8, None), mixtures=True),
    # What no stock reader takes.
    "int4g32 with zero points": Recipe(CT, _all(integer(4, symmetric=False)), forced=False),
    "embedding int8": Recipe(CT, _all(INT4), embedding=integer(8), tied=False),
    "tied head int8": Recipe(CT, _all(INT4), head=integer(8), tied=True, forced=False),
    "experts nvfp4": Recipe(CT, _experts(INT4, NVFP4), mixtures=True),
    "experts int4g32 or int8g32 by layer": Recipe(
        CT, _experts(INT4, lambda layer, expert, kind: INT8 if layer % 2 else INT4), mixtures=True),
    "experts int4g32 or int8g32 by expert": Recipe(
        CT, _experts(INT4, lambda layer, expert, kind: INT8 if expert % 2 else INT4), mixtures=True),
    "experts int4g32, down projections int8g32": Recipe(
        CT, _experts(INT4, lambda layer, expert, kind: INT8 if kind == "down" else INT4), mixtures=True),
    "expert 0 plain, others int4g32": Recipe(
        CT, _experts(INT4, lambda layer, expert, kind: INT4 if expert else None), mixtures=True),
    "experts of layer 1 plain, others int4g32": Recipe(
        CT, _experts(INT4, lambda layer, expert, kind: None if layer == 1 else INT4), mixtures=True),
    "experts plain, other modules int4g32": Recipe(CT, _experts(INT4, None), mixtures=True),

    **{f"auto-round int{bits}g32": Recipe(AR, _all(integer(bits))) for bits in range(2, 9)},
    "auto-round int4, a scale a row": Recipe(AR, _all(integer(4, -1))),
    "auto-round int4g32, head int8": Recipe(AR, _all(INT4), head=INT8, tied=False),
    "auto-round int8g32, int3g64, int2g32, int4g32 mixed": Recipe(
        AR, _cycle(INT8, integer(3, 64), integer(2), INT4), mixtures=False),
    "auto-round int4g32, some modules plain": Recipe(AR, _cycle(INT4, INT4, None)),
    "auto-round experts of 8, 3, 2 and 4 bits, each matrix its own": Recipe(AR, _experts(INT4, _widths), mixtures=True),
    "auto-round experts of 5, 7, 6 and 4 bits, each matrix its own": Recipe(AR, _experts(integer(5), _odd_widths), mixtures=True),
    "auto-round experts int4g32, some plain": Recipe(
        AR, _experts(INT8, lambda layer, expert, kind: INT4 if expert else None), mixtures=True),
    "auto-round experts int3g32, other modules plain": Recipe(AR, _experts(None, integer(3)), mixtures=True),
    "auto-round int4g32 with zero points": Recipe(AR, _all(integer(4, symmetric=False)), forced=False),
    "auto-round float8": Recipe(AR, _all(FLOAT8), forced=False),
    "auto-round tied head int8": Recipe(AR, _all(INT4), head=INT8, tied=True, forced=False),

    "nf4": Recipe(BNB, _all(bnb.NF4), mixtures=False),
    "nf4, double quantization": Recipe(BNB, _all(bnb.NF4), mixtures=False, double=True),
    "fp4": Recipe(BNB, _all(bnb.FP4), mixtures=False),
    "int8 rows by bitsandbytes": Recipe(BNB, _all(bnb.INT8), mixtures=False),
    "nf4, some modules plain": Recipe(BNB, _cycle(bnb.NF4, bnb.NF4, None), mixtures=False),
    "nf4, head nf4": Recipe(BNB, _all(bnb.NF4), mixtures=False, head=bnb.NF4, tied=False),
    "nf4 of a mixture": Recipe(BNB, _all(bnb.NF4), mixtures=True),
    "nf4 and int8 mixed": Recipe(BNB, _cycle(bnb.NF4, bnb.INT8), mixtures=False, forced=False),
    "bitsandbytes int4g32": Recipe(BNB, _all(INT4), mixtures=False, forced=False),
}  # fmt: skip


@dataclass(frozen=True)
class Cell:
    """One case of the table."""

    recipe: str
    family: str

    @property
    def form(self) -> str:
        return RECIPES[self.recipe].form

    def __str__(self) -> str:
        return f"{self.form}: {self.recipe}: {self.family}"


def cells() -> list[Cell]:
    """Return every case, form by form."""
    found = []
    for name, recipe in RECIPES.items():
        for family, (_, sizes) in FAMILIES.items():
            tied = bool(sizes.get("tie_word_embeddings"))
            if recipe.mixtures in (None, family in MIXTURES) and recipe.tied in (None, tied):
                found.append(Cell(name, family))
    return found


def source(family: str, folder: Path) -> Path:
    """Save the random bfloat16 model of a family in its hub layout, biases and norms random, too."""
    model_type, more = FAMILIES[family]
    sizes = {key: value for key, value in {**SIZES, **more}.items() if value is not None}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(sorted(FAMILIES).index(family))
        config = transformers.AutoConfig.for_model(model_type, **sizes)
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.data += 0.1 * torch.randn_like(parameter)
    model.to(torch.bfloat16).save_pretrained(folder)
    return folder


def modules_of(cell: Cell, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Scheme | None]:
    """Return every linear module of a model by its source name without ".weight" -> its scheme."""
    recipe, found = RECIPES[cell.recipe], {}
    for name, shape in shapes.items():
        part = part_of(name)
        if len(shape) != 2 or not name.endswith(".weight"):
            continue
        module = name.removesuffix(".weight")
        if part == "embedding":
            if recipe.embedding is not None:
                found[module] = recipe.embedding
        elif part == "head":
            found[module] = recipe.head
        else:
            found[module] = None if part == "router" else recipe.choose(module)
    if recipe.head is not None and recipe.tied:
        found["lm_head"] = recipe.head
    return found


def form_of(cell: Cell, runtime: Runtime = "transformers") -> forms.Form:
    model_type, sizes = FAMILIES[cell.family]
    made = forms.get(cell.form, Reader(runtime, "BF16", bool(sizes.get("tie_word_embeddings"))), model_type)
    if RECIPES[cell.recipe].double:
        made.double = True  # type: ignore[attr-defined]
    return made


def refusals(cell: Cell, shapes: Mapping[str, tuple[int, ...]], runtime: Runtime = "transformers") -> list[SurgeonError]:  # fmt: skip
    """Return why a form does not write this."""
    rows = {**shapes, "lm_head.weight": shapes.get("lm_head.weight", shapes["model.embed_tokens.weight"])}
    chosen = modules_of(cell, shapes)
    matrices = {f"{module}.weight": (rows[f"{module}.weight"], scheme) for module, scheme in chosen.items()}
    return form_of(cell, runtime).refusals(matrices)


def shapes_of(folder: Path) -> dict[str, tuple[int, ...]]:
    from surgeon.checkpoint.checkpoint import open_path

    checkpoint = open_path(folder, str(folder))
    try:
        return {name: info.shape for name, info in checkpoint.tensors.items()}
    finally:
        checkpoint.close()


def _as_torch(array: np.ndarray, code: str) -> torch.Tensor:
    array = np.array(array, order="C")
    if code == "BF16":
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    if code == "F8_E4M3":
        return torch.from_numpy(array).view(torch.float8_e4m3fn)
    return torch.from_numpy(array)


DECODED = {CT: torch.bfloat16, AR: torch.float16, BNB: torch.float32}
"""Form -> the type its reader rounds decoded matrices to, whatever the model's; values from bitsandbytes are rounded already."""


def _stored(
    form: forms.Form, name: str, weight: torch.Tensor, scheme: Scheme
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Return what a matrix becomes, and the values it stands for, float32."""
    if scheme.kind == "int":
        codes: Codes = rtn.quantize(weight.float(), scheme, scale_dtype=form.scale_dtype, clip=False)
        parts, values = form.pack(name, codes), codes.values()
    else:
        parts, values = form.encode(name, weight.float().numpy(), scheme)
    laid_out = form.layout(name, tuple(weight.shape), scheme)
    assert {n: (c, s) for n, c, s in laid_out} == {n: (c, a.shape) for n, (c, a) in parts.items()}, name
    stored = {place: _as_torch(array, code) for place, (code, array) in parts.items()}
    return stored, torch.from_numpy(values.copy()).to(DECODED[form.name]).float()


def write(cell: Cell, model: Path, folder: Path) -> tuple[Path, Path]:
    """Write the quantized folder of a cell and the plain one of what it stands for in float32, refused or not.

    Raises:
        InputError: the form itself cannot store it.
    """
    form = form_of(cell)
    tensors = load_file(model / "model.safetensors")
    chosen = modules_of(cell, {name: tuple(tensor.shape) for name, tensor in tensors.items()})
    packed: dict[str, torch.Tensor] = {}
    plain: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        scheme = chosen.get(name.removesuffix(".weight")) if name.endswith(".weight") else None
        plain[name] = tensor.float()
        if scheme is None:
            packed[form.renamed(name)] = tensor
            continue
        parts, values = _stored(form, name, tensor, scheme)
        packed |= parts
        plain[name] = values
    config = json.loads((model / "config.json").read_text())
    stored = {**config, "quantization_config": form.config(chosen)}
    for kind, held, said in (("packed", packed, stored), ("plain", plain, {**config, "dtype": "float32"})):
        (folder / kind).mkdir(parents=True)
        save_file(
            {n: t.contiguous().clone() for n, t in held.items()},
            folder / kind / "model.safetensors",
            {"format": "pt"},
        )
        (folder / kind / "config.json").write_text(json.dumps(said, indent=1))
    return folder / "packed", folder / "plain"
