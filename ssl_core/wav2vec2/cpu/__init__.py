"""Kernels for CPUs, sized for their caches."""
