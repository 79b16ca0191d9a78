// conv1x1_dgrad against double.
#include "../../csrc/cuda/conv1x1_dgrad.cu"

#include "../../csrc/cuda/conv1x1_support.cu"
#include "conv1x1_reference.h"

size_t ran::cuda::conv1x1::wgrad_workspace(const Conv1x1Shape&) { return 0; }

using namespace check;
using emu::Buffer;

template <typename T>
void check_dgrad(const Conv1x1Inputs<T>& in) {
  const Conv1x1Shape& s = in.s;
  if (s.stride != 1 || !in.c.normalise) return;
  const Filled<T> dy(s.rows() * s.c_out, -2, 2, in.c.whole);
  const Buffer<T> dz(in.x.size());
  const Buffer<float> sum_dz(s.c_in), sum_dz_xhat(s.c_in);
  const Given<T> given(in);
  const ConvScratch scratch(ConvPass::dgrad, s);
  const ran::cuda::Conv1x1Dgrad args{dz.data(),
                                     sum_dz.data(),
                                     sum_dz_xhat.data(),
                                     dy.data(),
                                     given.x(),
                                     in.norm(),
                                     in.weight.data(),
                                     s,
                                     scratch.workspace.data(),
                                     scratch.counters.data()};
  run_schedules([&] { return ran::cuda::conv1x1_dgrad(args, Type<T>::dtype, nullptr); }, dz, sum_dz, sum_dz_xhat);

  expect_gradients(in, dz, sum_dz, sum_dz_xhat,
                   multiply({values(dy), s.c_out, 1}, {values(in.weight), s.c_in, 1}, s.rows(), s.c_out, s.c_in));
}

// Without pixels both sums are zero.
void check_empty() {
  const Conv1x1Case c{"no pixels", {0, 4, 4, 8, 16, 1}, true, 1, kHopper};
  check_dgrad(Conv1x1Inputs<bf16>(c));
}

int main() {
  for_each_case(kConv1x1Cases, [](const auto& in, int) { check_dgrad(in); });
  check_empty();
  finish("conv1x1_dgrad");
}
