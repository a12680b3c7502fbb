// Attention of one tree of segments and one key head, forward and backward, in the manner of FlashAttention-2 (Dao, 2023): blocks
// of keys meet blocks of queries, scores never leave the first-level cache, and the backward pass makes them anew.
//
// A block of keys is turned once, so that a vector holds one column of many keys, and then meets every query that reads it: of its
// own segment, and if that is a prefix of all segments behind it. Everything else is read where it lies. All products are one
// kernel: six rows, broadcast a value at a time from any strides, times a few vectors of columns. Behind the diagonal each six rows
// stop at the last key that one of them sees.
//
// Every sum runs in an order that the tree alone decides. PORCELET_BODY names the table to define. No templates of the standard
// library here but min and max: the linker keeps one copy of each, and it might be one that this processor cannot run.
#include "packed_attention_body.h"

#include <algorithm>
#include <cmath>

#include "exponential.h"
#include "turn.h"
#include "vectors.h"

namespace porcelet {
namespace {

constexpr size_t ROWS = 6, VECTORS = Set::lanes == 16 ? 4 : 2;  // of 32 or 16 registers: the sums, a row of vectors, a broadcast
constexpr size_t STEP = 16;  // scores are walked in multiples of it

// The broadcast operand: values from row to row and from term to term.
struct Left {
    const float* first;
    size_t row_stride, term_stride;

    Left from(size_t row, size_t term) const { return {first + row * row_stride + term * term_stride, row_stride, term_stride}; }
};

struct Right {
    const float* first;
    size_t term_stride;
};

struct Out {
    float* first;
    size_t row_stride;
    bool adds;  // to what is there
};

// The loops over rows and vectors are unrolled early: GCC then keeps the sums in registers alone.
template <size_t NR, size_t NV>
void tile(Left left, Right right, Out out, size_t terms, size_t last_count) {
    Floats sums[NR][NV] = {};
    for (size_t t = 0; t < terms; ++t) {
        Floats values[NV];
#pragma GCC unroll 4
        for (size_t v = 0; v + 1 < NV; ++v) values[v] = Set::load(right.first + v * Set::lanes);
        values[NV - 1] = Set::load(right.first + (NV - 1) * Set::lanes, last_count);
#pragma GCC unroll 6
        for (size_t r = 0; r < NR; ++r) {
            const Floats factor = Set::broadcast(left.first[r * left.row_stride]);
#pragma GCC unroll 4
            for (size_t v = 0; v < NV; ++v) sums[r][v] = Set::fma(factor, values[v], sums[r][v]);
        }
        left.first += left.term_stride;
        right.first += right.term_stride;
    }
#pragma GCC unroll 6
    for (size_t r = 0; r < NR; ++r) {
#pragma GCC unroll 4
        for (size_t v = 0; v < NV; ++v) {
            float* const place = out.first + r * out.row_stride + v * Set::lanes;
            const size_t count = v + 1 < NV ? Set::lanes : last_count;
            Set::store(place, out.adds ? sums[r][v] + Set::load(place, count) : sums[r][v], count);
        }
    }
}

using Tile = void (*)(Left, Right, Out, size_t, size_t);

#define PORCELET_TILES(v) {tile<1, v>, tile<2, v>, tile<3, v>, tile<4, v>, tile<5, v>, tile<6, v>}
constexpr Tile TILES[VECTORS][ROWS] = {
    PORCELET_TILES(1),
    PORCELET_TILES(2),
#if defined(__AVX512F__)
    PORCELET_TILES(3),
    PORCELET_TILES(4),
#endif
};
#undef PORCELET_TILES

// out [rows, columns] = left [rows, terms] times right [terms, columns], for at most ROWS rows.
void product(Left left, Right right, Out out, size_t rows, size_t terms, size_t columns) {
    constexpr size_t width = VECTORS * Set::lanes;
    for (size_t column = 0; column < columns; column += width) {
        const size_t count = std::min(width, columns - column), vectors = (count + Set::lanes - 1) / Set::lanes;
        TILES[vectors - 1][rows - 1](left, {right.first + column, right.term_stride},
                                     {out.first + column, out.row_stride, out.adds}, terms,
                                     count - (vectors - 1) * Set::lanes);
    }
}

// Side by side: heads are often a power of two apart, and their rows would push one another out of the first-level cache.
void copy(const float* rows, size_t row_stride, size_t count, size_t width, float* copied) {
    for (size_t row = 0; row < count; ++row) std::memcpy(copied + row * width, rows + row * row_stride, width * sizeof(float));
}

// Up to BLOCK_KEYS keys of one segment, and `seen`: how many lie before them in their sequence.
struct KeyBlock {
    RowRange rows;
    size_t seen;

