"""Quantizing layer by layer, against a plain loop over the stock model with hooks, and token by token for experts."""

from __future__ import annotations

import dataclasses
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "calibrate"))
from walk_models import base_of, model_folder, stock, texts

from surgeon.calibrate.matrices import Matrix, matrices_of, read_matrix
from surgeon.calibrate.settings import Settings
from surgeon.calibrate.skeleton import Skeleton
from surgeon.calibrate.walk import Walk
from surgeon.checkpoint import tensor_file
from surgeon.checkpoint.checkpoint import open_path
from surgeon.checkpoint.header import read_header
from surgeon.errors import InputError, Interrupted, UsageError
from surgeon.formats.compressed_runtimes import Reader
from surgeon.formats.dequantized import dequantized
from surgeon.formats.float4 import shared_scale
from surgeon.formats.scheme import Scheme
from surgeon.kernels.cast import round_to, widen
from surgeon.quantize import forms, gptq, rtn, shrinkage, target_shift
from surgeon.quantize.moments import Moments, held_out
from surgeon.quantize.observing import Inputs, kind_of
from surgeon.quantize.sequential import Options, quantize_layers
from surgeon.quantize.view import QuantizedView

ONE = Settings(threads=1, batch_tokens=64)
MANY = tuple((20, 21, 21, 20, 24, 18) * 5)
"""More than four tokens for each input of the tiny models."""
FOUR, THREE, TWO, EIGHT = Scheme("int", 4, 16), Scheme("int", 3, 16), Scheme("int", 2, 16), Scheme("int", 8, -1)
DENSE = {"llama": (), "qwen3": (("head_dim", 16),)}
MOE = {"qwen3_moe": (("head_dim", 16), ("moe_intermediate_size", 32)), "mixtral": ()}


def folder_of(family):
    return model_folder(family, {**DENSE, **MOE}[family])


def opened(family):
    checkpoint = open_path(folder_of(family))
    return checkpoint, matrices_of(checkpoint, Skeleton(checkpoint, ONE))


def form_of(name="compressed-tensors", dtype="BF16", runtime="transformers", model_type=None):
    return forms.get(name, Reader(runtime, dtype), model_type)


def every(layers, scheme):
    return {matrix.label: scheme for layer in layers for matrix in layer}


def values_of(checkpoint, schemes, form, files):
    """Return what the reader of the form makes of the files: plain name -> float32 [out, in]."""
    view = dequantized(QuantizedView(checkpoint, files, schemes, (), form))
    return {
        name: torch.from_numpy(widen(view.read(name, 0, view.tensors[name].elements), view.tensors[name].dtype).copy())
        .reshape(view.tensors[name].shape)
        for name, scheme in schemes.items() if scheme is not None
    }  # fmt: skip


# ---- the plain loop ----------------------------------------------------------------------------------


class Stock:
    """The stock model, in which matrices are looked at and replaced by hand."""

    def __init__(self, family, samples):
        self.model = stock(folder_of(family))
        self.original = stock(folder_of(family))
        self.samples = [torch.from_numpy(sample)[None] for sample in samples]
        self.experts = {
            int(re.search(r"layers\.(\d+)", path)[1]): module
            for path, module in self.model.named_modules() if path.endswith(".experts")
        }  # fmt: skip

    def parameter(self, name):
        """Return the weights that a checkpoint's tensor is in this model."""
        found = re.match(r".*layers\.(\d+)\..*experts\.(\d+)\.(\w+)\.weight", name)
        if found is None:
            return self.model.get_parameter(name).data
        module, expert = self.experts[int(found[1])], int(found[2])
        if found[3] in ("down_proj", "w2"):
            return module.down_proj.data[expert]
        half = module.gate_up_proj.shape[1] // 2
        rows = slice(0, half) if found[3] in ("gate_proj", "w1") else slice(half, None)
        return module.gate_up_proj.data[expert, rows]

    def inputs(self, matrix, model=None):
        """Return of each sample the inputs [tokens, in] of a matrix, and the gates [tokens] of an expert's."""
        model = model or self.model
        seen = []
        expert = re.match(r".*layers\.(\d+)\..*experts\.(\d+)\.(\w+)", matrix.module)
        if expert is None:
            module = model.get_submodule(matrix.tensor.removesuffix(".weight"))
            handle = module.register_forward_pre_hook(lambda _, args: seen.append((args[0].reshape(-1, args[0].shape[-1]), None)))  # fmt: skip
        else:
            module = self.experts[int(expert[1])]

            def look(_, args, kwargs):
                hidden, index, weights = [*args, *kwargs.values()][:3]
                seen.append(token_by_token(module, int(expert[2]), expert[3], hidden, index, weights))

            handle = module.register_forward_pre_hook(look, with_kwargs=True)
        with torch.no_grad():
            for ids in self.samples:
                base_of(model)(ids)
        handle.remove()
        return seen


