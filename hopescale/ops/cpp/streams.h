// Projected inputs of a mixer, and the streams that are made of them.
#pragma once
#include "matrix.h"

namespace hopescale {

// The fields of `CLayout` in ops/head_streams.py. Strides are in numbers.
struct Layout {
    int32_t tokens, batch, heads, slices, dim, taps;  // no taps: no convolution and no SiLU
    int32_t unit;                                     // bit s: slice s is scaled to unit length
    int64_t token_stride, batch_stride, head_stride, slice_stride;  // of the inputs
};

}  // namespace hopescale

extern "C" void hopescale_streams_forward(const hopescale::Layout* layout, int begin, int end, const float* x,
                                          const float* weights, const float* tail, const int32_t* first,
                                          float* streams);
