// Short convolution, SiLU and unit norm of projected inputs, heads first: one pass over memory each way. Called by
// ops/head_streams.py.
#include <algorithm>
#include <vector>

#include "streams.h"

using namespace hopescale;

namespace {

// One slice of one head of one sequence.
struct Channels {
    const Layout& layout;
    const float *x, *tail;  // inputs; the taps - 1 inputs before them
    const int32_t* first;   // of each token, the first one of its document; null: all are one, and so is the tail
    int64_t tail_stride;
    std::vector<float> weight;  // filters [taps, dim]

    Channels(const Layout& layout, int b, int h, int s, const float* x, const float* weights, const float* tail,
             const int32_t* first)
        : layout(layout), x(x + b * layout.batch_stride + h * layout.head_stride + s * layout.slice_stride),
          first(first ? first + int64_t(b) * layout.tokens : nullptr),
          tail_stride(int64_t(layout.batch) * layout.heads * layout.slices * layout.dim) {
        const int64_t channel = (int64_t(h) * layout.slices + s) * layout.dim;
        this->tail = tail + b * tail_stride / layout.batch + channel;
        weight.resize(size_t(layout.taps) * layout.dim);
        for (int w = 0; w < layout.taps; ++w)
            for (int i = 0; i < layout.dim; ++i) weight[w * layout.dim + i] = weights[(channel + i) * layout.taps + w];
    }

    const float* input(int t) const {
        return t < 0 ? tail + (t + layout.taps - 1) * tail_stride : x + t * layout.token_stride;
    }

    // The first filter weight that meets an input of the token's own document.
    int oldest(int t) const { return first ? std::max(0, layout.taps - 1 - (t - first[t])) : 0; }

    // Numbers j to j + LANES of what the convolution gives for token t.
    Lanes mixed(int t, int j) const {
        if (!layout.taps) return load(input(t) + j);
        Lanes sum{};
        for (int w = oldest(t); w < layout.taps; ++w)
            sum += load(input(t - layout.taps + 1 + w) + j) * load(&weight[w * layout.dim + j]);
        return sum;
    }
};

}  // namespace

extern "C" {

// Heads `begin` to `end`. `x` has the strides of the layout, `weights` is [heads * slices * dim, taps], `tail` is
// [taps - 1, batch, heads * slices * dim], `first` [batch, tokens] or null, `streams` [slices, batch, heads, tokens,
// dim].
void hopescale_streams_forward(const Layout* layout_, int begin, int end, const float* x, const float* weights,
                               const float* tail, const int32_t* first, float* streams) {
    const Layout& layout = *layout_;
    for (int h = begin; h < end; ++h)
        for (int b = 0; b < layout.batch; ++b)
            for (int s = 0; s < layout.slices; ++s) {
                const Channels channels(layout, b, h, s, x, weights, tail, first);
                const int64_t head = (int64_t(s) * layout.batch + b) * layout.heads + h;
                float* row = streams + head * layout.tokens * layout.dim;
                for (int t = 0; t < layout.tokens; ++t, row += layout.dim) {
                    for (int j = 0; j < layout.dim; j += LANES) {
                        const Lanes mixed = channels.mixed(t, j);
                        store(row + j, layout.taps ? mixed * sigmoid(mixed) : mixed);
                    }
                    if (!(layout.unit >> s & 1)) continue;
                    const float scale = unit_scale(row, layout.dim);
                    for (int j = 0; j < layout.dim; j += LANES) store(row + j, scale * load(row + j));
                }
            }
}

// The way back. `d_x` is [tokens, batch, heads, slices, dim]; `d_weights` and `d_tail` are like `weights` and `tail`;
// the latter starts as zeros.
void hopescale_streams_backward(const Layout* layout_, int begin, int end, const float* x, const float* weights,
                                const float* tail, const int32_t* first, const float* d_streams, float* d_x,
                                float* d_weights, float* d_tail) {
    const Layout& layout = *layout_;
    const int dim = layout.dim, taps = layout.taps;
    const int64_t channels_all = int64_t(layout.heads) * layout.slices * dim, d_stride = layout.batch * channels_all;
    std::vector<float> filter(size_t(taps) * dim), mixed(dim), made(dim);
    for (int h = begin; h < end; ++h)
        for (int s = 0; s < layout.slices; ++s) {
            const int64_t channel = (int64_t(h) * layout.slices + s) * dim;
            std::fill(filter.begin(), filter.end(), 0.0f);
            for (int b = 0; b < layout.batch; ++b) {
                const Channels channels(layout, b, h, s, x, weights, tail, first);
                const int64_t head = (int64_t(s) * layout.batch + b) * layout.heads + h;
                const float* d_row = d_streams + head * layout.tokens * dim;
                const auto d_input = [&](int t) {
                    return t < 0 ? d_tail + ((t + taps - 1) * int64_t(layout.batch) + b) * channels_all + channel
                                 : d_x + t * d_stride + b * channels_all + channel;
                };
                for (int t = 0; t < layout.tokens; ++t, d_row += dim) {
                    for (int j = 0; j < dim; j += LANES) {
                        const Lanes value = channels.mixed(t, j);
                        store(&mixed[j], value);
                        store(&made[j], taps ? value * sigmoid(value) : value);
                    }
                    const bool unit = layout.unit >> s & 1;
                    const float scale = unit ? unit_scale(made.data(), dim) : 1;
                    const float along = unit ? scale * scale * dot(made.data(), d_row, dim) : 0;
                    for (int j = 0; j < dim; j += LANES) {
                        Lanes d = scale * (load(d_row + j) - along * load(&made[j]));
                        if (!taps) {
                            store(d_input(t) + j, d);
                            continue;
                        }
                        const Lanes value = load(&mixed[j]), gate = sigmoid(value);
                        d *= gate + value * gate * (1.0f - gate);
                        for (int w = channels.oldest(t); w < taps; ++w) {
                            const int from = t - taps + 1 + w;
                            float *at = d_input(from) + j, *sum = &filter[w * dim + j];
                            const Lanes share = d * load(&channels.weight[w * dim + j]);
                            store(at, from < t ? load(at) + share : share);
                            store(sum, load(sum) + d * load(channels.input(from) + j));
                        }
                    }
                }
            }
            for (int w = 0; w < taps; ++w)
                for (int i = 0; i < dim; ++i) d_weights[(channel + i) * taps + w] = filter[w * dim + i];
        }
}
}
