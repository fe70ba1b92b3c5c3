"""What can be put on top of any merge: strengths per layer, low rank, damping of important channels.

Each adjustment becomes one of three things: a factor on a model's task vector, tensor by tensor
(`acm`, `fim`, `sens`, `layer_scores`), a low-rank task vector (`delta_rank`), both in
`surgeon.merge.delta_view`; or a pull of the result back to the base, channel by channel (`aim`, in
`surgeon.merge.aim`). Some are measured on the models before the merge is planned for good, see
`surgeon.merge.measure`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any

from surgeon.errors import UsageError, close_matches


@dataclass(frozen=True)
class Adjustment:
    """One adjustment for listings: how it is named, given and published."""

    name: str
    title: str
    option: str
    summary: str
    default: float | bool | None
    reads: str
    reference: str
    page: str


ADJUSTMENTS = (
    Adjustment(
        "aim", "AIM", "--aim OMEGA",
        "Pulls the merged weights back to the base on input channels that are active on calibration text.", 0.4,
        "one forward pass of the base", "Activation-Informed Merging, arXiv 2502.02421",
        """W = b + (m - b) f, f_c = 1 - a_c (1 - omega); a_c is the mean magnitude of input channel c on calibration text,
divided by the largest of its module. omega 1 changes nothing; 0.2 to 0.6 is usual. Embeddings and biases stay as merged.
In a long-to-short merge the base is the short model, and questions with short answers are the best text.""",
    ),
    Adjustment(
        "acm", "ACM", "--acm THETA",
        "Weakens the task vector in layers whose activations agree with the base's already.", 0.7,
        "one forward pass of each model", "Activation-guided Consensus Merging, arXiv 2505.14009",
        """Each layer's task vector is multiplied by 1 - t, t = mean over samples of sigmoid(theta (I - max I)), I the mutual
information between the two models' outputs of the layer's last linear map: between 1/2 and 1. The published script measures I between raw
floats as if they were labels, which is close to ln(n) for every layer; the Gaussian estimate is the default here.""",
    ),
    Adjustment(
        "sens", "Sens-Merging", "--sens TEMPERATURE",
        "Balances the models layer by layer, by how much the loss depends on their weights.", 2.0,
        "a forward and a backward pass of each model", "Sens-Merging, arXiv 2502.12420",
        """The factor of model i in layer l is K sigma, sigma = softmax over models of alpha tau / T: alpha is the layer's share
of sum |theta dL/dtheta|, tau how well the model's logits carry over to the other's data, K the number of models. lambda is
the paper's alpha (0.4 at 1.5B, 0.7 at 7B, 0.8 at 14B). Each model is measured on the OTHER kind of answer.""",
    ),
    Adjustment(
        "fim", "FIM", "--fim",
        "Sets each layer's strength from the base's Fisher information on random tokens; needs no data.", True,
        "a forward and a backward pass of the base", "FIM-Merging, arXiv 2603.21705",
        """The strength of a layer is the sigmoid of its standardised log(mean Fisher x squared norm of the task vector), on 8
sequences of 64 random tokens. Published with TIES at density 0.2 (1.5B) and 0.4 (7B).""",
    ),
    Adjustment(
        "delta_rank", "Twin-Merging's low rank", "--delta-rank SHARE",
        "Replaces each task vector by its best approximation of lower rank.", 0.1,
        "the weights", "Twin-Merging, arXiv 2406.15479",
        """Every matrix of a task vector keeps its floor(SHARE x min(rows, columns)) largest singular directions; vectors are kept
whole. With task-arithmetic this is what long-to-short papers call Twin-Merging: --method twin.""",
    ),
    Adjustment(
        "layer_scores", "Layer scores", "--layer-scores FILE",
        "Multiplies task vectors by factors from a file, layer by layer.", None,
        "a JSON file", "",
        """{"format": "surgeon layer scores", "version": 1, "models": {"long": {"layers": {"0": 0.9}, "tensors":
{"*.gate_proj.weight": 0.7}, "default": 1.0}}}. Models are named by their short names. acm, sens and fim write such files
into --work, so a measurement made elsewhere (on a GPU) can be used here.""",
    ),
)  # fmt: skip

STRENGTHS = ("acm", "sens", "fim")
"""Measured layer strengths; they answer one question, so a merge takes one of them."""


