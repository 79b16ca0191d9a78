// Plain data shared by every kernel file and the torch side. No torch here.
#pragma once

#include <cstdint>

namespace ran {

enum class DType : int { f32, f64, bf16, f16 };

// ceil(a / b) of a >= 0 and b >= 1, whatever their size.
constexpr int64_t divide_up(int64_t a, int64_t b) { return a / b + (a % b != 0); }

enum class ConvPass { forward, dgrad, wgrad, gate };  // gate: the forward pass with the attention gate behind it

// A 4-d activation seen as [outer][channels][inner], dense: NCHW is (N, C, H*W), channels_last is (N*H*W, C, 1).
struct ChannelView {
  int64_t outer, channels, inner;
  int64_t count() const { return outer * inner; }  // values a channel
  int64_t numel() const { return outer * channels * inner; }
};

// The rows of a channels_last activation, [pixels][channels]: of one tensor, or of pieces whose channels lie side by
// side.
struct Rows {
  struct Piece {
    const void* data;
    int64_t channels;
  };
  Rows(const void* data = nullptr) : data(data) {}
  Rows(const Piece* pieces, int64_t count) : pieces(pieces), count(count) {}

  const void* data = nullptr;
  const Piece* pieces = nullptr;
  int64_t count = 0;
};

// The attention gate's trunk, dense NCHW or channels_last. The mask, in the same memory format, is
// (n, c, ceil(h / scale), ceil(w / scale)).
struct GateShape {
  int64_t n, c, h, w;
  int64_t scale;
  bool channels_last;
  int64_t mask_h() const { return divide_up(h, scale); }
  int64_t mask_w() const { return divide_up(w, scale); }
  int64_t numel() const { return n * c * h * w; }
};

// What batch normalisation does to a channel: vectors of `channels` values, Acc being float (double where x is double;
// void where the dtype is known at run time only). weight and bias may be null (1 and 0).
template <typename Acc>
struct BatchNorm {
  const Acc* mean;
  const Acc* var;  // biased
  const Acc* weight;
  const Acc* bias;
  double eps;
};

// What follows a batch normalisation: an activation of torch, with what it was given.
struct Activation {
  enum Kind : int { none, relu, leaky_relu, hardtanh, hardswish, silu, gelu, gelu_tanh } kind;
  double a, b;  // of leaky_relu the slope; of hardtanh the bounds

  // Whether its gradient takes an exponential: longer than to write it down and read it again.
  bool is_smooth() const { return kind >= silu; }
};

}  // namespace ran
