// The way back through a layer (layer.h). Gradients are added to what is there.
#pragma once
#include "layer.h"

namespace hopescale {

struct LayerGrads {
    Matrix keys, state, momentum, values, held;

    LayerGrads columns(int first, int count) const {
        LayerGrads part = *this;
        for (Matrix* x : {&part.state, &part.momentum, &part.values, &part.held})
            if (*x) *x = x->columns(first, count);
        return part;
    }
};

// sums[t, s] += factor * x[t, s] * y[t, s] for s < t (s <= t with the diagonal).
inline void add_below(float factor, Matrix x, Matrix y, Matrix sums, bool diagonal) {
    for (int t = 0; t < x.rows; ++t)
        for (int s = 0; s < t + diagonal; s += LANES) {
            const Lanes product = factor * load(x.row(t) + s) * load(y.row(t) + s);
            store(sums.row(t) + s, load(sums.row(t) + s) + first_lanes(t + diagonal - s, product));
        }
}

// Through what a product with `similar` and its weights gave: `d_weights`, the gradient of `weight o similar`, adds to
// that of the weight and of `similar`.
inline void weigh_back(float factor, Matrix d_weights, Matrix weight, Matrix similar, Matrix d_weight, Matrix d_similar,
                       bool diagonal) {
    add_below(factor, d_weights, similar, d_weight, diagonal);
    add_below(factor, d_weights, weight, d_similar, diagonal);
}

// Back through `read`.
inline void read_back(Arena& arena, const MemorySpec& spec, const DecayWeights& decay, const Layer& x,
                      const Queried& read,
                      Matrix d_output, Matrix d_q, LayerGrads d, TableGrads& d_decay) {
    Scope scope(arena);
    const int c = read.q.rows, after = spec.read == INCLUSIVE;
    const Reading at = reading(spec, decay);
    Matrix rows = arena.take(c, d_output.width), weights = arena.take(c, read.similar.width);
    Matrix d_weights = arena.take(c, read.similar.width), d_similar = arena.take(c, read.similar.width);
    const auto answered = [&](const float* scale, Matrix answers, Matrix state, Matrix d_state, float* d_scale) {
        Scope inner(arena);
        add_row_dots(1, d_output, answers, d_scale);
        scale_rows(1, scale, d_output, rows);
        product_t(read.q, rows, d_state, ADD);
        product(rows, transposed(arena, state), d_q, ADD);
    };
    answered(at.start, read.answers, x.state, d.state, d_decay.start + after);
    if (spec.momentum) answered(at.push, read.pushes, x.momentum, d.momentum, d_decay.push + after);
    fill(d_similar, 0);
    const auto weighed = [&](float sign, Matrix weight, Matrix values, Matrix d_values, Matrix d_weight) {
        Scope inner(arena);
        weigh(weight, read.similar, weights, at.diagonal);
        product_t(weights, d_output, d_values, sign > 0 ? ADD : SUBTRACT, LEFT_UPPER);
        product(d_output, transposed(arena, values), d_weights, SET, RESULT_LOWER);
        weigh_back(sign, d_weights, weight, read.similar, d_weight.block(after, c), d_similar, at.diagonal);
    };
    weighed(1, at.write, x.values, d.values, d_decay.write);
    if (spec.erase) weighed(-1, at.erase, x.held, d.held, d_decay.erase);
    product(d_similar, x.keys, d_q, ADD, LEFT_LOWER);
    product_t(d_similar, read.q, d.keys, ADD, LEFT_UPPER);
}

// Back through `move`, the first step of the way back: turns gradients of state and momentum after the chunk into those
// before it, and sets those of `values` and `held`. The other steps add.
inline void move_back(Arena& arena, const MemorySpec& spec, const DecayWeights& decay, const Layer& x, LayerGrads& d,
                      TableGrads& d_decay) {
    Scope scope(arena);
    const int c = decay.size;
    const float *write = decay.write.row(c), *erase = decay.erase.row(c);
    Matrix rows = arena.take(c, x.values.width), d_rows = arena.take(c, x.values.width);
    {
        Scope inner(arena);
        entering(spec, decay, x, rows);
        product(x.keys, d.state, d_rows);
        product(rows, transposed(arena, d.state), d.keys, ADD);
    }
    scale_rows(1, write, d_rows, d.values);
    add_row_dots(1, d_rows, x.values, d_decay.write.row(c));
    if (spec.erase) {
        scale_rows(-1, erase, d_rows, d.held);
        add_row_dots(-1, d_rows, x.held, d_decay.erase.row(c));
    }
    d_decay.start[c] += matrix_dot(d.state, x.state);
    if (spec.momentum) {
        Scope inner(arena);
        d_decay.push[c] += matrix_dot(d.state, x.momentum);
        d_decay.momentum_decay += matrix_dot(d.momentum, x.momentum);
        scale_rows(1, decay.last_push(), x.values, rows);
        product(x.keys, d.momentum, d_rows);
        product(rows, transposed(arena, d.momentum), d.keys, ADD);
        scale_rows(1, decay.last_push(), d_rows, d.values, ADD);
        add_row_dots(1, d_rows, x.values, d_decay.last_push);
        combine(decay.momentum_decay(), d.momentum, decay.push[c], d.state, d.momentum);
    }
    combine(decay.start[c], d.state, 0, {}, d.state);
}

// Back through `hold` and `open_layer`, from the gradient of `held`. Leaves the gradient of `answers` in `d_answers`,
// for the caller to take through the product with the state.
inline void hold_back(Arena& arena, const MemorySpec& spec, const DecayWeights& decay, const Layer& x, LayerGrads& d,
                      TableGrads& d_decay, Matrix d_answers) {
    if (!spec.erase) {
        fill(d_answers, 0);
        return;
    }
    Scope scope(arena);
    const int c = decay.size, width = x.similar.width;
    Matrix d_sum = arena.take(c, x.values.width), rows = arena.take(c, x.values.width);
    Matrix weights = arena.take(c, width), d_weights = arena.take(c, width), d_similar = arena.take(c, width);
    product_t(x.inverse, d.held, d_sum, SET, LEFT_UPPER);
    fill(d_similar, 0);
    const auto weighed = [&](float sign, Matrix weight, Matrix right, Matrix d_weight) {
        Scope inner(arena);
        product(d_sum, transposed(arena, right), d_weights, SET, RESULT_LOWER);
        weigh_back(sign, d_weights, weight, x.similar, d_weight, d_similar, false);
    };
    weighed(-1, decay.erase, x.held, d_decay.erase);
    weighed(1, decay.write, x.values, d_decay.write);
    weigh(decay.write, x.similar, weights);
    product_t(weights, d_sum, d.values, ADD, LEFT_UPPER);
    product(d_similar, x.keys, d.keys, ADD, LEFT_LOWER);
    product_t(d_similar, x.keys, d.keys, ADD, LEFT_UPPER);
    add_row_dots(1, d_sum, x.answers, d_decay.start);
    scale_rows(1, decay.start, d_sum, d_answers);
    if (!spec.momentum) return;
    add_row_dots(1, d_sum, x.pushes, d_decay.push);
    scale_rows(1, decay.push, d_sum, rows);
    product_t(x.keys, rows, d.momentum, ADD);
    product(rows, transposed(arena, x.momentum), d.keys, ADD);
}

}  // namespace hopescale
