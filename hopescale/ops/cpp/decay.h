// How much of each write, and of what a chunk begins with, is in the state before each of its tokens.
#pragma once
#include "memory_spec.h"

namespace hopescale {

// Weights of one chunk of `size` tokens. Row t is of the state before token t, the last row of the end.
struct DecayWeights {
    int size;
    float *eta, *alpha, *mu;       // [size]; mu is null without momentum
    float *start, *push;           // [size + 1]
    float* from_start;             // products of mu up to each token, [size]
    Matrix erase, write, chain;    // [size + 1, size], chain [size, size]; write is erase without momentum

    float momentum_decay() const { return from_start[size - 1]; }
    const float* last_push() const { return chain.row(size - 1); }
};

inline DecayWeights take_decay(Arena& arena, const MemorySpec& spec, int size) {
    DecayWeights x{};
    x.size = size;
    x.eta = arena.numbers(spec.chunk);
    x.alpha = arena.numbers(spec.chunk);
    x.start = arena.numbers(spec.chunk + 1);
    x.erase = x.write = arena.take(spec.chunk + 1, padded(spec.chunk));
    if (spec.momentum) {
        x.mu = arena.numbers(spec.chunk);
        x.push = arena.numbers(spec.chunk + 1);
        x.from_start = arena.numbers(spec.chunk);
        x.write = arena.take(spec.chunk + 1, padded(spec.chunk));
        x.chain = arena.take(spec.chunk, padded(spec.chunk));
    }
    return x;
}

// Row t + 1 from row t of a table that decays by `gate` and to which token t adds `eta`.
inline void decay_row(const float* before, float gate, int t, float eta, float* after, int width) {
    for (int s = 0; s < width; s += LANES) store(after + s, gate * load(before + s));
    after[t] = eta;
}

inline void fill_tables(const DecayWeights& x) {
    const int width = x.erase.width;
    x.start[0] = 1;
    fill(x.erase.block(0, 1), 0);
    for (int t = 0; t < x.size; ++t) {
        x.start[t + 1] = x.alpha[t] * x.start[t];
        decay_row(x.erase.row(t), x.alpha[t], t, x.eta[t], x.erase.row(t + 1), width);
    }
    if (!x.mu) return;
    x.push[0] = 0;
    fill(x.write.block(0, 1), 0);
    for (int t = 0; t < x.size; ++t) {
        x.from_start[t] = x.mu[t] * (t ? x.from_start[t - 1] : 1);
        x.push[t + 1] = x.alpha[t] * x.push[t] + x.from_start[t];
        decay_row(t ? x.chain.row(t - 1) : x.write.row(0), x.mu[t], t, x.eta[t], x.chain.row(t), width);
        const float *before = x.write.row(t), *chain = x.chain.row(t);
        for (int s = 0; s < width; s += LANES)
            store(x.write.row(t + 1) + s, x.alpha[t] * load(before + s) + load(chain + s));
    }
}

// Gradients of tables; entries (t, s) with s >= t of `erase` and `write` stay zero.
struct TableGrads {
    float *start, *push, *last_push, momentum_decay;
    Matrix erase, write;
    float *eta, *alpha, *mu;
};

inline TableGrads take_table_grads(Arena& arena, const DecayWeights& x) {
    const int width = x.erase.width;
    TableGrads d{};
    Matrix numbers = arena.take(6, padded(x.size + 1));
    fill(numbers, 0);
    d.start = numbers.row(0), d.push = numbers.row(1), d.last_push = arena.take(1, width).data;
    d.eta = numbers.row(2), d.alpha = numbers.row(3), d.mu = numbers.row(4);
    fill({d.last_push, 1, width, width}, 0);
    d.erase = d.write = arena.take(x.size + 1, width);
    fill(d.erase, 0);
    if (x.mu) {
        d.write = arena.take(x.size + 1, width);
        fill(d.write, 0);
    }
    return d;
}

// Goes back through `decay_row`: adds to the gradient of the row before, returns that of the gate.
inline float decay_row_back(const float* before, float gate, int t, float* d_after, float* d_before, float* d_eta,
                            int width) {
    *d_eta += d_after[t];
    d_after[t] = 0;
    const float d_gate = dot(d_after, before, width);
    add_scaled(d_before, gate, d_after, width);
    return d_gate;
}

// Turns gradients of tables into those of the gates. Overwrites the former.
inline void tables_back(Arena& arena, const DecayWeights& x, TableGrads& d) {
    Scope scope(arena);
    const int width = x.erase.width;
    float* row_before = arena.take(1, width).data;
    for (int t = x.size - 1; t >= 0; --t) {
        d.alpha[t] += d.start[t + 1] * x.start[t];
        d.start[t] += x.alpha[t] * d.start[t + 1];
        d.alpha[t] +=
            decay_row_back(x.erase.row(t), x.alpha[t], t, d.erase.row(t + 1), d.erase.row(t), &d.eta[t], width);
    }
    if (!x.mu) return;
    float* d_chain = d.last_push;
    float d_from_start = d.momentum_decay;
    for (int t = x.size - 1; t >= 0; --t) {
        float* d_write = d.write.row(t + 1);
        d.alpha[t] += dot(d_write, x.write.row(t), width) + d.push[t + 1] * x.push[t];
        add_scaled(d.write.row(t), x.alpha[t], d_write, width);
        d.push[t] += x.alpha[t] * d.push[t + 1];
        add_scaled(d_chain, 1, d_write, width);
        // `d_chain` becomes the gradient of the row before.
        std::memset(row_before, 0, sizeof(float) * width);
        const float* before = t ? x.chain.row(t - 1) : x.write.row(0);
        d.mu[t] += decay_row_back(before, x.mu[t], t, d_chain, row_before, &d.eta[t], width);
        std::memcpy(d_chain, row_before, sizeof(float) * width);
        d_from_start += d.push[t + 1];
        d.mu[t] += d_from_start * (t ? x.from_start[t - 1] : 1);
        d_from_start *= x.mu[t];
    }
}

}  // namespace hopescale
