// Holds every kernel of csrc/cpu, of one instruction set, to a reference in double at random small shapes. No torch: it
// is cross-compiled for processors that are not at hand, too.
//
//   driver [CASES [SEED]]
#include <algorithm>
#include <array>
#include <memory>
#include <vector>

#include "../../csrc/cpu/kernels.h"
#include "../../csrc/cpu/parallel.h"
#include "reference.h"

namespace ran {

// Three threads, one after the other.
void parallel_for(int64_t begin, int64_t end, int64_t grain, const std::function<void(int64_t, int64_t)>& body) {
  const int64_t part = std::max(std::max<int64_t>(grain, 1), (end - begin + 2) / 3);
  for (int64_t at = begin; at < end; at += part) body(at, std::min(end, at + part));
}
int max_threads() { return 3; }

namespace cpu::RAN_ISA {
extern const Kernels table;
}

}  // namespace ran

namespace kernels {
namespace {

using ran::BatchNorm;
using ran::ChannelView;
using ran::GateShape;
using ran::Rows;
using ran::cpu::Conv3x3;
using ran::cpu::ConvShape;
const ran::cpu::Kernels& table = ran::cpu::RAN_ISA::table;

Judge judge;

// Of a result of many roundings in float (double for float64), and one to the dtype.
double tolerance(DType dtype) { return dtype == DType::f64 ? 1e-13 : 4e-6 + 2 * roundoff(dtype); }
DType acc_of(DType dtype) { return dtype == DType::f64 ? DType::f64 : DType::f32; }

double relu(double z) { return z > 0 ? z : 0; }

// A batch normalisation's vectors of `channels` values.
struct Norm {
  Array mean, var, weight, bias;
  bool affine = integer(0, 3) > 0;
  double eps = 1e-5;

