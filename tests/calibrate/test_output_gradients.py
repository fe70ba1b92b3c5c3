"""Inputs of matrices and gradients at their outputs: their products are the gradients of the stock model's weights."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn import functional
from walk_models import model_folder, stock, texts

from surgeon.calibrate import output_gradients as own
from surgeon.calibrate.head import Head
from surgeon.calibrate.matrices import Matrix, matrices_of
from surgeon.calibrate.output_gradients import output_gradients
from surgeon.calibrate.settings import Settings
from surgeon.calibrate.skeleton import Skeleton
from surgeon.checkpoint.checkpoint import open_path
from surgeon.errors import EnvironmentFault, InputError
from surgeon.seeds import stream_key, uniform

SLOW = tuple(
    pytest.param(family, marks=pytest.mark.slow) for family in ("phi3", "gpt2", "qwen3_moe", "deepseek_v3")
)
FAMILIES = ("llama", "gemma2", "mixtral", "gpt_oss", "granitemoe", *SLOW)
"""Plain, with the head; capped logits; experts by themselves, stacked and transposed, stacked; q, k, v in one matrix; stored
[in, out]; shared experts."""
LENGTHS = (13, 17, 17, 18, 5)


class Products:
    """Adds up g x' of every matrix, which is the gradient of the loss towards it."""

    identity = "products"

    def __init__(self) -> None:
        self.sums: dict[str, torch.Tensor] = {}
        self.order: list[tuple[str, int]] = []

    def wants_layer(self, layer):
        return True

    def observer(self, layer):
        return None

    def begin(self, layer):
        self.order.append(("begin", layer))

    def outputs(self, matrix, inputs, gradients, columns):
        total = self.sums.setdefault(
            matrix.label, torch.zeros(matrix.rows, matrix.columns, dtype=torch.float64)
        )
        total[columns] += gradients.double().T @ inputs.double()

    def end(self, layer, predicted):
        self.order.append(("end", layer))
        self.predicted = predicted

    def state(self):
        return {}

    def restore(self, state):
        pass


def head_matrix(checkpoint, layers):
    rows, columns = checkpoint.tensors["lm_head.weight"].shape
    return Matrix("lm_head.weight", layers, "lm_head", False, None, rows, columns, False)


def stock_gradients(folder, samples, seed):
    """Gradients of all parameters of the stock model, labels drawn from its predictions one by one."""
    model = stock(folder, dtype=torch.float32, experts_implementation="eager")
    total = 0.0
    for number, ids in enumerate(samples):
        logits = model(torch.from_numpy(ids)[None]).logits[0, :-1]
        shares = torch.softmax(logits.detach().double(), 1).numpy()
        chances = uniform(stream_key(seed, number, "labels of the Fisher information"), 0, len(shares))
        labels = torch.tensor(
            [int((row.cumsum() <= chance).sum()) for row, chance in zip(shares, chances, strict=True)]
        )
        loss = functional.cross_entropy(logits, labels, reduction="sum")
        loss.backward()
        total += float(loss.detach())
    return {name: parameter.grad for name, parameter in model.named_parameters()}, total