    size_t count() const { return rows.last - rows.first; }
};

// Rows that read a block of keys; if it is of their own segment, each reads up to its own key only.
struct Readers {
    RowRange rows;
    bool causal;

    // How many keys the row sees.
    size_t sees(size_t row, const KeyBlock& keys) const {
        return causal ? std::min(keys.count(), row - keys.rows.first + 1) : keys.count();
    }
};

template <class Visit>
void each_key_block(RowRange segment, size_t seen, Visit visit) {
    for (size_t row = segment.first; row < segment.last; row += BLOCK_KEYS)
        visit(KeyBlock{{row, std::min(segment.last, row + BLOCK_KEYS)}, seen + row - segment.first});
}

// Calls visit(keys, each_reader) for every block of keys, in the order of the sequences; each_reader(visit_readers) then calls
// visit_readers(readers) for those that read the block. Segments side by side read their prefix as one.
template <class Visit>
void each_block(SegmentTree tree, Visit visit) {
    const RowRange prefix = tree.segments[0];
    each_key_block(prefix, 0, [&](const KeyBlock& keys) {
        visit(keys, [&](auto visit_readers) {
            visit_readers(Readers{{keys.rows.first, prefix.last}, true});
            for (size_t i = 1; i < tree.count;) {
                RowRange together = tree.segments[i++];
                while (i < tree.count && tree.segments[i].first == together.last) together.last = tree.segments[i++].last;
                if (together.first < together.last) visit_readers(Readers{together, false});
            }
        });
    });
    for (size_t i = 1; i < tree.count; ++i) {
        const RowRange segment = tree.segments[i];
        each_key_block(segment, prefix.last - prefix.first, [&](const KeyBlock& keys) {
            visit(keys, [&](auto visit_readers) { visit_readers(Readers{{keys.rows.first, segment.last}, true}); });
        });
    }
}

size_t rounded(size_t count) { return (count + STEP - 1) / STEP * STEP; }

float dot(const float* a, const float* b, size_t count) {
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (size_t i = 0; i < count; ++i) sum += a[i] * b[i];
    return sum;
}

void multiply(float* values, size_t count, float factor) {
#pragma omp simd
    for (size_t i = 0; i < count; ++i) values[i] *= factor;
}

// What happens to the scores of up to ROWS queries, BLOCK_KEYS apart, over a width known when compiled: no loop has a rest then.
template <size_t WIDTH>
struct Softmax {
    static void largest(const float* scores, size_t rows, float* largest) {
        for (size_t r = 0; r < rows; ++r) largest[r] = largest_of(scores + r * BLOCK_KEYS, WIDTH);
    }

    // scores become exp(score * scale - shift).
    static void weights(float* scores, size_t rows, float scale, const float* shifts, float* sums) {
        for (size_t r = 0; r < rows; ++r) sums[r] = soften_all(scores + r * BLOCK_KEYS, WIDTH, scale, shifts[r]);
    }

