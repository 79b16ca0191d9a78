"""The CUDA kernels' sources, run on the CPU: blocks, clusters, warps, shared memory and fragments emulated."""
