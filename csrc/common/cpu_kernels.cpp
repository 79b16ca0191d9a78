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

const cpu::Kernels& cpu_kernels() {
  static const cpu::Kernels& chosen = []() -> const cpu::Kernels& {
#ifdef RAN_X86_ISAS
    const std::string capability = at::get_cpu_capability();
    if (capability == "AVX512" && __builtin_cpu_supports("avx512bf16")) return cpu::avx512_bf16::table;
    if (capability == "AVX512") return cpu::avx512::table;
    if (capability == "AVX2") return cpu::avx2::table;
#endif
    return cpu::baseline::table;
  }();
  return chosen;
}

}  // namespace ran
