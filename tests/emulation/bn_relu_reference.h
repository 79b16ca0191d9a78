// BN-ReLU of a ChannelView in double: what the kernels are held to.
#pragma once

#include "check.h"

namespace check {

enum class Inputs { random, whole, far, constant, nan };  // far: |mean| is 1000 standard deviations
constexpr Inputs kAllInputs[] = {Inputs::random, Inputs::whole, Inputs::far, Inputs::constant, Inputs::nan};

template <typename Body>
void for_each_value(const ran::ChannelView& view, Body&& body) {
  for (int64_t o = 0; o < view.outer; ++o)
    for (int64_t c = 0; c < view.channels; ++c)
      for (int64_t i = 0; i < view.inner; ++i) body((o * view.channels + c) * view.inner + i, c);
}

template <typename T>
void fill_activation(const emu::Buffer<T>& x, const ran::ChannelView& view, Inputs inputs) {
  fill(x, -4, 4, inputs == Inputs::whole);
  if (inputs == Inputs::far && std::is_same_v<T, float>)
    for_each_value(view, [&](int64_t i, int64_t c) { x[i] = make<T>(value(x[i]) + 2300.0 * (c % 3 + 1)); });
  if (inputs == Inputs::constant) for_each_value(view, [&](int64_t i, int64_t c) { x[i] = make<T>(c % 61 - 30.0); });
  if (inputs == Inputs::nan && view.numel()) x[view.numel() / 2] = make<T>(NAN);
}

struct Statistics {
  std::vector<double> mean, var;
};

template <typename T>
Statistics statistics_of(const emu::Buffer<T>& x, const ran::ChannelView& view) {
  Statistics s{std::vector<double>(view.channels, 0.0), std::vector<double>(view.channels, 0.0)};
  for_each_value(view, [&](int64_t i, int64_t c) { s.mean[c] += value(x[i]) / view.count(); });
  for_each_value(view, [&](int64_t i, int64_t c) {
    s.var[c] += (value(x[i]) - s.mean[c]) * (value(x[i]) - s.mean[c]) / view.count();
  });
  return s;
}

struct Vectors {  // per channel; weight and bias may be left out
  emu::Buffer<float> mean, var, weight, bias;
  bool affine;
  double eps;

  Vectors(int64_t channels, bool affine, bool whole)
      : mean(channels), var(channels), weight(channels), bias(channels), affine(affine), eps(whole ? 0 : 1e-5) {
    fill(weight, -2, 2, whole);
    fill(bias, -1, 9, whole);
    fill(mean, -1, 1, whole);
    for (int64_t c = 0; c < channels; ++c) var[c] = whole ? 1.0f : 0.5f + (random_bits() % 64) / 32.0f;
  }
  ran::BatchNorm<float> norm() const {
    ran::BatchNorm<float> n{mean.data(), var.data(), affine ? weight.data() : nullptr, affine ? bias.data() : nullptr,
                            0};
    n.eps = static_cast<decltype(n.eps)>(eps);
    return n;
  }
  double w(int64_t c) const { return affine ? weight[c] : 1; }
  double b(int64_t c) const { return affine ? bias[c] : 0; }
};

// The sign of z must be the kernel's own, so z is rounded as csrc/math.h does it.
inline float z_of(const Vectors& v, int64_t c, float x) {
  const auto eps = static_cast<float>(v.eps);
  return ran::normalise(
      x, ran::scale_shift(v.mean[c], v.var[c], static_cast<float>(v.w(c)), static_cast<float>(v.b(c)), eps));
}

template <typename T>
void check_statistics(const ran::ChannelView& view, const emu::Buffer<T>& x, const emu::Buffer<float>& mean,
                      const emu::Buffer<float>& var, Inputs inputs) {
  const Statistics want = statistics_of(x, view);
  for (int64_t c = 0; c < view.channels; ++c) {
    if (inputs == Inputs::constant) {
      expect_equal("mean", mean, c, want.mean[c]);
      expect_equal("var", var, c, 0);
      continue;
    }
    expect_close("mean", mean, c, want.mean[c], 4 + std::fabs(want.mean[c]));
    // An error of the mean counts squared.
    expect_close("var", var, c, want.var[c], want.var[c], 40);
  }
}

template <typename T>
void check_forward(const ran::ChannelView& view, const emu::Buffer<T>& out, const emu::Buffer<T>& x, const Vectors& v,
                   bool whole) {
  for_each_value(view, [&](int64_t i, int64_t c) {
    const double scale = v.w(c) / std::sqrt(v.var[c] + v.eps), z = (value(x[i]) - v.mean[c]) * scale + v.b(c);
    const double want = z > 0 || z != z ? z : 0;
    if (whole)
      expect_equal("out", out, i, want);
    else
      expect_close("out", out, i, want,
                   std::fabs(scale) * (std::fabs(value(x[i])) + std::fabs(v.mean[c])) + std::fabs(v.b(c)));
  });
}

struct Sums {
  std::vector<double> dz, dz_xhat, size, size_xhat;
};

template <typename T>
Sums sums_of(const ran::ChannelView& view, const emu::Buffer<T>& dout, const emu::Buffer<T>& x, const Vectors& v) {
  const std::vector<double> zeros(view.channels, 0.0);
  Sums s{zeros, zeros, zeros, zeros};
  for_each_value(view, [&](int64_t i, int64_t c) {
    const double dz = z_of(v, c, static_cast<float>(value(x[i]))) <= 0 ? 0 : value(dout[i]);
    const double xhat = (value(x[i]) - v.mean[c]) / std::sqrt(v.var[c] + v.eps);
    s.dz[c] += dz;
    s.dz_xhat[c] += dz * xhat;
    s.size[c] += std::fabs(dz);
    s.size_xhat[c] += std::fabs(dz * xhat);
  });
  return s;
}

inline void check_sums(const Sums& want, const emu::Buffer<float>& dz, const emu::Buffer<float>& dz_xhat, bool whole) {
  for (size_t c = 0; c < dz.size(); ++c)
    if (whole) {
      expect_equal("sum_dz", dz, c, want.dz[c]);
      expect_equal("sum_dz_xhat", dz_xhat, c, want.dz_xhat[c]);
    } else {
      expect_close("sum_dz", dz, c, want.dz[c], want.size[c]);
      expect_close("sum_dz_xhat", dz_xhat, c, want.dz_xhat[c], want.size_xhat[c]);
    }
}

// `sums` empty: the statistics were given.
template <typename T>
void check_dx(const ran::ChannelView& view, const emu::Buffer<T>& dx, const emu::Buffer<T>& dout,
              const emu::Buffer<T>& x, const emu::Buffer<T>* residual, const Vectors& v, const Sums* sums) {
  for_each_value(view, [&](int64_t i, int64_t c) {
    const double dz = z_of(v, c, static_cast<float>(value(x[i]))) <= 0 ? 0 : value(dout[i]);
    const double invstd = 1 / std::sqrt(v.var[c] + v.eps), xhat = (value(x[i]) - v.mean[c]) * invstd;
    const double from_mean = sums ? sums->dz[c] / view.count() : 0,
                 from_var = sums ? sums->dz_xhat[c] / view.count() * xhat : 0;
    const double r = residual ? value((*residual)[i]) : 0, want = v.w(c) * invstd * (dz - from_mean - from_var) + r;
    const double size =
        std::fabs(v.w(c) * invstd) *
        (std::fabs(dz) + (sums ? sums->size[c] + sums->size_xhat[c] * std::fabs(xhat) : 0) / view.count());
    expect_close("dx", dx, i, want, size + std::fabs(r));
  });
}

}  // namespace check
