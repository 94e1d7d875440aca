// Self-modifying memories over whole sequences, one head of one sequence after the other. Called by
// ops/self_modifying/cpp.py.
#include <cstdlib>
#include <memory>
#ifdef __linux__
#include <sys/mman.h>
#endif

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

constexpr size_t HUGE_PAGE = 2 << 20;

// Scratch of one thread: twice what the neediest settings were seen to take. Only what is touched becomes memory of
// the process. Without memory where the system grants none.
struct Scratch {
    std::unique_ptr<void, decltype(&std::free)> memory{nullptr, std::free};
    Arena arena{};

    explicit Scratch(const MemorySpec& spec) {
        const size_t side = spec.chunk + spec.dim + spec.hidden + 4 * BLOCK;
        const size_t bytes = sizeof(float) * 40 * side * (spec.width() + side);
        memory.reset(std::aligned_alloc(HUGE_PAGE, (bytes / HUGE_PAGE + 1) * HUGE_PAGE));
        if (!memory) return;
        hopescale_use_huge_pages(memory.get(), bytes);
        arena.next = static_cast<float*>(memory.get());
    }
};

struct Sequence {
    int tokens, chunks;
    int64_t state, slot;  // numbers of a state, and of a state with its momentum

    Sequence(const MemorySpec& spec, int tokens)
        : tokens(tokens), chunks((tokens + spec.chunk - 1) / spec.chunk), state(spec.state_size()),
          slot(state * (spec.momentum ? 2 : 1)) {}

    State momentum(const MemorySpec& spec, float* slot) const { return {spec, spec.momentum ? slot + state : nullptr}; }

    int size(const MemorySpec& spec, int index) const {
        const int left = tokens - index * spec.chunk;
        return left < spec.chunk ? left : spec.chunk;
    }
};

Streams head_of(const MemorySpec& spec, int tokens, int64_t head, float* const* x) {
    const auto matrix = [&](float* at) { return Matrix{at + head * tokens * spec.dim, tokens, spec.dim, spec.dim}; };
    const auto gate = [&](float* at) { return at ? at + head * tokens : nullptr; };
    return {matrix(x[0]), matrix(x[1]), matrix(x[2]), gate(x[3]), gate(x[4]), gate(x[5])};
}

// One chunk of a head, run at the state that was kept for it.
struct Part {
    State state, momentum;
    Streams streams;
    Chunk chunk;
};

Part run_part(Arena& arena, const MemorySpec& spec, const Sequence& sequence, const Streams& inputs, float* slot,
              int index,
              float* surprise) {
    const Streams streams = rows_of(inputs, index * spec.chunk, sequence.size(spec, index));
    Part part{{spec, slot}, sequence.momentum(spec, slot), streams, {}};
    part.chunk = take_chunk(arena, spec, part.streams);
    run(arena, part.state, part.momentum, part.streams, part.chunk, surprise);
    return part;
}

}  // namespace

extern "C" {

int64_t hopescale_state_size(const MemorySpec* spec) { return spec->state_size(); }

// Runs heads `begin` to `end` forward. `streams` are k, v, q [heads, T, D], eta, alpha, mu [heads, T]. `kept` holds
// states and momenta at the start of each chunk [heads, chunks, slot], the first of which is given; `last` gets those
// after the last one. `y` is [heads, T, D], `stats` [heads, T, 3]. Returns 0 if there is no memory for it.
int hopescale_forward(const MemorySpec* spec_, int tokens, int begin, int end, float* const* streams, float* kept,
                      float* last, float* y, float* stats) {
    const MemorySpec& spec = *spec_;
    const Sequence sequence(spec, tokens);
    const FlushTiny flush;
    Scratch scratch(spec);
    if (!scratch.memory) return 0;
    Arena& arena = scratch.arena;
    float* surprise = arena.numbers(spec.chunk);
    for (int64_t head = begin; head < end; ++head) {
        const Streams inputs = head_of(spec, tokens, head, streams);
        for (int n = 0; n < sequence.chunks; ++n) {
            Scope scope(arena);
            float* slot = kept + (head * sequence.chunks + n) * sequence.slot;
            float* next = n + 1 < sequence.chunks ? slot + sequence.slot : last + head * sequence.slot;
            const Part part = run_part(arena, spec, sequence, inputs, slot, n, surprise);
            const int64_t row = head * tokens + n * spec.chunk;
            const int count = part.chunk.decay.size;
            answer(arena, part.state, part.chunk, Matrix{y + row * spec.dim, count, spec.dim, spec.dim});
            advance(arena, spec, part.chunk, {spec, next}, sequence.momentum(spec, next));
            for (int t = 0; t < count; ++t) {
                float* out = stats + (row + t) * 3;
                out[0] = part.chunk.decay.eta[t], out[1] = part.chunk.decay.alpha[t], out[2] = surprise[t];
            }
        }
    }
    return 1;
}

// Runs them back. `d_state` [heads, slot] holds gradients of `last` and gets those of the first state; `d_boundary` is
// the gradient of the last chunk's first state, or null. `d_streams` are like `streams`. Returns as above.
int hopescale_backward(const MemorySpec* spec_, int tokens, int begin, int end, float* const* streams, float* kept,
                       float* d_y, float* d_boundary, float* d_state, float* const* d_streams) {
    const MemorySpec& spec = *spec_;
    const Sequence sequence(spec, tokens);
    const FlushTiny flush;
    Scratch scratch(spec);
    if (!scratch.memory) return 0;
    Arena& arena = scratch.arena;
    float* surprise = arena.numbers(spec.chunk);
    for (int64_t head = begin; head < end; ++head) {
        const Streams inputs = head_of(spec, tokens, head, streams), grads = head_of(spec, tokens, head, d_streams);
        float* d = d_state + head * sequence.slot;
        for (int n = sequence.chunks - 1; n >= 0; --n) {
            Scope scope(arena);
            float* slot = kept + (head * sequence.chunks + n) * sequence.slot;
            const Part part = run_part(arena, spec, sequence, inputs, slot, n, surprise);
            const int at = n * spec.chunk, count = part.chunk.decay.size;
            const Matrix d_answers{d_y + (head * tokens + at) * spec.dim, count, spec.dim, spec.dim};
            back(arena, part.state, part.streams, part.chunk, d_answers, {spec, d}, sequence.momentum(spec, d),
                 rows_of(grads, at, count));
            if (d_boundary && n == sequence.chunks - 1)
                for (int64_t i = 0; i < sequence.state; ++i) d[i] += d_boundary[head * sequence.state + i];
        }
    }
    return 1;
}
}
