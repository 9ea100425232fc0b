"""Measurements of checkpoints with the real engine or the reference: what ``memlong-vllm evaluate`` runs."""
