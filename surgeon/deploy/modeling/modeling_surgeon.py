"""Decoders whose layers differ in heads and FFN width: the library's own, with layers of other sizes.

Written by surgeon; Apache-2.0; needs transformers >= 5. See configuration_surgeon.py for ``block_configs``.
"""

from typing import Any

import torch
import transformers
from torch import nn

from .configuration_surgeon import FAMILIES


class LayerSizes:
    """The configuration as one layer sees it: live, but for the sizes given."""

    def __init__(self, config, **sizes):
        self.__dict__.update(sizes, _whole=config)

    def __getattr__(self, name):
        if name.startswith("__") or "_whole" not in self.__dict__:
            raise AttributeError(name)
        return getattr(self._whole, name)


class NoFfn(nn.Module):
    def forward(self, hidden_states):
        return torch.zeros_like(hidden_states)


class NoHeads(nn.Module):
    """Writes one empty head into the cache: caches take the sequence length from whichever layer they like."""

    def __init__(self, layer_idx):
        super().__init__()
        self.layer_idx = layer_idx

    def forward(self, hidden_states, past_key_values=None, **kwargs):
        if past_key_values is not None:
            empty = hidden_states.new_zeros(hidden_states.shape[0], 1, hidden_states.shape[1], 1)
            past_key_values.update(empty, empty, self.layer_idx)
        return torch.zeros_like(hidden_states), None


class PerLayer:
    _auto_class = "AutoModelForCausalLM"
    model: Any
    post_init: Any

    def __init__(self, config):
        super().__init__(config)  # pyright: ignore
        for number, (layer, block) in enumerate(zip(self.model.layers, config.blocks(), strict=True)):
            attention, ffn = dict(block["attention"]), dict(block["ffn"])
            around_ffn = hasattr(
                layer, "pre_feedforward_layernorm"
            )  # Gemma 2 and 3: norms behind a branch too
            if attention.pop("no_op"):
                layer.self_attn = NoHeads(number)
                for norm in ("input_layernorm", *(["post_attention_layernorm"] if around_ffn else [])):
                    setattr(layer, norm, nn.Identity())
            else:
                layer.self_attn = type(layer.self_attn)(LayerSizes(config, **attention), layer_idx=number)
            if ffn.pop("no_op"):
                layer.mlp = NoFfn()
                norms = (
                    ("pre_feedforward_layernorm", "post_feedforward_layernorm")
                    if around_ffn
                    else ("post_attention_layernorm",)
                )
                for norm in norms:
                    setattr(layer, norm, nn.Identity())
            else:
                layer.mlp = type(layer.mlp)(LayerSizes(config, **ffn))
        self.post_init()


def _family(name):
    stock = getattr(transformers, f"{name}ForCausalLM")
    return type(
        f"Surgeon{name}ForCausalLM",
        (PerLayer, stock),
        {"config_class": FAMILIES[name], "__module__": __name__},
    )


SurgeonLlamaForCausalLM = _family("Llama")
SurgeonMistralForCausalLM = _family("Mistral")
SurgeonQwen2ForCausalLM = _family("Qwen2")
SurgeonQwen3ForCausalLM = _family("Qwen3")
SurgeonGemmaForCausalLM = _family("Gemma")
SurgeonGemma2ForCausalLM = _family("Gemma2")
SurgeonGemma3ForCausalLM = _family("Gemma3")
SurgeonPhi3ForCausalLM = _family("Phi3")
