// conv2d(relu(batch_norm(x))) of an x in pieces, as a concatenation along the channels has them. Where the 1x1 kernels
// run, these read the pieces, and x is never written; elsewhere it is, for the time of the call. Below autograd:
// ran_ext/_recomputed.py has the derivative.
#include <ATen/ops/cat.h>
#include <torch/library.h>

#include <vector>

#include "../common/autograd.h"
#include "../conv/bn_relu_conv.h"

namespace ran {
namespace {

class Pieces {
 public:
  explicit Pieces(at::TensorList pieces) : pieces_(pieces) {
    RAN_CHECK_VALUE(!pieces.empty(), kBnReluConv2d, "pieces must not be empty");
    int64_t channels = 0;
    const Tensor& first = pieces[0];
    by_rows_ = (first.is_cpu() || first.is_cuda()) && first.numel() > 0;
    for (const Tensor& piece : pieces) {
      RAN_CHECK_VALUE(piece.dim() == 4 && piece.size(0) == first.size(0) && piece.size(2) == first.size(2) &&
                          piece.size(3) == first.size(3) && piece.scalar_type() == first.scalar_type() &&
                          piece.device() == first.device(),
                      kBnReluConv2d, "pieces must be alike but for their channels, got ", first.sizes(), " and ",
                      piece.sizes());
      by_rows_ = by_rows_ && piece.is_contiguous(at::MemoryFormat::ChannelsLast);
      rows_.push_back({by_rows_ ? piece.const_data_ptr() : nullptr, piece.size(1)});
      channels += piece.size(1);
    }
    sizes_ = {first.size(0), channels, first.size(2), first.size(3)};
  }

  // Whether kernels might read them: then x is sized() and rows(), else joined().
  bool by_rows() const { return by_rows_; }
  Rows rows() const { return {rows_.data(), int64_t(rows_.size())}; }
  // Of x's sizes, without its values.
  Tensor sized() const {
    Tensor x = at::empty({1}, pieces_[0].options());
    x.unsafeGetTensorImpl()->set_sizes_and_strides(sizes_, c10::get_channels_last_strides_2d(sizes_));
    return x;
  }
  Tensor joined() const {
    const Tensor x = at::cat(pieces_, 1);
    // Pieces of one channel may be taken for NCHW.
    return dense_activation(kBnReluConv2d, by_rows_ ? x.contiguous(at::MemoryFormat::ChannelsLast) : x);
  }

 private:
  at::TensorList pieces_;
  std::vector<Rows::Piece> rows_;
  std::vector<int64_t> sizes_;
  bool by_rows_;
};

Tensor forward(at::TensorList pieces_, const Tensor& weight, const OptTensor& bias, const OptTensor& bn_weight,
               const OptTensor& bn_bias, const Tensor& mean, const Tensor& var, double eps, at::IntArrayRef stride,
               at::IntArrayRef padding, int64_t paths) {
  const Pieces pieces(pieces_);
  const Convolution conv{stride, padding, asked_of(kBnReluConv2d, paths)};
  const Tensor x = pieces.by_rows() ? pieces.sized() : pieces.joined();
  check_convolution(kBnReluConv2d, x, weight, conv);
  check_bias(kBnReluConv2d, bias, weight);
  const Rows rows = pieces.rows();
  const bool read = pieces.by_rows() && conv_reads_pieces(ConvPass::forward, x, weight, conv, rows);
  return bn_relu_conv_forward(read || !pieces.by_rows() ? x : pieces.joined(), {bn_weight, bn_bias, mean, var, {}, eps},
                              weight, bias, std::nullopt, conv, {false, {}}, read ? &rows : nullptr)
      .out;
}

// As bn_relu_conv2d_backward.
GradientTensors backward(const Tensor& dout, at::TensorList pieces_, const OptTensor& bn_weight,
                         const OptTensor& bn_bias, const Tensor& mean, const Tensor& var, const Tensor& weight,
                         at::IntArrayRef stride, at::IntArrayRef padding, double eps, bool batch_stats,
                         std::array<bool, 3> wanted, int64_t paths) {
  const Pieces pieces(pieces_);
  const Convolution conv{stride, padding, asked_of(kBnReluConv2d, paths)};
  const Tensor x = pieces.by_rows() ? pieces.sized() : pieces.joined();
  check_convolution(kBnReluConv2d, x, weight, conv);
  check_as(kBnReluConv2d, "dout", dout, conv.out_sizes(x, weight), x);
  const BatchNormArgs bn(kBnReluConv2d, x, bn_weight, bn_bias, mean, var, eps);
  const Rows rows = pieces.rows();
  const auto reads = [&](ConvPass pass) { return conv_reads_pieces(pass, x, weight, conv, rows); };
  const bool read =
      pieces.by_rows() && (!wanted[0] || reads(ConvPass::dgrad)) && (wanted[1] ? reads(ConvPass::wgrad) : !wanted[2]);
  const ConvGradients g = bn_relu_conv_backward(dout, read || !pieces.by_rows() ? x : pieces.joined(), Tensor(), bn,
                                                batch_stats, weight, conv, wanted, read ? &rows : nullptr);
  return tensors_of(g, x);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(ran_ext, m) {
  m.def(
      "_joined_bn_relu_conv2d(Tensor[] pieces, Tensor weight, Tensor? bias, Tensor? bn_weight, Tensor? bn_bias, "
      "Tensor mean, Tensor var, float eps, int[2] stride, int[2] padding, int paths) -> Tensor");
  m.def(
      "_joined_bn_relu_conv2d_backward(Tensor dout, Tensor[] pieces, Tensor? bn_weight, Tensor? bn_bias, Tensor mean, "
      "Tensor var, Tensor weight, int[2] stride, int[2] padding, float eps, bool batch_stats, bool[3] wanted, "
      "int paths) -> (Tensor dx, Tensor dbn_weight, Tensor dbn_bias, Tensor dweight, Tensor dbias)");
}
RAN_KERNELS(m) {
  m.impl("_joined_bn_relu_conv2d", forward);
  m.impl("_joined_bn_relu_conv2d_backward", backward);
}

}  // namespace ran
