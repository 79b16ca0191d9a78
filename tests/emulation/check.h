// What the kernel tests share: tensors in both layouts, schedules, and comparisons that end the program with the case's
// name.
#pragma once

#include <cstdarg>
#include <string>
#include <tuple>

#include "cuda_emulation.h"
#include "dtypes.h"

namespace check {

inline std::string current_case;

template <typename... Arguments>
void begin_case(const char* format, Arguments... arguments) {
  char text[256];
  std::snprintf(text, sizeof text, format, arguments...);
  current_case = text;
}

[[noreturn]] __attribute__((format(printf, 1, 2))) inline void mismatch(const char* format, ...) {
  std::fprintf(stderr, "%s: ", current_case.c_str());
  va_list arguments;
  va_start(arguments, format);
  std::vfprintf(stderr, format, arguments);
  va_end(arguments);
  std::fputs("\n", stderr);
  std::exit(1);
}

#define EXPECT(condition) \
  if (!(condition)) check::mismatch("%s:%d: not so: %s", __FILE__, __LINE__, #condition)

template <typename T>
void fill(const emu::Buffer<T>& buffer, double low, double high, bool whole = false) {
  for (size_t i = 0; i < buffer.size(); ++i) buffer[i] = random_number<T>(low, high, whole);
}

// Offset of (n, c, y, x) in a dense (., C, H, W) tensor of either layout.
struct Layout {
  int64_t channels, height, width;
  bool channels_last;
  int64_t operator()(int64_t n, int64_t c, int64_t y, int64_t x) const {
    return channels_last ? ((n * height + y) * width + x) * channels + c
                         : ((n * channels + c) * height + y) * width + x;
  }
};

template <typename T>
void expect_equal(const char* what, const emu::Buffer<T>& got, size_t i, double want) {
  const double g = value(got[i]), w = value(make<T>(want));
  if (g != w && !(g != g && w != w)) mismatch("%s[%zu] is %.9g, not %.9g", what, i, g, w);
}

// Within half a unit in the last place of T, and `slack` rounding errors of float32 on numbers of size `scale`.
template <typename T>
void expect_close(const char* what, const emu::Buffer<T>& got, size_t i, double want, double scale, double slack = 8) {
  const double g = value(got[i]);
  if (g == want || (g != g && want != want)) return;
  const double bound = std::fabs(want) * Type<T>::ulp * 0.51 + Type<T>::tiny + slack * 0x1p-24 * std::fabs(scale);
  if (!(std::fabs(g - want) <= bound)) mismatch("%s[%zu] is %.9g, not %.9g +- %.2g", what, i, g, want, bound);
}

template <typename T>
void poison(const emu::Buffer<T>& buffer) {
  std::memset(static_cast<void*>(buffer.data()), 0xff, buffer.bytes());
}

inline int outputs_compared = 0, outputs_equal = 0;  // of compiled kernels with those of their sources

// Those that RAN_SCHEDULES names.
inline const auto kSchedules = [] {
  std::vector<std::pair<emu::Schedule, const char*>> named;
  for (const auto& one : {std::pair(emu::Schedule::reverse, "reverse"),
                          {emu::Schedule::round_robin, "round_robin"},
                          {emu::Schedule::shuffled, "shuffled"},
                          {emu::Schedule::late_warps, "late_warps"},
                          {emu::Schedule::forward, "forward"}})
    if (wanted("RAN_SCHEDULES", one.second)) named.push_back(one);
  return named;
}();
inline size_t turn = 0;  // of the schedules

// Launches under every schedule, or, where the kernels have all been through that, under two, which take turns; the
// outputs must come out the same, bit for bit. The launch poisons its scratch, where it would else find what the one
// before has left.
template <typename Launch, typename... Outputs>
void run_schedules(Launch&& launch, const Outputs&... outputs) {
  using Bytes = std::vector<std::string>;
  const auto run = [&](emu::Schedule schedule) -> Bytes {
    const auto bytes = [](const auto& buffer) {
      return std::string(reinterpret_cast<const char*>(buffer.data()), buffer.bytes());
    };
    emu::schedule = schedule;
    (poison(outputs), ...);
    EXPECT(launch() == cudaSuccess);
    return {bytes(outputs)...};
  };
  if (!emu::compiled.empty()) emu::run_sources = true;
  const Bytes from_sources = emu::run_sources ? run(emu::Schedule::forward) : Bytes();
  emu::run_sources = false;
  ++turn;
  emu::known = true;
  const Bytes first = run(kSchedules[turn % kSchedules.size()].first);
  const size_t runs = emu::known ? 2 : kSchedules.size();
  for (size_t i = 1; i < runs; ++i) {
    const auto& [schedule, name] = kSchedules[(turn + i) % kSchedules.size()];
    if (run(schedule) != first) mismatch("the result depends on the schedule (%s)", name);
  }
  for (size_t i = 0; i < from_sources.size(); ++i) {
    ++outputs_compared;
    outputs_equal += from_sources[i] == first[i];
  }
}

// Ends a test program's main: which kernels ran, by their place in the program, and under which schedules (bits).
extern "C" const char __executable_start;
inline void finish(const char* what) {
  std::printf("%s: ok\n", what);
  if (outputs_compared) std::printf("equal %d of %d\n", outputs_equal, outputs_compared);
  for (const auto& [kernel, launched] : emu::launches)
    std::printf("%tx %x\n", static_cast<const char*>(kernel) - &__executable_start, launched.schedules);
}

}  // namespace check
