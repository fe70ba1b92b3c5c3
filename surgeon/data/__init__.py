"""Reading what people bring beside models: calibration text, evaluation questions."""
