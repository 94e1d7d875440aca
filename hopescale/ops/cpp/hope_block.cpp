// A whole block of Hope for one vector, without gradients. Called by ops/hope_block.py.
#include <atomic>
#include <vector>

#include "infer.h"
#include "streams.h"
#include "threads.h"

using namespace hopescale;

namespace {

// `CBlock` of ops/hope_block.py.
struct Block {
    int32_t width, heads, dim, taps, unit, gated, mlps;
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

// Bytes of memories that a token reads, or writes, about.
int64_t bytes_of(const Block& block) {
    const int64_t numbers = block.specs[0].state_size() + (block.specs[1].memories() ? block.specs[1].state_size() : 0);
    return 3 * numbers * block.heads * int64_t(sizeof(float));
}

// Multiplies answers of heads `begin` to `end` by silu of the last slice of their projected inputs.
void gate_answers(const Block& block, int begin, int end, const float* projected, float* answers) {
    const int slices = SLICES + block.gated;
    for (int h = begin; h < end; ++h)
        for (int j = 0; j < block.dim; j += LANES) {
            const Lanes gate = load(projected + (int64_t(h) * slices + SLICES) * block.dim + j);
            float* at = answers + int64_t(h) * block.dim + j;
            store(at, load(at) * gate * sigmoid(gate));
        }
}

}  // namespace

extern "C" {

// Maps `x` [width] to `y` after `position` tokens: norm, mixer, residual connection, and MLPs as in
// `hopescale_gated_mlps`. `given`, `last`, `tail` and `tail_after` are as in `hopescale_mix`; so is the result.
// Rows of weights, and heads, are distributed over at most `threads` threads.
int hopescale_hope_block(const Block* block_, const BlockWeights* weights_, int threads, int64_t position,
                         const BankTensors* given, const BankTensors* last, const float* tail, float* tail_after,
                         float* x, float* y) {
    const Block& block = *block_;
    const BlockWeights& weights = *weights_;
    const int width = block.width, inner = block.heads * block.dim, mixed = (SLICES + block.gated) * inner;
    std::vector<float> scratch(2 * width + mixed + inner + block.heads * (4 * block.dim + 6));
    Arena arena{scratch.data()};
    const Matrix normed = arena.take(1, width), projected = arena.take(1, mixed), answers = arena.take(1, inner);
    const Matrix added = arena.take(1, width);
    hopescale_rms_norm(width, 1, block.eps, weights.norm, x, normed.data);
    apply(threads, {weights.in_proj, mixed, width, false}, normed, projected);
    const Layout layout{1,      1,     block.heads,         SLICES,   block.dim, block.taps, block.unit,
                        mixed,  mixed, mixed / block.heads, block.dim};
    Mixer mixer{weights.filters, tail, tail_after, {}, {}, weights.head_norm, block.eps};
    std::copy_n(weights.bias, 3, mixer.bias);
    std::copy_n(weights.gate, 3, mixer.weight);
    const int64_t bounds[2] = {0, 1};
    const Batch batch{1, block.heads, 1, 0, 1, 1, bounds};
    std::atomic<bool> done{true};
    in_threads(threads, bytes_of(block), block.heads, 1, [&](int begin, int end) {
        if (!hopescale_mix(&layout, &mixer, block.specs, block.periods, &batch, position, begin, end, projected.data,
                           given, last, arena.next, answers.data))
            done = false;
        if (block.gated) gate_answers(block, begin, end, projected.data, answers.data);
    });
    if (!done) return 0;
    apply(threads, {weights.out_proj, width, inner, false}, answers, added);
    const auto mlps = reinterpret_cast<const float* const*>(weights_ + 1);
    hopescale_gated_mlps(width, block.eps, false, block.mlps, block.hidden, mlps, threads, 0, 1, x, added.data,
                         y);
    return 1;
}
}