  Norm(DType dtype, int64_t channels)
      : mean(acc_of(dtype), channels, -1, 1),
        var(acc_of(dtype), channels, 0.5, 2),
        weight(acc_of(dtype), channels, -2, 2),
        bias(acc_of(dtype), channels, -1, 1) {}
  BatchNorm<void> args() const {
    return {mean.data(), var.data(), affine ? weight.data() : nullptr, affine ? bias.data() : nullptr, eps};
  }
  double scale(int64_t c) const { return (affine ? weight[c] : 1) / std::sqrt(var[c] + eps); }
  double z(double x, int64_t c) const { return (x - mean[c]) * scale(c) + (affine ? bias[c] : 0); }
  double xhat(double x, int64_t c) const { return (x - mean[c]) / std::sqrt(var[c] + eps); }
};

// ---- attention gate, up-sampling, pooling

struct Planes {
  GateShape s;
  int64_t at(int64_t n, int64_t c, int64_t y, int64_t x, bool low) const {
    const int64_t h = low ? s.mask_h() : s.h, w = low ? s.mask_w() : s.w;
    return s.channels_last ? ((n * h + y) * w + x) * s.c + c : ((n * s.c + c) * h + y) * w + x;
  }
  int64_t low_count() const { return s.n * s.c * s.mask_h() * s.mask_w(); }
  template <typename Body>
  void each(Body&& body) const {  // body(index, index of the low resolution, place in its window)
    for (int64_t n = 0; n < s.n; ++n)
      for (int64_t c = 0; c < s.c; ++c)
        for (int64_t y = 0; y < s.h; ++y)
          for (int64_t x = 0; x < s.w; ++x)
            body(at(n, c, y, x, false), at(n, c, y / s.scale, x / s.scale, true), y % s.scale * s.scale + x % s.scale);
  }
};

GateShape random_planes(int64_t scale) {
  return {integer(1, 3), integer(1, 40), integer(1, 9), integer(1, 9), scale, integer(0, 1) == 1};
}

void check_gate(DType dtype) {
  judge.kernel = std::string("attention_gate ") + name_of(dtype);
  const Planes p{random_planes(integer(1, 3))};
  const Array trunk(dtype, p.s.numel(), -2, 2), mask(dtype, p.low_count(), -4, 4), dout(dtype, p.s.numel(), -1, 1);
  const Array out(dtype, p.s.numel()), dtrunk(dtype, p.s.numel()), dmask(dtype, p.low_count());
  table.attention_gate_forward(out.data(), trunk.data(), mask.data(), dtype, p.s);
  table.attention_gate_backward(dtrunk.data(), dmask.data(), dout.data(), trunk.data(), mask.data(), dtype, p.s);
  Doubles want(out.count()), want_dtrunk(out.count()), want_dmask(dmask.count());
  p.each([&](int64_t i, int64_t low, int64_t) {
    const double s = 1 / (1 + std::exp(-mask[low]));
    want[i] = (1 + s) * trunk[i];
    want_dtrunk[i] = (1 + s) * dout[i];
    want_dmask[low] += dout[i] * trunk[i] * s * (1 - s);
  });
  const double short_exp = dtype == DType::bf16 || dtype == DType::f16 ? 0x1p-12 : 0;  // sigmoid.h, exp2_short
  judge.near("out", out, want, tolerance(dtype) + short_exp);
  judge.near("dtrunk", dtrunk, want_dtrunk, tolerance(dtype) + short_exp);
  judge.near("dmask", dmask, want_dmask, tolerance(dtype) + 4 * short_exp);
}

// A high coordinate's place between the low ones, as torch's interpolate(align_corners=False) defines it.
struct Between {
  int64_t low[2];
  double weight[2];
  Between(int64_t x, int64_t high, int64_t low_size) {
    const double place = std::max(0.0, (double(x) + 0.5) * double(low_size) / double(high) - 0.5);
    low[0] = std::min(int64_t(place), low_size - 1);
    low[1] = std::min(low[0] + 1, low_size - 1);
    weight[1] = place - double(low[0]);
    weight[0] = 1 - weight[1];
  }
};

void check_bilinear_gate(DType dtype) {
  judge.kernel = std::string("attention_gate_bilinear ") + name_of(dtype);
  // Large enough for more than one thread, whose part may begin between two rows of the mask.
  const Planes p{{integer(1, 2), integer(1, 20), integer(1, 40), integer(1, 40), integer(2, 5), integer(0, 1) == 1}};
  const Array trunk(dtype, p.s.numel(), -2, 2), mask(dtype, p.low_count(), -4, 4), dout(dtype, p.s.numel(), -1, 1);
  const Array out(dtype, p.s.numel()), dtrunk(dtype, p.s.numel()), dmask(dtype, p.low_count());
  table.attention_gate_bilinear_forward(out.data(), trunk.data(), mask.data(), dtype, p.s);
  table.attention_gate_bilinear_backward(dtrunk.data(), dmask.data(), dout.data(), trunk.data(), mask.data(), dtype,
                                         p.s);
  Doubles want(out.count()), want_dtrunk(out.count()), want_dmask(dmask.count());
  for (int64_t n = 0; n < p.s.n; ++n)
    for (int64_t c = 0; c < p.s.c; ++c)
      for (int64_t y = 0; y < p.s.h; ++y)
        for (int64_t x = 0; x < p.s.w; ++x) {
          const Between v(y, p.s.h, p.s.mask_h()), u(x, p.s.w, p.s.mask_w());
          const auto each = [&](auto&& body) {
            for (int k = 0; k < 4; ++k)
              body(p.at(n, c, v.low[k / 2], u.low[k % 2], true), v.weight[k / 2] * u.weight[k % 2]);
          };
          double m = 0;
          each([&](int64_t low, double weight) { m += weight * mask[low]; });
          const int64_t i = p.at(n, c, y, x, false);
          const double s = 1 / (1 + std::exp(-m));
          want[i] = (1 + s) * trunk[i];
          want_dtrunk[i] = (1 + s) * dout[i];
          each([&](int64_t low, double weight) { want_dmask[low] += weight * dout[i] * trunk[i] * s * (1 - s); });
        }
  const double short_exp = dtype == DType::bf16 || dtype == DType::f16 ? 0x1p-12 : 0;  // sigmoid.h, exp2_short
  judge.near("out", out, want, tolerance(dtype) + short_exp);
  judge.near("dtrunk", dtrunk, want_dtrunk, tolerance(dtype) + short_exp);
  judge.near("dmask", dmask, want_dmask, 10 * (tolerance(dtype) + short_exp));  // of sums that may cancel
}

void check_pyramid(DType dtype) {
  judge.kernel = std::string("upsample_add ") + name_of(dtype);
  const Planes p{random_planes(2)};
  const Array lower(dtype, p.low_count(), -2, 2), skip(dtype, p.s.numel(), -2, 2), out(dtype, p.s.numel());
  const Array dlower(dtype, p.low_count());
  const bool skips = integer(0, 1) == 1;
  table.upsample_add_forward(out.data(), lower.data(), skips ? skip.data() : nullptr, dtype, p.s);
  table.upsample_add_backward(dlower.data(), skip.data(), dtype, p.s);
  Doubles want(out.count()), want_dlower(dlower.count());
  p.each([&](int64_t i, int64_t low, int64_t) {
    want[i] = lower[low] + (skips ? skip[i] : 0);
    want_dlower[low] += skip[i];
  });
  judge.near("out", out, want, tolerance(dtype));
  judge.near("dlower", dlower, want_dlower, tolerance(dtype));

  judge.kernel = std::string("max_pool ") + name_of(dtype);
  const Array pooled(dtype, p.low_count()), dx(dtype, p.s.numel());
  std::vector<uint8_t> index(size_t(p.low_count()));
  table.max_pool_forward(pooled.data(), index.data(), skip.data(), dtype, p.s);
  table.max_pool_backward(dx.data(), lower.data(), index.data(), dtype, p.s);
  Doubles want_pooled(pooled.count(), -1e300), want_dx(dx.count());
  std::vector<int64_t> want_index(index.size());
  p.each([&](int64_t i, int64_t low, int64_t place) {
    if (skip[i] > want_pooled[low]) want_pooled[low] = skip[i], want_index[low] = place;
  });
  p.each([&](int64_t i, int64_t low, int64_t place) { want_dx[i] = place == want_index[low] ? lower[low] : 0; });
  judge.near("out", pooled, want_pooled, 0);
  judge.near("dx", dx, want_dx, 0);
  for (size_t i = 0; i < index.size(); ++i) judge.equal("index", index[i], want_index[i]);
}

// ---- batch normalisation

double cdf(double z) { return 0.5 * std::erfc(-z / std::sqrt(2.0)); }

double activated(ran::Activation act, double z) {
  switch (act.kind) {
    case ran::Activation::relu:
      return relu(z);
    case ran::Activation::leaky_relu:
      return z > 0 ? z : z * act.a;
    case ran::Activation::hardtanh:
      return std::min(std::max(z, act.a), act.b);
    case ran::Activation::hardswish:
      return z * std::min(std::max(z + 3, 0.0), 6.0) / 6;
    case ran::Activation::silu:
      return z / (1 + std::exp(-z));
    case ran::Activation::gelu:
      return z * cdf(z);
    case ran::Activation::gelu_tanh:
      return 0.5 * z * (1 + std::tanh(std::sqrt(2 / M_PI) * (z + 0.044715 * z * z * z)));
    default:
      return z;
  }
}

double slope(ran::Activation act, double z) {
  const double s = 1 / (1 + std::exp(-z)), t = std::tanh(std::sqrt(2 / M_PI) * (z + 0.044715 * z * z * z));
  switch (act.kind) {
    case ran::Activation::relu:
      return z > 0;
    case ran::Activation::leaky_relu:
      return z > 0 ? 1 : act.a;
    case ran::Activation::hardtanh:
      return z > act.a && z < act.b;
    case ran::Activation::hardswish:
      return z <= -3 ? 0 : z >= 3 ? 1 : z / 3 + 0.5;
    case ran::Activation::silu:
      return s * (1 + z * (1 - s));
    case ran::Activation::gelu:
      return cdf(z) + z * std::exp(-z * z / 2) / std::sqrt(2 * M_PI);
    case ran::Activation::gelu_tanh:
      return 0.5 * (1 + t) + 0.5 * z * (1 - t * t) * std::sqrt(2 / M_PI) * (1 + 3 * 0.044715 * z * z);
    default:
      return 1;
  }
}

void check_bn_act(DType dtype) {
  const bool rows = integer(0, 1) == 1;
  const ChannelView v{integer(1, rows ? 300 : 4), integer(1, 70), rows ? 1 : integer(1, 200)};
  const Array x(dtype, v.numel(), -4, 4), dout(dtype, v.numel(), -1, 2);
  const ran::Activation act{ran::Activation::Kind(integer(0, 7)), 0.2, 1.1};
  judge.kernel = "bn_act " + std::to_string(act.kind) + " " + name_of(dtype);
  const Norm norm(dtype, v.channels);
  const DType acc = acc_of(dtype);
  const Array out(dtype, v.numel()), dx(dtype, v.numel()), sum_dz(acc, v.channels), sum_dz_xhat(acc, v.channels);
  const bool batch = integer(0, 1) == 1;
  table.bn_act_forward(out.data(), x.data(), dtype, v, norm.args(), act);
  const bool keeps = act.is_smooth() && integer(0, 1) == 1;
  table.bn_act_backward_reduce(keeps ? dx.data() : nullptr, sum_dz.data(), sum_dz_xhat.data(), dout.data(), x.data(),
                               dtype, v, norm.args(), act);
  table.bn_act_backward_apply(dx.data(), keeps ? dx.data() : dout.data(), x.data(), batch ? sum_dz.data() : nullptr,
                              batch ? sum_dz_xhat.data() : nullptr, double(v.count()), dtype, v, norm.args(),
                              keeps ? ran::Activation{ran::Activation::none, 0, 0} : act);
  Doubles want(v.numel()), want_dx(v.numel()), want_dz(v.channels), want_dz_xhat(v.channels);
  const auto channel = [&](int64_t i) { return i / v.inner % v.channels; };
  for (int64_t i = 0; i < v.numel(); ++i) {
    const int64_t c = channel(i);
    const double z = norm.z(x[i], c), dz = dout[i] * slope(act, z);
    want[i] = activated(act, z);
    want_dz[c] += dz;
    want_dz_xhat[c] += dz * norm.xhat(x[i], c);
  }
  for (int64_t i = 0; i < v.numel(); ++i) {
    const int64_t c = channel(i);
    double dz = dout[i] * slope(act, norm.z(x[i], c));
    if (batch) dz -= (sum_dz[c] + norm.xhat(x[i], c) * sum_dz_xhat[c]) / double(v.count());
    want_dx[i] = norm.scale(c) * dz;
  }
  judge.near("out", out, want, tolerance(dtype));
  judge.near("dx", dx, want_dx, tolerance(dtype));
  judge.near("sum_dz", sum_dz, want_dz, dtype == DType::f64 ? 1e-12 : 1e-5);
  judge.near("sum_dz_xhat", sum_dz_xhat, want_dz_xhat, dtype == DType::f64 ? 1e-12 : 1e-5);
}

void check_bn_relu(DType dtype) {
  judge.kernel = std::string("bn_relu ") + name_of(dtype);
  const bool rows = integer(0, 1) == 1;
  const ChannelView v{integer(1, rows ? 300 : 4), integer(1, 70), rows ? 1 : integer(1, 200)};
  const double shift = integer(0, 2) * 30.0;
  const Array x(dtype, v.numel(), shift - 2, shift + 2), dout(dtype, v.numel(), -1, 2),
      residual(dtype, v.numel(), -1, 1);
  const auto channel = [&](int64_t i) { return i / v.inner % v.channels; };
  const DType acc = acc_of(dtype);
  const Array mean(acc, v.channels), var(acc, v.channels);
  Doubles exact(size_t(2 * v.channels)), want_mean(v.channels), want_var(v.channels);
  table.batch_norm_stats(mean.data(), var.data(), exact.data(), x.data(), dtype, v);
  for (int64_t i = 0; i < v.numel(); ++i) want_mean[channel(i)] += x[i] / double(v.count());
  for (int64_t i = 0; i < v.numel(); ++i)
    want_var[channel(i)] += std::pow(x[i] - want_mean[channel(i)], 2) / double(v.count());
  judge.near("mean", mean, want_mean, acc == DType::f64 ? 1e-14 : 1e-7);
  judge.near("var", var, want_var, acc == DType::f64 ? 1e-12 : 1e-6);
  for (int64_t c = 0; c < v.channels; ++c)  // the same before rounding
    judge.equal("exact", std::fabs(exact[c] - want_mean[c]) <= 1e-9 * (1 + shift), 1);

  Norm norm(dtype, v.channels);
  for (int64_t c = 0; c < v.channels; ++c) norm.mean.set(c, shift + uniform(-1, 1));
  const Array out(dtype, v.numel()), dx(dtype, v.numel()), sum_dz(acc, v.channels), sum_dz_xhat(acc, v.channels);
  const bool batch = integer(0, 1) == 1, adds = integer(0, 1) == 1;
  table.bn_relu_forward(out.data(), x.data(), dtype, v, norm.args());
  table.bn_relu_backward_reduce(sum_dz.data(), sum_dz_xhat.data(), dout.data(), x.data(), dtype, v, norm.args());
  table.bn_relu_backward_apply(dx.data(), dout.data(), x.data(), adds ? residual.data() : nullptr,
                               batch ? sum_dz.data() : nullptr, batch ? sum_dz_xhat.data() : nullptr, double(v.count()),
                               dtype, v, norm.args());
  Doubles want(v.numel()), want_dx(v.numel()), want_dz(v.channels), want_dz_xhat(v.channels), size(v.channels);
  for (int64_t i = 0; i < v.numel(); ++i) {
    const int64_t c = channel(i);
    want[i] = relu(norm.z(x[i], c));
    const double dz = norm.z(x[i], c) > 0 ? dout[i] : 0;
    want_dz[c] += dz;
    want_dz_xhat[c] += dz * norm.xhat(x[i], c);
  }
  for (int64_t i = 0; i < v.numel(); ++i) {
    const int64_t c = channel(i);
    double dz = norm.z(x[i], c) > 0 ? dout[i] : 0;
    if (batch) dz -= (want_dz[c] + norm.xhat(x[i], c) * want_dz_xhat[c]) / double(v.count());
    want_dx[i] = norm.scale(c) * dz + (adds ? residual[i] : 0);
  }
  const double far = acc == DType::f64 ? 1e-12 : 1e-5 * (1 + shift);  // z of x far from 0
  judge.near("out", out, want, tolerance(dtype) + far);
  judge.near("sum_dz", sum_dz, want_dz, far);
  judge.near("sum_dz_xhat", sum_dz_xhat, want_dz_xhat, far);
  judge.near("dx", dx, want_dx, tolerance(dtype) + far);
}

// ---- convolutions

struct Conv {
  ConvShape s;
  DType dtype;
  Norm norm{dtype, s.ci};
  bool normalises = true;
  Array x{dtype, s.n * s.h * s.w * s.ci, -2, 2}, weight{dtype, s.co * s.taps() * s.ci, -1, 1};
  Array dout{dtype, s.pixels() * s.co, -1, 1}, residual{dtype, s.pixels() * s.co, -1, 1};
  Array bias{DType::f32, s.co, -1, 1};

