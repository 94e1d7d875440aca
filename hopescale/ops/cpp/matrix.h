// Views of row-major matrices, products of small ones, and the few functions that go with them, on vector registers.
//
// Widths are multiples of BLOCK on every machine: what is narrower is padded. Rows are any number.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#include <initializer_list>
#include <utility>
#ifdef __SSE__
#include <xmmintrin.h>
#endif

namespace hopescale {

constexpr int BLOCK = 16;
// Numbers in a register: compilers keep wider vectors in memory. A tile of sums leaves registers for its factors.
#if defined(__AVX512F__)
constexpr int LANES = 16, TILE_ROWS = 8;
#elif defined(__AVX__)
constexpr int LANES = 8, TILE_ROWS = 4;
#else
constexpr int LANES = 4, TILE_ROWS = 4;
#endif
constexpr int TILE_VECTORS = 2;

typedef float Lanes __attribute__((vector_size(4 * LANES), aligned(4)));
typedef int32_t IntLanes __attribute__((vector_size(4 * LANES), aligned(4)));

inline Lanes load(const float* x) { return *reinterpret_cast<const Lanes*>(x); }
inline void store(float* x, Lanes value) { *reinterpret_cast<Lanes*>(x) = value; }
inline Lanes broadcast(float x) { return x - Lanes{}; }
inline int padded(int width) { return (width + BLOCK - 1) / BLOCK * BLOCK; }

struct Matrix {
    float* data = nullptr;
    int rows = 0, width = 0, stride = 0;

    float* row(int i) const { return data + int64_t(i) * stride; }
    Matrix columns(int first, int count) const { return {data + first, rows, count, stride}; }
    Matrix block(int first, int count) const { return {row(first), count, width, stride}; }
    explicit operator bool() const { return data != nullptr; }
};

// Memory for matrices, taken from the front. `Scope` gives back what was taken since it began.
struct Arena {
    float* next;

    Matrix take(int rows, int width) {
        Matrix matrix{next, rows, width, width};
        next += int64_t(rows) * width;
        return matrix;
    }
    float* numbers(int count) { return take(1, padded(count)).data; }
};

struct Scope {
    Arena& arena;
    float* before;

