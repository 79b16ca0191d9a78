// The 1x1 convolutions of compare_gpu.cpp.
#pragma once

#include "compare_norm.h"
#include "compare_pieces.h"

namespace compare {

using ran::ConvPass;
using ran::cuda::Conv1x1Shape;

struct Fused {
  bool norm, bias, residual, statistics;
  int gate_scale;
};

// What a value of `size` rounded to T another way now and then does to a sum of `count` of them.
template <typename T>
double flips(double size, int64_t count) {
  return Type<T>::ulp * size * (4 + std::sqrt(static_cast<double>(count)));
}

template <typename T>
void conv1x1_forward(const Run& run, const Conv1x1Shape& s, const Fused& fused) {
  // With a gate y is a multiple of 64, of which the sigmoid is 0, 1/2 or 1 to the last bit that counts.
  const double step = run.whole && fused.gate_scale ? 64 : 1;
  const int64_t outputs = s.rows() * s.c_out;
  const auto x = run.input<T>(s.n * s.h * s.w * s.c_in, -2, 2), weight = run.input<T>(s.c_out * s.c_in, -1, 1, step),
             bias = run.input<T>(s.c_out, -2, 2, step), residual = run.input<T>(outputs, -2, 2, step);
  const Norm norm(run, s.c_in);
  const Statistics statistics(s.c_out);
  const int64_t gate_h = s.out_h() * fused.gate_scale, gate_w = s.out_w() * fused.gate_scale;
  const auto trunk = run.input<T>(s.n * gate_h * gate_w * s.c_out, -2, 2);
  const Array<T> y(outputs), gated(trunk.size());
  const Array<char> workspace(conv1x1_workspace(ConvPass::forward, s));
  const Array<unsigned> counters(std::vector<unsigned>(conv1x1_counters(ConvPass::forward, s), 0));
  const TwoPieces pieces(x, s.c_in);
  ran::cuda::Conv1x1Forward args{};
  args.y = y.data();
  if (fused.gate_scale) args.gate = {gated.data(), trunk.data(), gate_h, gate_w, fused.gate_scale};
  if (fused.statistics) args.statistics = {statistics.mean.data(), statistics.var.data(), statistics.running()};
  args.x = s.pieces ? pieces.rows() : x.data();
  if (fused.norm) args.norm = norm.get();
  args.weight = weight.data();
  if (fused.bias) args.bias = bias.data();
  if (fused.residual) args.residual = residual.data();
  args.shape = s;
  args.workspace = workspace.data();
  args.counters = counters.data();
  run.launch(ran::cuda::conv1x1_forward(args, Type<T>::dtype, nullptr));
  run.output("y", y, Match::bits, rounding(10 * s.c_in));
  if (fused.gate_scale) run.output("gated", gated, Match::bits, 2 * Type<T>::ulp);
  const double of_sum = rounding(40) + flips<T>(40, s.rows()) / s.rows();
  if (fused.statistics) statistics.output(run, false, of_sum * 8);
}

template <typename T>
void conv1x1_dgrad(const Run& run, const Conv1x1Shape& s) {
  const auto x = run.input<T>(s.n * s.h * s.w * s.c_in, -2, 2), weight = run.input<T>(s.c_out * s.c_in, -1, 1),
             dy = run.input<T>(s.rows() * s.c_out, -2, 2);
  const Norm norm(run, s.c_in);
  const Array<T> dz(x.size());
  const Array<float> sum_dz(s.c_in), sum_dz_xhat(s.c_in);
  const Array<char> workspace(conv1x1_workspace(ConvPass::dgrad, s));
  const Array<unsigned> counters(std::vector<unsigned>(conv1x1_counters(ConvPass::dgrad, s), 0));
  const TwoPieces pieces(x, s.c_in);
  const ran::cuda::Conv1x1Dgrad args{dz.data(),
                                     sum_dz.data(),
                                     sum_dz_xhat.data(),
                                     dy.data(),
                                     s.pieces ? pieces.rows() : x.data(),
                                     norm.get(),
                                     weight.data(),
                                     s,
                                     workspace.data(),
                                     counters.data()};
  run.launch(ran::cuda::conv1x1_dgrad(args, Type<T>::dtype, nullptr));
  run.output("dz", dz, Match::bits, rounding(2 * s.c_out));
  run.output("sum_dz", sum_dz, Match::bits, flips<T>(20, s.rows()));
  run.output("sum_dz_xhat", sum_dz_xhat, Match::bits, flips<T>(80, s.rows()));
}

template <typename T>
void conv1x1_wgrad(const Run& run, const Conv1x1Shape& s) {
  const auto x = run.input<T>(s.n * s.h * s.w * s.c_in, -2, 2), dy = run.input<T>(s.rows() * s.c_out, -2, 2);
  const Norm norm(run, s.c_in);
  const Array<T> dweight(s.c_out * s.c_in), dbias(s.c_out);
  const Array<char> workspace(conv1x1_workspace(ConvPass::wgrad, s));
  const TwoPieces pieces(x, s.c_in);
  const ran::cuda::Conv1x1Wgrad args{
      dweight.data(), dbias.data(), dy.data(), s.pieces ? pieces.rows() : x.data(), norm.get(), s, workspace.data()};
  run.launch(ran::cuda::conv1x1_wgrad(args, Type<T>::dtype, nullptr));
  run.output("dweight", dweight, Match::bits, rounding(20 * s.rows()));
  run.output("dbias", dbias, Match::bits, rounding(2 * s.rows()));
}

}  // namespace compare
