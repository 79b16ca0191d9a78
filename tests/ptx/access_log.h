// How the accesses of a warp fall on shared memory's banks and on sectors of global memory.
//
// What the hardware does with one instruction of a warp: shared memory serves 32 banks of 4 bytes at a time, so lanes
// are taken 32, 16 or 8 at a time for 4, 8 and 16 bytes, and each such group takes as many wavefronts as its fullest
// bank has different words; one is the ideal. Global memory moves sectors of 32 bytes; the ideal is the bytes asked
// for, rounded up to whole ones.
#pragma once

#include <map>
#include <set>
#include <tuple>
#include <vector>

#include "../emulation/global_memory.h"

namespace ptx {

enum class Access { shared_load, shared_store, matrix, copy_to_shared, global_load, global_store, copy_from_global };

inline bool is_shared(Access access) { return access <= Access::copy_to_shared; }

struct Lane {
  int lane;
  uint64_t address;
};

struct Key {  // one execution of one instruction by one warp
  const char* kernel;
  int number;
  size_t block;
  int warp, time;
  auto tie() const { return std::tie(kernel, number, block, warp, time); }
  bool operator<(const Key& other) const { return tie() < other.tie(); }
};

struct Request {
  Access access;
  int bytes;
  bool tensor;  // global memory of a whole tensor
  std::vector<Lane> lanes;
};

inline bool logging = false;
inline std::map<Key, Request> requests;
inline std::map<std::pair<const emu::Thread*, int>, int> times;

inline void note(Access access, uint64_t address, int bytes, int number) {
  if (!logging) return;
  const emu::Thread& t = *emu::self;
  const size_t block = t.block->index.x + (size_t(t.block->index.y) << 20) + (size_t(t.block->index.z) << 40);
  Request& request = requests[{emu::kernel, number, block, t.warp, times[{&t, number}]++}];
  request.access = access;
  request.bytes = bytes;
  if (!is_shared(access)) request.tensor = emu::allocation_of(reinterpret_cast<const void*>(address))->second.tensor;
  request.lanes.push_back({t.lane, address});
}

struct Cost {
  long used = 0, ideal = 0;
};

inline Cost wavefronts(const Request& request) {
  const int words = std::max(1, request.bytes / 4), together = 32 / words;
  std::map<int, std::map<uint64_t, std::set<uint64_t>>> banks;  // by group of lanes and bank
  for (const Lane& lane : request.lanes)
    for (int i = 0; i < words; ++i)
      banks[lane.lane / together][(lane.address / 4 + i) % 32].insert(lane.address / 4 + i);
  Cost cost;
  for (const auto& [group, words_of] : banks) {
    size_t fullest = 0;
    for (const auto& [bank, different] : words_of) fullest = std::max(fullest, different.size());
    cost.used += fullest;
    ++cost.ideal;
  }
  return cost;
}

inline Cost sectors(const Request& request) {
  std::set<uint64_t> touched, bytes;
  for (const Lane& lane : request.lanes)
    for (int i = 0; i < request.bytes; ++i) {
      touched.insert((lane.address + i) / 32);
      bytes.insert(lane.address + i);
    }
  return {static_cast<long>(touched.size()), static_cast<long>((bytes.size() + 31) / 32)};
}

}  // namespace ptx
