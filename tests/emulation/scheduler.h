// Runs a kernel's threads as fibers on one CPU thread.
//
// A gang is the set of blocks that must be alive at once: one block, the blocks of a cluster, or a cooperative launch's
// whole grid. Schedules:
//   forward, reverse  greedy: each warp runs as far as it can go before the next starts (this shows a missing barrier)
//   round_robin       every warp runs to its next meeting point in turn
//   shuffled          greedy in a random order of threads, over several gangs at a time (this shows what one block
//                     sees of another's unfinished work)
//   late_warps        the first warp of every block before all others; of these the one that is furthest behind, in the
//                     block whose first warp ran last (this shows what a warp sees when the first one of its own block
//                     has reported too early that the block is ready). Over several gangs at a time
#pragma once

#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <csetjmp>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <map>
#include <memory>
#include <random>
#include <string>
#include <tuple>
#include <vector>

#include "number_types.h"

namespace emu {

enum class Schedule { forward, reverse, round_robin, shuffled, late_warps };
inline constexpr unsigned kAllSchedules = 0b11111;  // a bit each
inline Schedule schedule = Schedule::forward;
inline std::mt19937 shuffler{1};
// Of which blocks meet in memory alone.
inline size_t gangs_at_a_time() { return schedule == Schedule::shuffled || schedule == Schedule::late_warps ? 8 : 1; }

// Threads that meet. `what` and `line` name the call, so that threads meeting from different places are noticed.
struct Barrier {
  uint32_t generation = 0;
  int arrived = 0, line = 0;
  const char* what = nullptr;
};

struct Block;
struct Fiber;
struct Gang;
struct Region;

struct Copy {  // an asynchronous copy that has been issued and not landed
  Region* region;
  size_t offset;
  const void* source;
  size_t bytes, size;  // bytes from the source, then zeros up to size
  int group;
};

struct Thread {
  Block* block;
  dim3 index;
  int flat, warp, lane;
  bool done = false;
  const Barrier* waits_for = nullptr;
  uint32_t generation = 0;  // of waits_for when the thread arrived
  std::vector<Copy> copies;
  int copy_group = 0;
  bool cluster_arrived = false;           // of a split barrier, in PTX
  uint64_t polled = 0, polled_value = 0;  // by an acquiring load, in PTX
  jmp_buf context;
  Fiber* fiber = nullptr;

  bool runnable() const { return !done && (!waits_for || waits_for->generation != generation); }
};

struct Warp {
  Barrier collective, sync;
  alignas(16) unsigned char slots[2][32][64];  // two sets: a fast lane may be one collective ahead
};

struct Block {
  ~Block();  // in cuda_emulation.h, where Region is complete
  Gang* gang;
  dim3 index;
  unsigned rank;  // in the gang
  std::vector<Thread> threads;
  std::vector<Warp> warps;
  int live;  // threads that have not ended
  Barrier barrier;
  std::unique_ptr<Region> dynamic;
  std::vector<std::unique_ptr<Region>> statics;
};

struct Gang {
  std::vector<std::unique_ptr<Block>> blocks;
  Barrier barrier;
};

inline Thread* self = nullptr;  // null on the host
inline const char* kernel = nullptr;
inline unsigned cluster_size = 1;
inline bool cooperative_launch = false;

struct Launched {
  std::string name;
  unsigned schedules = 0;  // that it has run under, one bit each
};
inline std::map<const void*, Launched> launches;  // by the kernel's address

// The one of mutate.py's changes to the kernels that is in force; 0: none.
inline const int mutant = std::getenv("RAN_MUTANT") ? std::atoi(std::getenv("RAN_MUTANT")) : 0;

[[noreturn]] inline void fail(const char* text, int line = 0, const Thread* thread = self) {
  std::fprintf(stderr, "emulation: kernel %s", kernel ? kernel : "(none)");
  if (thread) {
    const dim3 b = thread->block->index, t = thread->index;
    std::fprintf(stderr, ", block (%u, %u, %u), thread (%u, %u, %u)", b.x, b.y, b.z, t.x, t.y, t.z);
  }
  if (line) std::fprintf(stderr, ", line %d", line);
  std::fprintf(stderr, ": %s\n", text);
  std::_Exit(3);
}

// From the launch as written, "name<T, V>, first argument, ...", and a signature with the types: "name<T, V> [with
// ...]".
inline std::string kernel_name(const std::string& launch, const std::string& signature) {
  size_t end = 0;
  for (int depth = 0; end < launch.size() && (depth > 0 || launch[end] != ','); ++end)
    depth += (launch[end] == '<' || launch[end] == '(') - (launch[end] == '>' || launch[end] == ')');
  const size_t types = signature.find("[with");
  return launch.substr(0, end) + (types == std::string::npos ? "" : " " + signature.substr(types));
}

}  // namespace emu

