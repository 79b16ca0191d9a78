// Runs every launcher on small cases and writes what comes out to a file. Compiled twice, by g++ for the emulation and
// by nvcc for a GPU; compare_gpu.py compares the two. It is also what compute-sanitizer can run: no torch, seconds.
//
//   compare_gpu FILE [--case NAME] [--schedule reverse] [--limits CAPABILITY PROCESSORS A_BLOCK A_PROCESSOR]
//
// The launchers plan by the device's limits; --limits gives the emulation those of a GPU.
#include <functional>

#include "compare_conv3x3.h"
#include "compare_ops.h"

namespace compare {

using ran::cuda::conv1x1::DeviceLimits;

struct Case {
  std::string name;
  std::function<void(const Run&)> run;
};

template <typename Body>
Case in_all(const std::string& name, Body body) {
  return {name, [body](const Run& run) { check::for_each_type([&](auto type) { body(type, run); }); }};
}
template <typename Body>
Case in_16_bits(const std::string& name, Body body) {
  return {name, [body](const Run& run) { body(bf16{}, run), body(f16{}, run); }};
}

void add_ops(std::vector<Case>& cases, const DeviceLimits& device) {
  const auto add_gate = [&](const char* name, ran::GateShape s) {
    cases.push_back(in_all(name, [s](auto type, const Run& run) { gate<decltype(type)>(run, s); }));
  };
  const auto add_bilinear_gate = [&](const char* name, ran::GateShape s) {
    cases.push_back(in_all(name, [s](auto type, const Run& run) { bilinear_gate<decltype(type)>(run, s); }));
  };
  const auto add_pyramid = [&](const char* name, ran::GateShape s) {
    cases.push_back(in_all(name, [s](auto type, const Run& run) { pyramid<decltype(type)>(run, s); }));
  };
  const auto add_streaming = [&](const char* name, ran::ChannelView view) {
    cases.push_back(in_all(name, [view](auto type, const Run& run) { streaming<decltype(type)>(run, view); }));
  };
  const auto add_resident = [&](const std::string& name, ran::ChannelView view, int group, bool clusters) {
    const auto body = [=](auto type, const Run& run) { resident<decltype(type)>(run, view, group, clusters); };
    cases.push_back(in_all(name, body));
  };
  add_gate("gate", {1, 1, 1, 4101, 1, false});
  add_gate("gate_up_sampled", {2, 24, 5, 7, 2, true});
  add_gate("gate_up_sampled_nchw", {2, 3, 6, 5, 2, false});
  add_gate("gate_up_sampled_by_3", {1, 8, 7, 8, 3, true});
  add_bilinear_gate("gate_bilinear", {2, 24, 11, 7, 2, true});
  add_bilinear_gate("gate_bilinear_nchw", {2, 3, 6, 5, 2, false});
  add_bilinear_gate("gate_bilinear_by_3", {1, 8, 17, 8, 3, true});
  add_pyramid("pyramid", {2, 24, 5, 7, 2, true});
  add_pyramid("pyramid_nchw", {2, 3, 6, 5, 2, false});
  add_streaming("bn_relu", {32, 24, 1});
  add_streaming("bn_relu_nchw", {2, 3, 16});
  add_streaming("bn_relu_odd", {37, 5, 1});
  add_streaming("bn_relu_tiles", {1024, 40, 1});
  add_streaming("bn_relu_tiles_nchw", {5, 2, 4096});
  for (const int group : {1, 2, 5}) add_resident("resident_grid_" + std::to_string(group), {32, 64, 1}, group, false);
  for (const int group : {1, 2, 8, 16}) {
    if (device.capability < 90 || (group == 16 && device.capability >= 120)) break;  // what the chips take
    add_resident("resident_cluster_" + std::to_string(group), {32, 64, 1}, group, true);
  }
  // More memory than a launch has without asking for it; a block on every SM, of one slab.
  add_resident("resident_large_slab", {740, 64, 1}, 1, false);
  cases.push_back(in_all("resident_whole_grid", [sm_count = device.sm_count](auto type, const Run& run) {
    using T = decltype(type);
    constexpr int kSlabBytes = 64;
    resident<T>(run, {int64_t(8) * sm_count, kSlabBytes / int(sizeof(T)), 1}, sm_count, false, kSlabBytes);
  }));
}

void add_conv1x1(std::vector<Case>& cases, const DeviceLimits& device) {
  const auto add_forward = [&](const char* name, Conv1x1Shape s, Fused fused) {
    const auto body = [=](auto type, const Run& run) { conv1x1_forward<decltype(type)>(run, s, fused); };
    cases.push_back(in_16_bits(name, body));
  };
  const auto add_dgrad = [&](const char* name, Conv1x1Shape s) {
    const auto body = [=](auto type, const Run& run) { conv1x1_dgrad<decltype(type)>(run, s); };
    cases.push_back(in_16_bits(name, body));
  };
  const auto add_wgrad = [&](const char* name, Conv1x1Shape s) {
    const auto body = [=](auto type, const Run& run) { conv1x1_wgrad<decltype(type)>(run, s); };
    cases.push_back(in_16_bits(name, body));
  };
  const Conv1x1Shape small{2, 7, 9, 40, 72, 1}, strided{2, 7, 9, 40, 72, 2}, deep{1, 5, 7, 320, 40, 1},
      in_pieces{2, 7, 9, 72, 72, 1, true};
  // As many pixels as give every SM a large tile, or a share of them.
  const int64_t tiles = device.sm_count;
  add_forward("forward", small, {});
  add_forward("forward_norm", small, {true, true, true, true, 0});
  add_forward("forward_gate", small, {true, true, false, true, 1});
  add_forward("forward_gate_plain", small, {false, true, false, false, 2});
  add_forward("forward_gate_up_sampled", small, {true, false, true, true, 2});
  add_forward("forward_stride_2", strided, {true, false, false, true, 0});
  add_forward("forward_deep", deep, {true, false, false, false, 0});
  add_forward("forward_large", {1, tiles, 129, 8, 72, 1}, {true, true, false, true, 0});
  add_forward("forward_tall", {1, tiles, 129, 8, 64, 1}, {});
  add_forward("forward_depth_split", {1, 7, 11, 520, 40, 1}, {true, true, true, true, 0});
  add_forward("forward_pieces", in_pieces, {true, true, false, true, 0});
  add_dgrad("dgrad", small);
  add_dgrad("dgrad_pieces", in_pieces);
  add_dgrad("dgrad_depth_split", {1, 7, 11, 40, 520, 1});
  add_dgrad("dgrad_large", {1, tiles, 129, 72, 8, 1});
  add_dgrad("dgrad_tall", {1, tiles, 129, 64, 8, 1});
  add_wgrad("wgrad", small);
  add_wgrad("wgrad_pieces", in_pieces);
  add_wgrad("wgrad_stride_2", strided);
  add_wgrad("wgrad_split", {1, 39, 37, 24, 16, 1});
  add_wgrad("wgrad_large", {1, tiles * 4, 65, 72, 72, 1});
}

void add_conv3x3(std::vector<Case>& cases, const DeviceLimits& device) {
  const auto add = [&](const std::string& name, Conv3x3Shape s) {
    cases.push_back(in_16_bits("forward3x3_" + name, [s](auto type, const Run& run) {
      conv3x3_forward<decltype(type)>(run, s, s.stride == 1);
    }));
    cases.push_back(
        in_16_bits("dgrad3x3_" + name, [s](auto type, const Run& run) { conv3x3_dgrad<decltype(type)>(run, s); }));
    cases.push_back(
        in_16_bits("wgrad3x3_" + name, [s](auto type, const Run& run) { conv3x3_wgrad<decltype(type)>(run, s); }));
  };
  add("small", {2, 7, 9, 40, 72, 1, 1});
  add("stride_2", {2, 7, 9, 24, 40, 2, 1});
  add("no_padding", {1, 6, 8, 72, 24, 1, 0});
  add("stride_2_no_padding", {3, 4, 4, 8, 8, 2, 0});
  add("large", {device.sm_count, 8, 16, 72, 72, 1, 1});  // a large tile for every SM, in all three passes
}

struct Options {
  const char* file = nullptr;
  const char* only = nullptr;
};

Options parse(int argc, char** argv) {
  if (argc < 2) stop("usage", "compare_gpu FILE [--case NAME] [--schedule reverse] [--limits N N N N]");
  Options options{argv[1]};
  for (int i = 2; i < argc; ++i) {
    const std::string option = argv[i];
    if (option == "--case" && i + 1 < argc) {
      options.only = argv[++i];
#if defined(RAN_EMULATE)
    } else if (option == "--schedule" && i + 1 < argc) {
      const std::string name = argv[++i];
      if (name != "forward" && name != "reverse") stop("--schedule must be forward or reverse; got", name.c_str());
      emu::schedule = name == "reverse" ? emu::Schedule::reverse : emu::Schedule::forward;
    } else if (option == "--limits" && i + 4 < argc) {
      int* const limits[] = {
          &ran::cuda::conv1x1::emulated_device.capability, &ran::cuda::conv1x1::emulated_device.sm_count,
          &ran::cuda::conv1x1::emulated_device.shared_per_block, &ran::cuda::conv1x1::emulated_device.shared_per_sm};
      for (int* limit : limits) *limit = std::atoi(argv[++i]);
#endif
    } else {
      stop("unknown option", argv[i]);
    }
  }
  return options;
}

int run_all(const Options& options) {
  const DeviceLimits device = ran::cuda::conv1x1::device_limits();
  std::vector<Case> cases;
  add_ops(cases, device);
  add_conv1x1(cases, device);
  add_conv3x3(cases, device);
  FILE* file = std::fopen(options.file, "wb");
  if (!file) stop("cannot write", options.file);
  std::fprintf(file, "device %d %d %d %d\n", device.capability, device.sm_count, device.shared_per_block,
               device.shared_per_sm);
  int ran = 0;
  for (const Case& c : cases) {
    if (options.only && c.name != options.only) continue;
    std::fprintf(file, "case %s\n", c.name.c_str());
    kernels.clear();
    for (const bool whole : {true, false}) {
      check::random_bits.seed(20261);
      c.run({c.name.c_str(), whole, file});
    }
    std::string names;
    for (const std::string& kernel : kernels) names += " " + kernel;
    std::printf("%s:%s\n", c.name.c_str(), names.c_str());
    std::fprintf(file, "kernels%s\n", names.c_str());
    ++ran;
  }
  if (std::fclose(file) != 0) stop("cannot write", options.file);
  if (ran == 0) stop("no case is called", options.only);
  return 0;
}

}  // namespace compare

int main(int argc, char** argv) { return compare::run_all(compare::parse(argc, argv)); }
