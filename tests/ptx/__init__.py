"""What nvcc made of the CUDA kernels, translated to C++ and run on the CPU."""
