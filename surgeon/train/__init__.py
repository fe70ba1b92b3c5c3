"""Training that follows or decides a cut: distillation, learned thresholds, gradual sparsity."""
