// How a bank of memories reads and learns, and where its weights lie in one row of numbers.
#pragma once
#include "matrix.h"

namespace hopescale {

constexpr float CAP_EPS = 1e-12f;  // of ops/self_modifying/inner_gradient.py::capped

enum Read { PREFIX, INCLUSIVE, BOUNDARY };

// The fields of `CMemorySpec` in ops/self_modifying/cpp.py. Memories are numbered: vector memories, then gate memories.
struct MemorySpec {
    int32_t dim, hidden;           // hidden is 0 for linear memories
    int32_t vectors, gates, chunk;
    int32_t of_k, of_v, of_q;      // which vector memory makes them; -1 if none does
    int32_t of_eta, of_alpha;      // which memory adds to them; -1 if none does
    int32_t retention, momentum;
    int32_t averaged;              // whether a write enters the momentum by 1 - mu of its size
    int32_t normalized;            // whether writes of MLP memories are divided by squares of gains above 1
    int32_t l2, own_target, erase, read;
    float error_cap, key_eps, eta_max;  // error_cap is 0 if there is none

    bool is_mlp() const { return hidden > 0; }
    int memories() const { return vectors + gates; }
    int rows() const { return is_mlp() ? hidden : dim; }
    // Columns of the matrices that read keys. The last ones of linear memories are padding.
    int width() const { return is_mlp() ? memories() * hidden : padded(vectors * dim + gates); }
    int seconds() const { return is_mlp() ? memories() : 0; }
    // Columns of a second layer; a gate memory has one that counts.
    int outputs(int memory) const { return memory < vectors ? dim : BLOCK; }
    int64_t state_size() const {
        return int64_t(dim) * width() + (is_mlp() ? int64_t(hidden) * (vectors * dim + gates * BLOCK) : 0);
    }
};

// Where weights lie: the matrices that read keys side by side, and the second layers of vector and of gate memories.
struct Parts {
    float *first, *vectors, *gates;

    // All in one row of numbers, `MemorySpec::state_size` of them.
    static Parts of(const MemorySpec& spec, float* row) {
        if (!row) return {};
        float* vectors = row + int64_t(spec.dim) * spec.width();
        return {row, vectors, vectors + int64_t(spec.hidden) * spec.dim * spec.vectors};
    }
};

// Weights, or momenta, or gradients of either, of all memories. Without data (no momentum) its matrices have none.
struct State {
    const MemorySpec& spec;
    Parts at;

    State(const MemorySpec& spec, Parts at) : spec(spec), at(at) {}
    State(const MemorySpec& spec, float* row) : spec(spec), at(Parts::of(spec, row)) {}

    Matrix first() const { return at.first ? Matrix{at.first, spec.dim, spec.width(), spec.width()} : Matrix{}; }
    // The matrix that reads keys of one memory; of linear gate memories, which lie side by side, all of them.
    Matrix first(int memory) const {
        if (spec.is_mlp() || memory < spec.vectors) return first().columns(memory * spec.rows(), spec.rows());
        return first().columns(spec.vectors * spec.dim, spec.width() - spec.vectors * spec.dim);
    }
    Matrix second(int memory) const {
        if (!at.first) return {};
        const int outputs = spec.outputs(memory), gate = memory - spec.vectors;
        float* begin = gate < 0 ? at.vectors + int64_t(spec.hidden) * memory * spec.dim
                                : at.gates + int64_t(spec.hidden) * gate * BLOCK;
        return {begin, spec.hidden, outputs, outputs};
    }
};

}  // namespace hopescale
