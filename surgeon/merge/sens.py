"""Sens-Merging: factors per layer and model from parameter sensitivity and from transfer between models.

Liu et al., "Sens-Merging: Sensitivity-Guided Parameter Balancing for Merging Large Language Models",
arXiv 2502.12420. With K experts i and layers l:

    s_i^l     = mean over i's samples of  sum over the layer's parameters of |theta * dL/dtheta|
    alpha_i^l = s_i^l / ||s_i||_2                          (over the layers of model i)
    g_i       = mean L2 distance between the logits of i and of another expert, on that expert's samples
    tau_i     from g_i, normalised to sum 1
    sigma_i^l = softmax over i of (alpha_i^l * tau_i / T)
    factor of model i in layer l = K * sigma_i^l           (1 for every model when T grows)

What the source leaves open, and what is done here:

* The direction of tau. The idea is to favour models that help others, and logits close to another expert's on
  that expert's own data are the sign of it: "closer" (default) weighs by 1 / g_i. A public re-implementation
  weighs by g_i itself: "farther".
* L is the mean negative log-likelihood over the answer tokens, and logits are compared at the same places.
* Embedding, final norm and head are one more "layer" each, as in that re-implementation. A tied head has the
  embedding's alpha.
* Logits of vocabularies that are padded to different sizes are compared over the common ids.

The merge's own lambda is the alpha in the paper's last equation.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from surgeon.errors import InputError, UsageError
from surgeon.merge.layer_groups import (
    Group,
    MeasuredScores,
    aliases,
    group_of,
    in_order,
    layer_scores,
    row_blocks,
)
from surgeon.scalars import show

if TYPE_CHECKING:
    import torch

    from surgeon.calibrate.data import CalibrationSet
    from surgeon.calibrate.skeleton import Settings
    from surgeon.checkpoint.checkpoint import Checkpoint

TRANSFER = ("closer", "farther")
TEMPERATURE = 2.0
"""The value of "Unlocking Efficient Long-to-Short LLM Reasoning" (arXiv 2503.20641) for 7B; 3 for 1.5B, 6 for 14B."""


def check(temperature: float, transfer: str) -> None:
    """Raise E232 for settings that mean nothing."""
    if not (isinstance(temperature, (int, float)) and math.isfinite(temperature) and temperature > 0):
        raise UsageError(
            "E232",
            f"the temperature of Sens-Merging is {show(temperature)}, not a positive number",
            help="the paper uses 2 for models of 7B, 3 for 1.5B, 6 for 14B",
        )
    if transfer not in TRANSFER:
        raise UsageError("E232", f"unknown transfer {show(transfer)}",
                         help=f"use {' or '.join(TRANSFER)}")  # fmt: skip


def normalised(sensitivity: Mapping[Group, float]) -> dict[Group, float]:
    """Return alpha: sensitivities divided by their L2 norm over the layers; zeros where all are zero."""
    norm = math.sqrt(math.fsum(value * value for value in sensitivity.values()))
    return {group: value / norm if norm else 0.0 for group, value in sensitivity.items()}


def transfer_weights(distances: Sequence[float], transfer: str = "closer") -> tuple[float, ...]:
    """Return tau: how much each model counts for its closeness to the others' logits; the sum is 1.

    Args:
        distances: g_i >= 0 of each model.
        transfer: "closer" weighs by 1 / g_i, so that for two models tau_i = 1 - g_i / (g_1 + g_2);
            "farther" weighs by g_i. Models at distance 0 share everything, or nothing.
    """
    zeros = sum(distance == 0 for distance in distances)
    if zeros == len(distances):
        weights = [1.0] * len(distances)
    elif transfer == "farther":
        weights = list(distances)
    elif zeros:
        weights = [float(distance == 0) for distance in distances]
    else:
        weights = [1.0 / distance for distance in distances]
    total = math.fsum(weights)
    return tuple(weight / total for weight in weights)


def factors(
    alphas: Sequence[Mapping[Group, float]], taus: Sequence[float], temperature: float = TEMPERATURE
) -> tuple[dict[Group, float], ...]:
    """Return K * sigma_i^l for every model and group; over the models the mean is 1 in each group.

    Args:
        alphas: per model, group -> normalised sensitivity; all over the same groups.
        taus: per model, its transfer weight.
        temperature: T > 0.

    Raises:
        InputError: E357 the models have different groups.
    """
    groups = in_order(alphas[0])
    for other in alphas[1:]:
        strange = sorted(map(str, set(groups) ^ set(other)))
        if strange:
            raise InputError("E357", f"{strange[0]} has a sensitivity in one model only",
                             help="Sens-Merging compares layer by layer; the models must be built alike")  # fmt: skip
    found: tuple[dict[Group, float], ...] = tuple({} for _ in alphas)
    for group in groups:
        exponents = [alpha[group] * tau / temperature for alpha, tau in zip(alphas, taus, strict=True)]
        highest = max(exponents)  # exp of large arguments overflows; the softmax does not change
        weights = [math.exp(value - highest) for value in exponents]
        total = math.fsum(weights)
        for of_model, weight in zip(found, weights, strict=True):
            of_model[group] = len(alphas) * weight / total
    return found


class SensitivityReceiver:
    """Sums |theta * dL/dtheta| over samples and over the tensors of each group, in float64."""

    def __init__(self) -> None:
        self.sums: dict[Group, float] = {}

    def receive(
        self,
        sample: int,
        tensor: str,
        weight: torch.Tensor,
        gradient: torch.Tensor,
        rows: torch.Tensor | None = None,
    ) -> None:
        import torch

        group = group_of(tensor)
        for w, g in row_blocks(weight, gradient):
            value = (w.float() * g.float()).abs_().sum(dtype=torch.float64).item()
            self.sums[group] = self.sums.get(group, 0.0) + value


def measure(
    models: Mapping[str, Checkpoint],
    calibration: Mapping[str, CalibrationSet],
    settings: Settings,
    *,
    temperature: float = TEMPERATURE,
    transfer: str = "closer",
    progress: Callable[[str], None] | None = None,
    stop: threading.Event | None = None,
) -> MeasuredScores:
    """Measure sensitivities and logit distances of the experts and return their factors.

    Args:
        models: name -> expert, two or more. In a long/short merge both models are experts; the one that is
            the base as well has no task vector, so that its own factor has no effect.
        calibration: name -> that expert's samples. For long/short: short answers for the long model, long
            answers for the short one (the paper on long-to-short merging crosses them).
        settings: device, precision and limits of the streamed passes.
    """
    check(temperature, transfer)
    names = list(models)
    if len(names) < 2:
        raise UsageError(
            "E232",
            f"Sens-Merging compares models; {len(names)} was given",
            help="give the two or more models that are merged",
        )
    sensitivity, losses, distances = _passes(models, calibration, settings, progress, stop)
    taus = transfer_weights([distances[name] for name in names], transfer)
    alphas = [_with_tied_head(models[n], normalised(sensitivity[n]), models) for n in names]
    chosen = factors(alphas, taus, temperature)
    scores = {
        name: layer_scores(found, models[name].tensors, aliases(models[name]))
        for name, found in zip(names, chosen, strict=True)
    }
    made_by: dict[str, Any] = {
        "method": "sens",
        "temperature": float(temperature),
        "transfer": transfer,
        "precision": settings.dtype,
        "calibration": {name: dict(calibration[name].record) for name in names},
        "loss": losses,
        "distance": distances,
        "tau": dict(zip(names, taus, strict=True)),
        "sensitivity": {name: {str(g): v for g, v in sensitivity[name].items()} for name in names},
    }
    return MeasuredScores(scores, made_by)


def _with_tied_head(
    model: Checkpoint, alphas: dict[Group, float], models: Mapping[str, Checkpoint]
) -> dict[Group, float]:
    """Give a tied head the embedding's alpha where another model has a head of its own to compare with."""
    tied = {group_of(copy): group_of(stored) for copy, stored in aliases(model).items()}
    elsewhere = {group_of(name) for other in models.values() for name in other.tensors}
    return alphas | {g: alphas[s] for g, s in tied.items() if g in elsewhere and s in alphas}


