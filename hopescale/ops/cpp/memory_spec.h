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

// Weights, or momenta, or gradients of either, of all memories. Without data (no momentum) its matrices have none.
struct State {
    const MemorySpec& spec;
    float* data;

    Matrix first() const { return data ? Matrix{data, spec.dim, spec.width(), spec.width()} : Matrix{}; }
    // The matrix that reads keys of one memory; of linear gate memories, which lie side by side, all of them.
    Matrix first(int memory) const {
        if (spec.is_mlp() || memory < spec.vectors) return first().columns(memory * spec.rows(), spec.rows());
        return first().columns(spec.vectors * spec.dim, spec.width() - spec.vectors * spec.dim);
    }
    Matrix second(int memory) const {
        if (!data) return {};
        const int vectors = spec.vectors;
        const int before = memory < vectors ? memory * spec.dim : vectors * spec.dim + (memory - vectors) * BLOCK;
        return {data + int64_t(spec.dim) * spec.width() + int64_t(spec.hidden) * before, spec.hidden,
                spec.outputs(memory), spec.outputs(memory)};
    }
};

}  // namespace hopescale
