// conv3x3_dgrad against double.
#include "../../csrc/cuda/conv3x3_dgrad.cu"

#include "../../csrc/cuda/conv3x3_support.cu"
#include "conv3x3_reference.h"

using namespace check;
using emu::Buffer;

template <typename T>
void check_dgrad(const Conv3x3Inputs<T>& in) {
  const Conv3x3Shape& s = in.s;
  const Filled<T> dy(s.rows() * s.c_out, -2, 2, in.c.whole);
  const Buffer<T> dz(in.x.size());
  const Buffer<float> sum_dz(s.c_in), sum_dz_xhat(s.c_in);
  const ConvScratch scratch(ConvPass::dgrad, s);
  const ran::cuda::Conv3x3Dgrad args{
      dz.data(), sum_dz.data(),           sum_dz_xhat.data(), dy.data(), in.x.data(), in.norm(), in.weight.data(),
      s,         scratch.workspace.data()};
  run_schedules([&] { return ran::cuda::conv3x3_dgrad(args, Type<T>::dtype, nullptr); }, dz, sum_dz, sum_dz_xhat);

  const std::vector<double> dy_values = values(dy), weight = values(in.weight);
  std::vector<Sum> want(in.x.size());
  for_each_product(s, [&](int64_t row, int64_t pixel, int64_t tap) {
    for (int64_t k = 0; k < s.c_out; ++k)
      for (int64_t c = 0; c < s.c_in; ++c)
        want[pixel * s.c_in + c].add(dy_values[row * s.c_out + k] * weight[(k * 9 + tap) * s.c_in + c]);
  });
  expect_gradients(in, dz, sum_dz, sum_dz_xhat, want);
}

// Without pixels both sums are zero.
void check_empty() {
  const Conv3x3Case c{"no pixels", {0, 4, 4, 8, 16, 2, 1}, true, 1, kHopper};
  check_dgrad(Conv3x3Inputs<bf16>(c));
}

int main() {
  for_each_case(kConv3x3Cases, [](const auto& in, int) { check_dgrad(in); });
  check_empty();
  finish("conv3x3_dgrad");
}
