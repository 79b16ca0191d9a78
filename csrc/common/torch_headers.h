// What most files on torch's side include. setup.py has GCC compile it once, and every file begin with that; a file
// includes what it needs all the same, so that it compiles without.
#pragma once

#include <ATen/Functions.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>
