// The cases of compare_gpu.cpp that are no convolutions: gate, up-sampling, pooling, BN-ReLU.
#pragma once

#include "compare_norm.h"
#include "compare_pieces.h"

namespace compare {

template <typename T>
void gate(const Run& run, const ran::GateShape& s) {
  const size_t low = s.n * s.c * s.mask_h() * s.mask_w();
  const auto trunk = run.input<T>(s.numel(), -4, 4), dout = run.input<T>(s.numel(), -4, 4);
  // Sigmoids of exactly 0, 1/2 and 1.
  const auto mask = run.input<T>(low, -1, 1, run.whole ? 200 : 6);
  const Array<T> out(s.numel()), dtrunk(s.numel()), dmask(low);
  run.launch(ran::cuda::attention_gate_forward(out.data(), trunk.data(), mask.data(), Type<T>::dtype, s, nullptr));
  run.launch(ran::cuda::attention_gate_backward(dtrunk.data(), dmask.data(), dout.data(), trunk.data(), mask.data(),
                                                Type<T>::dtype, s, nullptr));
  run.output("out", out, Match::bits, rounding(8));
  run.output("dtrunk", dtrunk, Match::bits, rounding(8));
  run.output("dmask", dmask, Match::bits, rounding(16 * s.scale * s.scale));
}

template <typename T>
void bilinear_gate(const Run& run, const ran::GateShape& s) {
  const size_t low = s.n * s.c * s.mask_h() * s.mask_w();
  const auto trunk = run.input<T>(s.numel(), -4, 4), dout = run.input<T>(s.numel(), -4, 4),
             mask = run.input<T>(low, -6, 6);
  const Array<T> out(s.numel()), dtrunk(s.numel()), dmask(low);
  const auto dtype = Type<T>::dtype;
  run.launch(ran::cuda::attention_gate_bilinear_forward(out.data(), trunk.data(), mask.data(), dtype, s, nullptr));
  run.launch(ran::cuda::attention_gate_bilinear_backward(dtrunk.data(), dmask.data(), dout.data(), trunk.data(),
                                                         mask.data(), dtype, s, nullptr));
  run.output("out", out, Match::rounding, rounding(8));
  run.output("dtrunk", dtrunk, Match::rounding, rounding(8));
  run.output("dmask", dmask, Match::rounding, rounding(64 * s.scale * s.scale));
}

template <typename T>
void pyramid(const Run& run, const ran::GateShape& s) {
  const size_t low = s.n * s.c * s.mask_h() * s.mask_w();
  const auto lower = run.input<T>(low, -4, 4), high = run.input<T>(s.numel(), -4, 4);
  const Array<T> out(s.numel()), dlower(low), pooled(low), dx(s.numel());
  const Array<uint8_t> index(low);
  const auto dtype = Type<T>::dtype;
  run.launch(ran::cuda::upsample_add_forward(out.data(), lower.data(), high.data(), dtype, s, nullptr));
  run.launch(ran::cuda::upsample_add_backward(dlower.data(), high.data(), dtype, s, nullptr));
  run.launch(ran::cuda::max_pool_forward(pooled.data(), index.data(), high.data(), dtype, s, nullptr));
  run.launch(ran::cuda::max_pool_backward(dx.data(), lower.data(), index.data(), dtype, s, nullptr));
  run.output("up_sampled", out, Match::bits, rounding(8));
  run.output("dlower", dlower, Match::bits, rounding(16));
  run.output("pooled", pooled, Match::bits, 0);
  run.output("index", index, Match::bits, 0);
  run.output("dx", dx, Match::bits, 0);
}

template <typename T>
void output_gradients(const Run& run, const ran::ChannelView& view, const Array<T>& dx, const Array<float>& sum_dz,
                      const Array<float>& sum_dz_xhat) {
  run.output("dx", dx, Match::bits, rounding(40));
  run.output("sum_dz", sum_dz, Match::bits, rounding(4 * view.count()));
  run.output("sum_dz_xhat", sum_dz_xhat, Match::bits, rounding(16 * view.count()));
}

template <typename T>
void streaming(const Run& run, const ran::ChannelView& view) {
  const auto x = run.input<T>(view.numel(), -4, 4), dout = run.input<T>(view.numel(), -4, 4),
             residual = run.input<T>(view.numel(), -4, 4);
  const Norm norm(run, view.channels);
  const Statistics statistics(view.channels);
  const Array<T> out(view.numel()), dx(view.numel());
  const Array<float> sum_dz(view.channels), sum_dz_xhat(view.channels);
  const Array<char> workspace(ran::cuda::bn_relu_workspace_bytes(view));
  const Array<unsigned> counters(std::vector<unsigned>(ran::cuda::bn_relu_counters(view), 0));
  const auto dtype = Type<T>::dtype;
  run.launch(ran::cuda::bn_relu_statistics(statistics.mean.data(), statistics.var.data(), x.data(), dtype, view,
                                           statistics.running(), workspace.data(), counters.data(), nullptr));
  run.launch(ran::cuda::bn_relu_forward(out.data(), x.data(), dtype, view, norm.get(), nullptr));
  run.launch(ran::cuda::bn_relu_backward_reduce(sum_dz.data(), sum_dz_xhat.data(), dout.data(), x.data(), dtype, view,
                                                norm.get(), workspace.data(), counters.data(), nullptr));
  run.launch(ran::cuda::bn_relu_backward_apply(dx.data(), dout.data(), x.data(), sum_dz.data(), sum_dz_xhat.data(),
                                               residual.data(), view.count(), dtype, view, norm.get(), nullptr));
  if (view.inner == 1 && sizeof(T) == 2 && view.channels % 8 == 0 && view.channels > 8) {
    const TwoPieces pieces(x, view.channels);
    const Array<T> dx_of_pieces(view.numel());
    run.launch(ran::cuda::bn_relu_backward_apply(dx_of_pieces.data(), dout.data(), pieces.rows(), sum_dz.data(),
                                                 sum_dz_xhat.data(), nullptr, view.count(), dtype, view, norm.get(),
                                                 nullptr));
    run.output("dx_of_pieces", dx_of_pieces, Match::bits, rounding(80));
  }
  statistics.output(run, view.count() == 32, rounding(8));
  run.output("out", out, Match::bits, rounding(20));
  output_gradients(run, view, dx, sum_dz, sum_dz_xhat);
  if (view.inner != 1) return;
  const auto bias = run.input<T>(view.channels, -4, 4);
  const Array<T> sums(view.channels), sum(view.numel());
  run.launch(
      ran::cuda::channel_sums(sums.data(), dout.data(), dtype, view, workspace.data(), counters.data(), nullptr));
  run.output("channel_sums", sums, Match::bits, rounding(view.count()));
  if (!ran::cuda::add_with_statistics_takes(x.data(), bias.data(), residual.data(), dtype, view)) return;
  run.launch(ran::cuda::add_with_statistics(sum.data(), statistics.mean.data(), statistics.var.data(), x.data(),
                                            bias.data(), residual.data(), dtype, view, statistics.running(),
                                            workspace.data(), counters.data(), nullptr));
  run.output("sum", sum, Match::bits, rounding(4));
  statistics.output(run, view.count() == 32, rounding(8));
}

template <typename T>
void resident(const Run& run, const ran::ChannelView& view, int group, bool clusters, int slab_bytes = 64) {
  const ran::cuda::ResidentPlan plan{group, slab_bytes, clusters};
  const auto x = run.input<T>(view.numel(), -4, 4), dout = run.input<T>(view.numel(), -4, 4),
             residual = run.input<T>(view.numel(), -4, 4);
  const Norm norm(run, view.channels);
  const Statistics statistics(view.channels);
  const Array<T> out(view.numel()), dx(view.numel());
  const Array<float> sum_dz(view.channels), sum_dz_xhat(view.channels);
  const Array<char> workspace(ran::cuda::bn_relu_resident_workspace_bytes(view, Type<T>::dtype, plan));
  const Array<unsigned> counters(std::vector<unsigned>(1, 0));
  run.launch(ran::cuda::bn_relu_resident_forward(
      out.data(), statistics.mean.data(), statistics.var.data(), x.data(), norm.weight.data(), norm.bias.data(),
      Type<T>::dtype, view, norm.eps, statistics.running(), plan, workspace.data(), counters.data(), nullptr));
  run.launch(ran::cuda::bn_relu_resident_backward(dx.data(), sum_dz.data(), sum_dz_xhat.data(), dout.data(), x.data(),
                                                  residual.data(), Type<T>::dtype, view, norm.get(), plan,
                                                  workspace.data(), nullptr));
  const bool exact = group <= 2;
  statistics.output(run, exact, rounding(8));
  run.output("out", out, exact ? Match::bits : Match::rounding, rounding(40));
  output_gradients(run, view, dx, sum_dz, sum_dz_xhat);
}

}  // namespace compare
