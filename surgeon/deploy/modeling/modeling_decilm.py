"""DeciLM (Llama-Nemotron) for transformers: Llama layers that differ in key/value heads and FFN width.

Written by surgeon; Apache-2.0; needs transformers >= 5. vLLM and TensorRT-LLM have this class built in.
"""

from transformers import LlamaForCausalLM

from .configuration_decilm import DeciLMConfig
from .modeling_surgeon import PerLayer


class DeciLMForCausalLM(PerLayer, LlamaForCausalLM):
    config_class = DeciLMConfig
