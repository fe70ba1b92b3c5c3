"""What storing each matrix in each scheme costs, measured: one file for each kind of sensitivity.

    table = measure("rel-output", checkpoint, layers, menu, form, samples, settings, options, folder)

The error D = Q(W) - W is that of the quantizer that will be used, on the unquantized model. Kinds, from the cheapest:

    weight       parameters * |D|^2 / |W|^2                  no text; integers are rounded to nearest
    rel-output   tr(D H D') / tr(W H W')                     one pass forward, H = sum of x x'
    fisher       1/2 mean over tokens of g^2 (D x)^2         one pass forward and back, g at every matrix's output
    kl           KL(model || model with one group changed)   groups x schemes passes from the changed layer on

A table is kept in ``folder`` under everything it depends on, and taken from there the next time. Passes also keep what is
finished of a layer there, so that an interrupted one goes on.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from surgeon.calibrate.matrices import Matrix
from surgeon.calibrate.settings import Settings
from surgeon.checkpoint.checkpoint import Checkpoint
from surgeon.errors import InputError, UsageError, close_matches
from surgeon.formats.scheme import Scheme
from surgeon.quantize.allocation import sensitivity_file
from surgeon.quantize.allocation.sensitivity import Kind, Sensitivities
from surgeon.quantize.forms import Form
from surgeon.quantize.measuring import fisher, kl, relative_output, weight
from surgeon.quantize.measuring.job import Job, Tell
from surgeon.quantize.solving import Options

KINDS: tuple[Kind, ...] = ("rel-output", "fisher", "kl", "weight")

__all__ = ["KINDS", "measure"]


def measure(
    kind: str, checkpoint: Checkpoint, layers: Sequence[Sequence[Matrix]], menu: Sequence[Scheme], form: Form,
    samples: Sequence[np.ndarray], settings: Settings, options: Options, folder: Path, *,
    search: Sequence[np.ndarray] = (), groups: Mapping[str, str] | None = None, seed: int = 0,
    progress: Tell | None = None, stop: threading.Event | None = None,
) -> Sensitivities:  # fmt: skip
    """Return the losses of every matrix in every scheme of a menu.

    Args:
        kind: of `KINDS`; "relative-output" is another word for "rel-output".
        checkpoint: the model, as plain numbers.
        layers: its matrices, layer by layer (`surgeon.calibrate.matrices.matrices_of`); an output head may follow as one
            more layer.
        menu: schemes; losses of a matrix whose shape a scheme does not fit are NaN.
        form: says how schemes are stored.
        samples: calibration tokens, one array a sample; () for "weight".
        settings: where and how the model runs; with a spill folder an interrupted pass goes on where it stopped.
        options: of the quantizer; its ``method``, ``order``, ``damp``, ``block`` and ``clip`` count.
        folder: for tables, also unfinished ones.
        search: of "kl": texts the divergence is measured on; they should not be those of ``samples``.
        groups: of "kl": matrix (its label) -> group; those of one group in one layer are changed together.
        seed: of "fisher": which tokens are drawn from the model's predictions.
        progress: called with (what, done, total).
        stop: set it to stop.

    Returns:
        One row for each matrix, by ``Matrix.label``. Experts that no token reached have the losses of like ones and stand
        in ``estimated``.

    Raises:
        UsageError: E474 more groups than "kl" is for; E475 "kl" or another kind without text; E217 an unknown kind.
        InputError: E464 a loss is not finite; what the passes and the quantizers raise.
        EnvironmentFault: E476 the model does not fit into memory as "kl" needs it; E504.
        Interrupted: E130.
    """
    kind = "rel-output" if kind == "relative-output" else kind
    if kind not in KINDS:
        raise UsageError("E217", f'unknown sensitivity "{kind[:60]}"',
                         help=close_matches(kind, KINDS) or "one of: " + ", ".join(KINDS))  # fmt: skip
    job = Job.of(kind, checkpoint, layers, menu, form, samples, settings, options, folder, search, groups, seed,
                 progress or (lambda *_: None), stop)  # fmt: skip
    path = sensitivity_file.place(folder, kind, job.about)
    if path.is_file():
        try:
            return sensitivity_file.load(path, kind=kind, about=job.about)
        except InputError:  # damaged: nobody named this file, so it is made again
            path.unlink(missing_ok=True)
    found = {"weight": weight, "rel-output": relative_output, "fisher": fisher, "kl": kl}[kind].measured(job)
    sensitivity_file.save(path, found)
    job.forget()
    return found
