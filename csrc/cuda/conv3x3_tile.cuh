// A patch's halo: global memory to shared memory, normalised in place, to mma fragments.
//
// A halo is pixels of kPanel 16-bit channels, as the rows of a panel are. The 16-byte vectors of a pixel are permuted
// by a number that is, of the pixels that neighbouring outputs read through one tap, one more from each to the next: so
// the 8 rows of an ldmatrix fall on different banks, whatever the patch's width and the stride.
#pragma once

#include "conv1x1_tile.cuh"
#include "conv3x3_plan.h"

namespace ran::cuda::conv3x3 {

// A place in a box of `group` images, each of some height and width.
struct Place {
  int image, y, x;
};

__device__ __forceinline__ Place place_in(int index, int height, int width) {
  const int row = index / width, image = row / height;
  return {image, row - image * height, index - row * width};
}

// Walks a box of pixels as copies do: 8 threads a pixel, kStep pixels at a time. One division is made, at the start.
class BoxWalk {
 public:
  __device__ BoxWalk(int group, int height, int width)
      : count_(group * height * width),
        height_(height),
        width_(width),
        first_(place_in(thread_rank() / 8, height, width)),
        step_(place_in(kStep, height, width)) {}

  template <typename Body>
  __device__ __forceinline__ void for_each(Body body) const {  // body(pixel, its place)
    Place at = first_;
#pragma unroll 1
    for (int pixel = thread_rank() / 8; pixel < count_; pixel += kStep) {
      body(pixel, at);
      at.image += step_.image, at.y += step_.y, at.x += step_.x;
      if (at.x >= width_) at.x -= width_, ++at.y;
      if (at.y >= height_) at.y -= height_, ++at.image;
    }
  }

 private:
  int count_, height_, width_;
  Place first_, step_;
};

// The first output of patch number `tile`.
__device__ __forceinline__ Place patch_start(const Patches& p, int tile) {
  const Place at = place_in(tile, p.y.tiles(), p.x.tiles());
  return {at.image * p.group, at.y * p.y.patch, at.x * p.x.patch};
}

// Of an output in its patch: the first pixel it reads.
__device__ __forceinline__ int halo_pixel(const Patches& p, const Place& at) {
  return (at.image * p.y.halo + at.y * p.y.step()) * p.x.halo + at.x * p.x.step();
}

// What the vectors of a pixel, `y` and `x` in its halo, are permuted by; and those that a tap reads, relative to row 0.
__device__ __forceinline__ int tap_key(const Patches& p, int y, int x) {
  return (y >> (p.y.step() - 1)) * p.x.patch + (x >> (p.x.step() - 1));
}
__device__ __forceinline__ int halo_key(const Patches& p, const Place& at) {
  return (at.image * p.y.patch * p.x.patch + tap_key(p, at.y, at.x)) & 7;
}

// A tensor whose pixels the halos hold.
template <typename T>
struct HaloSource {
  const T* data;
  int channels;

  // Calls body(a thread's vector of the halo, the pixel's number in the tensor or -1 outside).
  template <typename Body>
  __device__ __forceinline__ void for_each(Shared<T> halo, const BoxWalk& walk, const Patches& p, const Place& start,
                                           Body body) const {
    const int vector = thread_rank() % 8;
    const int y0 = p.y.origin + start.y * p.y.stride, x0 = p.x.origin + start.x * p.x.stride;
    walk.for_each([&](int pixel, const Place& at) {
      const int image = start.image + at.image, y = y0 + at.y * p.y.spacing(), x = x0 + at.x * p.x.spacing();
      const bool inside = image < p.images && static_cast<unsigned>(y) < static_cast<unsigned>(p.y.inputs) &&
                          static_cast<unsigned>(x) < static_cast<unsigned>(p.x.inputs);
      body(halo + pixel * kPanel + ((vector ^ halo_key(p, at)) << 3),
           inside ? (image * p.y.inputs + y) * p.x.inputs + x : -1);
    });
  }

  // Asks for kPanel channels of every pixel; zeros outside the image and past the last channel.
  __device__ __forceinline__ void copy(Shared<T> halo, const BoxWalk& walk, const Patches& p, const Place& start,
                                       int first_channel) const {
    const int channel = first_channel + thread_rank() % 8 * 8;
    for_each(halo, walk, p, start, [&](Shared<T> to, int pixel) {
      const bool inside = pixel >= 0 && channel < channels;
      cp_async16(to, data + (inside ? static_cast<int64_t>(pixel) * channels + channel : 0), inside);
    });
  }

  // relu(bn) of the vectors that this thread has copied, in place; pixels outside the image stay 0.
  __device__ __forceinline__ void bn_relu(Shared<T> halo, const BoxWalk& walk, const Patches& p, const Place& start,
                                          const float (&scale)[8], const float (&shift)[8]) const {
    for_each(halo, walk, p, start, [&](Shared<T> at, int pixel) {
      if (pixel < 0) return;
      const auto words = shared_cast<Pack<unsigned, 4>>(at);
      Pack<unsigned, 4> held = words[0];
#pragma unroll
      for (int i = 0; i < 4; ++i)
        held.value[i] =
            bn_relu_pair<T>(held.value[i], {scale[2 * i], shift[2 * i]}, {scale[2 * i + 1], shift[2 * i + 1]});
      words[0] = held;
    });
  }
};

}  // namespace ran::cuda::conv3x3
