"""Which programs load a model of given shapes, stored plain or quantized, and why others do not.

transformers and llama.cpp were run on every rule here; vLLM and TensorRT-LLM were read, not run.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from surgeon.deploy import decilm, gguf_layout, per_layer, quantized_runtimes
from surgeon.errors import UsageError, close_matches
from surgeon.formats.account import Account
from surgeon.formats.dequantized import plain_config
from surgeon.structure.config import DIVIDED_HIDDEN

RUNTIMES = ("transformers", "vllm", "llama.cpp", "tensorrt-llm")
_ENGINE_FAMILIES = frozenset({"llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "phi3"})
"""Decoders that vLLM and TensorRT-LLM have classes for, among those with structures to prune."""
_QUANTIZED_MIXTURES = frozenset(
    {"mixtral", "qwen2_moe", "qwen3_moe", "deepseek_v2", "deepseek_v3", "olmoe", "gpt_oss"}
)
"""Mixtures of experts whose quantized folders vLLM has rules for."""


@dataclass(frozen=True)
class Reader:
    """One program and one model.

    Attributes:
        runtime: one of `RUNTIMES`.
        loads: whether it loads the model, in the form named by ``form``.
        form: "folder" as it is written, "folder with code" (trust_remote_code), "decilm" or "gguf <architecture>"
            after an export; empty when it does not load.
        reason: what the user must know, or why it does not load.
    """

    runtime: str
    loads: bool
    form: str
    reason: str


def readers(
    config: Mapping[str, Any], account: Account | None = None, *, dtype: str = "BF16", tied: bool = False
) -> list[Reader]:
    """Return a verdict for every runtime on a configuration: stock, with ``block_configs``, or DeciLM.

    Args:
        config: config.json.
        account: what a quantized folder holds (`surgeon.formats.account.account_of`); None of a plain one.
        dtype: storage type of a quantized folder's plain tensors.
        tied: whether its head is the embedding.

    Raises:
        InputError: E324 block_configs are malformed.
    """
    if account is not None:
        return [
            _quantized(one, config, account, dtype, tied)
            for one in readers(plain_config(config, "bfloat16") or {})
        ]
    return [
        _transformers(config),
        _engine("vllm", config),
        _llama_cpp(config),
        _engine("tensorrt-llm", config),
    ]


def _quantized(shapes: Reader, config: Mapping[str, Any], account: Account, dtype: str, tied: bool) -> Reader:
    """Return the verdict on a quantized folder of shapes on which there is one already."""
    found = quantized_runtimes.verdict(shapes.runtime, config, account, dtype=dtype, tied=tied)
    known = shapes.runtime == "vllm" and per_layer.base_type(config) in _QUANTIZED_MIXTURES
    if not found.loads:
        unknown = shapes.runtime == "llama.cpp" and not shapes.loads  # no export would help
        return Reader(shapes.runtime, False, "", shapes.reason if unknown else found.reason)
    if not shapes.loads and not known:
        return Reader(shapes.runtime, False, "", shapes.reason)
    if shapes.form and shapes.form != "folder":
        return Reader(
            shapes.runtime,
            False,
            "",
            f"these shapes need another form ({shapes.form}), which holds plain weights",
        )
    return Reader(shapes.runtime, True, "folder", found.reason)


def require(config: Mapping[str, Any], runtime: str) -> Reader:
    """Return the verdict for one runtime, refusing when it does not load the model.

    Raises:
        UsageError: E287 an unknown runtime; E288 it does not load the model.
    """
    if runtime not in RUNTIMES:
        raise UsageError(
            "E287",
            f'there is no runtime "{runtime}"',
            help=close_matches(runtime, RUNTIMES) or ", ".join(RUNTIMES),
        )
    found = readers(config)
    verdict = next(reader for reader in found if reader.runtime == runtime)
    if not verdict.loads:
        others = ", ".join(reader.runtime for reader in found if reader.loads)
        raise UsageError("E288", f"{runtime} does not load these shapes: {verdict.reason}",
                         help="--layout uniform" + (f"; as it is, these load it: {others}" if others else ""))  # fmt: skip
    return verdict


def _transformers(config: Mapping[str, Any]) -> Reader:
    if per_layer.is_per_layer(config):
        if per_layer.base_type(config) not in (*per_layer.FAMILIES, decilm.MODEL_TYPE):
            return Reader(
                "transformers", False, "", "no class holds layers of different sizes for this family"
            )
        return Reader(
            "transformers",
            True,
            "folder with code",
            "needs trust_remote_code=True: the folder brings two short files",
        )
    heads, hidden = config.get("num_attention_heads"), config.get("hidden_size")
    if per_layer.base_type(config) in DIVIDED_HIDDEN and heads and hidden and hidden % heads:
        return Reader(
            "transformers",
            False,
            "",
            f"its class refuses {heads} heads, which do not divide hidden_size = {hidden}",
        )
    return Reader("transformers", True, "folder", "")


def _engine(runtime: str, config: Mapping[str, Any]) -> Reader:
    family = per_layer.base_type(config)
    if family == decilm.MODEL_TYPE:
        return Reader(runtime, True, "folder", "as DeciLMForCausalLM; read in its source, not run")
    if not per_layer.is_per_layer(config):
        if family in _ENGINE_FAMILIES:
            return Reader(runtime, True, "folder", "")
        return Reader(runtime, False, "", f"support for {family} models is not recorded here")
    reasons = decilm.obstacles(config)
    if reasons:
        return Reader(runtime, False, "", reasons[0])
    return Reader(
        runtime, True, "decilm", "after an export as a DeciLM directory; read in its source, not run"
    )


def _llama_cpp(config: Mapping[str, Any]) -> Reader:
    if per_layer.base_type(config) == decilm.MODEL_TYPE:
        return Reader(
            "llama.cpp",
            False,
            "",
            "its converter reads DeciLM directories, but rounds widths; export from the model itself",
        )
    arch, reason = gguf_layout.architecture(config)
    if arch is None:
        return Reader("llama.cpp", False, "", reason)
    warned = " (openelm's graph: experimental)" if arch == "openelm" else ""
    return Reader("llama.cpp", True, f"gguf {arch}", f"after an export as GGUF{warned}")


def quantization_notes(config: Mapping[str, Any]) -> Iterator[str]:
    """Yield which later quantizations these shapes do not suit: GGUF K-quants, group sizes, Marlin kernels."""
    shapes = per_layer.block_shapes(config)
    hidden = int(config["hidden_size"])
    yield from gguf_layout.quantization_notes(shapes, hidden)
    inputs = {
        hidden,
        *(shape.ffn for shape in shapes),
        *(shape.heads * shape.head_dim for shape in shapes),
    } - {0}
    odd = sorted(size for size in inputs if size % 128)
    if odd:
        yield f"groups of 128 (GPTQ, AWQ) do not divide inputs of {', '.join(map(str, odd[:4]))}; a smaller group size does"
    outputs = inputs | {shape.groups * shape.head_dim for shape in shapes} - {0}
    odd = sorted(size for size in outputs if size % 64)
    if odd:
        yield f"Marlin kernels need outputs in multiples of 64, which {', '.join(map(str, odd[:4]))} are not"
