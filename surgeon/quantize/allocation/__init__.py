"""Which format each group of matrices gets, under a budget: plain mathematics, nothing here knows a model."""
