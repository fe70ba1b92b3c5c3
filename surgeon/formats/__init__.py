"""Quantized ways of storing weights, read as the plain numbers they stand for; one file per way."""
