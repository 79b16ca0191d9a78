// conv3x3_wgrad against double.
#include "../../csrc/cuda/conv3x3_wgrad.cu"

#include "../../csrc/cuda/conv3x3_support.cu"
#include "conv3x3_reference.h"

using namespace check;
using emu::Buffer;

template <typename T>
void check_wgrad(const Conv3x3Inputs<T>& in, bool with_bias) {
  const Conv3x3Shape& s = in.s;
  const Filled<T> dy(s.rows() * s.c_out, -2, 2, in.c.whole);
  const Buffer<T> dweight(in.weight.size()), dbias(s.c_out);
  const ConvScratch scratch(ConvPass::wgrad, s);
  const ran::cuda::Conv3x3Wgrad args{
      dweight.data(),          with_bias ? dbias.data() : nullptr, dy.data(), in.x.data(), in.norm(), s,
      scratch.workspace.data()};
  run_schedules([&] { return ran::cuda::conv3x3_wgrad(args, Type<T>::dtype, nullptr); }, dweight, dbias);

  const std::vector<double> a = in.activation(), dy_values = values(dy);
  std::vector<Sum> want(in.weight.size()), want_bias(s.c_out);
  for_each_product(s, [&](int64_t row, int64_t pixel, int64_t tap) {
    for (int64_t k = 0; k < s.c_out; ++k)
      for (int64_t c = 0; c < s.c_in; ++c)
        want[(k * 9 + tap) * s.c_in + c].add(dy_values[row * s.c_out + k] * a[pixel * s.c_in + c]);
  });
  for (size_t i = 0; i < dy.size(); ++i) want_bias[i % s.c_out].add(dy_values[i]);
  expect_sums("dweight", dweight, want, in.c.whole);
  if (with_bias) expect_sums("dbias", dbias, want_bias, in.c.whole);
}

// Without pixels both gradients are zero.
void check_empty() {
  const Conv3x3Case c{"no pixels", {0, 4, 4, 8, 16, 1, 1}, true, 1, kHopper};
  check_wgrad(Conv3x3Inputs<bf16>(c), true);
}

int main() {
  for_each_case(kConv3x3Cases, [](const auto& in, int number) { check_wgrad(in, number % 3 != 0); });
  check_empty();
  finish("conv3x3_wgrad");
}
