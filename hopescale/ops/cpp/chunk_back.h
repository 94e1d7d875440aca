// The way back through a chunk (chunk.h).
#pragma once
#include "chunk.h"

namespace hopescale {

inline Matrix zeros(Arena& arena, int rows, int width) {
    Matrix x = arena.take(rows, width);
    fill(x, 0);
    return x;
}

inline LayerGrads take_layer_grads(Arena& arena, const MemorySpec& spec, const Layer& x, Matrix keys, Matrix state,
                                   Matrix momentum) {
    const int c = x.keys.rows, width = x.values.width;
    return {keys, state, momentum, arena.take(c, width), spec.erase ? arena.take(c, width) : Matrix{}};
}

inline LayerGrads second_grads(Arena& arena, const MemorySpec& spec, const Chunk& x, int memory, const State& d_state,
                               const State& d_momentum) {
    Matrix keys = zeros(arena, x.decay.size, spec.hidden);
    return take_layer_grads(arena, spec, x.second[memory], keys, d_state.second(memory), d_momentum.second(memory));
}

inline void answer_back(Arena& arena, const State& state, const Chunk& x, Matrix d_y, const State& d_state, Matrix d_q,
                        LayerGrads& d_first, LayerGrads& d_second, TableGrads& d_decay) {
    const MemorySpec& spec = state.spec;
    if (spec.read == BOUNDARY) {
        retrieve_back(arena, state, 0, x.q.output, x.inner, d_y, d_state, d_q);
        return;
    }
    const LayerGrads d_mem = d_first.columns(0, spec.rows());
    if (!spec.is_mlp()) {
        read_back(arena, spec, x.decay, x.mem(spec), x.first_read, d_y, d_q, d_mem, d_decay);
        return;
    }
    Scope scope(arena);
    Matrix d_inner = zeros(arena, d_y.rows, spec.hidden);
    for (int t = 0; t < d_y.rows; ++t) add_scaled(d_q.row(t), 1, d_y.row(t), d_y.width);
    read_back(arena, spec, x.decay, x.second[0], x.second_read, d_y, d_inner, d_second, d_decay);
    for (int t = 0; t < d_y.rows; ++t)
        for (int j = 0; j < spec.hidden; j += LANES) {
            float* at = d_inner.row(t) + j;
            store(at, load(at) * slope(load(x.inner.pre.row(t) + j), load(x.inner.gate.row(t) + j)));
        }
    read_back(arena, spec, x.decay, x.mem(spec), x.first_read, d_inner, d_q, d_mem, d_decay);
}

// Through keys that were asked at the chunk's first state: answers = x @ state.
inline void answers_back(Arena& arena, Matrix x, Matrix state, Matrix d_answers, Matrix d_state, Matrix d_x) {
    Scope scope(arena);
    product_t(x, d_answers, d_state, ADD);
    product(d_answers, transposed(arena, state), d_x, ADD);
}

inline void gates_back(Arena& arena, const State& state, const Streams& streams, const Chunk& x, const TableGrads& d,
                       const State& d_state, const Streams& d_streams) {
    const MemorySpec& spec = state.spec;
    Scope scope(arena);
    const int c = x.decay.size;
    Matrix d_answers[2];
    for (int n = 0; n < spec.gates; ++n) d_answers[n] = n && !spec.is_mlp() ? d_answers[0] : zeros(arena, c, BLOCK);
    const auto add = [&](int memory, int t, float d_logit) {
        if (memory >= 0) d_answers[memory - spec.vectors].row(t)[spec.is_mlp() ? 0 : memory - spec.vectors] = d_logit;
        return d_logit;
    };
    for (int t = 0; t < c; ++t) {
        const float eta = x.decay.eta[t], alpha = x.decay.alpha[t];
        d_streams.eta[t] = add(spec.of_eta, t, d.eta[t] * eta * (1 - eta / spec.eta_max));
        if (spec.retention) d_streams.alpha[t] = add(spec.of_alpha, t, d.alpha[t] * alpha * (1 - alpha));
        if (spec.momentum) d_streams.mu[t] = d.mu[t] * x.decay.mu[t] * (1 - x.decay.mu[t]);
    }
    for (int n = 0; n < (spec.is_mlp() ? spec.gates : spec.gates > 0); ++n)
        retrieve_back(arena, state, spec.vectors + n, streams.k, x.gate_activations[spec.vectors + n], d_answers[n],
                      d_state, d_streams.k);
}

// Turns gradients of state and momentum after the chunk into those before it, and writes those of the streams.
inline void back(Arena& arena, const State& state, const Streams& streams, const Chunk& x, Matrix d_y,
                 const State& d_state, const State& d_momentum, const Streams& d_streams) {
    const MemorySpec& spec = state.spec;
    Scope scope(arena);
    const int c = x.decay.size, width = spec.width();
    TableGrads d_decay = take_table_grads(arena, x.decay);
    SourceGrads d{zeros(arena, c, spec.dim), zeros(arena, c, spec.dim), zeros(arena, 1, padded(spec.chunk)).data};
    Matrix d_q = zeros(arena, c, spec.dim), d_pre = arena.take(c, width), d_pre_v;
    if (spec.own_target) d_pre_v = arena.take(c, width);
    LayerGrads d_first = take_layer_grads(arena, spec, x.first, d.k, d_state.first(), d_momentum.first()), d_mem{};
    move_back(arena, spec, x.decay, x.first, d_first, d_decay);
    if (spec.is_mlp()) {
        d_mem = second_grads(arena, spec, x, 0, d_state, d_momentum);
        move_back(arena, spec, x.decay, x.second[0], d_mem, d_decay);
    }
    answer_back(arena, state, x, d_y, d_state, d_q, d_first, d_mem, d_decay);
    hold_back(arena, spec, x.decay, x.first, d_first, d_decay, d_pre);
    for (int m = 0; m < spec.seconds(); ++m) {
        Scope inner(arena);
        LayerGrads own = m ? second_grads(arena, spec, x, m, d_state, d_momentum) : d_mem;
        if (m) move_back(arena, spec, x.decay, x.second[m], own, d_decay);
        const Layer& layer = x.second[m];
        const auto part = [&](Matrix whole) { return whole ? whole.columns(m * spec.hidden, spec.hidden) : whole; };
        if (spec.erase) {
            Matrix d_answers = arena.take(c, layer.values.width);
            hold_back(arena, spec, x.decay, layer, own, d_decay, d_answers);
            answers_back(arena, layer.keys, layer.state, d_answers, own.state, own.keys);
        }
        mlp_writes_back(arena, spec, m, layer.state, x.source(), x.writes[m], layer, part(d_first.values), own, d,
                        own.state, part(d_pre), part(d_pre_v));
    }
    if (!spec.is_mlp()) linear_writes_back(spec, x.source(), x.linear_writes, d_first.values, d, d_pre, d_pre_v);
    answers_back(arena, x.k.output, state.first(), d_pre, d_state.first(), d.k);
    if (spec.own_target) answers_back(arena, x.v.output, state.first(), d_pre_v, d_state.first(), d.v);
    tables_back(arena, x.decay, d_decay);
    if (spec.averaged)
        for (int t = 0; t < c; ++t) d_decay.mu[t] -= d.fresh[t];
    make_back(arena, state, x.k, d.k, d_state, d_streams.k);
    make_back(arena, state, x.v, d.v, d_state, d_streams.v);
    make_back(arena, state, x.q, d_q, d_state, d_streams.q);
    gates_back(arena, state, streams, x, d_decay, d_state, d_streams);
}

}  // namespace hopescale
