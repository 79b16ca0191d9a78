// One table of kernels for the instruction set this file is compiled for.
#include "kernels.h"
#include "kernels_isa.h"

namespace ran::cpu::RAN_ISA {

#define RAN_STRING_(x) #x
#define RAN_STRING(x) RAN_STRING_(x)

extern const Kernels table;
const Kernels table = {
    RAN_STRING(RAN_ISA),     attention_gate_forward, attention_gate_backward,
    upsample_add_forward,    upsample_add_backward,  max_pool_forward,
    max_pool_backward,       batch_norm_stats,       bn_relu_forward,
    bn_relu_backward_reduce, bn_relu_backward_apply, conv_supported,
    conv1x1_forward,         conv1x1_data_gradient,  conv_weight_gradient,
    conv3x3_supported,       conv3x3_panels_size,    conv3x3_pack,
    conv3x3_forward,         conv3x3_data_gradient,  conv3x3_weight_gradient,
    conv3x3_choice,
};

}  // namespace ran::cpu::RAN_ISA
