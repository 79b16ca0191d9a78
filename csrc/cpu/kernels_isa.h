// The kernels of one instruction set, as the table in kernels_cpu.cpp needs them; kernels.h says what each does.
#pragma once

#include "kernels.h"

namespace ran::cpu::RAN_ISA {

void attention_gate_forward(void* out, const void* trunk, const void* mask, DType, GateShape);
void attention_gate_backward(void* dtrunk, void* dmask, const void* dout, const void* trunk, const void* mask, DType,
                             GateShape);

void upsample_add_forward(void* out, const void* lower, const void* skip, DType, GateShape);
void upsample_add_backward(void* dlower, const void* dout, DType, GateShape);
void max_pool_forward(void* out, uint8_t* index, const void* x, DType, GateShape);
void max_pool_backward(void* dx, const void* dout, const uint8_t* index, DType, GateShape);

void batch_norm_stats(void* mean, void* var, double* exact, const void* x, DType, ChannelView);
void bn_relu_forward(void* out, const void* x, DType, ChannelView, BatchNorm<void>);
void bn_relu_backward_reduce(void* sum_dz, void* sum_dz_xhat, const void* dout, const void* x, DType, ChannelView,
                             BatchNorm<void>);
void bn_relu_backward_apply(void* dx, const void* dout, const void* x, const void* residual, const void* sum_dz,
                            const void* sum_dz_xhat, double count, DType, ChannelView, BatchNorm<void>);

bool conv_supported(DType, ConvShape);
void conv1x1_forward(void* out, float* out_mean, float* out_var, double* exact, const void* x, const void* weight,
                     const float* bias, const void* residual, DType, ConvShape, BatchNorm<void>);
void conv1x1_data_gradient(void* dz, float* sum_dz, float* sum_dz_xhat, const void* dout, const void* x,
                           const void* weight, DType, ConvShape, BatchNorm<void>);
bool conv3x3_supported(DType, ConvShape);
int64_t conv3x3_panels_size(Conv3x3, ConvShape);
void conv3x3_pack(Conv3x3, float* panels, const void* weight, DType, ConvShape);
void conv3x3_forward(Conv3x3, void* out, float* out_mean, float* out_var, const void* x, const void* weight,
                     const float* panels, const float* bias, const void* residual, bool with_relu, DType, ConvShape,
                     const BatchNorm<void>* bn);
void conv3x3_data_gradient(Conv3x3, void* dz, float* sum_dz, float* sum_dz_xhat, const void* dout, const void* x,
                           const void* weight, DType, ConvShape, const BatchNorm<void>* bn);
void conv3x3_weight_gradient(Conv3x3, void* dweight, float* dbias, const void* dout, const void* x, DType, ConvShape,
                             const BatchNorm<void>* bn);
Conv3x3 conv3x3_choice(ConvPass, DType, ConvShape, bool strict);
void conv_weight_gradient(void* dweight, float* dbias, const void* dout, const void* x, DType, ConvShape,
                          const BatchNorm<void>* bn);

}  // namespace ran::cpu::RAN_ISA
