// Scratch memory that a thread keeps from call to call: faulting in fresh pages can take longer than the arithmetic on
// them. On a boundary of 64 bytes, so that no vector is read across two lines of the cache.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <new>
#include <utility>
#include <vector>

namespace ran::cpu::RAN_ISA {

class ScratchPool {
 public:
  struct Block {
    void* data;
    size_t bytes;
  };

  static ScratchPool& of_this_thread() {
    static thread_local ScratchPool pool;
    return pool;
  }
  ~ScratchPool() {
    for (const Block& block : kept_) std::free(block.data);
  }
  // The smallest block kept that is neither too small nor twice too large, or a new one.
  Block take(size_t bytes) {
    bytes = (bytes + kLine - 1) / kLine * kLine + (bytes ? 0 : kLine);
    size_t best = kept_.size();
    for (size_t i = 0; i < kept_.size(); ++i)
      if (kept_[i].bytes >= bytes && kept_[i].bytes <= 2 * bytes &&
          (best == kept_.size() || kept_[i].bytes < kept_[best].bytes))
        best = i;
    if (best == kept_.size()) {
      void* const data = std::aligned_alloc(kLine, bytes);
      if (data == nullptr) throw std::bad_alloc();
      return {data, bytes};
    }
    const Block block = kept_[best];
    kept_.erase(kept_.begin() + ptrdiff_t(best));
    kept_bytes_ -= block.bytes;
    return block;
  }
  void give_back(Block block) {
    kept_.push_back(block);
    kept_bytes_ += block.bytes;
    while (kept_bytes_ > kMost) {  // the longest unused go first
      kept_bytes_ -= kept_.front().bytes;
      std::free(kept_.front().data);
      kept_.erase(kept_.begin());
    }
  }

 private:
  static constexpr size_t kLine = 64, kMost = size_t{32} << 20;

  std::vector<Block> kept_;
  size_t kept_bytes_ = 0;
};

// `count` values of T, uninitialised; given back to the thread that ends their life.
template <typename T>
class Scratch {
 public:
  explicit Scratch(int64_t count) : block_(ScratchPool::of_this_thread().take(size_t(count) * sizeof(T))) {}
  ~Scratch() { ScratchPool::of_this_thread().give_back(block_); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  T* get() const { return static_cast<T*>(block_.data); }

 private:
  ScratchPool::Block block_;
};

}  // namespace ran::cpu::RAN_ISA
