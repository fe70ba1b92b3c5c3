"""BERT: post-norm encoder with learned positions; the base model and its usual heads."""

from __future__ import annotations

from collections.abc import Iterator

from surgeon.architectures.base import Architecture, Part, Tensor
from surgeon.architectures.blocks import grouped, labels, linear, norm, quotient
from surgeon.architectures.rules import heads_divide_hidden
from surgeon.architectures.settings import Settings, Size

POOLED = ("ForPreTraining", "ForSequenceClassification", "ForMultipleChoice", "ForNextSentencePrediction")
"""Classes that read the pooler; the others may lack it."""

LANGUAGE_MODELS = ("ForMaskedLM", "LMHeadModel", "ForPreTraining")


def _sizes(settings: Settings) -> dict[str, Size]:
    hidden, heads = settings.size("hidden_size"), settings.size("num_attention_heads")
    return {
        "vocab": settings.size("vocab_size"),
        "positions": settings.size("max_position_embeddings"),
        "segments": settings.size("type_vocab_size"),
        "hidden": hidden,
        "heads": heads,
        "groups": heads,
        "head_dim": quotient(hidden, heads),
        "query": hidden,
        "key_value": hidden,
        "ffn": settings.size("intermediate_size"),
        "one": Size(1, ()),
        "two": Size(2, ()),
    } | labels(settings)


def _outer(settings: Settings) -> Iterator[Part]:
    yield Tensor("embeddings.word_embeddings.weight", ("vocab", "hidden"), "embedding")
    yield Tensor("embeddings.position_embeddings.weight", ("positions", "hidden"), "position_embedding")
    yield Tensor("embeddings.token_type_embeddings.weight", ("segments", "hidden"), "segment_embedding")
    yield from norm("embeddings.LayerNorm", bias=True)
    yield Tensor("embeddings.position_ids", None, "buffer", optional=True)
    pooler = linear("pooler.dense", "hidden", "hidden", "pooler", bias=True)
    yield from pooler if settings.model_class().endswith(POOLED) else grouped(pooler, "pooler")


def _attention(path: str, kind: str) -> Iterator[Tensor]:
    yield from linear(f"{path}.self.query", "query", "hidden", f"{kind}_q", bias=True)
    yield from linear(f"{path}.self.key", "key_value", "hidden", f"{kind}_k", bias=True)
    yield from linear(f"{path}.self.value", "key_value", "hidden", f"{kind}_v", bias=True)
    yield from linear(f"{path}.output.dense", "hidden", "query", f"{kind}_o", bias=True)
    yield from norm(f"{path}.output.LayerNorm", bias=True)


def _layer(settings: Settings, index: int) -> Iterator[Tensor]:
    yield from _attention("attention", "attention")
    if settings.flag("is_decoder") and settings.flag("add_cross_attention"):
        yield from _attention("crossattention", "cross_attention")
    yield from linear("intermediate.dense", "ffn", "hidden", "ffn_up", bias=True)
    yield from linear("output.dense", "hidden", "ffn", "ffn_down", bias=True)
    yield from norm("output.LayerNorm", bias=True)


def _language_model(settings: Settings) -> Iterator[Tensor]:
    yield Tensor("cls.predictions.bias", ("vocab",), "head_bias")
    yield from linear("cls.predictions.transform.dense", "hidden", "hidden", "head_transform", bias=True)
    yield from norm("cls.predictions.transform.LayerNorm", bias=True)
    yield from linear("cls.predictions.decoder", "vocab", "hidden", "head", bias=True)


def _head(settings: Settings) -> Iterator[Part]:
    name = settings.model_class()
    next_sentence = linear("cls.seq_relationship", "two", "hidden", "head", bias=True)
    if name.endswith(("ForPreTraining", "ForNextSentencePrediction")):
        yield from next_sentence
    else:
        yield from grouped(next_sentence, "next sentence")  # files of the original model keep it
    if name.endswith(LANGUAGE_MODELS):
        yield from _language_model(settings)
    elif name.endswith(("ForSequenceClassification", "ForTokenClassification")):
        yield from linear("classifier", "labels", "hidden", "head", bias=True)
    elif name.endswith("ForMultipleChoice"):
        yield from linear("classifier", "one", "hidden", "head", bias=True)
    elif name.endswith("ForQuestionAnswering"):
        yield from linear("qa_outputs", "labels", "hidden", "head", bias=True)
    elif not name:
        yield from grouped(_language_model(settings), "language model")


ARCHITECTURE = Architecture(
    model_type="bert",
    prefix="bert.",
    stack="encoder.layer",
    sizes=_sizes,
    outer=_outer,
    layer=_layer,
    head=_head,
    ties=(
        ("{prefix}embeddings.word_embeddings.weight", "cls.predictions.decoder.weight"),
        ("cls.predictions.bias", "cls.predictions.decoder.bias"),
    ),
    default_tie=True,
    defaults={
        "vocab_size": 30522,
        "hidden_size": 768,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "intermediate_size": 3072,
        "max_position_embeddings": 512,
        "type_vocab_size": 2,
    },
    rules=(heads_divide_hidden(),),
    spelling=((".gamma", ".weight"), (".beta", ".bias")),
    branch_norms=((), ()),  # both normalise the residual sum
    post_norm=True,
)
