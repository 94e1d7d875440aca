// Memories with fixed weights: what they answer, and what keys, values, queries and gates are made of the answers.
#pragma once
#include "memory_spec.h"

namespace hopescale {

// What asking a memory leaves for the way back: the first layer's results and their sigmoid [c, E].
struct Activations {
    Matrix pre, gate;
};

inline Activations take_activations(Arena& arena, const MemorySpec& spec, int c) {
    if (!spec.is_mlp()) return {};
    return {arena.take(c, spec.hidden), arena.take(c, spec.hidden)};
}

inline void sigmoids(Matrix x, Matrix result) {
    for (int i = 0; i < x.rows; ++i)
        for (int j = 0; j < x.width; j += LANES) store(result.row(i) + j, sigmoid(load(x.row(i) + j)));
}

inline Lanes slope(Lanes pre, Lanes gate) { return gate + pre * gate * (1.0f - gate); }

// result = silu of x.pre
inline void hidden(const Activations& x, Matrix result) {
    for (int i = 0; i < result.rows; ++i)
        for (int j = 0; j < result.width; j += LANES)
            store(result.row(i) + j, load(x.pre.row(i) + j) * load(x.gate.row(i) + j));
}

// Asks the first layer of an MLP memory.
inline void retrieve_first(const State& state, int memory, Matrix x, const Activations& activations) {
    if (!state.spec.is_mlp()) return;
    product(x, state.first(memory), activations.pre);
    sigmoids(activations.pre, activations.gate);
}

// Answers of a memory whose first layer was asked; vector MLP memories add x.
inline void retrieve_second(Arena& arena, const State& state, int memory, Matrix x, const Activations& activations,
                            Matrix answer) {
    const MemorySpec& spec = state.spec;
    if (!spec.is_mlp()) {
        product(x, state.first(memory), answer);
        return;
    }
    Scope scope(arena);
    Matrix middle = arena.take(x.rows, spec.hidden);
    hidden(activations, middle);
    const bool residual = memory < spec.vectors;
    if (residual) copy(x, answer);
    product(middle, state.second(memory), answer, residual ? ADD : SET);
}

inline void retrieve(Arena& arena, const State& state, int memory, Matrix x, const Activations& activations,
                     Matrix answer) {
    retrieve_first(state, memory, x, activations);
    retrieve_second(arena, state, memory, x, activations, answer);
}

// Adds to the gradients of the weights and of x.
inline void retrieve_back(Arena& arena, const State& state, int memory, Matrix x, const Activations& activations,
                          Matrix d_answer,
                     const State& d_state, Matrix d_x) {
    const MemorySpec& spec = state.spec;
    Scope scope(arena);
    Matrix d_pre = d_answer;
    if (spec.is_mlp()) {
        Matrix middle = arena.take(x.rows, spec.hidden);
        d_pre = arena.take(x.rows, spec.hidden);
        hidden(activations, middle);
        product_t(middle, d_answer, d_state.second(memory), ADD);
        product(d_answer, transposed(arena, state.second(memory)), d_pre);
        for (int i = 0; i < x.rows; ++i)
            for (int j = 0; j < spec.hidden; j += LANES) {
                float* at = d_pre.row(i) + j;
                store(at, load(at) * slope(load(activations.pre.row(i) + j), load(activations.gate.row(i) + j)));
            }
        if (memory < spec.vectors)
            for (int i = 0; i < x.rows; ++i) add_scaled(d_x.row(i), 1, d_answer.row(i), x.width);
    }
    product_t(x, d_pre, d_state.first(memory), ADD);
    product(d_pre, transposed(arena, state.first(memory)), d_x, ADD);
}

// Scales rows to unit length; keeps the factors.
inline void normalize(Matrix x, float* factors) {
    for (int i = 0; i < x.rows; ++i) {
        float* row = x.row(i);
        factors[i] = unit_scale(row, x.width);
        for (int j = 0; j < x.width; j += LANES) store(row + j, factors[i] * load(row + j));
    }
}

// Turns the gradient of unit rows y into that of what they were made of.
inline void normalize_back(Matrix y, const float* factors, Matrix d) {
    for (int i = 0; i < y.rows; ++i) {
        const float along = dot(y.row(i), d.row(i), y.width);
        for (int j = 0; j < y.width; j += LANES)
            store(d.row(i) + j, factors[i] * (load(d.row(i) + j) - along * load(y.row(i) + j)));
    }
}

// One of k, v, q: the stream itself, or the unit answer of a memory to it.
struct Projection {
    int memory;  // -1: none
    Matrix input, output;
    Activations activations;
    float* factors;
};

inline Projection take_projection(Arena& arena, const MemorySpec& spec, int memory, Matrix input) {
    if (memory < 0) return {memory, input, input, {}, nullptr};
    return {memory, input, arena.take(input.rows, spec.dim), take_activations(arena, spec, input.rows),
            arena.numbers(spec.chunk)};
}

inline void make(Arena& arena, const State& state, Projection& x) {
    if (x.memory < 0) return;
    retrieve(arena, state, x.memory, x.input, x.activations, x.output);
    normalize(x.output, x.factors);
}

// Turns the gradient of the output into that of the input, `d_input`. Overwrites the former.
inline void make_back(Arena& arena, const State& state, const Projection& x, Matrix d_output, const State& d_state,
                      Matrix d_input) {
    if (x.memory < 0) {
        copy(d_output, d_input);
        return;
    }
    normalize_back(x.output, x.factors, d_output);
    fill(d_input, 0);
    retrieve_back(arena, state, x.memory, x.input, x.activations, d_output, d_state, d_input);
}

}  // namespace hopescale
