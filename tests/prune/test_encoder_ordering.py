"""The encoder benchmark on part of its sentences: which criterion wins on a real pretrained model."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks" / "pruning"))
import encoder as encoder_benchmark


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    torch.set_num_threads(1)
    return encoder_benchmark.Encoder(tmp_path_factory.mktemp("encoder"), calibration=128, evaluation=64)


def test_the_sentences_are_disjoint_and_of_the_promised_length():
    calibration, evaluation = (encoder_benchmark.sentences(name) for name in ("calibration", "evaluation"))
    assert (len(calibration), len(evaluation)) == (1024, 256)
    assert len({*calibration, *evaluation}) == 1280
    assert all(8 <= len(sentence.split()) <= 40 for sentence in (*calibration, *evaluation))


@pytest.mark.slow
def test_ziplm_is_first_and_ahead_of_flap(encoder):
    """On all sentences it leads by more (benchmarks/pruning/ENCODER.md); with less text by less."""
    methods = encoder_benchmark.REQUIRED
    found = encoder_benchmark.width_cosines(encoder, methods, seeds=2)
    leads = {("ffn", 0.25): 0.02, ("ffn", 0.5): 0.05, ("attention", 0.25): 0.01, ("attention", 0.5): 0.02}
    for (kind, fraction), lead in leads.items():
        scores = {name: float(found[name, kind, fraction].mean()) for name in methods}
        others = [score for name, score in scores.items() if name != "ziplm"]
        assert scores["ziplm"] > max(others), scores
        assert scores["ziplm"] - scores["flap"] > lead, scores
        assert scores["flap"] > scores["wanda, structured"] > scores["random"], scores
        assert scores["ziplm"] - scores["OBS without update"] > 0.025, scores
    assert found["ziplm", "ffn", 0.25].mean() > 0.97 and found["ziplm", "ffn", 0.5].mean() > 0.91


@pytest.mark.slow
def test_nmse_orders_layers_as_their_true_damage_does(encoder):
    found = encoder_benchmark.depth_scores(encoder)
    true = sorted(found["one"], key=lambda layer: -found["one"][layer])
    assert sorted(found["nmse alone"], key=found["nmse alone"].__getitem__) == true
    # Block influence takes layer 0 for less important than layer 4; without it the embeddings are worse off.
    turned = found["block-influence alone"]
    assert turned[(0,)] < turned[(4,)] and found["one"][(0,)] < found["one"][(4,)]
    pairs = sorted(found["two"].values(), reverse=True)
    ((_, chosen),) = found["nmse"].items()
    ((_, spaced),) = found["uniform"].items()
    assert chosen >= pairs[1] and chosen > spaced
