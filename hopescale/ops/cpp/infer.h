// What passes without gradients are given, and the operations that others are made of.
#pragma once
#include "batch.h"
#include "streams.h"

namespace hopescale {

// `Weights` of ops/self_modifying/types.py, or momenta: [rows, heads, ...]. Without data where there are none.
struct Layers {
    float *w_in, *w_out_vector, *w_out_gate;
};

// `MemoryState` of ops/self_modifying/types.py. Without `boundary` where the caller knows it.
struct BankTensors {
    Layers running, momentum, boundary;
};

// What `hopescale_mix` is given beside the projected inputs: the fields of `_Mixer` in ops/self_modifying/mix.py.
struct Mixer {
    const float *filters, *tail;  // [heads * slices * dim, taps], [taps - 1, rows, heads * slices * dim]
    float* tail_after;
    const float *bias[3], *weight[3];  // of eta, alpha, mu: [heads], [heads, dim]; without data there is none
    const float* norm;                 // [heads, dim]
    float norm_eps;
};

}  // namespace hopescale

extern "C" {

int hopescale_mix(const hopescale::Layout* layout, const hopescale::Mixer* mixer, const hopescale::MemorySpec* specs,
                  const int32_t* periods, const hopescale::Batch* batch, int64_t position, int begin, int end,
                  const float* x, const hopescale::BankTensors* given, const hopescale::BankTensors* last,
                  float* memory, float* y);
void hopescale_rms_norm(int width, int count, float eps, const float* weight, float* x, float* result);
void hopescale_gated_mlps(int width, float eps, int packed, int count, const int32_t* hidden,
                          const float* const* weights, int threads, int begin, int end, float* x, float* added,
                          float* result);
}
