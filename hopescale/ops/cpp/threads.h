// Rows of a product distributed over threads.
#pragma once
#include <algorithm>
#include <system_error>
#include <thread>
#include <vector>

#include "linear.h"

namespace hopescale {

// Bytes that a thread has to read, at least: that takes several times as long as its start.
constexpr int64_t THREAD_BYTES = 2 << 20;

// Calls `run(begin, end)` for parts of `count`, multiples of `unit` but for the last, in at most `threads` threads, and
// in no more than the bytes that all of it reads are work for.
template <typename Run>
void in_threads(int threads, int64_t bytes, int count, int unit, const Run& run) {
    const int units = (count + unit - 1) / unit;
    threads = std::max<int64_t>(1, std::min<int64_t>({threads, bytes / THREAD_BYTES, units}));
    const auto bound = [&](int n) { return n == threads ? count : int(int64_t(units) * n / threads) * unit; };
    std::vector<std::thread> others;
    others.reserve(threads - 1);
    for (int n = 1; n < threads; ++n) try {
            others.emplace_back(run, bound(n), bound(n + 1));
        } catch (const std::system_error&) {  // the system grants no more threads
            run(bound(n), bound(n + 1));
        }
    run(0, bound(1));
    for (std::thread& other : others) other.join();
}

inline int64_t bytes_of(const LinearMap& map) { return int64_t(map.rows) * map.columns * sizeof(float); }

// Computes rows `begin` to `end` of a product with a weight that is not packed.
inline void apply_rows(const LinearMap& map, Matrix x, Matrix result, int begin, int end, Update update = SET) {
    const LinearMap part{map.weight + int64_t(begin) * map.columns, end - begin, map.columns, false};
    apply(part, x, result.columns(begin, end - begin), update);
}

// Computes `apply` in at most so many threads if the weight is not packed.
inline void apply(int threads, const LinearMap& map, Matrix x, Matrix result, Update update = SET) {
    if (map.is_packed || threads <= 1) return apply(map, x, result, update);
    in_threads(threads, bytes_of(map), map.rows, BLOCK,
               [&](int begin, int end) { apply_rows(map, x, result, begin, end, update); });
}

}  // namespace hopescale
