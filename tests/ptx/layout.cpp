// Runs each launcher at shapes whose tensors are aligned, and prints how each kernel's accesses fall on memory: a line
// an instruction, "kernel | number | kind | bytes | used | ideal | narrow". layout.py sums them up.
#include "../emulation/compare_conv3x3.h"
#include "../emulation/compare_ops.h"
#include "run_time.h"

namespace {

using namespace compare;

struct Line {
  ptx::Cost cost;
  long narrow = 0;
  int bytes = 0;
};

constexpr const char* kKinds[] = {"shared load", "shared store", "matrix load",     "copy to shared",
                                  "global load", "global store", "copy from global"};

void report() {
  std::map<std::tuple<std::string, int, ptx::Access>, Line> lines;
  for (const auto& [key, request] : ptx::requests) {
    Line& line = lines[{key.kernel, key.number, request.access}];
    const ptx::Cost cost = ptx::is_shared(request.access) ? ptx::wavefronts(request) : ptx::sectors(request);
    line.cost.used += cost.used;
    line.cost.ideal += cost.ideal;
    line.bytes = request.bytes;
    line.narrow += !ptx::is_shared(request.access) && request.tensor && request.bytes < 16;
  }
  for (const auto& [key, line] : lines)
    std::printf("%s | %d | %s | %d | %ld | %ld | %ld\n", std::get<0>(key).c_str(), std::get<1>(key),
                kKinds[static_cast<int>(std::get<2>(key))], line.bytes, line.cost.used, line.cost.ideal, line.narrow);
  ptx::requests.clear();
}

template <typename Body>
void measure(Body&& body) {
  ptx::times.clear();
  body();
  report();
}

template <typename T>
void ops(const Run& run) {
  measure([&] { gate<T>(run, {2, 64, 16, 16, 1, true}); });
  measure([&] { gate<T>(run, {2, 64, 16, 16, 2, true}); });
  measure([&] { bilinear_gate<T>(run, {2, 64, 16, 16, 2, true}); });
  measure([&] { pyramid<T>(run, {2, 64, 16, 16, 2, true}); });
  measure([&] { streaming<T>(run, {2048, 64, 1}); });
  measure([&] { streaming<T>(run, {8, 16, 1024}); });
  // The widest slab, and the narrowest of whole sectors.
  measure([&] { resident<T>(run, {2048, 64, 1}, 8, true, 128); });
  measure([&] { resident<T>(run, {2048, 64, 1}, 4, false, 128); });
  measure([&] { resident<T>(run, {2048, 64, 1}, 4, true, 32); });
}

// With each tile: by so many rows that every SM has one, or by fewer.
template <typename T>
void convolutions(const Run& run) {
  const Conv1x1Shape large{1, 8, 64, 128, 128, 1}, tall{1, 8, 64, 64, 64, 1}, small{1, 2, 64, 128, 64, 1};
  for (const Conv1x1Shape& s : {large, tall, small}) {
    measure([&] { conv1x1_forward<T>(run, s, {true, true, true, true, 0}); });
    measure([&] { conv1x1_forward<T>(run, s, {false, true, false, false, 1}); });
    measure([&] { conv1x1_dgrad<T>(run, s); });
    measure([&] { conv1x1_wgrad<T>(run, s); });
  }
  // A tile for four SMs: the depth is split.
  const Conv1x1Shape forward_split{1, 1, 64, 512, 64, 1}, dgrad_split{1, 1, 64, 64, 512, 1};
  measure([&] { conv1x1_forward<T>(run, forward_split, {true, true, true, true, 0}); });
  measure([&] { conv1x1_dgrad<T>(run, dgrad_split); });
  for (Conv1x1Shape s : {large, tall, small}) {
    s.pieces = true;
    measure([&] { conv1x1_forward<T>(run, s, {true, true, false, true, 0}); });
    measure([&] { conv1x1_dgrad<T>(run, s); });
    measure([&] { conv1x1_wgrad<T>(run, s); });
  }
  const Conv1x1Shape strided{2, 32, 32, 128, 128, 2};
  measure([&] { conv1x1_forward<T>(run, strided, {true, false, false, true, 0}); });
  measure([&] { conv1x1_wgrad<T>(run, {1, 32, 64, 128, 128, 1}); });
  measure([&] { conv1x1_wgrad<T>(run, {1, 32, 64, 128, 128, 1, true}); });
}

// With both tiles; one SM has large tiles of a few patches.
template <typename T>
void convolutions3x3(const Run& run) {
  const Conv3x3Shape large{2, 16, 16, 64, 128, 1, 1}, tall{1, 16, 16, 64, 64, 1, 1}, strided{1, 16, 32, 64, 64, 2, 1},
      images{8, 4, 4, 64, 64, 1, 1};
  measure([&] { conv3x3_forward<T>(run, large, true); });
  measure([&] { conv3x3_dgrad<T>(run, {2, 16, 16, 128, 64, 1, 1}); });
  for (const Conv3x3Shape& s : {tall, strided, images}) {
    measure([&] { conv3x3_forward<T>(run, s, true); });
    measure([&] { conv3x3_dgrad<T>(run, s); });
    measure([&] { conv3x3_wgrad<T>(run, s); });
  }
}

}  // namespace

int main() {
  ran::cuda::conv1x1::emulated_device = {90, 4, 227 << 10, 228 << 10};
  std::FILE* nowhere = std::fopen("/dev/null", "wb");
  const Run run{"layout", false, nowhere};
  ptx::logging = true;
  ops<float>(run);
  ops<check::bf16>(run);
  convolutions<check::bf16>(run);
  ran::cuda::conv1x1::emulated_device.sm_count = 1;
  convolutions3x3<check::bf16>(run);
}