  double activation(int64_t i) const { return normalises ? relu(norm.z(x[i], i % s.ci)) : x[i]; }
  // body(output index, input index, weight index) of every product.
  template <typename Body>
  void each(Body&& body) const {
    for (int64_t n = 0; n < s.n; ++n)
      for (int64_t y = 0; y < s.ho; ++y)
        for (int64_t xo = 0; xo < s.wo; ++xo)
          for (int64_t ky = 0; ky < s.kh; ++ky)
            for (int64_t kx = 0; kx < s.kw; ++kx) {
              const int64_t iy = y * s.stride_h + ky - s.pad_h, ix = xo * s.stride_w + kx - s.pad_w;
              if (iy < 0 || iy >= s.h || ix < 0 || ix >= s.w) continue;
              const int64_t out = ((n * s.ho + y) * s.wo + xo) * s.co, in = ((n * s.h + iy) * s.w + ix) * s.ci;
              for (int64_t o = 0; o < s.co; ++o)
                for (int64_t i = 0; i < s.ci; ++i) body(out + o, in + i, ((o * s.kh + ky) * s.kw + kx) * s.ci + i);
            }
  }
  Doubles outputs(bool adds) const {
    Doubles a(x.count()), out(dout.count());
    const Doubles w = values_of(weight);
    for (int64_t i = 0; i < x.count(); ++i) a[i] = activation(i);
    each([&](int64_t o, int64_t i, int64_t k) { out[o] += a[i] * w[k]; });
    for (size_t o = 0; o < out.size(); ++o) out[o] += bias[int64_t(o) % s.co] + (adds ? residual[int64_t(o)] : 0);
    return out;
  }
  struct Backward {
    Doubles dz, dweight, dbias, sum_dz, sum_dz_xhat;
  };
  Backward gradients() const {
    Backward g{Doubles(x.count()), Doubles(weight.count()), Doubles(s.co), Doubles(s.ci), Doubles(s.ci)};
    const Doubles w = values_of(weight), d = values_of(dout);
    Doubles a(x.count());
    for (int64_t i = 0; i < x.count(); ++i) a[i] = activation(i);
    each([&](int64_t o, int64_t i, int64_t k) { g.dz[i] += d[o] * w[k], g.dweight[k] += d[o] * a[i]; });
    for (size_t o = 0; o < d.size(); ++o) g.dbias[o % size_t(s.co)] += d[o];
    for (int64_t i = 0; normalises && i < x.count(); ++i) {
      if (norm.z(x[i], i % s.ci) <= 0) g.dz[i] = 0;
      g.sum_dz[i % s.ci] += g.dz[i];
      g.sum_dz_xhat[i % s.ci] += g.dz[i] * norm.xhat(x[i], i % s.ci);
    }
    return g;
  }
};

// 16-bit operands are rounded once more on the way.
double conv_tolerance(DType dtype, double of_float) {
  return of_float + 4 * (dtype == DType::f32 ? 0 : roundoff(dtype));
}

void check_statistics(const Conv& c, const Array& out, const Array& mean, const Array& var) {
  Doubles want_mean(c.s.co), want_var(c.s.co);
  for (int64_t i = 0; i < out.count(); ++i) want_mean[i % c.s.co] += out[i] / double(c.s.pixels());
  for (int64_t i = 0; i < out.count(); ++i)
    want_var[i % c.s.co] += std::pow(out[i] - want_mean[i % c.s.co], 2) / double(c.s.pixels());
  judge.near("out_mean", mean, want_mean, 1e-5 + 4 * (c.dtype == DType::f32 ? 0 : roundoff(c.dtype)));
  judge.near("out_var", var, want_var, 1e-5 + 4 * (c.dtype == DType::f32 ? 0 : roundoff(c.dtype)));
}

// The rows of a tensor in three pieces.
class InPieces {
 public:
  InPieces(const Array& x, int64_t channels) {
    const int64_t rows = x.count() / channels, first = integer(1, channels - 2),
                  second = integer(1, channels - first - 1);
    int64_t begin = 0;
    for (const int64_t size : {first, second, channels - first - second}) {
      pieces_.push_back(std::make_unique<Array>(x.dtype(), rows * size));
      for (int64_t i = 0; i < rows * size; ++i) pieces_.back()->set(i, x[i / size * channels + begin + i % size]);
      parts_.push_back({pieces_.back()->data(), size});
      begin += size;
    }
  }
  Rows rows() const { return {parts_.data(), int64_t(parts_.size())}; }

