// Documents of a batch, one head of one document after the other, and the scratch memory of a thread.
#pragma once
#include <algorithm>
#include <cstdlib>
#include <memory>

#include "chunk.h"

extern "C" void hopescale_use_huge_pages(void* memory, int64_t bytes);

namespace hopescale {

// Bytes of scratch for one chunk: twice what the neediest settings were seen to take.
inline size_t scratch_bytes(const MemorySpec& spec) {
    const size_t side = spec.chunk + spec.dim + spec.hidden + 4 * BLOCK;
    return sizeof(float) * 40 * side * (spec.width() + side);
}

// Scratch of one thread. Only what is touched becomes memory of the process; large pages pay where much is. Without
// memory where the system grants none.
struct Scratch {
    std::unique_ptr<void, decltype(&std::free)> memory{nullptr, std::free};
    Arena arena{};

    explicit Scratch(size_t bytes, bool large_pages = true) {
        const size_t page = large_pages ? 2 << 20 : 4096;
        memory.reset(std::aligned_alloc(page, (bytes / page + 1) * page));
        if (!memory) return;
        if (large_pages) hopescale_use_huge_pages(memory.get(), bytes);
        arena.next = static_cast<float*>(memory.get());
    }
};

// The fields of `CBatch` in ops/self_modifying/cpp.py. The tokens of all rows lie one after the other; document `n` has
// those from `bounds[n]` up to `bounds[n + 1]`, all of one row. Without documents each row is one.
struct Batch {
    int32_t tokens, heads, documents;
    int32_t shared;          // whether all documents begin with one state; otherwise each row has its own
    int32_t group, groups;   // documents that begin in the same `group` tokens are run one after the other
    const int64_t* bounds;

    // Number of the first document of a group.
    int first(int number) const {
        return std::lower_bound(bounds, bounds + documents, int64_t(number) * group) - bounds;
    }
};

// One document of one head, and where it lies among all heads of all rows.
struct Sequence {
    int tokens, chunks;
    int64_t token;        // its first one, in tensors [rows, heads, T]
    int64_t head;         // of tensors [rows, heads]
    int64_t given, kept;  // states: the one it begins with, in [1 or rows, heads], and the one of its second chunk
    bool is_last;         // of its row

    Sequence(const MemorySpec& spec, const Batch& batch, int number, int h) {
        const int64_t begin = batch.bounds[number], end = batch.bounds[number + 1], row = begin / batch.tokens;
        tokens = end - begin, chunks = (tokens + spec.chunk - 1) / spec.chunk;
        head = row * batch.heads + h;
        token = head * batch.tokens + begin % batch.tokens;
        given = batch.shared ? h : head;
        kept = h * kept_states(spec, batch) + begin / spec.chunk;
        is_last = end % batch.tokens == 0;
    }

    // States that are kept of one head: a document of n tokens, after its first chunk, begins (n - 1) / chunk others.
    static int64_t kept_states(const MemorySpec& spec, const Batch& batch) {
        return batch.bounds[batch.documents] / spec.chunk;
    }

    int size(const MemorySpec& spec, int index) const { return std::min(spec.chunk, tokens - index * spec.chunk); }
};

inline Streams streams_of(const MemorySpec& spec, const Sequence& sequence, float* const* x) {
    const int tokens = sequence.tokens;
    const auto matrix = [&](float* at) { return Matrix{at + sequence.token * spec.dim, tokens, spec.dim, spec.dim}; };
    const auto gate = [&](float* at) { return at ? at + sequence.token : nullptr; };
    return {matrix(x[0]), matrix(x[1]), matrix(x[2]), gate(x[3]), gate(x[4]), gate(x[5])};
}

}  // namespace hopescale
