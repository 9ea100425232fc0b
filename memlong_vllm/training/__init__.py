"""Fine-tuning: the layers above the memory layer learn to read from memory (sections 3 and 4.1)."""
