"""Tiny models with a direction, and the plain torch model edited by hooks, for the tests of edits."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "calibrate"))
from walk_models import model_folder, stock

from surgeon.checkpoint.checkpoint import open_path
from surgeon.derive import Derived, Source, plan_of
from surgeon.edit.direction_file import Directions, fingerprint
from surgeon.edit.writers import stream_of
from surgeon.execute import execute

IDS = torch.tensor([[5, 9, 33, 41, 12, 7, 60, 22], [8, 3, 3, 17, 29, 50, 11, 4]])


def opened(family, *extra):
    checkpoint = open_path(model_folder(family, extra))
    return checkpoint, stream_of(checkpoint)


def directions_for(checkpoint, stream, site="attn", seed=0):
    """Random directions with random mean inputs, of the right widths."""
    drawn = np.random.default_rng(seed)
    layers = list(stream.site(site))
    return Directions(
        site=site,
        window="response",
        vectors={n: drawn.normal(size=stream.hidden).astype(np.float32) for n in layers},
        inputs={w.layer: drawn.normal(size=w.inputs).astype(np.float32) for w in stream.attention()},
        norms=dict.fromkeys(layers, 5.0),
        separated=dict.fromkeys(layers, 1.0),
        modules=dict(stream.site(site)),
        examples=(60, 60),
        model=fingerprint(checkpoint),
    )


def tensor(checkpoint, name):
    """A tensor as float64."""
    from surgeon.kernels.cast import widen

    info = checkpoint.tensors[name]
    return widen(checkpoint.read(name, 0, info.elements), info.dtype).astype(np.float64).reshape(info.shape)


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


def saved(view, checkpoint, out, dtype=None):
    """Write a view through the engine and load the result the way everybody does, strictly."""
    source = Source("source", checkpoint, str(checkpoint.folder))
    plan = plan_of(
        source, {"": Derived(view, {"method": "test"}, "thinkedit", {}, "edited")}, verb="edit", dtype=dtype
    )
    execute(plan, out, threads=1)
    model, info = type(stock(out)).from_pretrained(out, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"], info
    return model.eval()


def unit(vector):
    vector = np.asarray(vector, np.float64)
    return vector / np.linalg.norm(vector)
