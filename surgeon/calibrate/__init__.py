"""Running a model layer by layer over calibration text: activations, routing, losses, gradients."""