@dataclass(frozen=True)
class Adjustments:
    """The adjustments of one merge; None and False mean: not used.

    Attributes:
        aim: omega in [0, 1].
        acm: theta > 0.
        acm_estimator: "gaussian", "binned" or "literal".
        sens: temperature T > 0.
        fim: use it.
        delta_rank: share of the full rank that is kept, in (0, 1].
        layer_scores: path of a file.
    """

    aim: float | None = None
    acm: float | None = None
    acm_estimator: str = "gaussian"
    sens: float | None = None
    fim: bool = False
    delta_rank: float | None = None
    layer_scores: str | None = None

    @property
    def active(self) -> tuple[str, ...]:
        """Names of the adjustments in use."""
        given = (a.name for a in ADJUSTMENTS)
        return tuple(n for n in given if getattr(self, n) not in (None, False))

    @property
    def measured(self) -> tuple[str, ...]:
        """Names of those that need a pass over the models first."""
        return tuple(n for n in self.active if n in {"aim", *STRENGTHS})

    def check(self) -> None:
        """Raise E232 for a value out of range or adjustments that exclude each other."""
        for name, low, high, closed in (("aim", 0.0, 1.0, True), ("acm", 0.0, math.inf, False),
                                        ("sens", 0.0, math.inf, False), ("delta_rank", 0.0, 1.0, False)):  # fmt: skip
            value = getattr(self, name)
            if value is None:
                continue
            inside = (low <= value if closed else low < value) and value <= high and math.isfinite(value)
            if not inside:
                left = "[" if closed else "("
                right = "inf)" if high == math.inf else f"{high:g}]"
                raise UsageError("E232", f"{name.replace('_', '-')} {value:g} is out of range",
                                 help=f"it must be in {left}{low:g}, {right}")  # fmt: skip
        if self.acm_estimator not in ESTIMATORS:
            raise UsageError("E232", f'the ACM estimator is "{self.acm_estimator}"',
                             help=f"one of: {', '.join(ESTIMATORS)}")  # fmt: skip
        several = [n for n in STRENGTHS if getattr(self, n) not in (None, False)]
        if len(several) > 1:
            raise UsageError("E232", f"{' and '.join(several)} both set the strength of layers",
                             help="use one of them; layer_scores may be combined with any")  # fmt: skip

    def as_data(self) -> dict[str, Any]:
        """Return what is in use as plain data for the manifest; the file of scores by its name only."""
        found = {f.name: getattr(self, f.name) for f in fields(self) if f.name in self.active}
        if "acm" in found:
            found["acm_estimator"] = self.acm_estimator
        if "layer_scores" in found:
            found["layer_scores"] = str(found["layer_scores"]).rpartition("/")[2]
        return found


ESTIMATORS = ("gaussian", "binned", "literal")

WHOLE_NAMES = {
    "sens": ("task_arithmetic", {"sens": 2.0}),
    "twin": ("task_arithmetic", {"delta_rank": 0.1}),
    "twin_merging": ("task_arithmetic", {"delta_rank": 0.1}),
}
"""Published names that are a method of ours with an adjustment."""


def split_method(name: str) -> tuple[str, dict[str, Any]]:
    """Take a published name apart: "aim-ties" is ties with aim at its default; others pass unchanged."""
    wanted = name.replace("-", "_").lower() if isinstance(name, str) else ""
    if wanted in WHOLE_NAMES:
        method, adjust = WHOLE_NAMES[wanted]
        return method, dict(adjust)
    found: dict[str, Any] = {}
    defaults = {a.name: a.default for a in ADJUSTMENTS if a.default is not None and a.name != "delta_rank"}
    defaults["twin"] = 0.1
    while "_" in wanted:
        head, _, rest = wanted.partition("_")
        if head not in defaults:
            break
        found["delta_rank" if head == "twin" else head] = defaults[head]
        wanted = rest
    if found:
        return wanted, found
    if wanted in defaults:
        raise UsageError("E201", f'"{wanted}" is put on top of a merge method',
                         help=f"--method {wanted}-ties, or --method ties --{wanted}")  # fmt: skip
    return name, {}


@dataclass(frozen=True)
class CalibrationSource:
    """The text that activations are measured on.

    Attributes:
        sources: files, NAME=FILE, or dataset ids; empty = the text shipped with surgeon.
        samples, sequence_length: how many texts, at most how many tokens of each.
        pack: join texts into full sequences.
        template: apply the chat template.
        device: "auto", "cpu", "cuda", "cuda:N".
        dtype: type the models run in.
    """

    sources: tuple[str, ...] = ()
    samples: int = 100
    sequence_length: int = 2048
    pack: bool = False
    template: bool = True
    device: str = "auto"
    dtype: str = "float32"

    def check(self) -> None:
        for name, value in (("samples", self.samples), ("sequence_length", self.sequence_length)):
            if value < 1:
                raise UsageError("E232", f"{name.replace('_', '-')} is {value}", help="it must be 1 or more")


def unknown(name: str) -> UsageError:
    """Return the error for an adjustment that does not exist."""
    names = [a.name for a in ADJUSTMENTS]
    return UsageError(
        "E232", f'unknown adjustment "{name}"', help=close_matches(name, names) or ", ".join(names)
    )
