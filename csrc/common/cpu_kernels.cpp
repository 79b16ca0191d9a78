// Which instruction set's kernels run: what torch itself found, so that ATEN_CPU_CAPABILITY chooses for both.
#include <ATen/Version.h>

#include "kernels.h"

namespace ran {

namespace cpu {
#define RAN_DECLARE(isa)      \
  namespace isa {             \
  extern const Kernels table; \
  }
RAN_DECLARE(baseline)
#ifdef RAN_X86_ISAS
RAN_DECLARE(avx2)
RAN_DECLARE(avx512)
RAN_DECLARE(avx512_bf16)
#endif
#undef RAN_DECLARE
}  // namespace cpu

const cpu::Kernels& cpu_kernels(at::ScalarType dtype) {
  struct Sets {
    const cpu::Kernels *bf16, *others;
  };
  static const Sets chosen = []() -> Sets {
#ifdef RAN_X86_ISAS
    const std::string capability = at::get_cpu_capability();
    if (capability == "AVX512" && __builtin_cpu_supports("avx512bf16"))
      return {&cpu::avx512_bf16::table, &cpu::avx512::table};
    if (capability == "AVX512") return {&cpu::avx512::table, &cpu::avx512::table};
    if (capability == "AVX2") return {&cpu::avx2::table, &cpu::avx2::table};
#endif
    return {&cpu::baseline::table, &cpu::baseline::table};
  }();
  return dtype == at::kBFloat16 ? *chosen.bf16 : *chosen.others;
}

#ifdef RAN_X86_ISAS
namespace {

// Products of channels in and out, both rounded up to whole vectors.
double products(const cpu::ConvShape& s, int64_t lanes) {
  const auto rounded = [lanes](int64_t channels) { return double((channels + lanes - 1) / lanes * lanes); };
  return rounded(s.ci) * rounded(s.co);
}

}  // namespace
#endif

const cpu::Kernels& conv_kernels(DType dtype, const cpu::ConvShape& s) {
  const cpu::Kernels& all = cpu_kernels(dtype == DType::bf16 ? at::kBFloat16 : at::kFloat);
#ifdef RAN_X86_ISAS
  // At 24 channels (1.8 times the products) a step is a sixth shorter on a Xeon, at 40 (1.4) as long; 100 have 1.2.
  if (&all == &cpu::avx512::table && dtype == DType::f32 && products(s, 16) > 1.3 * products(s, 8))
    return cpu::avx2::table;
#endif
  return all;
}

}  // namespace ran
