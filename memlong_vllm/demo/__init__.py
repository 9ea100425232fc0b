"""What ``memlong-vllm demo`` does: questions about a document, in one batch through vLLM."""
