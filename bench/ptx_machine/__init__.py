"""Compiled kernels, their PTX, executed on a CPU and watched."""
