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
    Projection k, v, q;
    Activations gate_activations[MOST_MEMORIES];  // of the memories that gates come from
    DecayWeights decay;
    float* fresh;
    Activations at_k, at_v;             // results of the first layers for keys and values [c, R]
    Layer first, second[MOST_MEMORIES];
    MlpWrites writes[MOST_MEMORIES];
    LinearWrites linear_writes;
    Queried first_read, second_read;
    Activations inner;                  // what the first read of an MLP memory gave; of a boundary read, what was asked

    Source source() const { return {k.output, v.output, fresh}; }
    Layer mem(const MemorySpec& spec) const { return first.columns(0, spec.rows()); }
};

inline Chunk take_chunk(Arena& arena, const MemorySpec& spec, const Streams& streams) {
    const int c = streams.k.rows, width = spec.width();
    Chunk x{};
    x.k = take_projection(arena, spec, spec.of_k, streams.k);
    x.v = take_projection(arena, spec, spec.of_v, streams.v);
    x.q = take_projection(arena, spec, spec.of_q, streams.q);
    for (int m = spec.vectors; m < spec.memories(); ++m) x.gate_activations[m] = take_activations(arena, spec, c);
    x.decay = take_decay(arena, spec, c);
    x.fresh = arena.numbers(spec.chunk);
    x.first = take_layer(arena, spec, x.k.output, width);
    x.at_k.pre = x.first.answers;
    if (spec.own_target) x.at_v.pre = arena.take(c, width);
    x.inner = {arena.take(c, spec.rows()), arena.take(c, spec.rows())};
    x.first_read = take_queried(arena, spec, x.q.output, spec.rows());
    if (!spec.is_mlp()) {
        x.linear_writes = take_linear_writes(arena, spec, c);
        return x;
    }
    x.at_k.gate = arena.take(c, width);
    if (spec.own_target) x.at_v.gate = arena.take(c, width);
    for (int m = 0; m < spec.memories(); ++m) {
        const auto part = [&](Matrix whole) { return whole ? whole.columns(m * spec.hidden, spec.hidden) : whole; };
        x.writes[m] = take_mlp_writes(arena, spec, m, {part(x.at_k.pre), part(x.at_k.gate)},
                                      {part(x.at_v.pre), part(x.at_v.gate)});
        x.second[m] = take_layer(arena, spec, arena.take(c, spec.hidden), spec.outputs(m));
    }
    x.second_read = take_queried(arena, spec, arena.take(c, spec.hidden), spec.dim);
    return x;
}

inline float logistic(float x) { return 1 / (1 + std::exp(-x)); }

// Makes keys, values, queries and gates (Nested Learning, Eq. 90).
inline void make_inputs(Arena& arena, const State& boundary, const Streams& streams, Chunk& x) {
    const MemorySpec& spec = boundary.spec;
    for (Projection* projection : {&x.k, &x.v, &x.q}) make(arena, boundary, *projection);
    Scope scope(arena);
    const int c = x.decay.size;
    Matrix answers[2];
    for (int n = 0; n < (spec.is_mlp() ? spec.gates : spec.gates > 0); ++n) {
        answers[n] = arena.take(c, BLOCK);
        retrieve(arena, boundary, spec.vectors + n, streams.k, x.gate_activations[spec.vectors + n], answers[n]);
    }
    const auto added = [&](int memory, int t) {
        if (memory < 0) return 0.0f;
        return spec.is_mlp() ? answers[memory - spec.vectors].row(t)[0] : answers[0].row(t)[memory - spec.vectors];
    };
    for (int t = 0; t < c; ++t) {
        x.decay.eta[t] = spec.eta_max * logistic(streams.eta[t] + added(spec.of_eta, t));
        x.decay.alpha[t] = spec.retention ? logistic(streams.alpha[t] + added(spec.of_alpha, t)) : 1;
        if (spec.momentum) x.decay.mu[t] = logistic(streams.mu[t]);
        x.fresh[t] = spec.momentum ? 1 - x.decay.mu[t] : 1;
    }
}

