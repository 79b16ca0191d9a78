// Every kernel of the CPU, once: RAN_KERNEL(result, name, (arguments)). Whoever includes this defines RAN_KERNEL as
// what it makes of an entry; it is undefined again at the end.
//
// Order of arguments: outputs, inputs, sizes, options. Vectors of one value a channel are float (double for f64 data).
// Rows: of pieces only in channels_last, and in a convolution only where it is pointwise.
// Every sum is taken over tiles of fixed size that are merged in fixed order: results do not depend on the number of
// threads, but for conv_weight_gradient's, which has a partial sum for each.

RAN_KERNEL(void, attention_gate_forward, (void* out, const void* trunk, const void* mask, DType, GateShape))
RAN_KERNEL(void, attention_gate_backward,
           (void* dtrunk, void* dmask, const void* dout, const void* trunk, const void* mask, DType, GateShape))
// The same of a mask that is up-sampled as torch's interpolate(mode="bilinear", align_corners=False) does, by any scale
RAN_KERNEL(void, attention_gate_bilinear_forward, (void* out, const void* trunk, const void* mask, DType, GateShape))
RAN_KERNEL(void, attention_gate_bilinear_backward,
           (void* dtrunk, void* dmask, const void* dout, const void* trunk, const void* mask, DType, GateShape))

// In these four the shape's scale is 2. out = lower, which has the mask's size, up-sampled (nearest) and cropped, +
// skip, which may be null and whose gradient is dout
RAN_KERNEL(void, upsample_add_forward, (void* out, const void* lower, const void* skip, DType, GateShape))
RAN_KERNEL(void, upsample_add_backward, (void* dlower, const void* dout, DType, GateShape))
// 2x2 windows at stride 2, the last ones cut off at the border; out and index have the mask's size. index: 2 * row +
// column of the maximum in its window; the first of equals, the last NaN
RAN_KERNEL(void, max_pool_forward, (void* out, uint8_t* index, const void* x, DType, GateShape))
RAN_KERNEL(void, max_pool_backward, (void* dx, const void* dout, const uint8_t* index, DType, GateShape))

// mean and biased variance of each channel; both (channels,). exact: the same before they are rounded, [2][channels],
// for the running ones; or null
RAN_KERNEL(void, batch_norm_stats, (void* mean, void* var, double* exact, const void* x, DType, ChannelView))
// out = relu(x * scale + shift)
RAN_KERNEL(void, bn_relu_forward, (void* out, const void* x, DType, ChannelView, BatchNorm<void>))
// dz = dout where z > 0: sum_dz, and sum_dz_xhat = sum dz * (x - mean) / sqrt(var + eps)
RAN_KERNEL(void, bn_relu_backward_reduce,
           (void* sum_dz, void* sum_dz_xhat, const void* dout, const void* x, DType, ChannelView, BatchNorm<void>))
// dx of normalisation with batch statistics over `count` values a channel, plus `residual` (the gradient that reaches
// x by another path, or null); with sum_dz null (running statistics) dx = scale * dz. dx may be dout.
RAN_KERNEL(void, bn_relu_backward_apply,
           (void* dx, const void* dout, Rows x, const void* residual, const void* sum_dz, const void* sum_dz_xhat,
            double count, DType, ChannelView, BatchNorm<void>))

// The same three with another activation, and without residual. kept: dz, written by silu alone, or null
RAN_KERNEL(void, bn_act_forward, (void* out, const void* x, DType, ChannelView, BatchNorm<void>, Activation))
RAN_KERNEL(void, bn_act_backward_reduce,
           (void* kept, void* sum_dz, void* sum_dz_xhat, const void* dout, const void* x, DType, ChannelView,
            BatchNorm<void>, Activation))
RAN_KERNEL(void, bn_act_backward_apply,
           (void* dx, const void* dout, const void* x, const void* sum_dz, const void* sum_dz_xhat, double count, DType,
            ChannelView, BatchNorm<void>, Activation))

// Whether the three below take this convolution; the first two take pointwise ones only.
RAN_KERNEL(bool, conv_supported, (DType, ConvShape))
// out = relu(bn(x)) * weight + bias + residual; bias (float) and residual may be null. out_mean, out_var (biased) and
// exact: the channels' statistics of out, as above, or null
RAN_KERNEL(void, conv1x1_forward,
           (void* out, float* out_mean, float* out_var, double* exact, Rows x, const void* weight, const float* bias,
            const void* residual, DType, ConvShape, BatchNorm<void>))
// dz = (dout * weight^T) where z > 0, with the two sums of bn_relu_backward_reduce
RAN_KERNEL(void, conv1x1_data_gradient,
           (void* dz, float* sum_dz, float* sum_dz_xhat, const void* dout, Rows x, const void* weight, DType, ConvShape,
            BatchNorm<void>))
// dweight and dbias (float; may be null) of a convolution of relu(bn(x)), or, with `bn` null, of x itself
RAN_KERNEL(void, conv_weight_gradient,
           (void* dweight, float* dbias, const void* dout, Rows x, DType, ConvShape, const BatchNorm<void>* bn))

// Whether those below, of the same meaning, take this convolution: 3x3, stride 1, padding 1. Points and products are
// float.
RAN_KERNEL(bool, conv3x3_supported, (DType, ConvShape))
// The weight as the forward pass takes it, and how many floats that is.
RAN_KERNEL(int64_t, conv3x3_panels_size, (Conv3x3, ConvShape))
RAN_KERNEL(void, conv3x3_pack, (Conv3x3, float* panels, const void* weight, DType, ConvShape))
// From panels, or, where they are null, from the weight; a ReLU of the result where `with_relu`. In all three bn may
// be null: x as it is, and the data gradient needs neither x nor the sums.
RAN_KERNEL(void, conv3x3_forward,
           (Conv3x3, void* out, float* out_mean, float* out_var, const void* x, const void* weight, const float* panels,
            const float* bias, const void* residual, bool with_relu, DType, ConvShape, const BatchNorm<void>* bn))
RAN_KERNEL(void, conv3x3_data_gradient,
           (Conv3x3, void* dz, float* sum_dz, float* sum_dz_xhat, const void* dout, const void* x, const void* weight,
            DType, ConvShape, const BatchNorm<void>* bn))
RAN_KERNEL(void, conv3x3_weight_gradient,
           (Conv3x3, void* dweight, float* dbias, const void* dout, const void* x, DType, ConvShape,
            const BatchNorm<void>* bn))
// Whether a tile is accurate enough for a pass of a supported one, beside the library with as many threads as are set;
// `strict`, F(2x2) at most.
RAN_KERNEL(bool, conv3x3_allowed, (Conv3x3, ConvPass, DType, ConvShape, bool strict))
// The one of these that is fastest, by rule, or the library.
RAN_KERNEL(Conv3x3, conv3x3_choice, (ConvPass, DType, ConvShape, bool strict))

#undef RAN_KERNEL