    // And the gradients of weights become those of q times k.
    static void gradients(float* scores, float* gradients, size_t rows, float scale, const float* shifts, const float* deltas) {
        for (size_t r = 0; r < rows; ++r, scores += BLOCK_KEYS, gradients += BLOCK_KEYS) {
            const Floats factor = Set::broadcast(scale), minus = Set::broadcast(-shifts[r]), delta = Set::broadcast(deltas[r]);
            for (size_t i = 0; i < WIDTH; i += Set::lanes) {
                const Floats weights = exponential_of(Set::fma(Set::load(scores + i), factor, minus));
                Set::store(scores + i, weights);
                Set::store(gradients + i, weights * (Set::load(gradients + i) - delta) * factor);
            }
        }
    }
};

struct SoftmaxOf {
    decltype(&Softmax<STEP>::largest) largest;
    decltype(&Softmax<STEP>::weights) weights;
    decltype(&Softmax<STEP>::gradients) gradients;
};

template <size_t WIDTH>
constexpr SoftmaxOf softmax_of = {Softmax<WIDTH>::largest, Softmax<WIDTH>::weights, Softmax<WIDTH>::gradients};

constexpr SoftmaxOf SOFTMAX[BLOCK_KEYS / STEP] = {softmax_of<16>, softmax_of<32>, softmax_of<48>, softmax_of<64>};
static_assert(STEP == 16 && BLOCK_KEYS == 64, "the table's widths");

void fill(float* values, size_t first, size_t end, float value) {
    for (size_t i = first; i < end; ++i) values[i] = value;
}

void forward(const PackedAttentionArgs& args, SegmentTree tree, size_t kv_head, const PackedAttentionScratch& scratch) {
    const size_t group = args.heads / args.kv_heads;
    const auto attend = [&](const KeyBlock& keys, const Readers& readers, size_t head, size_t first, size_t rows) {
        const size_t seen = readers.sees(first + rows - 1, keys);
        const Right turned = {scratch.turned_keys, BLOCK_KEYS};
        const Left queries = {args.q.at(first, head), args.q.row_stride, 1};
        product(queries, turned, {scratch.scores, BLOCK_KEYS, false}, rows, args.k_width, seen);
        const size_t width = rounded(seen);
        const SoftmaxOf& softmax = SOFTMAX[width / STEP - 1];
        float largest[ROWS], sums[ROWS];
        for (size_t r = 0; r < rows; ++r)
            fill(scratch.scores + r * BLOCK_KEYS, readers.sees(first + r, keys), width, -INFINITY);
        softmax.largest(scratch.scores, rows, largest);
        for (size_t r = 0; r < rows; ++r) {
            const size_t place = (first + r) * args.heads + head;
            float &before = args.lse[place], &sum = scratch.rows[place];
            largest[r] *= args.scale;
            if (keys.seen == 0) {
                sum = 0;
            } else if (largest[r] <= before) {
                largest[r] = before;
            } else {
                const float factor = exponential(before - largest[r]);
                multiply(args.out.at(first + r, head), args.v_width, factor);
                sum *= factor;
            }
            before = largest[r];
        }
        softmax.weights(scratch.scores, rows, args.scale, largest, sums);
        for (size_t r = 0; r < rows; ++r) {
            scratch.rows[(first + r) * args.heads + head] += sums[r];  // what was filled in adds 1e-38
            fill(scratch.scores + r * BLOCK_KEYS, readers.sees(first + r, keys), width, 0);
        }
        product({scratch.scores, BLOCK_KEYS, 1}, {scratch.values, args.v_width},
                {args.out.at(first, head), args.out.row_stride, keys.seen > 0}, rows, seen, args.v_width);
    };
    each_block(tree, [&](const KeyBlock& keys, auto each_reader) {
        turn(args.k.at(keys.rows.first, kv_head), args.k.row_stride, keys.count(), args.k_width, scratch.turned_keys, BLOCK_KEYS);
        copy(args.v.at(keys.rows.first, kv_head), args.v.row_stride, keys.count(), args.v_width, scratch.values);
        each_reader([&](const Readers& readers) {
            for (size_t head = kv_head * group; head < (kv_head + 1) * group; ++head)
                for (size_t row = readers.rows.first; row < readers.rows.last; row += ROWS)
                    attend(keys, readers, head, row, std::min(ROWS, readers.rows.last - row));
        });
    });
    for (size_t i = 0; i < tree.count; ++i)
        for (size_t row = tree.segments[i].first; row < tree.segments[i].last; ++row)
            for (size_t head = kv_head * group; head < (kv_head + 1) * group; ++head) {
                const float sum = scratch.rows[row * args.heads + head];
                multiply(args.out.at(row, head), args.v_width, 1 / sum);
                args.lse[row * args.heads + head] += std::log(sum);
            }
}

void backward(const PackedAttentionArgs& args, const PackedAttentionGradients& gradients, SegmentTree tree, size_t kv_head,
              const PackedAttentionScratch& scratch) {
    const size_t group = args.heads / args.kv_heads;
    for (size_t i = 0; i < tree.count; ++i)
        for (size_t row = tree.segments[i].first; row < tree.segments[i].last; ++row)
            for (size_t head = kv_head * group; head < (kv_head + 1) * group; ++head)
                scratch.rows[row * args.heads + head] = dot(gradients.out.at(row, head), args.out.at(row, head), args.v_width);

    // Weights and their gradients of a few rows, at `place` of the block, and what the rows' queries get.
    const auto weigh = [&](const KeyBlock& keys, const Readers& readers, size_t head, size_t first, size_t rows, size_t place) {
        const size_t seen = readers.sees(first + rows - 1, keys);
        float* const weights = scratch.scores + place * BLOCK_KEYS;
        float* const changes = scratch.score_gradients + place * BLOCK_KEYS;
        product({scratch.queries + place * args.k_width, args.k_width, 1}, {scratch.turned_keys, BLOCK_KEYS},
                {weights, BLOCK_KEYS, false}, rows, args.k_width, seen);
        product({scratch.out_gradients + place * args.v_width, args.v_width, 1}, {scratch.turned_values, BLOCK_KEYS},
                {changes, BLOCK_KEYS, false}, rows, args.v_width, seen);
        float shifts[ROWS], deltas[ROWS];
        for (size_t r = 0; r < rows; ++r) {
            shifts[r] = args.lse[(first + r) * args.heads + head];
            deltas[r] = scratch.rows[(first + r) * args.heads + head];
        }
        SOFTMAX[rounded(seen) / STEP - 1].gradients(weights, changes, rows, args.scale, shifts, deltas);
        for (size_t r = 0; r < rows; ++r) {
            fill(weights + r * BLOCK_KEYS, readers.sees(first + r, keys), keys.count(), 0);
            fill(changes + r * BLOCK_KEYS, readers.sees(first + r, keys), keys.count(), 0);
        }
        product({changes, BLOCK_KEYS, 1}, {scratch.keys, args.k_width},
                {gradients.q.at(first, head), gradients.q.row_stride, keys.seen > 0}, rows, seen, args.k_width);
    };
    // What a block of queries gives to the keys and values that it read.
    const auto give = [&](const KeyBlock& keys, const Readers& readers, size_t first, size_t rows, bool adds) {
        const Left weights = {scratch.scores, 1, BLOCK_KEYS}, changes = {scratch.score_gradients, 1, BLOCK_KEYS};
        for (size_t key = 0; key < keys.count(); key += ROWS) {
            const size_t count = std::min(ROWS, keys.count() - key), row = keys.rows.first + key;
            const size_t skipped = readers.causal && row > first ? std::min(rows, row - first) : 0;  // that are before the keys
            product(weights.from(key, skipped), {scratch.out_gradients + skipped * args.v_width, args.v_width},
                    {gradients.v.at(row, kv_head), gradients.v.row_stride, adds}, count, rows - skipped, args.v_width);
            product(changes.from(key, skipped), {scratch.queries + skipped * args.k_width, args.k_width},
                    {gradients.k.at(row, kv_head), gradients.k.row_stride, adds}, count, rows - skipped, args.k_width);
        }
    };
    each_block(tree, [&](const KeyBlock& keys, auto each_reader) {
        const float *const k = args.k.at(keys.rows.first, kv_head), *const v = args.v.at(keys.rows.first, kv_head);
        turn(k, args.k.row_stride, keys.count(), args.k_width, scratch.turned_keys, BLOCK_KEYS);
        copy(k, args.k.row_stride, keys.count(), args.k_width, scratch.keys);
        turn(v, args.v.row_stride, keys.count(), args.v_width, scratch.turned_values, BLOCK_KEYS);
        bool adds = false;
        each_reader([&](const Readers& readers) {
            for (size_t head = kv_head * group; head < (kv_head + 1) * group; ++head)
                for (size_t first = readers.rows.first; first < readers.rows.last; first += BLOCK_QUERIES) {
                    const size_t rows = std::min(BLOCK_QUERIES, readers.rows.last - first);
                    copy(args.q.at(first, head), args.q.row_stride, rows, args.k_width, scratch.queries);
                    copy(gradients.out.at(first, head), gradients.out.row_stride, rows, args.v_width, scratch.out_gradients);
                    for (size_t r = 0; r < rows; r += ROWS) weigh(keys, readers, head, first + r, std::min(ROWS, rows - r), r);
                    give(keys, readers, first, rows, adds);
                    adds = true;
                }
        });
    });
}

}  // namespace

constexpr PackedAttentionBody PORCELET_BODY = {forward, backward};

}  // namespace porcelet
