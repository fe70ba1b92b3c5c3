"""Kimi K2: DeepSeek V3 under a name of its own."""

from __future__ import annotations

from dataclasses import replace

from surgeon.architectures import deepseek_v3

ARCHITECTURE = replace(deepseek_v3.ARCHITECTURE, model_type="kimi_k2")
