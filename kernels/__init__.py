"""Faster functions for what model.py computes: cpu.py on a CPU, gpu.py (Triton) on an NVIDIA GPU."""
from kernels.cpu import Linear, pick, selective_attention, _SelectiveAttention, _try_triton, _why_not_triton  # noqa: F401
