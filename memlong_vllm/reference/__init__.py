"""The reference model in plain transformers: oracle, training, and the code inside checkpoints."""
