"""The Triton kernels: forward and backward attention over the groups of any partition, on tensors as they lie."""
