"""Which layers of a Llama backbone copy from memory, measured before anything is trained."""
