// Linear maps, norms, and gated MLPs one after the other with residual connections, without gradients. Called by
// ops/vectors.py and ops/gated_mlps.py.
#include <numeric>
#include <vector>

#include "threads.h"

using namespace hopescale;

namespace {

constexpr int TILE_TOKENS = 128;  // what they need beside the weights stays in the second-level cache

// `down(silu(gate x) * up x)` of a normed x.
struct GatedMlp {
    const float* norm;
    LinearMap gate, up, down;

    // `weights` are those of `GatedMlp` of ops/gated_mlps.py.
    GatedMlp(const float* const* weights, int width, int hidden, bool packed)
        : norm(weights[0]), gate{weights[1], hidden, width, packed}, up{weights[2], hidden, width, packed},
          down{weights[3], width, hidden, packed} {}

    void add_to(int threads, Matrix normed, Matrix gated, Matrix raised, Matrix y) const;
};

// Numbers that begin where a line of the cache does.
struct Numbers {
    std::vector<float> memory;
    float* data;

    explicit Numbers(int64_t count) : memory(count + BLOCK) {
        const uintptr_t line = 64, at = reinterpret_cast<uintptr_t>(memory.data());
        data = reinterpret_cast<float*>((at + line - 1) / line * line);
    }
};

void add(Matrix x, Matrix y, Matrix result) {
    for (int t = 0; t < x.rows; ++t)
        for (int j = 0; j < x.width; j += LANES) store(result.row(t) + j, load(x.row(t) + j) + load(y.row(t) + j));
}

void rms_norm(Matrix x, const float* weight, float eps, Matrix result) {
    for (int t = 0; t < x.rows; ++t) {
        const float scale = 1 / std::sqrt(dot(x.row(t), x.row(t), x.width) / x.width + eps);
        for (int j = 0; j < x.width; j += LANES)
            store(result.row(t) + j, scale * load(x.row(t) + j) * load(weight + j));
    }
}

// result = silu(result) * x
void gate_by(Matrix x, Matrix result) {
    for (int t = 0; t < x.rows; ++t)
        for (int j = 0; j < x.width; j += LANES) {
            const Lanes gate = load(result.row(t) + j);
            store(result.row(t) + j, gate * sigmoid(gate) * load(x.row(t) + j));
        }
}

// y += down(silu(gate normed) * up normed); `gated` and `raised` hold what lies between.
void GatedMlp::add_to(int threads, Matrix normed, Matrix gated, Matrix raised, Matrix y) const {
    if (gate.is_packed) {
        apply(gate, normed, gated);
        apply(up, normed, raised);
        gate_by(raised, gated);
    } else {
        in_threads(threads, 2 * bytes_of(gate), gate.rows, BLOCK, [&](int begin, int end) {
            apply_rows(gate, normed, gated, begin, end);
            apply_rows(up, normed, raised, begin, end);
            gate_by(raised.columns(begin, end - begin), gated.columns(begin, end - begin));
        });
    }
    apply(threads, down, gated, y, ADD);
}

}  // namespace

extern "C" {

void hopescale_pack(int rows, int columns, const float* weight, float* packed) {
    pack({weight, rows, columns, false}, packed);
}

// Maps vectors x [count, columns] to `result` [count, rows], in at most `threads` threads.
void hopescale_linear(int rows, int columns, int packed, int count, int threads, const float* weight, float* x,
                      float* result) {
    apply(threads, {weight, rows, columns, bool(packed)}, {x, count, columns, columns}, {result, count, rows, rows});
}

// Norms vectors x [count, width].
void hopescale_rms_norm(int width, int count, float eps, const float* weight, float* x, float* result) {
    rms_norm({x, count, width, width}, weight, eps, {result, count, width, width});
}

// Runs vectors `begin` to `end` of a stream through MLPs: `result` = x + added, then for each
// `result += mlp(norm(result))`. `added` may be null. All are [vectors, width]. `weights` are four of each MLP.
// Weights that are not packed are distributed over at most `threads` threads.
void hopescale_gated_mlps(int width, float eps, int packed, int count, const int32_t* hidden,
                          const float* const* weights, int threads, int begin, int end, float* x, float* added,
                          float* result) {
    const int tokens = std::min(TILE_TOKENS, end - begin);
    const int widest = std::accumulate(hidden, hidden + count, 0, [](int x, int y) { return std::max(x, y); });
    const Numbers scratch(int64_t(tokens) * (width + 2 * widest));
    for (; begin < end; begin += tokens) {
        const int rows = std::min(tokens, end - begin);
        const auto tile = [&](float* stream) { return Matrix{stream + int64_t(begin) * width, rows, width, width}; };
        Arena arena{scratch.data};
        const Matrix y = tile(result), normed = arena.take(rows, width);
        if (added)
            add(tile(x), tile(added), y);
        else
            copy(tile(x), y);
        for (int n = 0; n < count; ++n) {
            Scope scope(arena);
            const GatedMlp mlp(weights + 4 * n, width, hidden[n], packed);
            const Matrix gated = arena.take(rows, hidden[n]), raised = arena.take(rows, hidden[n]);
            rms_norm(y, mlp.norm, eps, normed);
            mlp.add_to(threads, normed, gated, raised, y);
        }
    }
}
}
