// A whole block of Hope for one vector, without gradients. Called by ops/hope_block.py.
#include <vector>

#include "infer.h"
#include "linear.h"
#include "streams.h"

using namespace hopescale;

namespace {

// `CBlock` of ops/hope_block.py.
struct Block {
    int32_t width, heads, dim, taps, unit, mlps;
    float eps;
    MemorySpec specs[2];
    int32_t periods[2];
    const int32_t* hidden;
};

// The fields of `BlockWeights` of ops/hope_block.py; four weights of each MLP follow.
struct BlockWeights {
    const float *norm, *in_proj, *out_proj, *filters, *head_norm, *bias[3], *gate[3];
};

constexpr int SLICES = 3;

}  // namespace

extern "C" {

// Maps `x` [width] to `y` after `position` tokens: norm, mixer, residual connection, and MLPs as in
// `hopescale_gated_mlps`. `given`, `last`, `tail` and `tail_after` are as in `hopescale_mix`; so is the result.
int hopescale_hope_block(const Block* block_, const BlockWeights* weights_, int64_t position, const BankTensors* given,
                         const BankTensors* last, const float* tail, float* tail_after, float* x, float* y) {
    const Block& block = *block_;
    const BlockWeights& weights = *weights_;
    const int width = block.width, inner = block.heads * block.dim, mixed = SLICES * inner;
    std::vector<float> scratch(2 * width + mixed + inner + block.heads * (4 * block.dim + 6));
    Arena arena{scratch.data()};
    const Matrix normed = arena.take(1, width), projected = arena.take(1, mixed), answers = arena.take(1, inner);
    const Matrix added = arena.take(1, width);
    hopescale_rms_norm(width, 1, block.eps, weights.norm, x, normed.data);
    apply({weights.in_proj, mixed, width, false}, normed, projected);
    const Layout layout{1,      1,     block.heads,         SLICES,   block.dim, block.taps, block.unit,
                        mixed,  mixed, SLICES * block.dim,  block.dim};
    Mixer mixer{weights.filters, tail, tail_after, {}, {}, weights.head_norm, block.eps};
    std::copy_n(weights.bias, 3, mixer.bias);
    std::copy_n(weights.gate, 3, mixer.weight);
    const int64_t bounds[2] = {0, 1};
    const Batch batch{1, block.heads, 1, 0, 1, 1, bounds};
    const int done = hopescale_mix(&layout, &mixer, block.specs, block.periods, &batch, position, 0, block.heads,
                                   projected.data, given, last, arena.next, answers.data);
    if (!done) return 0;
    apply({weights.out_proj, width, inner, false}, answers, added);
    const auto mlps = reinterpret_cast<const float* const*>(weights_ + 1);
    hopescale_gated_mlps(width, block.eps, false, block.mlps, block.hidden, mlps, 0, 1, x, added.data, y);
    return 1;
}
}