    explicit Scope(Arena& arena) : arena(arena), before(arena.next) {}
    ~Scope() { arena.next = before; }
};

// Treats numbers below 1e-38 as zeros while it lives: a memory that forgets for long is full of them, and they take
// a processor many times as long as others.
struct FlushTiny {
#ifdef __SSE__
    unsigned before = _mm_getcsr();
    FlushTiny() { _mm_setcsr(before | 0x8040); }
    ~FlushTiny() { _mm_setcsr(before); }
#endif
};

// Where entries of a product lie that count. What is known to be zero is neither read nor multiplied.
enum Shape {
    FULL,
    LEFT_LOWER,    // left[i, p] = 0 for p > i
    LEFT_UPPER,    // left[i, p] = 0 for p < i
    RESULT_LOWER,  // result[i, j] is wanted for j <= i; elsewhere it may become anything
};

enum Update { SET, ADD, SUBTRACT };

template <int ROWS, int VECTORS, bool TRANSPOSED>
inline void tile(const float* left, int64_t left_stride, const float* right, int64_t right_stride, float* result,
                 int64_t stride, int from, int to, Update update) {
    Lanes sum[ROWS][VECTORS] = {};
    for (int p = from; p < to; ++p) {
        Lanes b[VECTORS];
        for (int v = 0; v < VECTORS; ++v) b[v] = load(right + p * right_stride + v * LANES);
        for (int i = 0; i < ROWS; ++i) {
            const Lanes a = broadcast(TRANSPOSED ? left[p * left_stride + i] : left[i * left_stride + p]);
            for (int v = 0; v < VECTORS; ++v) sum[i][v] += a * b[v];
        }
    }
    for (int i = 0; i < ROWS; ++i)
        for (int v = 0; v < VECTORS; ++v) {
            float* at = result + i * stride + v * LANES;
            if (update == ADD) sum[i][v] = load(at) + sum[i][v];
            if (update == SUBTRACT) sum[i][v] = load(at) - sum[i][v];
            store(at, sum[i][v]);
        }
}

// Rows `begin` to `end` of a product whose right factor has VECTORS * LANES columns.
template <int ROWS, int VECTORS, bool TRANSPOSED>
inline int product_rows(Matrix left, Matrix right, Matrix result, int begin, int end, Shape shape, Update update) {
    for (; begin + ROWS <= end; begin += ROWS) {
        const int from = shape == LEFT_UPPER ? begin : 0;
        const int to = shape == LEFT_LOWER && begin + ROWS < right.rows ? begin + ROWS : right.rows;
        tile<ROWS, VECTORS, TRANSPOSED>(TRANSPOSED ? left.data + begin : left.row(begin), left.stride, right.data,
                                        right.stride, result.row(begin), result.stride, from, to, update);
    }
    return begin;
}

template <int VECTORS, bool TRANSPOSED>
inline void product_panel(Matrix left, Matrix right, Matrix result, int begin, int end, Shape shape, Update update) {
    // Eight sums at least, so that none has to wait for the one before.
    constexpr int rows = VECTORS > 1 ? TILE_ROWS : 8;
    begin = product_rows<rows, VECTORS, TRANSPOSED>(left, right, result, begin, end, shape, update);
    product_rows<1, VECTORS, TRANSPOSED>(left, right, result, begin, end, shape, update);
}

// A panel of columns is finished before the next one is begun: what it needs of the right factor stays in the first
// cache.
template <bool TRANSPOSED>
inline void product_block(Matrix left, Matrix right, Matrix result, int begin, int end, Shape shape, Update update) {
    for (int j = 0; j < right.width;) {
        const int left_over = (right.width - j) / LANES, vectors = left_over < TILE_VECTORS ? left_over : TILE_VECTORS;
        const Matrix b = right.columns(j, vectors * LANES), sum = result.columns(j, vectors * LANES);
        if (vectors == 1) product_panel<1, TRANSPOSED>(left, b, sum, begin, end, shape, update);
        if (vectors == 2) product_panel<2, TRANSPOSED>(left, b, sum, begin, end, shape, update);
        j += vectors * LANES;
    }
}

template <bool TRANSPOSED>
inline void product_of(Matrix left, Matrix right, Matrix result, Shape shape, Update update) {
    if (shape != RESULT_LOWER) {
        product_block<TRANSPOSED>(left, right, result, 0, result.rows, shape, update);
        return;
    }
    for (int begin = 0; begin < result.rows; begin += BLOCK) {
        const int end = begin + BLOCK < result.rows ? begin + BLOCK : result.rows;
        const int width = begin + BLOCK < right.width ? begin + BLOCK : right.width;
        product_block<TRANSPOSED>(left, right.columns(0, width), result, begin, end, FULL, update);
    }
}

// result (=, +=, -=) left @ right.
inline void product(Matrix left, Matrix right, Matrix result, Update update = SET, Shape shape = FULL) {
    product_of<false>(left, right, result, shape, update);
}

// result (=, +=, -=) left^T @ right, for a left of [depth, rows]. LEFT_LOWER and LEFT_UPPER speak of left^T.
inline void product_t(Matrix left, Matrix right, Matrix result, Update update = SET, Shape shape = FULL) {
    product_of<true>(left, right, result, shape, update);
}

#ifdef __clang__
#define HOPESCALE_SHUFFLE(x, y, ...) __builtin_shufflevector(x, y, __VA_ARGS__)
#else
#define HOPESCALE_SHUFFLE(x, y, ...) __builtin_shuffle(x, y, IntLanes{__VA_ARGS__})
#endif

using LaneNumbers = std::make_integer_sequence<int, LANES>;

// Exchanges every second block of SPAN numbers of x with the one before it of y.
template <int SPAN, int... I>
inline void exchange(Lanes& x, Lanes& y, std::integer_sequence<int, I...>) {
    const Lanes a = x, b = y;
    x = HOPESCALE_SHUFFLE(a, b, (I & SPAN ? LANES + I - SPAN : I)...);
    y = HOPESCALE_SHUFFLE(a, b, (I & SPAN ? LANES + I : I + SPAN)...);
}

template <int SPAN>
inline void exchange_all(Lanes* x) {
    for (int i = 0; i < LANES; ++i)
        if (!(i & SPAN)) exchange<SPAN>(x[i], x[i + SPAN], LaneNumbers{});
    if constexpr (SPAN > 1) exchange_all<SPAN / 2>(x);
}

// Transposes LANES x LANES numbers; rows from `rows` on count as zeros.
inline void transpose_block(const float* from, int64_t from_stride, float* to, int64_t to_stride, int rows) {
    Lanes x[LANES];
    for (int i = 0; i < LANES; ++i) x[i] = i < rows ? load(from + i * from_stride) : Lanes{};
    exchange_all<LANES / 2>(x);
    for (int i = 0; i < LANES; ++i) store(to + i * to_stride, x[i]);
}

// Writes x^T; the result has as many columns as x has rows, padded with zeros.
inline void transpose(Matrix x, Matrix result) {
    for (int i = 0; i < result.width; i += LANES)
        for (int j = 0; j < x.width; j += LANES)
            transpose_block(x.row(i) + j, x.stride, result.row(j) + i, result.stride, x.rows - i);
}

inline Matrix transposed(Arena& arena, Matrix x) {
    Matrix result = arena.take(x.width, padded(x.rows));
    transpose(x, result);
    return result;
}

template <int... I>
constexpr IntLanes counted(std::integer_sequence<int, I...>) {
    return IntLanes{I...};
}

// Keeps the first `count` numbers of x; others become zero.
inline Lanes first_lanes(int count, Lanes x) { return counted(LaneNumbers{}) < count ? x : Lanes{}; }

// Adds to each number the one HALF places further, then halves again: the first one becomes the sum of all.
template <int HALF, int... I>
inline Lanes folded(Lanes x, std::integer_sequence<int, I...> numbers) {
    x += HOPESCALE_SHUFFLE(x, x, ((I + HALF) % LANES)...);
    if constexpr (HALF > 1) return folded<HALF / 2>(x, numbers);
    return x;
}

inline float total(Lanes x) { return folded<LANES / 2>(x, LaneNumbers{})[0]; }

// A call of its own: where it is inlined, compilers round the sums around it in ways of their own.
__attribute__((noinline)) inline float dot(const float* x, const float* y, int count) {
    Lanes sum{};
    for (int i = 0; i < count; i += LANES) sum += load(x + i) * load(y + i);
    return total(sum);
}

// What scales x to unit length (ops/norm.py::l2_norm).
inline float unit_scale(const float* x, int count) { return 1 / std::sqrt(dot(x, x, count) + 1e-6f); }

// target += factor * x
inline void add_scaled(float* target, float factor, const float* x, int count) {
    for (int i = 0; i < count; i += LANES) store(target + i, load(target + i) + factor * load(x + i));
}

inline void fill(Matrix x, float value) {
    for (int i = 0; i < x.rows; ++i)
        for (int j = 0; j < x.width; j += LANES) store(x.row(i) + j, broadcast(value));
}

inline void copy(Matrix from, Matrix to) {
    for (int i = 0; i < from.rows; ++i) std::memcpy(to.row(i), from.row(i), sizeof(float) * from.width);
}

// e^x: 2^n times a polynomial in what is left, at most half of log 2. Relative error below 2e-7; NaN stays NaN.
inline Lanes exponential(Lanes x) {
    x = x > 88.0f ? broadcast(88.0f) : x;
    x = x < -87.0f ? broadcast(-87.0f) : x;
    const Lanes round = broadcast(12582912.0f);
    const Lanes shifted = x * 1.44269504f + round;
    const Lanes n = shifted - round;
    const Lanes r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    Lanes p = broadcast(1.0f / 5040);
    p = p * r + 1.0f / 720;
    p = p * r + 1.0f / 120;
    p = p * r + 1.0f / 24;
    p = p * r + 1.0f / 6;
    p = p * r + 0.5f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
    const IntLanes power = ((IntLanes)shifted - 0x4B400000 + 127) << 23;
    return p * (Lanes)power;
}

inline Lanes sigmoid(Lanes x) { return 1.0f / (1.0f + exponential(-x)); }

}  // namespace hopescale
