"""Triton kernels of multi-view attention pooling; imported as mvam_fast.kernels."""
