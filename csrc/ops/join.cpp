// The pieces of a concatenation side by side, as at::cat: that copies channels_last ones a pixel at a time, by an
// iterator's inner loop of a piece's few channels.
#include <ATen/Parallel.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/set.h>
#include <torch/library.h>

#include <cstring>
#include <vector>

#include "../common/tensors.h"

namespace ran {
namespace {

struct Piece {
  const char* from;
  int64_t bytes, at;  // of a pixel, and where they go in the row
};

// `kUnit` bytes at a time: a call of memcpy takes longer than such a move.
template <int kUnit>
void copy_units(char* to, int64_t row_bytes, const Piece& piece, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row)
    for (int64_t i = 0; i < piece.bytes; i += kUnit)
      std::memcpy(to + row * row_bytes + piece.at + i, piece.from + row * piece.bytes + i, kUnit);
}

void copy_rows(char* to, int64_t row_bytes, const Piece& piece, int64_t begin, int64_t end) {
  constexpr int64_t kLong = 512;
  if (piece.bytes < kLong && piece.bytes % 16 == 0) return copy_units<16>(to, row_bytes, piece, begin, end);
  if (piece.bytes < kLong && piece.bytes % 8 == 0) return copy_units<8>(to, row_bytes, piece, begin, end);
  for (int64_t row = begin; row < end; ++row)
    std::memcpy(to + row * row_bytes + piece.at, piece.from + row * piece.bytes, size_t(piece.bytes));
}

// A channels_last tensor in memory that this thread keeps: joins are short-lived, and the system's fresh pages take
// longer than the copy. Memory that a join is still using, and more than kMost bytes, is new.
Tensor reused(at::IntArrayRef sizes, const at::TensorOptions& options) {
  constexpr size_t kMost = size_t{32} << 20;
  static thread_local c10::Storage kept;
  Tensor out = at::empty({0}, options);
  const int64_t c = sizes[1], h = sizes[2], w = sizes[3];
  const size_t bytes = size_t(sizes[0] * c * h * w) * out.element_size();
  if (bytes > kMost) return at::empty(sizes, options.memory_format(at::MemoryFormat::ChannelsLast));
  if (!kept || kept.use_count() > 1 || kept.nbytes() < bytes)
    kept = at::empty({int64_t(bytes)}, at::TensorOptions(at::kByte)).storage();
  return out.set_(kept, 0, sizes, {c * h * w, 1, c * w, c});
}

Tensor join(at::TensorList pieces) {
  RAN_CHECK_VALUE(!pieces.empty(), "_join", "pieces must not be empty");
  const Tensor& first = pieces[0];
  int64_t channels = 0;
  for (const Tensor& piece : pieces) {
    const bool alike = piece.is_cpu() && piece.dim() == 4 && piece.scalar_type() == first.scalar_type() &&
                       piece.is_contiguous(at::MemoryFormat::ChannelsLast) && piece.size(0) == first.size(0) &&
                       piece.size(2) == first.size(2) && piece.size(3) == first.size(3);
    if (!alike) return at::cat(pieces, 1);
    channels += piece.size(1);
  }
  Tensor out = reused({first.size(0), channels, first.size(2), first.size(3)}, first.options());
  if (out.numel() == 0) return out;
  std::vector<Piece> parts;
  int64_t row_bytes = 0;
  for (const Tensor& piece : pieces) {
    const int64_t bytes = piece.size(1) * int64_t(piece.element_size());
    parts.push_back({static_cast<const char*>(piece.const_data_ptr()), bytes, row_bytes});
    row_bytes += bytes;
  }
  char* const to = static_cast<char*>(out.data_ptr());
  constexpr int64_t kBlock = 32;  // rows that stay in the first-level cache from piece to piece
  const int64_t rows = out.numel() / channels;
  at::parallel_for(0, rows, std::max<int64_t>(kBlock, (int64_t{64} << 10) / row_bytes),
                   [&](int64_t begin, int64_t end) {
                     for (int64_t row = begin; row < end; row += kBlock)
                       for (const Piece& part : parts) copy_rows(to, row_bytes, part, row, std::min(end, row + kBlock));
                   });
  return out;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(ran_ext, m) { m.def("_join(Tensor[] pieces) -> Tensor"); }
TORCH_LIBRARY_IMPL(ran_ext, CompositeExplicitAutograd, m) { m.impl("_join", join); }

}  // namespace ran
