// Shared memory whose every access is checked: bounds, alignment, initialisation, copies in flight, and races (two
// threads touch the same bytes, one of them writing, with no barrier between them).
#pragma once

#include <type_traits>

#include "scheduler.h"

namespace emu {

// Who touched a granule last, and how many barriers of each kind that thread had passed.
struct Stamp {
  const Thread* thread = nullptr;
  uint32_t warp = 0, block = 0, gang = 0;
};

inline Stamp stamp(const Thread* t) {
  return {t, t->block->warps[t->warp].sync.generation, t->block->barrier.generation,
          t->block->gang->barrier.generation};
}

// Whether every access from now on is ordered after `before`, whoever makes it in this thread's block.
inline bool obsolete(const Stamp& before, const Stamp& now) {
  return !before.thread || before.gang != now.gang ||
         (before.thread->block == now.thread->block && before.block != now.block);
}

// Whether a barrier lies between an earlier access and one made now.
inline bool ordered(const Stamp& before, const Stamp& now) {
  if (!before.thread || before.thread == now.thread || before.gang != now.gang) return true;
  if (before.thread->block != now.thread->block) return false;
  if (before.block != now.block) return true;
  return before.thread->warp == now.thread->warp && before.warp != now.warp;
}

inline constexpr size_t kGranule = 2;  // bytes; the smallest type kept in shared memory

struct Granule {
  enum State : uint8_t { undefined, in_flight, defined } state = undefined;
  Stamp write, read, other_read;

  // Two readers are enough to notice any writer: by different threads, and from different warps where there are such.
  void note_read(const Stamp& now) {
    const bool keep = !obsolete(other_read, now) && other_read.thread->warp != now.thread->warp;
    if (!keep && !obsolete(read, now) && read.thread != now.thread) other_read = read;
    read = now;
  }
};

struct Region {
  Block* owner;
  int key;  // of the static array; -1: dynamic
  std::vector<uint4> storage;
  std::vector<Granule> granules;
  size_t size;

  Region(Block* owner, int key, size_t size)
      : owner(owner), key(key), storage((size + 15) / 16), granules(size / kGranule + 1), size(size) {}
  unsigned char* data() { return reinterpret_cast<unsigned char*>(storage.data()); }

  void check(size_t offset, size_t bytes, size_t alignment) const {
    if (offset + bytes > size || offset + bytes < bytes) fail("shared memory: out of bounds");
    if (offset % alignment) fail("shared memory: misaligned");
    if (owner->live == 0) fail("shared memory: the block it belongs to has ended");
  }
  void read(size_t offset, void* to, size_t bytes, size_t alignment) {
    check(offset, bytes, alignment);
    const Stamp now = stamp(self);
    for (size_t i = offset / kGranule; i < (offset + bytes + kGranule - 1) / kGranule; ++i) {
      Granule& g = granules[i];
      if (g.state == Granule::undefined) fail("shared memory: read before anything was written");
      if (g.state == Granule::in_flight) fail("shared memory: read before its cp.async was waited for");
      if (!ordered(g.write, now))
        fail("shared memory: race, read after another thread's write with no barrier between");
      g.note_read(now);
    }
    std::memcpy(to, data() + offset, bytes);
  }
  void claim(size_t offset, size_t bytes, size_t alignment, Granule::State state) {
    check(offset, bytes, alignment);
    const Stamp now = stamp(self);
    for (size_t i = offset / kGranule; i < (offset + bytes + kGranule - 1) / kGranule; ++i) {
      Granule& g = granules[i];
      if (g.state == Granule::in_flight && g.write.thread != self)
        fail("shared memory: written while another thread's cp.async is in flight");
      if (!ordered(g.write, now)) fail("shared memory: race, written by two threads with no barrier between");
      if (!ordered(g.read, now) || !ordered(g.other_read, now))
        fail("shared memory: race, written after another thread's read with no barrier between");
      g.write = now;
      g.state = state;
    }
  }
  void write(size_t offset, const void* from, size_t bytes, size_t alignment) {
    claim(offset, bytes, alignment, Granule::defined);
    std::memcpy(data() + offset, from, bytes);
  }
};

}  // namespace emu

namespace ran {

// A pointer into shared memory; for nvcc it is a plain T*.
template <typename T>
class Shared {
 public:
  class Reference {
   public:
    Reference(emu::Region* region, size_t offset) : region_(region), offset_(offset) {}
    Reference(const Reference&) = default;
    operator T() const {
      T value;
      region_->read(offset_, &value, sizeof(T), alignof(T));
      return value;
    }
    Reference& operator=(const T& value) {
      region_->write(offset_, &value, sizeof(T), alignof(T));
      return *this;
    }
    Reference& operator=(const Reference& other) { return *this = T(other); }
    Reference& operator+=(const T& value) { return *this = T(*this) + value; }

   private:
    emu::Region* region_;
    size_t offset_;
  };

  Shared() = default;
  Shared(emu::Region* region, size_t offset) : region(region), offset(offset) {}
  Reference operator[](ptrdiff_t i) const {
    static_assert(std::is_trivially_copyable_v<T> && sizeof(T) % emu::kGranule == 0);
    return {region, offset + i * sizeof(T)};
  }
  Reference operator*() const { return (*this)[0]; }
  Shared operator+(ptrdiff_t i) const { return {region, offset + i * sizeof(T)}; }
  Shared operator-(ptrdiff_t i) const { return *this + -i; }
  Shared& operator+=(ptrdiff_t i) { return *this = *this + i; }

  emu::Region* region = nullptr;
  size_t offset = 0;
};

template <typename To, typename From>
Shared<To> shared_cast(Shared<From> p) {
  return {p.region, p.offset};
}

template <typename T>
Shared<T> dynamic_shared() {
  return {emu::self->block->dynamic.get(), 0};
}

}  // namespace ran

namespace emu {

inline int static_keys = 0;

// A block's copy of one static array. The array's name in the source is its key.
template <typename T>
ran::Shared<T> static_shared(int key, size_t count) {
  auto& statics = self->block->statics;
  if (statics.size() <= size_t(key)) statics.resize(key + 1);
  if (!statics[key]) statics[key] = std::make_unique<Region>(self->block, key, count * sizeof(T));
  return {statics[key].get(), 0};
}

// `region`'s twin in another block of the gang.
inline Region* twin(const Region& region, Block& block) {
  if (region.key < 0) return block.dynamic.get();
  if (block.statics.size() <= size_t(region.key) || !block.statics[region.key])
    fail("shared memory: the other block has not come to its declaration yet");
  return block.statics[region.key].get();
}

}  // namespace emu

#define RAN_SHARED(T, name, count)                  \
  static const int name##_key = emu::static_keys++; \
  const ran::Shared<T> name = emu::static_shared<T>(name##_key, count)
