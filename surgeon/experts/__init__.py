"""What a model's routing and its weights say about its experts: statistics of one pass, criteria, super experts, analysis."""