@pytest.mark.parametrize("family", FAMILIES)
def test_products_are_the_gradients_of_the_stock_model(family):
    folder, samples = model_folder(family), texts(LENGTHS)
    checkpoint = open_path(folder)
    skeleton = Skeleton(checkpoint, Settings())
    layers = [*matrices_of(checkpoint, skeleton)]
    head = "lm_head.weight" in checkpoint.tensors and family == "llama"
    if head:
        layers.append((head_matrix(checkpoint, len(layers)),))
    receiver = Products()
    summed = output_gradients(checkpoint, samples, layers, receiver, Settings(threads=1), seed=4)
    expected, total = stock_gradients(folder, samples, 4)
    assert summed.total == pytest.approx(total, rel=1e-4)
    assert summed.tokens == sum(LENGTHS) - len(LENGTHS) == receiver.predicted
    assert receiver.order[:2] == [("begin", len(layers) - 1), ("end", len(layers) - 1)] or not head
    largest = max(float(value.abs().max()) for value in expected.values() if value is not None)
    checked = set()
    for number in range(skeleton.layers):
        for name, pieces in skeleton.pieces(number).items():
            for piece in pieces:
                if not piece.name.endswith(".weight") or piece.stored[1:]:
                    continue
                gradient = expected.get(f"{skeleton.layer_path(number)}.{name}")
                matrix = next((m for layer in layers for m in layer if m.tensor == piece.tensor
                               and m.expert == (piece.stored[0] if piece.stored else None)), None)  # fmt: skip
                if matrix is None or gradient is None:
                    continue
                wanted = gradient[piece.index] if piece.index else gradient
                wanted = wanted.T if matrix.transposed else wanted
                found = receiver.sums.get(matrix.label, torch.zeros(matrix.rows, matrix.columns))
                assert torch.allclose(found.float(), wanted, rtol=1e-3, atol=2e-6 * largest), matrix.label
                checked.add(matrix.label)
    # Gate and up of a stack are one matrix, of which the pieces are parts.
    for layer in layers[: skeleton.layers]:
        for matrix in layer:
            if matrix.label in checked or matrix.expert is None:
                continue
            (name,) = (
                n
                for n, pieces in skeleton.pieces(matrix.layer).items()
                if any(p.tensor == matrix.tensor for p in pieces)
            )
            wanted = expected[f"{skeleton.layer_path(matrix.layer)}.{name}"][matrix.expert]
            wanted = wanted.T if matrix.transposed else wanted
            found = receiver.sums.get(matrix.label, torch.zeros(matrix.rows, matrix.columns))
            assert torch.allclose(found.float(), wanted, rtol=1e-3, atol=2e-6 * largest), matrix.label
            checked.add(matrix.label)
    if head:
        found = receiver.sums["lm_head.weight"].float()
        assert torch.allclose(found, expected["lm_head.weight"], rtol=1e-3, atol=2e-6 * largest)
        checked.add("lm_head.weight")
    assert checked == {matrix.label for layer in layers for matrix in layer}


def test_labels_are_drawn_as_often_as_predicted(monkeypatch):
    """Of many draws at one place each token is as frequent as its probability, whatever the blocks of the head."""
    checkpoint = open_path(model_folder("llama"))
    head = Head(checkpoint, Settings())
    hidden = torch.randn(1, 32, generator=torch.Generator().manual_seed(0)).expand(20_000, 32)
    chances = torch.from_numpy(np.random.default_rng(0).random(20_000))
    monkeypatch.setattr("surgeon.calibrate.head.BLOCK_BYTES", 4 * 20_000 * 11)
    assert head.rows_per_block(20_000) == 11
    drawn = own._drawn(head, hidden, own._log_sums(head, hidden), chances)
    shares = torch.softmax(head.logits(hidden[:1])[0].double(), 0).numpy()
    counts = np.bincount(drawn.numpy(), minlength=head.vocabulary)
    expected = 20_000 * shares
    assert ((counts - expected) ** 2 / expected)[expected > 5].sum() < 2 * (expected > 5).sum()


def test_layers_of_streamed_experts_are_refused():
    checkpoint = open_path(model_folder("mixtral"))
    layers = matrices_of(checkpoint, Skeleton(checkpoint, Settings()))
    with pytest.raises(EnvironmentFault, match="do not fit the memory limit together") as caught:
        output_gradients(checkpoint, texts((5,)), layers, Products(), Settings(stream_experts=True))
    assert caught.value.code == "E504"


def test_samples_of_one_token_are_refused():
    checkpoint = open_path(model_folder("llama"))
    with pytest.raises(InputError) as caught:
        output_gradients(checkpoint, texts((5, 1)), [()], Products(), Settings())
    assert caught.value.code == "E387"
