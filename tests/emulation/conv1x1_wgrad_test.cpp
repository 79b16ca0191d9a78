// conv1x1_wgrad against double.
#include "../../csrc/cuda/conv1x1_wgrad.cu"

#include "../../csrc/cuda/conv1x1_support.cu"
#include "conv1x1_reference.h"

using namespace check;
using emu::Buffer;

template <typename T>
void check_wgrad(const Conv1x1Inputs<T>& in, bool with_bias) {
  const Conv1x1Shape& s = in.s;
  if (!in.c.normalise) return;
  const Filled<T> dy(s.rows() * s.c_out, -2, 2, in.c.whole);
  const Buffer<T> dweight(in.weight.size()), dbias(s.c_out);
  const Given<T> given(in);
  const ConvScratch scratch(ConvPass::wgrad, s);
  const ran::cuda::Conv1x1Wgrad args{
      dweight.data(), with_bias ? dbias.data() : nullptr, dy.data(), given.x(), in.norm(), s, scratch.workspace.data()};
  run_schedules([&] { return ran::cuda::conv1x1_wgrad(args, Type<T>::dtype, nullptr); }, dweight, dbias);

  const std::vector<double> dy_values = values(dy), ones(s.rows(), 1.0);
  const View dy_transposed{dy_values, 1, s.c_out};
  expect_sums("dweight", dweight, multiply(dy_transposed, {activation_rows(in), s.c_in, 1}, s.c_out, s.rows(), s.c_in),
              in.c.whole);
  if (with_bias) expect_sums("dbias", dbias, multiply(dy_transposed, {ones, 1, 1}, s.c_out, s.rows(), 1), in.c.whole);
}

// Without pixels both gradients are zero.
void check_empty() {
  const Conv1x1Case c{"no pixels", {0, 4, 4, 8, 16, 1}, true, 1, kHopper};
  check_wgrad(Conv1x1Inputs<bf16>(c), true);
}

int main() {
  for_each_case(kConv1x1Cases, [](const auto& in, int number) { check_wgrad(in, number % 3 != 0); });
  check_empty();
  finish("conv1x1_wgrad");
}
