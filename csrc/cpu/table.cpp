// One table of kernels for the instruction set this file is compiled for.
#include "kernels.h"

namespace ran::cpu::RAN_ISA {

#define RAN_STRING_(x) #x
#define RAN_STRING(x) RAN_STRING_(x)

extern const Kernels table;
const Kernels table = {
    RAN_STRING(RAN_ISA),
#define RAN_KERNEL(result, name, arguments) name,
#include "kernel_list.h"
};

}  // namespace ran::cpu::RAN_ISA
