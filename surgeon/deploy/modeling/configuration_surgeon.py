"""Configurations of decoders whose layers differ in heads and FFN width.

Written by surgeon; Apache-2.0; needs transformers >= 5. ``block_configs`` holds one entry a layer:
{"attention": {"no_op", "num_attention_heads", "num_key_value_heads"}, "ffn": {"no_op", "intermediate_size"}}.
The global sizes are those of the model it was cut from.
"""

from typing import Any

import transformers
from huggingface_hub.dataclasses import strict


class Blocks:
    """What a configuration gains: sizes for each layer, and a check of them."""

    _auto_class = "AutoConfig"
    block_configs: Any
    num_hidden_layers: Any

    def blocks(self):
        return self.block_configs

    def validate_block_configs(self):
        blocks = self.blocks()
        if blocks is None:  # a default instance, made when a configuration is compared with the defaults
            return
        if len(blocks) != self.num_hidden_layers:
            raise ValueError(
                f"block_configs has {len(blocks)} entries, num_hidden_layers is {self.num_hidden_layers}"
            )
        for number, block in enumerate(blocks):
            attention, ffn = block["attention"], block["ffn"]
            if not attention["no_op"]:
                heads, groups = attention["num_attention_heads"], attention["num_key_value_heads"]
                if groups < 1 or heads < 1 or heads % groups:
                    raise ValueError(
                        f"layer {number}: {heads} query heads cannot share {groups} key/value heads"
                    )
            if not ffn["no_op"] and ffn["intermediate_size"] < 1:
                raise ValueError(f"layer {number}: intermediate_size is {ffn['intermediate_size']}")


@strict
class SurgeonLlamaConfig(Blocks, transformers.LlamaConfig):
    model_type = "surgeon_llama"
    block_configs: list | None = None


@strict
class SurgeonMistralConfig(Blocks, transformers.MistralConfig):
    model_type = "surgeon_mistral"
    block_configs: list | None = None


@strict
class SurgeonQwen2Config(Blocks, transformers.Qwen2Config):
    model_type = "surgeon_qwen2"
    block_configs: list | None = None


@strict
class SurgeonQwen3Config(Blocks, transformers.Qwen3Config):
    model_type = "surgeon_qwen3"
    block_configs: list | None = None


@strict
class SurgeonGemmaConfig(Blocks, transformers.GemmaConfig):
    model_type = "surgeon_gemma"
    block_configs: list | None = None


@strict
class SurgeonGemma2Config(Blocks, transformers.Gemma2Config):
    model_type = "surgeon_gemma2"
    block_configs: list | None = None


@strict
class SurgeonGemma3Config(Blocks, transformers.Gemma3TextConfig):
    model_type = "surgeon_gemma3_text"
    block_configs: list | None = None


@strict
class SurgeonPhi3Config(Blocks, transformers.Phi3Config):
    model_type = "surgeon_phi3"
    block_configs: list | None = None


FAMILIES = {
    "Llama": SurgeonLlamaConfig,
    "Mistral": SurgeonMistralConfig,
    "Qwen2": SurgeonQwen2Config,
    "Qwen3": SurgeonQwen3Config,
    "Gemma": SurgeonGemmaConfig,
    "Gemma2": SurgeonGemma2Config,
    "Gemma3": SurgeonGemma3Config,
    "Phi3": SurgeonPhi3Config,
}