 private:
  std::vector<std::unique_ptr<Array>> pieces_;
  std::vector<Rows::Piece> parts_;
};

void check_products(DType dtype) {
  judge.kernel = std::string("conv1x1 ") + name_of(dtype);
  const int64_t n = integer(1, 3), h = integer(1, 7), w = integer(1, 7), ci = integer(16, 70), co = integer(16, 70);
  const Conv c{{n, h, w, ci, h, w, co, 1, 1, 1, 1, 0, 0}, dtype};
  if (!table.conv_supported(dtype, c.s)) return;
  const Array out(dtype, c.dout.count()), mean(DType::f32, co), var(DType::f32, co);
  const bool adds = integer(0, 1) == 1;
  const InPieces pieces(c.x, ci);
  const Rows x = integer(0, 1) ? pieces.rows() : Rows(c.x.data());
  table.conv1x1_forward(out.data(), mean.as<float>(), var.as<float>(), nullptr, x, c.weight.data(), c.bias.as<float>(),
                        adds ? c.residual.data() : nullptr, dtype, c.s, c.norm.args());
  judge.near("out", out, c.outputs(adds), conv_tolerance(dtype, 2e-6));
  check_statistics(c, out, mean, var);
  const Conv::Backward g = c.gradients();
  const Array dz(dtype, c.x.count()), sum_dz(DType::f32, ci), sum_dz_xhat(DType::f32, ci);
  table.conv1x1_data_gradient(dz.data(), sum_dz.as<float>(), sum_dz_xhat.as<float>(), c.dout.data(), x, c.weight.data(),
                              dtype, c.s, c.norm.args());
  judge.near("dz", dz, g.dz, conv_tolerance(dtype, 2e-6));
  judge.near("sum_dz", sum_dz, g.sum_dz, conv_tolerance(dtype, 1e-5));
  judge.near("sum_dz_xhat", sum_dz_xhat, g.sum_dz_xhat, conv_tolerance(dtype, 1e-5));
  const Array dweight(dtype, c.weight.count()), dbias(DType::f32, co);
  const BatchNorm<void> norm = c.norm.args();
  table.conv_weight_gradient(dweight.data(), dbias.as<float>(), c.dout.data(), x, dtype, c.s, &norm);
  judge.near("dweight", dweight, g.dweight, conv_tolerance(dtype, 2e-6));
  judge.near("dbias", dbias, g.dbias, 1e-5);
  const Array whole(dtype, c.x.count()), of_pieces(dtype, c.x.count());
  for (const Array* dx : {&whole, &of_pieces})
    table.bn_relu_backward_apply(dx->data(), dz.data(), dx == &whole ? Rows(c.x.data()) : pieces.rows(), nullptr,
                                 sum_dz.data(), sum_dz_xhat.data(), double(c.s.pixels()), dtype, {c.s.pixels(), ci, 1},
                                 norm);
  judge.near("dx of pieces", of_pieces, values_of(whole), 0);
}

// The weight gradient of any kernel size, stride and padding, of x itself.
void check_weight_gradient(DType dtype) {
  judge.kernel = std::string("conv_weight_gradient ") + name_of(dtype);
  const int64_t k = integer(1, 3), stride = integer(1, 2), pad = integer(0, k / 2), h = integer(k, 9),
                w = integer(k, 9);
  const int64_t ho = (h + 2 * pad - k) / stride + 1, wo = (w + 2 * pad - k) / stride + 1;
  Conv c{{integer(1, 3), h, w, integer(16, 50), ho, wo, integer(16, 50), k, k, stride, stride, pad, pad}, dtype};
  if (!table.conv_supported(dtype, c.s)) return;
  c.normalises = false;
  const Array dweight(dtype, c.weight.count());
  table.conv_weight_gradient(dweight.data(), nullptr, c.dout.data(), c.x.data(), dtype, c.s, nullptr);
  judge.near("dweight", dweight, c.gradients().dweight, conv_tolerance(dtype, 2e-6));
}

void check_winograd(DType dtype, Conv3x3 tile) {
  judge.kernel =
      (tile == Conv3x3::f4x4 ? "Winograd F(4x4, 3x3) " : "Winograd F(2x2, 3x3) ") + std::string(name_of(dtype));
  const int64_t n = integer(1, 3), h = integer(1, 11), w = integer(1, 11);
  const int64_t most = integer(0, 3) ? 50 : 16, ci = integer(16, most),
                co = integer(16, most);  // 16: fewest of a block
  Conv c{{n, h, w, ci, h, w, co, 3, 3, 1, 1, 1, 1}, dtype};
  if (!table.conv3x3_supported(dtype, c.s)) return;
  c.normalises = integer(0, 2) > 0;
  const BatchNorm<void> norm = c.norm.args();
  const BatchNorm<void>* const bn = c.normalises ? &norm : nullptr;
  const Array out(dtype, c.dout.count()), mean(DType::f32, co), var(DType::f32, co);
  const bool adds = c.normalises && integer(0, 1) == 1, packed = integer(0, 1) == 1;
  const Array panels(DType::f32, table.conv3x3_panels_size(tile, c.s));
  table.conv3x3_pack(tile, panels.as<float>(), c.weight.data(), dtype, c.s);
  table.conv3x3_forward(tile, out.data(), c.normalises ? mean.as<float>() : nullptr,
                        c.normalises ? var.as<float>() : nullptr, c.x.data(), packed ? nullptr : c.weight.data(),
                        packed ? panels.as<float>() : nullptr, c.bias.as<float>(), adds ? c.residual.data() : nullptr,
                        false, dtype, c.s, bn);
  judge.near("out", out, c.outputs(adds), conv_tolerance(dtype, 5e-6));
  if (c.normalises) check_statistics(c, out, mean, var);
  const Conv::Backward g = c.gradients();
  const Array dz(dtype, c.x.count()), sum_dz(DType::f32, ci), sum_dz_xhat(DType::f32, ci);
  table.conv3x3_data_gradient(tile, dz.data(), bn ? sum_dz.as<float>() : nullptr,
                              bn ? sum_dz_xhat.as<float>() : nullptr, c.dout.data(), bn ? c.x.data() : nullptr,
                              c.weight.data(), dtype, c.s, bn);
  judge.near("dz", dz, g.dz, conv_tolerance(dtype, 5e-6));
  if (bn) {
    judge.near("sum_dz", sum_dz, g.sum_dz, conv_tolerance(dtype, 1e-5));
    judge.near("sum_dz_xhat", sum_dz_xhat, g.sum_dz_xhat, conv_tolerance(dtype, 1e-5));
  }
  const Array dweight(dtype, c.weight.count()), dbias(DType::f32, co);
  table.conv3x3_weight_gradient(tile, dweight.data(), dbias.as<float>(), c.dout.data(), c.x.data(), dtype, c.s, bn);
  judge.near("dweight", dweight, g.dweight, conv_tolerance(dtype, 5e-6));
  judge.near("dbias", dbias, g.dbias, 1e-5);
}

}  // namespace
}  // namespace kernels

int main(int argc, char** argv) {
  using namespace kernels;
  const int cases = argc > 1 ? std::atoi(argv[1]) : 20;
  generator().seed(argc > 2 ? std::atoi(argv[2]) : 0);
  judge.isa = table.name;
  for (int i = 0; i < cases; ++i)
    for (const DType dtype : {DType::f32, DType::f64, DType::bf16, DType::f16}) {
      check_gate(dtype);
      check_bilinear_gate(dtype);
      check_pyramid(dtype);
      check_bn_relu(dtype);
      check_bn_act(dtype);
      check_products(dtype);
      check_weight_gradient(dtype);
      check_winograd(dtype, Conv3x3::f4x4);
      check_winograd(dtype, Conv3x3::f2x2);
    }
  std::printf("%s: %lld results as they must be\n", table.name, static_cast<long long>(judge.compared));
}
