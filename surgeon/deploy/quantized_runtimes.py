"""Which programs load a quantized folder as it is, what has to be installed for it, and why others do not.

The rules of compressed-tensors and auto-round are those their writers obey (`surgeon.formats.compressed_runtimes`,
`surgeon.formats.auto_round`); transformers was run on them, vLLM was read. Others are what the libraries say themselves.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from surgeon.formats import auto_round, compressed_runtimes
from surgeon.formats.account import Account
from surgeon.formats.compressed_runtimes import Reader as Target
from surgeon.formats.dequantized import scheme_of
from surgeon.traits import part_of, text_section

DENSE_WIDTHS = frozenset({3, 5, 6, 7})
"""Widths that compressed-tensors packs in one way since 0.20, and packed in another before."""

PACKAGES = {
    "auto-round": "auto-round",
    "gptq": "optimum and gptqmodel",
    "awq": "gptqmodel and accelerate",
    "bitsandbytes": "bitsandbytes",
    "fp8": "accelerate",
    "mxfp4": "accelerate; kernels and triton to run it packed",
    "fbgemm_fp8": "fbgemm-gpu",
}
"""quant_method -> what transformers asks for."""


@dataclass(frozen=True)
class Verdict:
    """Whether a program loads a quantized folder.

    Attributes:
        loads: whether it does.
        reason: what the user must know, or why not.
    """

    loads: bool
    reason: str


def verdict(runtime: str, config: Mapping[str, Any], account: Account, *, dtype: str, tied: bool) -> Verdict:
    """Return what a program makes of a quantized folder, its shapes aside.

    Args:
        runtime: one of `surgeon.deploy.runtimes.RUNTIMES`.
        config: config.json.
        account: what the folder holds.
        dtype: storage type of its plain tensors.
        tied: whether its head is the embedding.
    """
    if runtime == "transformers":
        return _transformers(config, account, dtype, tied)
    if runtime == "vllm":
        return _vllm(config, account, dtype, tied)
    if runtime == "llama.cpp":
        return Verdict(False, "it reads files of its own: surgeon export --to gguf --dequantize")
    return Verdict(False, "which quantized folders it reads is not recorded here")


def _transformers(config: Mapping[str, Any], account: Account, dtype: str, tied: bool) -> Verdict:
    method = account.method
    target = Target("transformers", dtype, tied)
    if method == "compressed-tensors":
        refused = compressed_runtimes.refusals(account.matrices, target)
        if refused:
            return Verdict(False, refused[0].message)
        widths = {s.bits for _, s in account.matrices.values() if s is not None and s.kind == "int"}
        version = ">=0.20" if widths & DENSE_WIDTHS else ">=0.15"
        return Verdict(True, f"needs compressed-tensors{version}; unpacks to 16 bits in memory on processors")
    if method == "auto-round":
        refused = auto_round.refusals(account.matrices, target, text_section(config).get("model_type"))
        return Verdict(False, refused[0].message) if refused else Verdict(True, f"needs {PACKAGES[method]}")
    if method == "gptq" and (
        len({s for _, s in account.matrices.values() if s}) > 1 or scheme_of(config).get("dynamic")
    ):
        return Verdict(
            False,
            "it takes all modules of GPTQ files for alike and ignores dynamic; GPTQModel.load reads them",
        )
    if method == "bitsandbytes" and account.experts[1]:
        return Verdict(
            False, "it keeps the experts of a layer in one tensor, which bitsandbytes does not unpack"
        )
    if method in PACKAGES:
        shown = {"fp8": "; converts to 16 bits without a GPU for it"}.get(method, "")
        return Verdict(True, f"needs {PACKAGES[method]}{shown}")
    return Verdict(False, f"it reads no models of {account.words.partition(':')[0] or 'this form'}")


def _vllm(config: Mapping[str, Any], account: Account, dtype: str, tied: bool) -> Verdict:
    method = account.method
    target = Target("vllm", dtype, tied)
    read = "read in its source, not run"
    refused: list[Any] = []
    if method == "compressed-tensors":
        refused = compressed_runtimes.refusals(account.matrices, target)
    elif method == "auto-round":
        refused = auto_round.refusals(account.matrices, target, text_section(config).get("model_type"))
    elif method == "gptq":
        schemes = {s for _, s in account.matrices.values() if s is not None}
        if any(s.bits not in (4, 8) or not s.symmetric for s in schemes):
            return Verdict(False, "it reads GPTQ files of 4 and 8 bits with zero points in the middle")
        within = {
            (name.rpartition(".experts.")[0], s)
            for name, (_, s) in account.matrices.items()
            if part_of(name) == "expert"
        }
        if len({place for place, _ in within}) != len(within):
            return Verdict(False, "it has one scheme for all experts of a layer")
    elif method == "bitsandbytes" and account.experts[0]:
        return Verdict(False, "its reading of bitsandbytes' mixtures of experts is not recorded here")
    elif method not in ("awq", "fp8", "mxfp4", "bitsandbytes", "fbgemm_fp8"):
        return Verdict(False, f"its reading of {method or 'this form'} is not recorded here")
    return Verdict(False, refused[0].message) if refused else Verdict(True, read)
