"""Triton kernels. Imported only where they run: on GPUs, and under Triton's interpreter."""
