"""The tests, and the programs that run the CUDA kernels without a GPU: emulation, ptx, emulated_gpu."""
