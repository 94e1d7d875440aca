// One linear layer during one chunk: what its keys hold, what is written, what a query reads, and the way back.
#pragma once
#include "decay.h"

namespace hopescale {

struct Layer {
    Matrix keys, state, momentum;  // [c, K], [K, Do]; no momentum, no `pushes`
    Matrix values;                 // what is written [c, Do]
    Matrix answers, pushes;        // what keys read of state and momentum [c, Do]
    Matrix held;                   // what they read before each write, what was erased before taken off [c, Do]
    Matrix similar, inverse;       // keys @ keys^T, and the inverse of I + erase o that [c, c]

    Layer columns(int first, int count) const {
        Layer part = *this;
        for (Matrix* x : {&part.state, &part.momentum, &part.values, &part.answers, &part.pushes, &part.held})
            if (*x) *x = x->columns(first, count);
        return part;
    }
};

inline Layer take_layer(Arena& arena, const MemorySpec& spec, Matrix keys, int outputs) {
    const int c = keys.rows;
    Layer x{};
    x.keys = keys;
    x.values = arena.take(c, outputs);
    x.answers = arena.take(c, outputs);
    if (spec.momentum) x.pushes = arena.take(c, outputs);
    if (spec.erase) {
        x.held = arena.take(c, outputs);
        x.similar = arena.take(c, padded(spec.chunk));
        x.inverse = arena.take(c, padded(spec.chunk));
    }
    return x;
}

// result[t, s] = weight[t, s] * x[t, s] for s < t (s <= t with the diagonal), 0 from there to the end of BLOCK columns:
// a product with LEFT_LOWER or LEFT_UPPER looks no further.
inline void weigh(Matrix weight, Matrix x, Matrix result, bool diagonal = false) {
    for (int t = 0; t < x.rows; ++t)
        for (int s = 0; s < padded(t + 1); s += LANES)
            store(result.row(t) + s, first_lanes(t + diagonal - s, load(weight.row(t) + s) * load(x.row(t) + s)));
}

// result[t] (=, +=) factor * scale[t] * x[t]
inline void scale_rows(float factor, const float* scale, Matrix x, Matrix result, Update update = SET) {
    for (int t = 0; t < x.rows; ++t)
        for (int j = 0; j < x.width; j += LANES) {
            const Lanes value = factor * scale[t] * load(x.row(t) + j);
            store(result.row(t) + j, update == SET ? value : load(result.row(t) + j) + value);
        }
}

// sums[t] += factor * <x[t], y[t]>
inline void add_row_dots(float factor, Matrix x, Matrix y, float* sums) {
    for (int t = 0; t < x.rows; ++t) sums[t] += factor * dot(x.row(t), y.row(t), x.width);
}

inline float matrix_dot(Matrix x, Matrix y) {
    Lanes sum{};
    for (int i = 0; i < x.rows; ++i)
        for (int j = 0; j < x.width; j += LANES) sum += load(x.row(i) + j) * load(y.row(i) + j);
    return total(sum);
}

// Inverse of I + x for x strictly lower triangular, a block of LANES rows after the other.
inline void invert_unit_lower(Arena& arena, Matrix x, Matrix result) {
    Scope scope(arena);
    Matrix carried = arena.take(LANES, x.width);
    fill(result, 0);
    for (int begin = 0; begin < x.rows; begin += LANES) {
        const int count = x.rows - begin < LANES ? x.rows - begin : LANES;
        Matrix own = result.columns(begin, LANES).block(begin, count);
        for (int i = 0; i < count; ++i) {
            Lanes row{};
            row[i] = 1;
            for (int j = 0; j < i; ++j) row -= x.row(begin + i)[begin + j] * load(own.row(j));
            store(own.row(i), row);
        }
        if (!begin) continue;
        Matrix before = carried.columns(0, begin).block(0, count);
        product(x.columns(0, begin).block(begin, count), result.columns(0, begin).block(0, begin), before);
        product(own, before, result.columns(0, begin).block(begin, count), SUBTRACT, LEFT_LOWER);
    }
}

// Compares keys with each other; inverts what erasing does to later reads.
inline void open_layer(Arena& arena, const MemorySpec& spec, const DecayWeights& decay, Layer& x) {
    if (!spec.erase) return;
    Scope scope(arena);
    product(x.keys, transposed(arena, x.keys), x.similar, SET, RESULT_LOWER);
    Matrix system = arena.take(x.keys.rows, x.similar.width);
    weigh(decay.erase, x.similar, system);
    invert_unit_lower(arena, system, x.inverse);
}

// Reads the momentum. The state before a first token holds nothing of it, unless a token reads the one after itself.
inline void ask_momentum(Matrix keys, Matrix momentum, Matrix pushes, bool after) {
    if (keys.rows > 1 || after)
        product(keys, momentum, pushes);
    else
        fill(pushes, 0);
}

// Computes `held`, and `answers` and `pushes` on the way; `answers` of the first layer are known.
inline void hold(Arena& arena, const MemorySpec& spec, const DecayWeights& decay, Layer& x, bool answered) {
    if (!spec.erase) return;
    Scope scope(arena);
    const int c = x.keys.rows;
    if (!answered) product(x.keys, x.state, x.answers);
    Matrix weights = arena.take(c, x.similar.width), sum = arena.take(c, x.values.width);
    weigh(decay.write, x.similar, weights);
    product(weights, x.values, sum, SET, LEFT_LOWER);
    scale_rows(1, decay.start, x.answers, sum, ADD);
    if (spec.momentum) {
        ask_momentum(x.keys, x.momentum, x.pushes, false);
        scale_rows(1, decay.push, x.pushes, sum, ADD);
    }
    product(x.inverse, sum, x.held, SET, LEFT_LOWER);
}

// What enters the state with each key, `write[c] o values - erase[c] o held`.
inline void entering(const MemorySpec& spec, const DecayWeights& decay, const Layer& x, Matrix result) {
    const float *write = decay.write.row(decay.size), *erase = decay.erase.row(decay.size);
    for (int t = 0; t < result.rows; ++t)
        for (int j = 0; j < result.width; j += LANES) {
            Lanes value = write[t] * load(x.values.row(t) + j);
            if (spec.erase) value -= erase[t] * load(x.held.row(t) + j);
            store(result.row(t) + j, value);
        }
}

// result = a * x + b * y; y may be missing.
inline void combine(float a, Matrix x, float b, Matrix y, Matrix result) {
    for (int i = 0; i < x.rows; ++i)
        for (int j = 0; j < x.width; j += LANES) {
            Lanes value = a * load(x.row(i) + j);
            if (y) value += b * load(y.row(i) + j);
            store(result.row(i) + j, value);
        }
}

// result = a * x + b * y + key^T row; y may be missing. One pass where a product would take another.
inline void combine_one(float a, Matrix x, float b, Matrix y, const float* key, const float* row, Matrix result) {
    for (int i = 0; i < x.rows; ++i)
        for (int j = 0; j < x.width; j += LANES) {
            Lanes value = a * load(x.row(i) + j);
            if (y) value += b * load(y.row(i) + j);
            store(result.row(i) + j, value + key[i] * load(row + j));
        }
}

// Writes the state and the momentum after the chunk.
inline void move(Arena& arena, const MemorySpec& spec, const DecayWeights& decay, const Layer& x, Matrix state,
                 Matrix momentum) {
    Scope scope(arena);
    const int c = decay.size;
    Matrix rows = arena.take(c, x.values.width);
    entering(spec, decay, x, rows);
    if (c == 1) {
        const float push = spec.momentum ? decay.push[1] : 0;
        combine_one(decay.start[1], x.state, push, x.momentum, x.keys.data, rows.data, state);
        if (!spec.momentum) return;
        scale_rows(1, decay.last_push(), x.values, rows);
        combine_one(decay.momentum_decay(), x.momentum, 0, {}, x.keys.data, rows.data, momentum);
        return;
    }
    combine(decay.start[c], x.state, spec.momentum ? decay.push[c] : 0, x.momentum, state);
    product_t(x.keys, rows, state, ADD);
    if (!spec.momentum) return;
    scale_rows(1, decay.last_push(), x.values, rows);
    combine(decay.momentum_decay(), x.momentum, 0, {}, momentum);
    product_t(x.keys, rows, momentum, ADD);
}

// What reading takes from the tables: rows of the states that tokens read.
struct Reading {
    const float *start, *push;
    Matrix erase, write;
    bool diagonal;
};

inline Reading reading(const MemorySpec& spec, const DecayWeights& x) {
    const int after = spec.read == INCLUSIVE;
    const float* push = x.mu ? x.push + after : nullptr;
    return {x.start + after, push, x.erase.block(after, x.size), x.write.block(after, x.size), after > 0};
}

// What a read computes and its way back needs again.
struct Queried {
    Matrix q, answers, pushes, similar;
};

inline Queried take_queried(Arena& arena, const MemorySpec& spec, Matrix q, int outputs) {
    Queried x{q, arena.take(q.rows, outputs), {}, arena.take(q.rows, padded(spec.chunk))};
    if (spec.momentum) x.pushes = arena.take(q.rows, outputs);
    return x;
}

// Asks with one query per token, and compares queries with keys.
inline void query(Arena& arena, const MemorySpec& spec, const Layer& x, Queried& read) {
    Scope scope(arena);
    product(read.q, transposed(arena, x.keys), read.similar, SET, RESULT_LOWER);
    product(read.q, x.state, read.answers);
    if (spec.momentum) ask_momentum(read.q, x.momentum, read.pushes, spec.read == INCLUSIVE);
}

// Reads what a query asked for.
inline void read(Arena& arena, const MemorySpec& spec, const DecayWeights& decay, const Layer& x, const Queried& read,
                 Matrix output) {
    Scope scope(arena);
    const Reading at = reading(spec, decay);
    Matrix weights = arena.take(read.q.rows, read.similar.width);
    weigh(at.write, read.similar, weights, at.diagonal);
    product(weights, x.values, output, SET, LEFT_LOWER);
    if (spec.erase) {
        weigh(at.erase, read.similar, weights, at.diagonal);
        product(weights, x.held, output, SUBTRACT, LEFT_LOWER);
    }
    scale_rows(1, at.start, read.answers, output, ADD);
    if (spec.momentum) scale_rows(1, at.push, read.pushes, output, ADD);
}

}  // namespace hopescale
