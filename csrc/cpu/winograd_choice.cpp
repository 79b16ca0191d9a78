// Which 3x3 convolutions the Winograd kernels may take, and with which tile. Accuracy comes first, and says what is
// allowed: against float64 "fast" is off by at most twice what PyTorch's own is, "strict" by at most 1.2 times, on
// dense inputs (measured for 8 to 512 channels, 1 to 57 pixels and batches of 1 to 64, float32; the tests repeat it).
// Then speed: what is fastest of the allowed, by a rule for shapes that nobody has measured on the machine at hand.
#include "kernels.h"
#include "parallel.h"
#include "winograd_tiles.h"

namespace ran::cpu::RAN_ISA {

namespace {

// Forward and data gradient sum over channels: the more, the more the library rounds, while Winograd's own error, of
// its transforms, stays.
bool channels_suffice(ConvPass pass, const ConvShape& s) {
  const int64_t terms = pass == ConvPass::forward ? s.ci : s.co, pixels = std::min(s.h, s.w);
  // So few values PyTorch may hand to another library, which rounds less.
  if (s.n < 16 && s.n * s.h * s.w * terms <= 20480) return false;
  if (pixels <= 2) return false;  // zeros of the padding cost the library no rounding
  if (pixels <= 4) return terms >= 128;
  return terms >= (pass == ConvPass::forward ? 36 : 28);
}

// Into how many sums oneDNN splits a weight gradient among the threads, where channels are few: each sum is shorter,
// and the result more accurate. Measured with 1 to 8 threads and 16 to 256 channels.
int64_t library_splits(const ConvShape& s) {
  const int64_t blocks = ((s.ci + 15) / 16) * ((s.co + 15) / 16), threads = max_threads();
  return std::max<int64_t>(1, std::min(threads, 4 * threads / blocks));
}

// The weight gradient sums over tiles. Measured against oneDNN's kernels for AVX-512, which are more accurate than
// those for AVX2.
bool tiles_suffice(const ConvShape& s, int64_t tiles) {
  const int64_t splits = library_splits(s);
  return tiles >= 192 * splits || (splits == 1 && tiles >= 128 && s.n >= 32);
}

bool f4x4_is_accurate(ConvPass pass, const ConvShape& s) {
  return pass == ConvPass::wgrad ? tiles_suffice(s, TileGrid<4>(s).count) : channels_suffice(pass, s);
}

bool f2x2_is_accurate(ConvPass pass, const ConvShape& s, bool strict) {
  const int64_t pixels = std::min(s.h, s.w), tiles = TileGrid<2>(s).count;
  if (pass != ConvPass::wgrad) return !strict || pixels > 1;
  const int64_t splits = library_splits(s);
  return pixels > 2 && tiles >= (strict ? std::max<int64_t>(512, 256 * splits) : 32 * splits);
}

// Multiplications, for one channel in and out.
template <int m>
int64_t cost(const ConvShape& s) {
  return TileGrid<m>(s).count * (m + 2) * (m + 2);
}

}  // namespace

bool conv3x3_supported(DType dtype, ConvShape s) {
#if defined(RAN_FMA)
  return dtype != DType::f64 && s.kh == 3 && s.kw == 3 && s.stride_h == 1 && s.stride_w == 1 && s.pad_h == 1 &&
         s.pad_w == 1 && s.pixels() > 0;
#else
  return false;
#endif
}

bool conv3x3_allowed(Conv3x3 tile, ConvPass pass, DType dtype, ConvShape s, bool strict) {
  if (std::min(s.ci, s.co) < 16 || (strict && tile == Conv3x3::f4x4)) return false;
  if (dtype != DType::f32) return true;  // rounded to 16 bits, beside which the transforms' error is nothing
  return tile == Conv3x3::f4x4 ? f4x4_is_accurate(pass, s) : f2x2_is_accurate(pass, s, strict);
}

Conv3x3 conv3x3_choice(ConvPass pass, DType dtype, ConvShape s, bool strict) {
  // With fewer tiles the weight's transform takes longer than the multiplications that it saves.
  const bool f4x4 = TileGrid<4>(s).count >= 4 && conv3x3_allowed(Conv3x3::f4x4, pass, dtype, s, strict);
  const bool fills = std::min(s.ci, s.co) >= 32 || (s.ci % kLanes == 0 && s.co % kLanes == 0);
  const bool f2x2 = TileGrid<2>(s).count >= 16 && fills && conv3x3_allowed(Conv3x3::f2x2, pass, dtype, s, strict);
  if (f4x4 && (!f2x2 || cost<4>(s) < cost<2>(s))) return Conv3x3::f4x4;
  return f2x2 ? Conv3x3::f2x2 : Conv3x3::library;
}

}  // namespace ran::cpu::RAN_ISA
