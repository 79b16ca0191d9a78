// The gradient of a 3x3 convolution's weight and bias, with relu(bn(x)) computed again from x. The pixels are the depth
// of the product and are split between blocks; their sums are merged in a fixed order by a second kernel.
#include "batch_norm.cuh"
#include "conv3x3_tile.cuh"
#include "conv_wgrad_end.cuh"

namespace ran::cuda {
namespace conv3x3 {
namespace {

template <typename T>
struct WgradArgs {
  HaloSource<T> x;
  const T* dy;
  int c_out;
  WgradPlan plan;
  int padding;
  BatchNorm<float> norm;
  float* partials;  // [split][c_out * 9 * c_in + c_out]
};

// Patches of pixels, copied ahead into kWgradStages places.
template <typename T>
class PatchCopies {
 public:
  __device__ PatchCopies(const WgradArgs<T>& args, const Patches& patches, Shared<T> shared)
      : args_(args),
        patches_(patches),
        walk_(patches.group, patches.y.halo, patches.x.halo),
        shared_(shared),
        patch_(blockIdx.z / 3 * args.plan.patches_a_split),
        next_(patch_) {
    end_ = patch_ + args.plan.patches_a_split < args.plan.patches_in_all ? patch_ + args.plan.patches_a_split
                                                                         : args.plan.patches_in_all;
    for (int i = 0; i < kWgradStages - 1; ++i) request_next();
  }
  __device__ int count() const { return end_ - patch_; }

  __device__ Shared<T> dy() const { return shared_ + slot_ * stage_values(); }
  __device__ Shared<T> halo() const { return dy() + kPanel * kPanel; }
  // The halo's pixel that each row of dy reads through the first tap; -1 where the row is of no output.
  __device__ Shared<int> row_pixels() const { return row_pixels(slot_); }

  // Waits for patch number `i` of this block's, and normalises its halo.
  __device__ void wait(int i, const float (&scale)[8], const float (&shift)[8]) {
    slot_ = i % kWgradStages;
    cp_async_wait<kWgradStages - 2>();
    args_.x.bn_relu(halo(), walk_, patches_, patch_start(patches_, patch_ + i), scale, shift);
    __syncthreads();  // this patch is there for all, and all are done with the one whose place is taken next
    request_next();
  }

 private:
  __device__ int stage_values() const { return (kPanel + patches_.halo()) * kPanel; }
  __device__ Shared<int> row_pixels(int slot) const {
    return shared_cast<int>(shared_ + kWgradStages * stage_values()) + slot * kPanel;
  }

  __device__ void request_next() {
    if (next_ < end_) {
      const int slot = (next_ - patch_) % kWgradStages, vector = thread_rank() % 8;
      const Place start = patch_start(patches_, next_);
      const Shared<T> dy = shared_ + slot * stage_values();
      const int column = blockIdx.y * kPanel + 8 * vector;
#pragma unroll 1
      for (int row = thread_rank() / 8; row < kPanel; row += kStep) {
        const Place at = place_in(row, patches_.y.patch, patches_.x.patch);
        const int image = start.image + at.image, y = start.y + at.y, x = start.x + at.x;
        const bool there =
            row < patches_.rows() && image < patches_.images && y < patches_.y.outputs && x < patches_.x.outputs;
        const int pixel = (image * patches_.y.outputs + y) * patches_.x.outputs + x;
        const bool inside = there && column < args_.c_out;
        cp_async16(dy + panel_at(row, vector),
                   args_.dy + (inside ? static_cast<int64_t>(pixel) * args_.c_out + column : 0), inside);
        if (vector == 0) row_pixels(slot)[row] = there ? halo_pixel(patches_, at) : -1;
      }
      args_.x.copy(dy + kPanel * kPanel, walk_, patches_, start, blockIdx.x * kPanel);
      ++next_;
    }
    cp_async_commit();  // also where it is empty: the wait counts groups
  }

