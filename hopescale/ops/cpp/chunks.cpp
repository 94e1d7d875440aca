// Self-modifying memories over whole documents, one head of one document after the other. Called by
// ops/self_modifying/cpp.py.
#include <vector>
#ifdef __linux__
#include <sys/mman.h>
#endif

#include "batch.h"
#include "chunk_back.h"

using namespace hopescale;

// Asks for large pages where memory is fresh: to get it page by page costs as much as a tenth of the computation.
extern "C" void hopescale_use_huge_pages(void* memory, int64_t bytes) {
#ifdef __linux__
    const uintptr_t page = 4096, begin = (reinterpret_cast<uintptr_t>(memory) + page - 1) / page * page;
    const uintptr_t end = (reinterpret_cast<uintptr_t>(memory) + bytes) / page * page;
    if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
    (void)memory, (void)bytes;
#endif
}

namespace {

// Numbers of a state with its momentum.
int64_t slot_of(const MemorySpec& spec) { return spec.state_size() * (spec.momentum ? 2 : 1); }

State momentum_of(const MemorySpec& spec, float* slot) {
    return {spec, spec.momentum ? slot + spec.state_size() : nullptr};
}

// The state that a chunk begins with.
float* slot_at(const MemorySpec& spec, const Sequence& sequence, float* given, float* kept, int index) {
    const int64_t size = slot_of(spec);
    return index ? kept + (sequence.kept + index - 1) * size : given + sequence.given * size;
}

// One chunk of a head, run at the state that was kept for it.
struct Part {
    State state, momentum;
    Streams streams;
    Chunk chunk;
};

Part run_part(Arena& arena, const MemorySpec& spec, const Sequence& sequence, const Streams& inputs, float* slot,
              int index, float* surprise) {
    const Streams streams = rows_of(inputs, index * spec.chunk, sequence.size(spec, index));
    Part part{{spec, slot}, momentum_of(spec, slot), streams, {}};
    part.chunk = take_chunk(arena, spec, part.streams);
    run(arena, part.state, part.momentum, part.streams, part.chunk, surprise);
    return part;
}

}  // namespace

extern "C" {

// Runs heads of groups of documents forward: number h * groups + g is head `h` of group `g`, and all from `begin` up to
// `end` are run. `streams` are k, v, q [rows, heads, T, D], eta, alpha, mu [rows, heads, T]. `given` holds states and
// momenta before the first token [1 or rows, heads, slot]; `kept` gets those before each further chunk. `last` gets
// those after the last token of each row [rows, heads, slot], `boundary` the weights before its last chunk. `y` is
// [rows, heads, T, D], `stats` [rows, heads, T, 3]. Returns 0 if there is no memory for it.
int hopescale_forward(const MemorySpec* spec_, const Batch* batch_, int begin, int end, float* const* streams,
                      float* given, float* kept, float* last, float* boundary, float* y, float* stats) {
    const MemorySpec& spec = *spec_;
    const Batch& batch = *batch_;
    const FlushTiny flush;
    Scratch scratch(scratch_bytes(spec));
    if (!scratch.memory) return 0;
    Arena& arena = scratch.arena;
    float* surprise = arena.numbers(spec.chunk);
    const int64_t slot_size = slot_of(spec), state_size = spec.state_size();
    const auto run_document = [&](const Sequence& sequence) {
        const Streams inputs = streams_of(spec, sequence, streams);
        for (int n = 0; n < sequence.chunks; ++n) {
            Scope scope(arena);
            const bool ends = n + 1 == sequence.chunks;
            float* slot = slot_at(spec, sequence, given, kept, n);
            const Part part = run_part(arena, spec, sequence, inputs, slot, n, surprise);
            const int64_t row = sequence.token + n * spec.chunk;
            const int count = part.chunk.decay.size;
            answer(arena, part.state, part.chunk, Matrix{y + row * spec.dim, count, spec.dim, spec.dim});
            float* next = ends ? last + sequence.head * slot_size : slot_at(spec, sequence, given, kept, n + 1);
            if (!ends || sequence.is_last)
                advance(arena, spec, part.chunk, {spec, next}, momentum_of(spec, next));
            if (ends && sequence.is_last) std::copy_n(slot, state_size, boundary + sequence.head * state_size);
            for (int t = 0; t < count; ++t) {
                float* out = stats + (row + t) * 3;
                out[0] = part.chunk.decay.eta[t], out[1] = part.chunk.decay.alpha[t], out[2] = surprise[t];
            }
        }
    };
    for (int number = begin; number < end; ++number) {
        const int h = number / batch.groups, g = number % batch.groups;
        for (int n = batch.first(g); n < batch.first(g + 1); ++n) run_document(Sequence(spec, batch, n, h));
    }
    return 1;
}

// Runs them back. `d_last` and `d_boundary` are gradients of `last` and `boundary`, the latter may be null. `d_given`
// [groups, heads, slot], zeros at first, gets those of the states that documents of a group begin with. `d_streams` are
// like `streams`. Returns as above.
int hopescale_backward(const MemorySpec* spec_, const Batch* batch_, int begin, int end, float* const* streams,
                       float* given, float* kept, float* d_y, float* d_last, float* d_boundary, float* d_given,
                       float* const* d_streams) {
    const MemorySpec& spec = *spec_;
    const Batch& batch = *batch_;
    const FlushTiny flush;
    Scratch scratch(scratch_bytes(spec));
    if (!scratch.memory) return 0;
    Arena& arena = scratch.arena;
    float* surprise = arena.numbers(spec.chunk);
    const int64_t slot_size = slot_of(spec), state_size = spec.state_size();
    std::vector<float> gradient(slot_size);
    float* d = gradient.data();
    const auto run_document = [&](const Sequence& sequence, float* d_first) {
        const Streams inputs = streams_of(spec, sequence, streams), grads = streams_of(spec, sequence, d_streams);
        if (sequence.is_last)
            std::copy_n(d_last + sequence.head * slot_size, slot_size, d);
        else
            std::fill_n(d, slot_size, 0.0f);
        for (int n = sequence.chunks - 1; n >= 0; --n) {
            Scope scope(arena);
            float* slot = slot_at(spec, sequence, given, kept, n);
            const Part part = run_part(arena, spec, sequence, inputs, slot, n, surprise);
            const int at = n * spec.chunk, count = part.chunk.decay.size;
            const Matrix d_answers{d_y + (sequence.token + at) * spec.dim, count, spec.dim, spec.dim};
            back(arena, part.state, part.streams, part.chunk, d_answers, {spec, d}, momentum_of(spec, d),
                 rows_of(grads, at, count));
            if (d_boundary && sequence.is_last && n == sequence.chunks - 1)
                for (int64_t i = 0; i < state_size; ++i) d[i] += d_boundary[sequence.head * state_size + i];
        }
        for (int64_t i = 0; i < slot_size; ++i) d_first[i] += d[i];
    };
    for (int number = begin; number < end; ++number) {
        const int h = number / batch.groups, g = number % batch.groups;
        float* d_first = d_given + (int64_t(g) * batch.heads + h) * slot_size;
        for (int n = batch.first(g); n < batch.first(g + 1); ++n) run_document(Sequence(spec, batch, n, h), d_first);
    }
    return 1;
}
}