// Asks mem with the queries. All that the way back needs is known then.
inline void query_mem(Arena& arena, const State& boundary, Chunk& x) {
    const MemorySpec& spec = boundary.spec;
    if (spec.read == BOUNDARY) {
        retrieve_first(boundary, 0, x.q.output, x.inner);
        return;
    }
    query(arena, spec, x.mem(spec), x.first_read);
    if (!spec.is_mlp()) return;
    read(arena, spec, x.decay, x.mem(spec), x.first_read, x.inner.pre);
    sigmoids(x.inner.pre, x.inner.gate);
    hidden(x.inner, x.second_read.q);
    query(arena, spec, x.second[0], x.second_read);
}

// Computes what a chunk writes and what the layers hold, of keys, values and gates that are made. Writes are gradients
// at `boundary`, the state that the chunk begins with; layers hold `state`, which is the same unless `x` is a LATER part
// of the chunk. `surprise` gets the norms of the first memory's errors.
template <bool LATER>
inline void write(Arena& arena, const State& boundary, const State& state, const State& momentum, Chunk& x,
                  float* surprise) {
    const MemorySpec& spec = state.spec;
    fill_tables(x.decay);
    x.first.state = state.first(), x.first.momentum = momentum.first();
    if (LATER) x.first.answers = arena.take(x.decay.size, spec.width());
    product(x.k.output, boundary.first(), x.at_k.pre);
    if (spec.own_target) product(x.v.output, boundary.first(), x.at_v.pre);
    open_layer(arena, spec, x.decay, x.first);
    if (spec.is_mlp()) {
        sigmoids(x.at_k.pre, x.at_k.gate);
        if (spec.own_target) sigmoids(x.at_v.pre, x.at_v.gate);
    } else {
        linear_writes(spec, x.source(), x.at_k.pre, x.at_v.pre, x.linear_writes, x.first.values, surprise);
    }
    for (int m = 0; m < spec.seconds(); ++m) {
        Layer& layer = x.second[m];
        layer.state = state.second(m), layer.momentum = momentum.second(m);
        mlp_writes(arena, spec, m, boundary.second(m), x.source(), x.writes[m],
                   x.first.values.columns(m * spec.hidden, spec.hidden), layer, m ? nullptr : surprise);
        open_layer(arena, spec, x.decay, layer);
        hold(arena, spec, x.decay, layer, false);
    }
    hold(arena, spec, x.decay, x.first, !LATER);
}

// Computes all that the way back needs, and what the layers hold. `surprise` gets the norms of mem's errors.
inline void run(Arena& arena, const State& state, const State& momentum, const Streams& streams, Chunk& x,
                float* surprise) {
    make_inputs(arena, state, streams, x);
    write<false>(arena, state, state, momentum, x, surprise);
    query_mem(arena, state, x);
}

// What mem answers to the queries.
inline void answer(Arena& arena, const State& boundary, const Chunk& x, Matrix y) {
    const MemorySpec& spec = boundary.spec;
    if (spec.read == BOUNDARY) {
        retrieve_second(arena, boundary, 0, x.q.output, x.inner, y);
        return;
    }
    const bool mlp = spec.is_mlp();
    read(arena, spec, x.decay, mlp ? x.second[0] : x.mem(spec), mlp ? x.second_read : x.first_read, y);
    if (!mlp) return;
    for (int t = 0; t < y.rows; ++t) add_scaled(y.row(t), 1, x.q.output.row(t), y.width);
}

// Moves all memories over the chunk.
inline void advance(Arena& arena, const MemorySpec& spec, const Chunk& x, const State& state, const State& momentum) {
    move(arena, spec, x.decay, x.first, state.first(), momentum.first());
    for (int m = 0; m < spec.seconds(); ++m)
        move(arena, spec, x.decay, x.second[m], state.second(m), momentum.second(m));
}

}  // namespace hopescale