  const WgradArgs<T>& args_;
  const Patches& patches_;
  BoxWalk walk_;
  Shared<T> shared_;
  int patch_, next_, end_, slot_ = 0;
};

// blockIdx.x: kPanel input channels, the rows of the product; blockIdx.y: kPanel output channels; blockIdx.z: the part
// of the patches, and the row of taps. The three taps of a row share a halo, and the fragments of dy.
template <typename T>
__global__ void __launch_bounds__(kThreads, 2) wgrad3x3_kernel(const WgradArgs<T> args) {
  const int lane = thread_rank() % 32, warp = thread_rank() / 32, c_in = args.x.channels, tap_row = blockIdx.z % 3;
  const Shared<T> zeros = dynamic_shared<T>();  // a pixel
  Patches patches = args.plan.patches;
  patches.y.origin = tap_row - args.padding;
  PatchCopies<T> copies(args, patches, zeros + kPanel);
  if (thread_rank() < kPanel / 2) shared_cast<unsigned>(zeros)[thread_rank()] = 0;
  const int channel = blockIdx.x * kPanel + thread_rank() % 8 * 8;  // the first of those that this thread copies
  const ChannelScales<8> channels(args.norm, channel < c_in ? channel : 0);

  constexpr int kPairs = kPanel / 16;  // of tiles of 8 columns; each warp sums dy over one
  float sums[3][2 * kPairs][4] = {}, dy_sums[2] = {};
  for (int patch = 0; patch < copies.count(); ++patch) {
    copies.wait(patch, channels.scale, channels.shift);
    const Shared<T> dy = copies.dy(), halo = copies.halo();
#pragma unroll 1
    for (int k = 0; k < patches.rows(); k += 16) {
      // A lane's pixel and vector of the ldmatrix, as block_at<false> has them.
      const int row = k + lane / 16 * 8 + lane % 8, vector = 2 * warp + lane / 8 % 2;
      const int pixel = copies.row_pixels()[row];
      unsigned a[3][4];
#pragma unroll
      for (int tap = 0; tap < 3; ++tap) {
        const int key = (row + tap_key(patches, 0, tap)) & 7;
        const Shared<T> from = pixel < 0 ? zeros : halo + (pixel + tap) * kPanel;
        ldmatrix_x4<true>(a[tap], from + ((vector ^ key) << 3));
      }
#pragma unroll
      for (int pair = 0; pair < kPairs; ++pair) {
        unsigned b[2][2];
        load_columns<true>(b, dy, pair * 16, k);
#pragma unroll
        for (int side = 0; side < 2; ++side) {
#pragma unroll
          for (int tap = 0; tap < 3; ++tap) mma_m16n8k16<T>(sums[tap][2 * pair + side], a[tap], b[side]);
          if (pair == warp) dy_sums[side] += sum_of_pairs<T>(b[side]);
        }
      }
    }
  }

  const int row0 = blockIdx.x * kPanel + 16 * warp + lane / 4, column0 = blockIdx.y * kPanel + lane % 4 * 2;
  const int64_t weights = int64_t{9} * args.c_out * c_in;
  float* partials = args.partials + blockIdx.z / 3 * (weights + args.c_out);
#pragma unroll
  for (int i = 0; i < 3 * 2 * kPairs * 4; ++i) {
    const int tap = i / (8 * kPairs), tile = i / 4 % (2 * kPairs), part = i % 4;
    const int row = row0 + 8 * (part / 2), column = column0 + 8 * tile + part % 2;
    if (row < c_in && column < args.c_out)
      partials[(static_cast<int64_t>(column) * 9 + tap_row * 3 + tap) * c_in + row] = sums[tap][tile][part];
  }
  if (blockIdx.x != 0 || tap_row != 0) return;
#pragma unroll
  for (int side = 0; side < 2; ++side) {
    float sum = dy_sums[side];
    sum += __shfl_xor_sync(~0u, sum, 1);
    sum += __shfl_xor_sync(~0u, sum, 2);
    const int column = blockIdx.y * kPanel + 16 * warp + 8 * side + lane / 4;
    if (lane % 4 == 0 && column < args.c_out) partials[weights + column] = sum;
  }
}

template <typename T>
cudaError_t wgrad(const Conv3x3Wgrad& p, cudaStream_t stream) {
  const Conv3x3Shape& s = p.shape;
  const WgradPlan plan = wgrad_plan(s);
  auto* partials = static_cast<float*>(p.workspace);
  if (s.n > 0) {
    const WgradArgs<T> args{{static_cast<const T*>(p.x.data), static_cast<int>(s.c_in)},
                            static_cast<const T*>(p.dy),
                            static_cast<int>(s.c_out),
                            plan,
                            s.padding,
                            p.norm,
                            partials};
    const cudaError_t error = RAN_LAUNCH(plan.launch_shape(), stream, wgrad3x3_kernel<T>, args);
    if (error != cudaSuccess) return error;
  }
  return finish_wgrad(static_cast<T*>(p.dweight), static_cast<T*>(p.dbias), partials, s.n > 0 ? plan.splits : 0,
                      s.c_out * 9 * s.c_in, wgrad_floats(s), stream);
}

}  // namespace
}  // namespace conv3x3

cudaError_t conv3x3_wgrad(const Conv3x3Wgrad& p, DType dtype, cudaStream_t stream) {
  if (!conv3x3_supported(ConvPass::wgrad, p.shape, dtype, nullptr) || p.x.pieces ||
      !aligned16(p.dweight, p.dbias, p.dy, p.x.data, p.workspace))
    return cudaErrorInvalidValue;
  return dtype == DType::bf16 ? conv3x3::wgrad<bf16>(p, stream) : conv3x3::wgrad<f16>(p, stream);
}

}  // namespace ran::cuda