inline uint3 threadIdx, blockIdx;
inline dim3 blockDim, gridDim;

namespace emu {

inline constexpr size_t kStack = 128 << 10;
// Stacks with a page below them that catches overflow: each makes a mapping of its own, of which Linux allows 65,530. A
// grid that fills a chip needs more stacks than that, and those above run what those below have run.
inline constexpr size_t kGuarded = 16 << 10;

// A stack with a fiber on it, which runs one thread after the other: ucontext makes it, once, and _setjmp/_longjmp
// switch, which needs no system call.
struct Fiber {
  void* memory;
  jmp_buf between_threads;
  bool made = false;
};
inline std::vector<std::unique_ptr<Fiber>> fibers;
inline std::vector<Fiber*> idle_fibers;
inline jmp_buf scheduler_context;
inline std::function<void()> body;

inline void run_threads() {
  for (;;) {
    body();
    if (!self->copies.empty()) fail("the thread ends with a cp.async that was never waited for");
    self->done = true;
    --self->block->live;
    if (_setjmp(self->fiber->between_threads) == 0) _longjmp(scheduler_context, 1);
  }
}

inline Fiber* take_fiber() {
  if (idle_fibers.empty()) {
    void* memory = mmap(nullptr, kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) fail("no memory for another thread's stack");
    if (fibers.size() < kGuarded) mprotect(memory, 4096, PROT_NONE);
    fibers.push_back(std::make_unique<Fiber>());
    fibers.back()->memory = memory;
    idle_fibers.push_back(fibers.back().get());
  }
  Fiber* fiber = idle_fibers.back();
  idle_fibers.pop_back();
  return fiber;
}

inline void start(Fiber& fiber) {
  if (fiber.made) _longjmp(fiber.between_threads, 1);
  fiber.made = true;
  ucontext_t context;
  getcontext(&context);
  context.uc_stack.ss_sp = fiber.memory;
  context.uc_stack.ss_size = kStack;
  context.uc_link = nullptr;
  makecontext(&context, run_threads, 0);
  setcontext(&context);
}

__attribute__((noinline)) inline void resume(Thread& thread) {
  self = &thread;
  threadIdx = thread.index;
  blockIdx = thread.block->index;
  thread.waits_for = nullptr;
  if (_setjmp(scheduler_context) == 0) {
    if (thread.fiber) _longjmp(thread.context, 1);
    thread.fiber = take_fiber();
    start(*thread.fiber);
  }
  if (thread.done) idle_fibers.push_back(thread.fiber);
  self = nullptr;
}

__attribute__((noinline)) inline void suspend() {
  if (_setjmp(self->context) == 0) _longjmp(scheduler_context, 1);
}

inline uint64_t barriers_passed = 0;

// Returns true in the thread that came last.
inline bool meet(Barrier& barrier, int expected, const char* what, int line) {
  if (barrier.arrived != 0 && (barrier.line != line || barrier.what != what))
    fail("divergent: other threads of its group wait at another call", line);
  barrier.what = what;
  barrier.line = line;
  if (++barrier.arrived == expected) {
    barrier.arrived = 0;
    ++barrier.generation;
    ++barriers_passed;
    return true;
  }
  self->waits_for = &barrier;
  self->generation = barrier.generation;
  suspend();
  return false;
}

[[noreturn]] inline void report_deadlock(const Gang& gang) {
  for (const auto& block : gang.blocks)
    for (const Thread& thread : block->threads)
      if (!thread.done && thread.waits_for) {
        static char text[160];
        std::snprintf(text, sizeof text, "divergent: waits at %s for threads that never come", thread.waits_for->what);
        fail(text, thread.waits_for->line, &thread);
      }
  fail("deadlock");
}

inline bool run_warp_once(Block& block, int warp, bool reverse) {
  bool ran = false;
  const int first = warp * 32;
  for (int i = 0; i < 32; ++i) {
    Thread& thread = block.threads[first + (reverse ? 31 - i : i)];
    if (!thread.runnable()) continue;
    resume(thread);
    ran = true;
  }
  return ran;
}

struct WarpOf {
  Block* block;
  int warp;
};

// Always the first thread in a random order that can go on. Only a barrier that is passed lets an earlier one go on
// again; every few of them the order changes, so that a thread that was ahead falls behind.
inline void run_shuffled(std::vector<Thread*> order) {
  std::shuffle(order.begin(), order.end(), shuffler);
  for (size_t i = 0; i < order.size();) {
    const uint64_t before = barriers_passed;
    if (order[i]->runnable()) resume(*order[i]);
    ++i;
    if (barriers_passed == before) continue;
    i = 0;
    if (shuffler() % 8 == 0) std::shuffle(order.begin(), order.end(), shuffler);
  }
}

inline void run_warps(const std::vector<WarpOf>& warps) {
  for (bool ran = true; ran;) {
    ran = false;
    for (const WarpOf& at : warps)
      while (run_warp_once(*at.block, at.warp, schedule == Schedule::reverse)) {
        ran = true;
        if (schedule == Schedule::round_robin) break;
      }
  }
}

inline void run_late_warps(const std::vector<WarpOf>& warps) {
  std::map<const Block*, int> turn;  // in which a block's first warp ran last
  std::vector<int> meetings(warps.size());
  for (int now = 1;; ++now) {
    std::vector<std::tuple<bool, int, int, size_t>> order;
    for (size_t i = 0; i < warps.size(); ++i)
      order.emplace_back(warps[i].warp > 0, warps[i].warp ? meetings[i] : 0, -turn[warps[i].block], i);
    std::sort(order.begin(), order.end());
    const auto next = std::find_if(order.begin(), order.end(), [&](const auto& one) {
      const WarpOf& at = warps[std::get<size_t>(one)];
      bool ran = false;
      while (run_warp_once(*at.block, at.warp, false)) ran = true;
      return ran;
    });
    if (next == order.end()) return;
    const size_t ran = std::get<size_t>(*next);
    ++meetings[ran];
    if (warps[ran].warp == 0) turn[warps[ran].block] = now;
  }
}

inline void run_gangs(const std::vector<std::unique_ptr<Gang>>& gangs) {
  std::vector<WarpOf> warps;
  std::vector<Thread*> threads;
  for (const auto& gang : gangs)
    for (const auto& block : gang->blocks) {
      for (int warp = 0; warp < static_cast<int>(block->warps.size()); ++warp) warps.push_back({block.get(), warp});
      for (Thread& thread : block->threads) threads.push_back(&thread);
    }
  if (schedule == Schedule::shuffled) {
    run_shuffled(threads);
  } else if (schedule == Schedule::late_warps) {
    run_late_warps(warps);
  } else {
    if (schedule == Schedule::reverse) std::reverse(warps.begin(), warps.end());
    run_warps(warps);
  }
  for (const auto& gang : gangs)
    for (const auto& block : gang->blocks)
      if (block->live) report_deadlock(*gang);
}

}  // namespace emu