def token_by_token(module, expert, part, hidden, index, weights):
    """Return what enters one matrix of an expert, and the routing weights, one token after the other."""
    rows, gates = [], []
    for token in range(len(hidden)):
        for slot in range(index.shape[1]):
            if int(index[token, slot]) != expert:
                continue
            x = hidden[token]
            if part in ("down_proj", "w2"):
                gate, up = (module.gate_up_proj[expert] @ x).chunk(2)
                x = functional.silu(gate) * up
            rows.append(x)
            gates.append(weights[token, slot])
    return (torch.stack(rows), torch.stack(gates)) if rows else (hidden[:0], torch.zeros(0))


def sums(seen, columns, originals=None):
    """Return the moments of three quarters of the samples and of the rest, in float64, as plain products."""
    parts = []
    for apart in (False, True):
        hessian = torch.zeros(columns, columns, dtype=torch.float64)
        cross, squares, fourths = torch.zeros_like(hessian), 0.0, 0.0
        for number, (rows, gates) in enumerate(seen):
            if held_out(number) is not apart or not len(rows):
                continue
            x = rows.double()
            g = torch.ones(len(x), dtype=torch.float64) if gates is None else gates.double()
            hessian += (x * g[:, None] ** 2).T @ x
            squares, fourths = squares + float((g**2).sum()), fourths + float((g**4).sum())
            if originals is not None:
                cross += (originals[number][0].double() - x).T @ x
        parts.append(Moments(hessian.float(), squares, fourths, None if originals is None else cross.float()))
    return parts


def by_hand(family, layers, schemes, samples, options, order=lambda layer: [layer]):
    """Quantize with hooks on the stock model; ``order`` divides a layer into steps."""
    model, found = Stock(family, samples), {}
    checkpoint = open_path(folder_of(family))
    more = {"scale_dtype": "BF16", "order": options.order, "damp": options.damp, "clip": options.clip}
    for layer in layers:
        for step in order(layer):
            new = {}
            for matrix in step:
                scheme = schemes[matrix.label]
                if scheme is None:
                    continue
                weight = read_matrix(checkpoint, matrix)
                seen = model.inputs(matrix)
                originals = model.inputs(matrix, model.original) if options.target_shift else None
                train, held = sums(seen, matrix.columns, originals)
                whole = train.merged(held)
                if whole.count == 0:
                    codes = rtn.quantize(weight, scheme, scale_dtype="BF16", clip=True)
                elif options.target_shift:
                    factor = gptq.factorise(whole.hessian, order=options.order, damp=options.damp)
                    target = target_shift.shifted(weight, whole.cross, factor)
                    codes, _ = gptq.quantize_with(target, factor, scheme, scale_dtype="BF16", clip=options.clip)
                elif not matrix.routed and whole.count >= 4 * matrix.columns:
                    codes, _ = gptq.quantize(weight, whole.hessian, scheme, **more)
                else:
                    shared = [
                        read_matrix(checkpoint, other) for other in layer
                        if other.module == matrix.module and schemes[other.label] == scheme
                    ]  # fmt: skip
                    results, _ = shrinkage.quantize(shared, train, held, scheme, **more)
                    codes = next(c for c, w in zip((c for c, _ in results), shared, strict=True) if torch.equal(w, weight))
                new[matrix.tensor] = torch.from_numpy(round_to(codes.values(), "BF16"))
            for name, values in new.items():
                model.parameter(name).copy_(values)
            found |= new
    return found


