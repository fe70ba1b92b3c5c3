"""The configuration of DeciLM (Llama-Nemotron): Llama layers that differ in key/value heads and FFN width.

Written by surgeon; Apache-2.0; needs transformers >= 5. Engines read ``block_configs`` by attribute and
transformers writes it as JSON, so its entries are dictionaries with attributes.
"""

from huggingface_hub.dataclasses import strict
from transformers import LlamaConfig

from .configuration_surgeon import Blocks


class Entry(dict):
    def __getattr__(self, name):
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None


@strict
class DeciLMConfig(Blocks, LlamaConfig):
    model_type = "nemotron-nas"
    block_configs: list | None = None

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        if self.block_configs is not None:
            self.block_configs = [
                Entry({part: Entry(sizes) for part, sizes in block.items()}) for block in self.block_configs
            ]

    def blocks(self):
        """Return the entries in the form of configuration_surgeon.py."""
        return None if self.block_configs is None else [self._block(block) for block in self.block_configs]

    def _block(self, block):
        heads, attention, ffn = self.num_attention_heads, block["attention"], block["ffn"]
        groups = 0 if attention["no_op"] else heads // attention["n_heads_in_group"]
        width = 0 if ffn["no_op"] else -(-int(2 * ffn["ffn_mult"] * self.hidden_size / 3) // 256) * 256
        return {
            "attention": {
                "no_op": attention["no_op"],
                "num_attention_heads": heads,
                "num_key_value_heads": groups,
            },
            "ffn": {"no_op": ffn["no_op"], "intermediate_size": width},
        }
