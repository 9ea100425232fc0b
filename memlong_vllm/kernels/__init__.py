"""Kernels of attention, each imported only where it runs: Triton's on GPUs and under its interpreter,
``…_cpu`` on CPUs."""
