// How a bank of memories reads and learns, and where its weights lie in one row of numbers.
#pragma once
#include "matrix.h"

namespace hopescale {

constexpr float CAP_EPS = 1e-12f;  // of ops/inner_gradient.py::capped

enum Read { PREFIX, INCLUSIVE, BOUNDARY };

// The fields of `_Rule` in ops/self_modifying/cpp.py. Memories are numbered: wide ones, then narrow ones.
struct Rule {
    int32_t dim, hidden;           // hidden is 0 for linear memories
    int32_t wide, narrow, chunk;
    int32_t of_k, of_v, of_q;      // which wide memory makes them; -1 if none does
    int32_t of_eta, of_alpha;      // which memory adds to them; -1 if none does
    int32_t retention, momentum, l2, own_target, erase, read;
    float error_cap, key_eps, eta_max;  // error_cap is 0 if there is none

    bool is_mlp() const { return hidden > 0; }
    int memories() const { return wide + narrow; }
    int rows() const { return is_mlp() ? hidden : dim; }
    // Columns of the matrices that read keys. The last ones of linear memories are padding.
    int width() const { return is_mlp() ? memories() * hidden : padded(wide * dim + narrow); }
    int seconds() const { return is_mlp() ? memories() : 0; }
    // Columns of a second layer; a narrow one has one that counts.
    int outputs(int memory) const { return memory < wide ? dim : LANES; }
    int64_t state_size() const {
        return int64_t(dim) * width() + (is_mlp() ? int64_t(hidden) * (wide * dim + narrow * LANES) : 0);
    }
};

// Weights, or momenta, or gradients of either, of all memories. Without data (no momentum) its matrices have none.
struct State {
    const Rule& rule;
    float* data;

    Matrix first() const { return data ? Matrix{data, rule.dim, rule.width(), rule.width()} : Matrix{}; }
    // The matrix that reads keys of one memory; of linear narrow memories, which lie side by side, all of them.
    Matrix first(int memory) const {
        if (rule.is_mlp() || memory < rule.wide) return first().columns(memory * rule.rows(), rule.rows());
        return first().columns(rule.wide * rule.dim, rule.width() - rule.wide * rule.dim);
    }
    Matrix second(int memory) const {
        if (!data) return {};
        const int before = memory < rule.wide ? memory * rule.dim : rule.wide * rule.dim + (memory - rule.wide) * LANES;
        return {data + int64_t(rule.dim) * rule.width() + int64_t(rule.hidden) * before, rule.hidden,
                rule.outputs(memory), rule.outputs(memory)};
    }
};

}  // namespace hopescale
