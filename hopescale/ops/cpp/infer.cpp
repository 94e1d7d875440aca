// Self-modifying memories over whole documents without gradients: nothing is kept, a call may begin within a chunk, and
// memories may lie in two banks with chunks of their own. Called by ops/self_modifying/infer.py and mix.py.
#include "infer.h"

using namespace hopescale;

namespace {

// Calls `each(tensor, its numbers, columns, packed numbers, columns there)` for the parts of one head's weights;
// columns beyond those of the tensor are padding.
template <typename Each>
void for_parts(const MemorySpec& spec, const Layers& layers, int64_t head, Parts& packed, const Each& each) {
    const int columns = spec.is_mlp() ? spec.width() : spec.vectors * spec.dim + spec.gates;
    each(layers.w_in + head * spec.dim * columns, spec.dim, columns, packed.first, spec.width());
    if (!spec.is_mlp()) return;
    const int vector_rows = spec.vectors * spec.hidden, gate_rows = spec.gates * spec.hidden;
    if (vector_rows)
        each(layers.w_out_vector + head * vector_rows * spec.dim, vector_rows, spec.dim, packed.vectors, spec.dim);
    if (gate_rows) each(layers.w_out_gate + head * gate_rows, gate_rows, 1, packed.gates, BLOCK);
}

void copy_rows(const float* from, int from_stride, float* to, int to_stride, int rows) {
    const int columns = std::min(from_stride, to_stride);
    if (from_stride == to_stride) {
        std::copy_n(from, int64_t(rows) * columns, to);
        return;
    }
    for (int i = 0; i < rows; ++i, from += from_stride, to += to_stride) {
        std::copy_n(from, columns, to);
        std::fill_n(to + columns, to_stride - columns, 0.0f);
    }
}

// Makes `packed` the weights of a head: a copy, or with `in_place` the tensors themselves where they have no padding.
void load_head(const MemorySpec& spec, const Layers& layers, int64_t head, Parts& packed, bool in_place) {
    for_parts(spec, layers, head, packed, [&](float* from, int rows, int columns, float*& to, int stride) {
        if (in_place && columns == stride)
            to = from;
        else
            copy_rows(from, columns, to, stride, rows);
    });
}

// Makes `packed` the place where weights of a head are to be written: as far as tensors have no padding, themselves.
void place_head(const MemorySpec& spec, const Layers& layers, int64_t head, Parts& packed) {
    for_parts(spec, layers, head, packed, [](float* to, int, int columns, float*& from, int stride) {
        if (columns == stride) from = to;
    });
}

void store_head(const MemorySpec& spec, const Layers& layers, int64_t head, Parts& packed) {
    for_parts(spec, layers, head, packed, [](float* to, int rows, int columns, const float* from, int stride) {
        if (from != to) copy_rows(from, stride, to, columns, rows);
    });
}

// The memories of one bank of a head while it goes over a document. Where that is one piece of a chunk, they are read
// from the tensors and written to them; else they are moved from chunk to chunk in memory of their own.
struct Bank {
    const MemorySpec& spec;
    int period;  // tokens of its chunks
    Parts boundary, running, momentum;
    Parts next, next_momentum;  // what is written: the weights run and their momentum after a piece

    Bank(Arena& arena, const MemorySpec& spec, int period)
        : spec(spec), period(period), boundary(take(arena)), running(take(arena)),
          momentum(spec.momentum ? take(arena) : Parts{}), next{}, next_momentum(momentum) {}

    Parts take(Arena& arena) const { return Parts::of(spec, arena.take(1, spec.state_size()).data); }

    void load(const BankTensors& from, int64_t head, bool begins, bool in_place) {
        load_head(spec, from.running, head, running, in_place);
        if (!begins) load_head(spec, from.boundary, head, boundary, in_place);
        if (momentum.first) load_head(spec, from.momentum, head, momentum, in_place);
    }

    // Lets what is written next go to the tensors that are to hold it in the end.
    void write_to(Arena& arena, const BankTensors& to, int64_t head) {
        next = take(arena);
        place_head(spec, to.running, head, next);
        if (!momentum.first) return;
        next_momentum = take(arena);
        place_head(spec, to.momentum, head, next_momentum);
    }

    void store(const BankTensors& to, int64_t head) {
        store_head(spec, to.running, head, running);
        if (momentum.first) store_head(spec, to.momentum, head, momentum);
        if (to.boundary.w_in) store_head(spec, to.boundary, head, boundary);
    }

