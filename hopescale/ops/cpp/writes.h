// What memories write: gradients of their inner loss at the chunk's first state (ops/self_modifying/inner_gradient.py), and back.
#pragma once
#include "retrieve.h"
#include "layer_back.h"

namespace hopescale {

// Keys, values and factors on writes of a chunk, and their gradients.
struct Source {
    Matrix k, v;
    const float* fresh;
};

struct SourceGrads {
    Matrix k, v;
    float* fresh;
};

// Errors of one memory, before they are capped, and by how much they are.
struct Errors {
    Matrix raw;
    float* scale;
};

// By how much an error of this squared length is capped; NaN stays NaN.
inline float cap_scale(const MemorySpec& spec, float square) {
    const float scale = spec.error_cap > 0 ? spec.error_cap / std::sqrt(square + CAP_EPS) : 1;
    return scale > 1 ? 1 : scale;
}

inline void cap(const MemorySpec& spec, Errors& x) {
    for (int t = 0; t < x.raw.rows; ++t)
        x.scale[t] = cap_scale(spec, dot(x.raw.row(t), x.raw.row(t), x.raw.width));
}

// Turns the gradient of capped errors into that of raw ones.
inline void cap_back(const Errors& x, Matrix d) {
    for (int t = 0; t < d.rows; ++t) {
        if (!(x.scale[t] < 1)) continue;
        const float* raw = x.raw.row(t);
        const float along = dot(raw, d.row(t), d.width) / (dot(raw, raw, d.width) + CAP_EPS);
        for (int j = 0; j < d.width; j += LANES)
            store(d.row(t) + j, x.scale[t] * (load(d.row(t) + j) - along * load(raw + j)));
    }
}

// An MLP memory's writes and what they are made of.
struct MlpWrites {
    Activations at_k, at_v;       // columns of what all memories compute at once; no `at_v` for given targets
    Matrix difference;      // what the second layer maps to the error [c, E]; missing if nothing
    Errors error;           // [c, Do]
    Matrix push;            // capped and fresh errors
    Matrix back;            // push @ second^T [c, E]
    float* norm;            // lengths of hidden activations
    float* shrink;          // factors on what is written to the first layer
};

constexpr float NO_PUSH = 1e-30f;  // _TINY of inner_gradient.py

// The length with which a second layer is written under a key that was `norm` long.
inline float written(const MemorySpec& spec, float norm) { return spec.normalized && norm > 1 ? 1 / norm : norm; }

inline MlpWrites take_mlp_writes(Arena& arena, const MemorySpec& spec, int memory, Activations at_k, Activations at_v) {
    const int c = at_k.pre.rows, outputs = spec.outputs(memory);
    MlpWrites x{at_k, at_v};
    if (spec.l2 || spec.own_target) x.difference = arena.take(c, spec.hidden);
    x.error = {arena.take(c, outputs), arena.numbers(spec.chunk)};
    x.push = arena.take(c, outputs);
    x.back = arena.take(c, spec.hidden);
    x.norm = arena.numbers(spec.chunk);
    x.shrink = arena.numbers(spec.chunk);
    return x;
}

inline float push_square(const MlpWrites& x, int t) {
    return std::max(dot(x.push.row(t), x.push.row(t), x.push.width), NO_PUSH);
}

inline void mlp_writes(Arena& arena, const MemorySpec& spec, int memory, Matrix second, const Source& from,
                       MlpWrites& x,
                       Matrix first_values, Layer& layer, float* surprise) {
    Scope scope(arena);
    const int c = from.k.rows, width = x.push.width;
    for (int t = 0; t < c; ++t) {
        float* key = layer.keys.row(t);
        Lanes square{};
        for (int j = 0; j < spec.hidden; j += LANES) {
            const Lanes at_k = load(x.at_k.pre.row(t) + j) * load(x.at_k.gate.row(t) + j);
            square += at_k * at_k;
            store(key + j, at_k);
            if (!x.difference) continue;
            Lanes difference = spec.l2 ? at_k : Lanes{};
            if (spec.own_target) difference -= load(x.at_v.pre.row(t) + j) * load(x.at_v.gate.row(t) + j);
            store(x.difference.row(t) + j, difference);
        }
        x.norm[t] = std::sqrt(total(square) + spec.key_eps);
        for (int j = 0; j < spec.hidden; j += LANES) store(key + j, load(key + j) / x.norm[t]);
    }
    if (x.difference)
        product(x.difference, second, x.error.raw);
    else
        fill(x.error.raw, 0);
    if (memory < spec.vectors)
        for (int t = 0; t < c; ++t) {
            if (spec.l2) add_scaled(x.error.raw.row(t), 1, from.k.row(t), width);
            add_scaled(x.error.raw.row(t), -1, from.v.row(t), width);
        }
    cap(spec, x.error);
    for (int t = 0; t < c; ++t) {
        if (surprise) surprise[t] = x.error.scale[t] * std::sqrt(dot(x.error.raw.row(t), x.error.raw.row(t), width));
        for (int j = 0; j < width; j += LANES) {
            const Lanes push = x.error.scale[t] * from.fresh[t] * load(x.error.raw.row(t) + j);
            store(x.push.row(t) + j, push);
            store(layer.values.row(t) + j, -written(spec, x.norm[t]) * push);
        }
    }
    product(x.push, transposed(arena, second), x.back);
    for (int t = 0; t < c; ++t) {
        float* first = first_values.row(t);
        for (int j = 0; j < spec.hidden; j += LANES)
            store(first + j, -load(x.back.row(t) + j) * slope(load(x.at_k.pre.row(t) + j), load(x.at_k.gate.row(t) + j)));
        x.shrink[t] = 1;
        if (!spec.normalized) continue;
        const float gain = dot(first, first, spec.hidden) / push_square(x, t);
        if (!(gain > 1)) continue;
        x.shrink[t] = 1 / gain;
        for (int j = 0; j < spec.hidden; j += LANES) store(first + j, x.shrink[t] * load(first + j));
    }
}

// Turns the gradient of what is written to the first layer into that of the write before it was made smaller. Returns the
// factor on the push that is the gradient of the push, as far as that decides how much smaller.
inline float shrink_back(const MemorySpec& spec, const MlpWrites& x, int t, float* d_first) {
    const float shrink = x.shrink[t];
    if (!(shrink < 1)) return 0;
    const float *pre = x.at_k.pre.row(t), *gate = x.at_k.gate.row(t), *back = x.back.row(t);
    const auto before = [&](int j) { return -load(back + j) * slope(load(pre + j), load(gate + j)); };
    Lanes sum{};
    for (int j = 0; j < spec.hidden; j += LANES) sum += load(d_first + j) * before(j);
    const float over = 2 * total(sum) * shrink / push_square(x, t);
    for (int j = 0; j < spec.hidden; j += LANES)
        store(d_first + j, shrink * (load(d_first + j) - over * before(j)));
    return over;
}

// Adds to `d_second`, to the gradient of the source and to that of the first layer's results for keys, `d_pre`; sets
// that of its results for values, `d_pre_v`. `d_values` and `d_keys` are of the second layer.
inline void mlp_writes_back(Arena& arena, const MemorySpec& spec, int memory, Matrix second, const Source& from,
                            const MlpWrites& x, const Layer& layer, Matrix d_first, const LayerGrads& d_layer,
                            SourceGrads& d, Matrix d_second, Matrix d_pre, Matrix d_pre_v) {
    Scope scope(arena);
    const int c = from.k.rows, width = x.push.width;
    Matrix d_back = arena.take(c, spec.hidden), d_error = arena.take(c, width), d_difference;
    float *d_norm = arena.numbers(spec.chunk), *d_push = arena.numbers(spec.chunk);
    for (int t = 0; t < c; ++t) {
        d_push[t] = shrink_back(spec, x, t, d_first.row(t));
        for (int j = 0; j < spec.hidden; j += LANES)
            store(d_back.row(t) + j,
                  -load(d_first.row(t) + j) * slope(load(x.at_k.pre.row(t) + j), load(x.at_k.gate.row(t) + j)));
    }
    product(d_back, second, d_error);
    product_t(d_back, x.push, d_second, ADD);
    for (int t = 0; t < c; ++t) {
        float *row = d_error.row(t), *raw = x.error.raw.row(t);
        const float* d_value = d_layer.values.row(t);
        const float bent = spec.normalized && x.norm[t] > 1 ? -1 / (x.norm[t] * x.norm[t]) : 1;
        d_norm[t] = -bent * dot(x.push.row(t), d_value, width) -
                    dot(d_layer.keys.row(t), layer.keys.row(t), spec.hidden) / x.norm[t];
        add_scaled(row, -written(spec, x.norm[t]), d_value, width);
        if (d_push[t] != 0) add_scaled(row, d_push[t], x.push.row(t), width);
        d.fresh[t] += x.error.scale[t] * dot(row, raw, width);
        for (int j = 0; j < width; j += LANES) store(row + j, from.fresh[t] * load(row + j));
    }
    cap_back(x.error, d_error);
    if (memory < spec.vectors)
        for (int t = 0; t < c; ++t) {
            if (spec.l2) add_scaled(d.k.row(t), 1, d_error.row(t), width);
            add_scaled(d.v.row(t), -1, d_error.row(t), width);
        }
    if (x.difference) {
        d_difference = arena.take(c, spec.hidden);
        product_t(x.difference, d_error, d_second, ADD);
        product(d_error, transposed(arena, second), d_difference);
    }
    for (int t = 0; t < c; ++t)
        for (int j = 0; j < spec.hidden; j += LANES) {
            const Lanes pre = load(x.at_k.pre.row(t) + j), gate = load(x.at_k.gate.row(t) + j);
            Lanes d_hidden = load(d_layer.keys.row(t) + j) / x.norm[t] + d_norm[t] * load(layer.keys.row(t) + j);
            if (spec.l2) d_hidden += load(d_difference.row(t) + j);
            // The slope itself depends on the first layer's result: its derivative is that of silu taken twice.
            const Lanes bend = (2.0f + pre * (1.0f - 2.0f * gate)) * gate * (1.0f - gate);
            const Lanes sum = d_hidden * slope(pre, gate) - load(d_first.row(t) + j) * load(x.back.row(t) + j) * bend;
            store(d_pre.row(t) + j, load(d_pre.row(t) + j) + sum);
            if (spec.own_target)
                store(d_pre_v.row(t) + j, -load(d_difference.row(t) + j) * slope(load(x.at_v.pre.row(t) + j),
                                                                                 load(x.at_v.gate.row(t) + j)));
        }
}

// Writes of linear memories [c, R]: vector memories block by block, gate memories by single columns.
struct LinearWrites {
    Matrix error, scale;  // raw errors; factors of the cap, by memory [c, memories]
};

inline LinearWrites take_linear_writes(Arena& arena, const MemorySpec& spec, int c) {
    return {arena.take(c, spec.width()), arena.take(c, padded(spec.memories()))};
}

inline int first_column(const MemorySpec& spec, int memory) {
    return memory < spec.vectors ? memory * spec.dim : spec.vectors * spec.dim + memory - spec.vectors;
}

inline float square_of(const MemorySpec& spec, const float* row, int memory) {
    const float* at = row + first_column(spec, memory);
    return memory < spec.vectors ? dot(at, at, spec.dim) : *at * *at;
}

inline void linear_writes(const MemorySpec& spec, const Source& from, Matrix at_k, Matrix at_v, LinearWrites& x,
                          Matrix values, float* surprise) {
    const int width = spec.width();
    for (int t = 0; t < values.rows; ++t) {
        float *error = x.error.row(t), *scale = x.scale.row(t), *value = values.row(t);
        for (int j = 0; j < width; j += LANES) {
            Lanes sum = spec.l2 ? load(at_k.row(t) + j) : Lanes{};
            if (spec.own_target) sum -= load(at_v.row(t) + j);
            store(error + j, sum);
        }
        if (!spec.own_target)
            for (int m = 0; m < spec.vectors; ++m) add_scaled(error + m * spec.dim, -1, from.v.row(t), spec.dim);
        for (int m = 0; m < spec.memories(); ++m) {
            const float square = square_of(spec, error, m);
            scale[m] = cap_scale(spec, square);
            if (!m) surprise[t] = scale[m] * std::sqrt(square);
            const int at = first_column(spec, m), count = m < spec.vectors ? spec.dim : 1;
            for (int j = at; j < at + count; ++j) value[j] = -from.fresh[t] * scale[m] * error[j];
        }
        for (int j = first_column(spec, spec.memories()); j < width; ++j) value[j] = 0;
    }
}

// Adds to the gradient of the source and of the memories' answers to keys; sets that of their answers to values.
inline void linear_writes_back(const MemorySpec& spec, const Source& from, const LinearWrites& x, Matrix d_values,
                               SourceGrads& d, Matrix d_at_k, Matrix d_at_v) {
    for (int t = 0; t < d_values.rows; ++t) {
        float* row = d_values.row(t);
        const float *error = x.error.row(t), *scale = x.scale.row(t);
        for (int m = 0; m < spec.memories(); ++m) {
            const int at = first_column(spec, m), count = m < spec.vectors ? spec.dim : 1;
            float along = 0;
            for (int j = at; j < at + count; ++j) along -= error[j] * row[j];
            d.fresh[t] += scale[m] * along;
            along *= scale[m] < 1 ? from.fresh[t] / (square_of(spec, error, m) + CAP_EPS) : 0;
            for (int j = at; j < at + count; ++j) row[j] = scale[m] * (-from.fresh[t] * row[j] - along * error[j]);
        }
        for (int j = first_column(spec, spec.memories()); j < spec.width(); ++j) row[j] = 0;
        if (spec.l2) add_scaled(d_at_k.row(t), 1, row, spec.width());
        if (spec.own_target)
            for (int j = 0; j < spec.width(); j += LANES) store(d_at_v.row(t) + j, -load(row + j));
        else
            for (int m = 0; m < spec.vectors; ++m) add_scaled(d.v.row(t), -1, row + m * spec.dim, spec.dim);
    }
}

}  // namespace hopescale
