"""The workbench: kernels compiled for any target without a GPU, and their machine code read."""
