// One chunk of all memories of a head: what it computes, and the way back through it.
#pragma once
#include "writes.h"

namespace hopescale {

constexpr int MOST_MEMORIES = 6;

// Rows of one chunk of a head's streams, or of their gradients. Without retention or momentum there are no such gates.
struct Streams {
    Matrix k, v, q;
    float *eta, *alpha, *mu;
};

inline Streams rows_of(const Streams& x, int begin, int count) {
    const auto from = [&](float* gate) { return gate ? gate + begin : nullptr; };
    return {x.k.block(begin, count), x.v.block(begin, count), x.q.block(begin, count),
            from(x.eta),             from(x.alpha),           from(x.mu)};
}

// What a chunk computes and its way back needs again.
struct Chunk {
    Made k, v, q;
    Asked narrow[MOST_MEMORIES];  // of the memories that gates come from
    Tables tables;
    float* fresh;
    Asked at_k, at_v;             // results of the first layers for keys and values [c, R]
    Layer first, second[MOST_MEMORIES];
    MlpWrites writes[MOST_MEMORIES];
    LinearWrites linear_writes;
    Queried first_read, second_read;
    Asked inner;                  // what the first read of an MLP memory gave; of a boundary read, what was asked

    Source source() const { return {k.output, v.output, fresh}; }
    Layer mem(const Rule& rule) const { return first.columns(0, rule.rows()); }
};

inline Chunk take_chunk(Arena& arena, const Rule& rule, const Streams& streams) {
    const int c = streams.k.rows, width = rule.width();
    Chunk x{};
    x.k = take_made(arena, rule, rule.of_k, streams.k);
    x.v = take_made(arena, rule, rule.of_v, streams.v);
    x.q = take_made(arena, rule, rule.of_q, streams.q);
    for (int m = rule.wide; m < rule.memories(); ++m) x.narrow[m] = take_asked(arena, rule, c);
    x.tables = take_tables(arena, rule, c);
    x.fresh = arena.numbers(rule.chunk);
    x.first = take_layer(arena, rule, x.k.output, width);
    x.at_k.pre = x.first.answers;
    if (rule.own_target) x.at_v.pre = arena.take(c, width);
    x.inner = {arena.take(c, rule.rows()), arena.take(c, rule.rows())};
    x.first_read = take_queried(arena, rule, x.q.output, rule.rows());
    if (!rule.is_mlp()) {
        x.linear_writes = take_linear_writes(arena, rule, c);
        return x;
    }
    x.at_k.gate = arena.take(c, width);
    if (rule.own_target) x.at_v.gate = arena.take(c, width);
    for (int m = 0; m < rule.memories(); ++m) {
        const auto part = [&](Matrix whole) { return whole ? whole.columns(m * rule.hidden, rule.hidden) : whole; };
        x.writes[m] = take_mlp_writes(arena, rule, m, {part(x.at_k.pre), part(x.at_k.gate)},
                                      {part(x.at_v.pre), part(x.at_v.gate)});
        x.second[m] = take_layer(arena, rule, arena.take(c, rule.hidden), rule.outputs(m));
    }
    x.second_read = take_queried(arena, rule, arena.take(c, rule.hidden), rule.dim);
    return x;
}

inline float logistic(float x) { return 1 / (1 + std::exp(-x)); }

// Makes keys, values, queries and gates (Nested Learning, Eq. 90).
inline void make_inputs(Arena& arena, const State& state, const Streams& streams, Chunk& x) {
    const Rule& rule = state.rule;
    for (Made* made : {&x.k, &x.v, &x.q}) make(arena, state, *made);
    Scope scope(arena);
    const int c = x.tables.size;
    Matrix answers[2];
    for (int n = 0; n < (rule.is_mlp() ? rule.narrow : rule.narrow > 0); ++n) {
        answers[n] = arena.take(c, LANES);
        ask(arena, state, rule.wide + n, streams.k, x.narrow[rule.wide + n], answers[n]);
    }
    const auto added = [&](int memory, int t) {
        if (memory < 0) return 0.0f;
        return rule.is_mlp() ? answers[memory - rule.wide].row(t)[0] : answers[0].row(t)[memory - rule.wide];
    };
    for (int t = 0; t < c; ++t) {
        x.tables.eta[t] = rule.eta_max * logistic(streams.eta[t] + added(rule.of_eta, t));
        x.tables.alpha[t] = rule.retention ? logistic(streams.alpha[t] + added(rule.of_alpha, t)) : 1;
        if (rule.momentum) x.tables.mu[t] = logistic(streams.mu[t]);
        x.fresh[t] = rule.momentum ? 1 - x.tables.mu[t] : 1;
    }
}

// Asks mem with the queries. All that the way back needs is known then.
inline void query_mem(Arena& arena, const State& state, Chunk& x) {
    const Rule& rule = state.rule;
    if (rule.read == BOUNDARY) {
        ask_first(state, 0, x.q.output, x.inner);
        return;
    }
    query(arena, rule, x.mem(rule), x.first_read);
    if (!rule.is_mlp()) return;
    read(arena, rule, x.tables, x.mem(rule), x.first_read, x.inner.pre);
    sigmoids(x.inner.pre, x.inner.gate);
    hidden(x.inner, x.second_read.q);
    query(arena, rule, x.second[0], x.second_read);
}

// Computes all that the way back needs, and what the layers hold. `surprise` gets the norms of mem's errors.
inline void run(Arena& arena, const State& state, const State& momentum, const Streams& streams, Chunk& x,
                float* surprise) {
    const Rule& rule = state.rule;
    make_inputs(arena, state, streams, x);
    fill_tables(x.tables);
    x.first.state = state.first(), x.first.momentum = momentum.first();
    product(x.k.output, x.first.state, x.at_k.pre);
    if (rule.own_target) product(x.v.output, x.first.state, x.at_v.pre);
    open_layer(arena, rule, x.tables, x.first);
    if (rule.is_mlp()) {
        sigmoids(x.at_k.pre, x.at_k.gate);
        if (rule.own_target) sigmoids(x.at_v.pre, x.at_v.gate);
    } else {
        linear_writes(rule, x.source(), x.at_k.pre, x.at_v.pre, x.linear_writes, x.first.values, surprise);
    }
    for (int m = 0; m < rule.seconds(); ++m) {
        Layer& layer = x.second[m];
        layer.state = state.second(m), layer.momentum = momentum.second(m);
        mlp_writes(arena, rule, m, layer.state, x.source(), x.writes[m],
                   x.first.values.columns(m * rule.hidden, rule.hidden), layer, m ? nullptr : surprise);
        open_layer(arena, rule, x.tables, layer);
        hold(arena, rule, x.tables, layer, false);
    }
    hold(arena, rule, x.tables, x.first, true);
    query_mem(arena, state, x);
}

// What mem answers to the queries.
inline void answer(Arena& arena, const State& state, const Chunk& x, Matrix y) {
    const Rule& rule = state.rule;
    if (rule.read == BOUNDARY) {
        ask_second(arena, state, 0, x.q.output, x.inner, y);
        return;
    }
    const bool mlp = rule.is_mlp();
    read(arena, rule, x.tables, mlp ? x.second[0] : x.mem(rule), mlp ? x.second_read : x.first_read, y);
    if (!mlp) return;
    for (int t = 0; t < y.rows; ++t) add_scaled(y.row(t), 1, x.q.output.row(t), y.width);
}

// Moves all memories over the chunk.
inline void advance(Arena& arena, const Rule& rule, const Chunk& x, const State& state, const State& momentum) {
    move(arena, rule, x.tables, x.first, state.first(), momentum.first());
    for (int m = 0; m < rule.seconds(); ++m)
        move(arena, rule, x.tables, x.second[m], state.second(m), momentum.second(m));
}

}  // namespace hopescale
