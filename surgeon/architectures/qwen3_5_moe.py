"""Qwen3.5-MoE with its vision model: the language model lies inside under names of its own."""

from __future__ import annotations

from dataclasses import replace

from surgeon.architectures import qwen3_5_moe_text

ARCHITECTURE = replace(
    qwen3_5_moe_text.ARCHITECTURE,
    model_type="qwen3_5_moe",
    prefix="model.language_model.",
    section="text_config",
    beside=("model.visual.",),
)
