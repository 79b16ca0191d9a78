// The 3x3 convolutions of compare_gpu.cpp.
#pragma once

#include "../../csrc/cuda/conv3x3.h"
#include "compare_conv1x1.h"

namespace compare {

using ran::ConvPass;
using ran::cuda::Conv3x3Shape;

template <typename T>
void conv3x3_forward(const Run& run, const Conv3x3Shape& s, bool residual_too) {
  const int64_t outputs = s.rows() * s.c_out;
  const auto x = run.input<T>(s.n * s.h * s.w * s.c_in, -2, 2), weight = run.input<T>(s.c_out * 9 * s.c_in, -1, 1),
             bias = run.input<T>(s.c_out, -2, 2), residual = run.input<T>(outputs, -2, 2);
  const Norm norm(run, s.c_in);
  const Statistics statistics(s.c_out);
  const Array<T> y(outputs);
  const Array<char> workspace(conv3x3_workspace(ConvPass::forward, s));
  ran::cuda::Conv3x3Forward args{};
  args.y = y.data();
  args.statistics = {statistics.mean.data(), statistics.var.data(), statistics.running()};
  args.x = x.data();
  args.norm = norm.get();
  args.weight = weight.data();
  args.bias = bias.data();
  if (residual_too) args.residual = residual.data();
  args.shape = s;
  args.workspace = workspace.data();
  run.launch(ran::cuda::conv3x3_forward(args, Type<T>::dtype, nullptr));
  run.output("y", y, Match::bits, rounding(90 * s.c_in));
  const double of_sum = rounding(40) + flips<T>(40, s.rows()) / s.rows();
  statistics.output(run, false, of_sum * 8);
}

template <typename T>
void conv3x3_dgrad(const Run& run, const Conv3x3Shape& s) {
  const auto x = run.input<T>(s.n * s.h * s.w * s.c_in, -2, 2), weight = run.input<T>(s.c_out * 9 * s.c_in, -1, 1),
             dy = run.input<T>(s.rows() * s.c_out, -2, 2);
  const Norm norm(run, s.c_in);
  const Array<T> dz(x.size());
  const Array<float> sum_dz(s.c_in), sum_dz_xhat(s.c_in);
  const Array<char> workspace(conv3x3_workspace(ConvPass::dgrad, s));
  const ran::cuda::Conv3x3Dgrad args{dz.data(),       sum_dz.data(), sum_dz_xhat.data(), dy.data(),
                                     x.data(),        norm.get(),    weight.data(),      s,
                                     workspace.data()};
  run.launch(ran::cuda::conv3x3_dgrad(args, Type<T>::dtype, nullptr));
  run.output("dz", dz, Match::bits, rounding(18 * s.c_out));
  run.output("sum_dz", sum_dz, Match::bits, flips<T>(20, s.n * s.h * s.w));
  run.output("sum_dz_xhat", sum_dz_xhat, Match::bits, flips<T>(80, s.n * s.h * s.w));
}

template <typename T>
void conv3x3_wgrad(const Run& run, const Conv3x3Shape& s) {
  const auto x = run.input<T>(s.n * s.h * s.w * s.c_in, -2, 2), dy = run.input<T>(s.rows() * s.c_out, -2, 2);
  const Norm norm(run, s.c_in);
  const Array<T> dweight(s.c_out * 9 * s.c_in), dbias(s.c_out);
  const Array<char> workspace(conv3x3_workspace(ConvPass::wgrad, s));
  const ran::cuda::Conv3x3Wgrad args{dweight.data(),  dbias.data(), dy.data(), x.data(), norm.get(), s,
                                     workspace.data()};
  run.launch(ran::cuda::conv3x3_wgrad(args, Type<T>::dtype, nullptr));
  run.output("dweight", dweight, Match::bits, rounding(20 * s.rows()));
  run.output("dbias", dbias, Match::bits, rounding(2 * s.rows()));
}

}  // namespace compare
