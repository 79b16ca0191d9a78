"""The GPU's half of the torch side, run on CPU tensors, with the kernels under emulation."""
