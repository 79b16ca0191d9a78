// The emulated GPU's memory: every tensor is counted, and known to the emulation, which finds accesses outside.
#include <torch/library.h>

#include <mutex>

#include "../../csrc/cuda/conv1x1_plan.h"

namespace {

int64_t held = 0, most = 0;
std::vector<int64_t> asked;
std::mutex mutex;  // torch's threads allocate, too

struct Memory : c10::Allocator {
  static void release(void* memory) {
    if (!memory) return;
    const std::lock_guard<std::mutex> lock(mutex);
    const auto found = emu::allocations.find(static_cast<unsigned char*>(memory));
    held -= static_cast<int64_t>(found->second.bytes);
    emu::allocations.erase(found);
    c10::free_cpu(memory);
  }
  c10::DataPtr allocate(size_t bytes) override {
    if (bytes == 0) return {nullptr, nullptr, &release, c10::Device(c10::kCPU)};
    void* memory = c10::alloc_cpu(bytes);
    const std::lock_guard<std::mutex> lock(mutex);
    emu::allocations[static_cast<unsigned char*>(memory)] = {bytes, false};
    held += static_cast<int64_t>(bytes);
    most = std::max(most, held);
    asked.push_back(static_cast<int64_t>(bytes));
    return {memory, memory, &release, c10::Device(c10::kCPU)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &release; }
  void copy_data(void* to, const void* from, size_t bytes) const override { default_copy_data(to, from, bytes); }
} memory;

const bool installed = [] {
  ran::cuda::conv1x1::emulated_device = {90, 132, 227 << 10, 228 << 10};
  c10::SetAllocator(c10::kCPU, &memory, 255);  // over that of torch
  return true;
}();

std::vector<std::string> launched() {
  std::vector<std::string> names;
  for (const auto& [address, kernel] : std::exchange(emu::launches, {}))
    names.push_back(kernel.name.substr(0, kernel.name.find_first_of("< ")));
  return names;
}

}  // namespace

// bytes: held now. peak, sizes and launched: the most, and the calls of the allocator and the kernels, since each was
// last asked for. skip_kernels: launches do nothing, so that sizes may be real ones.
TORCH_LIBRARY(emulated_gpu, m) {
  m.def("bytes() -> int", [] { return held; });
  m.def("peak() -> int", [] { return std::exchange(most, held); });
  m.def("sizes() -> int[]", [] { return std::exchange(asked, {}); });
  m.def("launched() -> str[]", &launched);
  m.def("skip_kernels(bool skip) -> ()", [](bool skip) { emu::skip_kernels = skip; });
}