def agree(found, wanted, share=0.999):
    """Compare quantized weights; a code may differ where two were equally near but for the last bits of a sum."""
    assert found.keys() == wanted.keys() and found
    equal = torch.cat([(found[name] == wanted[name]).reshape(-1) for name in wanted])
    assert float(equal.float().mean()) >= share, float(equal.float().mean())


# ---- whole models ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("lengths", [MANY, MANY[:6]], ids=["many", "few"])
@pytest.mark.parametrize("family", DENSE)
def test_dense_layers_equal_a_plain_loop(family, lengths, tmp_path):
    checkpoint, layers = opened(family)
    schemes = every(layers, FOUR)
    schemes[layers[0][0].label] = EIGHT  # mixed widths, in one group of inputs too
    schemes[next(label for label in schemes if label.endswith("1.self_attn.k_proj.weight"))] = None
    options, samples = Options("gptq", clip=True), texts(lengths)
    done = quantize_layers(checkpoint, layers, schemes, form_of(), samples, ONE, options, tmp_path)
    found = values_of(checkpoint, schemes, form_of(), done.files)
    agree(found, by_hand(family, layers, schemes, samples, options))
    assert len(done.files) == len(layers)
    records = {record["label"]: record for record in done.records}
    assert records.keys() == {label for label, scheme in schemes.items() if scheme}
    for label, record in records.items():
        assert record["tokens"] == sum(lengths) and record["scheme"] == schemes[label].name
        assert 0 < record["error"] < 1 and 0 < record["weight_error"] < 1
        assert (record["shrinkage"] == 0 and "shrinkage_by" not in record) or sum(lengths) < 4 * 48
    better = np.mean([record["error"] / record["rounding_error"] for record in done.records])
    assert better < 1


@pytest.mark.parametrize("family", MOE)
def test_layers_of_experts_equal_a_token_loop(family, tmp_path):
    checkpoint, layers = opened(family)
    schemes = every(layers, FOUR)
    options, samples = Options("gptq"), texts(MANY[:8])
    done = quantize_layers(checkpoint, layers, schemes, form_of(), samples, ONE, options, tmp_path)
    found = values_of(checkpoint, schemes, form_of(), done.files)
    agree(found, by_hand(family, layers, schemes, samples, options))
    routed = [record for record in done.records if ".experts." in record["label"] and record["tokens"]]
    assert routed and all(0 < record["effective_tokens"] < record["tokens"] for record in routed)


def test_the_hessian_of_an_expert_weighs_tokens_by_their_squared_gates():
    checkpoint, layers = opened("qwen3_moe")
    samples = texts(MANY[:8])
    observer = Inputs(layers, identity="", finished=lambda layer: False)
    model, checked = Stock("qwen3_moe", samples), 0
    for settings in (ONE, dataclasses.replace(ONE, batch_tokens=20), dataclasses.replace(ONE, stream_experts=True)):
        with Walk(checkpoint, samples, settings) as walk:
            assert settings.batch_tokens == 20 or any(batch.padded for batch in walk.batches)
            for number, stage in enumerate(walk.steps(observer)):
                if not stage.startswith("layer"):
                    continue
                for matrix in layers[number - 1]:
                    if ".k_proj" in matrix.tensor or ".up_proj" in matrix.tensor:
                        continue  # seen with others
                    seen = model.inputs(matrix)
                    assert observer.tokens(matrix.module) == sum(len(rows) for rows, _ in seen)
                    for wanted, got in zip(sums(seen, matrix.columns), observer.moments(matrix.module), strict=True):
                        torch.testing.assert_close(got.hessian, wanted.hessian, rtol=1e-4, atol=1e-4)
                        assert got.count == pytest.approx(wanted.count, rel=1e-5)
                    checked += matrix.routed
                observer.forget()
    assert checked >= 3 * 2 * 4