def _passes(
    models: Mapping[str, Checkpoint],
    calibration: Mapping[str, CalibrationSet],
    settings: Settings,
    progress: Callable[[str], None] | None,
    stop: threading.Event | None,
) -> tuple[dict[str, dict[Group, float]], dict[str, float], dict[str, float]]:
    """Return sensitivities and mean loss of each model on its samples, and its mean distance g_i to the others.

    For every model's samples: one backward pass of that model, which keeps its last hidden states on the
    way, one forward pass of each other model, then the logits of both block by block.
    """
    from surgeon.calibrate.gradients import gradients
    from surgeon.calibrate.head import Head
    from surgeon.calibrate.logit_distance import answer_states, answer_store, logit_distance

    names = list(models)
    sensitivity: dict[str, dict[Group, float]] = {}
    losses: dict[str, float] = {}
    apart: dict[str, list[float]] = {name: [] for name in names}

    for name in names:
        samples = calibration[name].samples

        def words(model: str, text: str = name) -> Callable[[str], None] | None:
            tell = progress
            return None if tell is None else lambda step: tell(f"{model} on the text of {text}: {step}")

        receiver = SensitivityReceiver()
        with answer_store(samples, models[name], settings) as states:
            found = gradients(
                models[name], samples, receiver, settings,
                progress=words(name), stop=stop, hidden=partial(states.put, 0),
            )  # fmt: skip
            sensitivity[name] = {g: receiver.sums[g] / len(samples) for g in in_order(receiver.sums)}
            losses[name] = math.fsum(found.values()) / len(found)
            for other in names:
                if other == name:
                    continue
                answer_states(
                    models[other], samples, settings, partial(states.put, 1), progress=words(other), stop=stop
                )
                heads = Head(models[name], settings), Head(models[other], settings)
                apart[other].append(logit_distance(*heads, states, len(samples)))
                states.drop(1)
    return sensitivity, losses, {name: math.fsum(apart[name]) / len(apart[name]) for name in names}