    // Computes what the bank writes and holds from `place` on, which may be where one of its chunks begins.
    void write(Arena& arena, int64_t place, Chunk& x, float* surprise) {
        if (place % period == 0)
            hopescale::write<false>(arena, at_boundary(), at_boundary(), {spec, momentum}, x, surprise);
        else
            hopescale::write<true>(arena, at_boundary(), {spec, running}, {spec, momentum}, x, surprise);
    }

    void open(int64_t place) {
        if (place % period == 0) std::swap(boundary, running);  // what is run next is written over the older one
    }

    void move(Arena& arena, const Chunk& x) {
        if (next.first) running = next;
        momentum = next_momentum;
        advance(arena, spec, x, {spec, running}, {spec, momentum});
    }

    State at_boundary() const { return {spec, boundary}; }
};

// One head of one document after the other.
struct Run {
    const MemorySpec* specs;  // of the bank of mem, then of that of the others: without memories if there is one bank
    const int32_t* periods;
    Arena& arena;
    float* surprise;

    bool is_split() const { return specs[1].memories() > 0; }

    // Runs tokens that lie in one chunk of each bank.
    void run_piece(Bank& main, Bank& other, int64_t place, const Streams& streams, Matrix y, bool moves, float* stats) {
        Scope scope(arena);
        main.open(place);
        if (is_split()) other.open(place);
        Bank& maker = is_split() ? other : main;
        Chunk made = take_chunk(arena, maker.spec, streams);
        make_inputs(arena, maker.at_boundary(), streams, made);
        Chunk apart{};
        if (is_split()) {
            apart = take_chunk(arena, main.spec, {made.k.output, made.v.output, made.q.output, {}, {}, {}});
            apart.decay = made.decay, apart.fresh = made.fresh;
        }
        Chunk& x = is_split() ? apart : made;
        main.write(arena, place, x, surprise);
        query_mem(arena, main.at_boundary(), x);
        answer(arena, main.at_boundary(), x, y);
        for (int t = 0; t < y.rows; ++t, stats += 3)
            stats[0] = x.decay.eta[t], stats[1] = x.decay.alpha[t], stats[2] = surprise[t];
        if (!moves) return;
        main.move(arena, x);
        if (!is_split()) return;
        other.write(arena, place, made, surprise);
        other.move(arena, made);
    }

    void run_document(const Sequence& sequence, int64_t position, const Streams& streams, const BankTensors* given,
                      const BankTensors* last, float* y, float* stats) {
        Scope scope(arena);
        Bank banks[2] = {{arena, specs[0], periods[0]}, {arena, specs[1], periods[1]}};
        const int count = is_split() ? 2 : 1;
        const bool is_one_piece = sequence.tokens <= periods[0] - position % periods[0];
        for (int n = 0; n < count; ++n) {
            banks[n].load(given[n], sequence.given, position % periods[n] == 0, is_one_piece);
            if (is_one_piece && sequence.is_last) banks[n].write_to(arena, last[n], sequence.head);
        }
        for (int begin = 0; begin < sequence.tokens;) {
            const int64_t place = position + begin, row = sequence.token + begin;
            const int size = std::min<int64_t>(periods[0] - place % periods[0], sequence.tokens - begin);
            const bool ends = begin + size == sequence.tokens;
            const Matrix answers{y + row * specs[0].dim, size, specs[0].dim, specs[0].dim};
            run_piece(banks[0], banks[1], place, rows_of(streams, begin, size), answers, !ends || sequence.is_last,
                      stats + row * 3);
            begin += size;
        }
        for (int n = 0; n < count && sequence.is_last; ++n) banks[n].store(last[n], sequence.head);
    }
};

// Streams, logits of gates, answers [rows, heads, T, dim] and statistics of a call, one behind the other.
struct Work {
    float *streams[6], *answers, *stats;

