"""--attention: a way to compute attention that a model does not have is a refusal."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from surgeon.errors import EnvironmentFault, UsageError
from surgeon.measure.conditions import Conditions
from surgeon.measure.models import attention_of, set_attention


@pytest.fixture
def model():
    with torch.device("meta"):
        return LlamaForCausalLM(LlamaConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=1,
                                            num_attention_heads=2, vocab_size=16))  # fmt: skip


def test_the_one_asked_for_is_taken(model):
    set_attention(model, Conditions(attention="eager"))
    assert attention_of(model) == "eager"
    set_attention(model, Conditions(attention=None))
    assert attention_of(model) == "eager"


def test_one_that_does_not_exist_is_refused(model):
    with pytest.raises(UsageError, match='--attention is "frog", which LlamaForCausalLM does not have') as refused:  # fmt: skip
        set_attention(model, Conditions(attention="frog"))
    assert refused.value.code == "E281" and "sdpa" in refused.value.help


def test_one_whose_package_is_missing_is_refused(model, monkeypatch):
    def missing(name):
        raise ImportError("flash_attn is not installed")

    monkeypatch.setattr(model, "set_attn_implementation", missing)
    with pytest.raises(EnvironmentFault, match="needs a package that is not installed") as refused:
        set_attention(model, Conditions(attention="flash_attention_2"))
    assert refused.value.code == "E512"