    Work(float* memory, const Layout& layout, const Mixer& mixer) {
        const int64_t tokens = int64_t(layout.batch) * layout.heads * layout.tokens;
        for (int n = 0; n < 3; ++n, memory += tokens * layout.dim) streams[n] = memory;
        for (int n = 0; n < 3; ++n, memory += tokens) streams[3 + n] = mixer.bias[n] ? memory : nullptr;
        answers = memory, stats = memory + tokens * layout.dim;
    }
};

void fill_gates(const Layout& layout, const Mixer& mixer, const Work& work, int h) {
    for (int n = 0; n < 3; ++n)
        for (int b = 0; b < layout.batch && mixer.bias[n]; ++b)
            for (int t = 0; t < layout.tokens; ++t) {
                const int64_t at = (int64_t(b) * layout.heads + h) * layout.tokens + t;
                const float* weight = mixer.weight[n] ? mixer.weight[n] + int64_t(h) * layout.dim : nullptr;
                const float* k = work.streams[0] + at * layout.dim;
                work.streams[3 + n][at] = mixer.bias[n][h] + (weight ? dot(weight, k, layout.dim) : 0);
            }
}

// Keeps the last inputs of the convolution for the next call.
void keep_tail(const Layout& layout, const Mixer& mixer, const float* x, int h) {
    const int64_t channels = int64_t(layout.heads) * layout.slices * layout.dim;
    const auto at = [&](int w, int b, int s) {
        return (int64_t(w) * layout.batch + b) * channels + (int64_t(h) * layout.slices + s) * layout.dim;
    };
    for (int w = 0; w < layout.taps - 1; ++w)
        for (int b = 0; b < layout.batch; ++b)
            for (int s = 0; s < layout.slices; ++s) {
                const int t = layout.tokens - (layout.taps - 1) + w;
                const float* input = x + t * layout.token_stride + b * layout.batch_stride + h * layout.head_stride +
                                     s * layout.slice_stride;
                std::copy_n(t < 0 ? mixer.tail + at(w + layout.tokens, b, s) : input, layout.dim,
                            mixer.tail_after + at(w, b, s));
            }
}

// Writes unit answers times the norm's weight, tokens first: [T, rows, heads, dim].
void normalize_answers(const Layout& layout, const Mixer& mixer, const Work& work, int h, float* y) {
    const float* weight = mixer.norm + int64_t(h) * layout.dim;
    for (int b = 0; b < layout.batch; ++b)
        for (int t = 0; t < layout.tokens; ++t) {
            const float* row =
                work.answers + ((int64_t(b) * layout.heads + h) * layout.tokens + t) * layout.dim;
            float* to = y + ((int64_t(t) * layout.batch + b) * layout.heads + h) * layout.dim;
            const float scale = 1 / std::sqrt(dot(row, row, layout.dim) / layout.dim + mixer.norm_eps);
            for (int j = 0; j < layout.dim; j += LANES) store(to + j, scale * load(row + j) * load(weight + j));
        }
}

}  // namespace

// Runs heads of groups of documents, numbered as for `hopescale_forward`, after `position` tokens of each. `specs` and
// `periods`, the tokens of a chunk, are of the two banks; the chunk of a spec is the most tokens that are run at once.
// `given` and `last` hold their states before the first token and after the last one of each row; other arguments are
// as there. Returns 0 if there is no memory for it.
extern "C" int hopescale_infer(const MemorySpec* specs, const int32_t* periods, const Batch* batch_, int64_t position,
                               int begin, int end, float* const* streams, const BankTensors* given,
                               const BankTensors* last, float* y, float* stats) {
    const Batch& batch = *batch_;
    const FlushTiny flush;
    Scratch scratch(scratch_bytes(specs[0]) + scratch_bytes(specs[1]), specs[0].chunk > BLOCK);
    if (!scratch.memory) return 0;
    Run run{specs, periods, scratch.arena, scratch.arena.numbers(specs[0].chunk)};
    for (int number = begin; number < end; ++number) {
        const int h = number / batch.groups, g = number % batch.groups;
        for (int n = batch.first(g); n < batch.first(g + 1); ++n) {
            const Sequence sequence(specs[0], batch, n, h);
            run.run_document(sequence, position, streams_of(specs[0], sequence, streams), given, last, y, stats);
        }
    }
    return 1;
}

// Runs heads `begin` to `end` of a mixer from its projected inputs `x`, with the strides of the layout, to its normed
// answers `y` [T, rows, heads, dim]: convolution, unit norms, gates, memories, and the norm of each head. `work` is for
// `Work`; other arguments are those of `hopescale_infer`. Returns as that does.
extern "C" int hopescale_mix(const Layout* layout_, const Mixer* mixer_, const MemorySpec* specs,
                             const int32_t* periods, const Batch* batch, int64_t position, int begin, int end,
                             const float* x, const BankTensors* given, const BankTensors* last, float* memory,
                             float* y) {
    const Layout& layout = *layout_;
    const Mixer& mixer = *mixer_;
    const Work work(memory, layout, mixer);
    hopescale_streams_forward(&layout, begin, end, x, mixer.filters, mixer.tail, nullptr, work.streams[0]);
    for (int h = begin; h < end; ++h) {
        fill_gates(layout, mixer, work, h);
        keep_tail(layout, mixer, x, h);
    }
    const int rows = batch->groups;
    const int done = hopescale_infer(specs, periods, batch, position, begin * rows, end * rows, work.streams, given,
                                     last, work.answers, work.stats);
    for (int h = begin; h < end && done; ++h) normalize_answers(layout, mixer, work, h, y);
    return done;
}
