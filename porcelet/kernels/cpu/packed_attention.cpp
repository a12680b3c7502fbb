// A unit of work is a tree, that is a prefix with all segments behind it or a segment alone, and one key head. Units write apart
// from one another and each sums in its own order: the result depends neither on threads nor on the batch.
#include "packed_attention.h"

#include <algorithm>
#include <cassert>
#include <utility>

namespace porcelet {
namespace {

const PackedAttentionBody& body_of(Isa isa) {
    assert(supported(isa));
    switch (isa) {
#ifdef __x86_64__
        case Isa::avx2:
        case Isa::avxvnni: return packed_attention_avx2;
        case Isa::avx512:
        case Isa::avx512vnni: return packed_attention_avx512;
#endif
        default: return packed_attention_scalar;
    }
}

using Tree = std::vector<RowRange>;

// Pairs of a query and a key that meet.
size_t cost(const Tree& tree) {
    const size_t prefix = tree[0].last - tree[0].first;
    size_t pairs = prefix * (prefix + 1) / 2;
    for (size_t i = 1; i < tree.size(); ++i) {
        const size_t length = tree[i].last - tree[i].first;
        pairs += length * prefix + length * (length + 1) / 2;
    }
    return pairs;
}

// The largest first, so that the threads end together.
std::vector<Tree> trees_of(const PackedSegments& segments) {
    std::vector<Tree> trees;
    std::vector<size_t> tree_of(segments.prefixes.size());
    for (size_t b = 0; b < segments.prefixes.size(); ++b) {
        const RowRange range = {static_cast<size_t>(segments.offsets[b]), static_cast<size_t>(segments.offsets[b + 1])};
        const int64_t prefix = segments.prefixes[b];
        tree_of[b] = prefix < 0 ? trees.size() : tree_of[static_cast<size_t>(prefix)];
        if (prefix < 0)
            trees.push_back({range});
        else
            trees[tree_of[b]].push_back(range);
    }
    std::stable_sort(trees.begin(), trees.end(), [](const Tree& a, const Tree& b) { return cost(a) > cost(b); });
    return trees;
}

// Calls compute(tree, key head, scratch) for all units.
template <class Compute>
void each_unit(const PackedAttentionArgs& args, const PackedSegments& segments, int threads, Compute compute) {
    const std::vector<Tree> trees = trees_of(segments);
    std::vector<float> rows(static_cast<size_t>(segments.offsets.back()) * args.heads);
    const size_t units = trees.size() * args.kv_heads;
#pragma omp parallel num_threads(threads) if (units > 1)
    {
        constexpr size_t scores = BLOCK_QUERIES * BLOCK_KEYS;
        std::vector<float> memory((2 * BLOCK_KEYS + BLOCK_QUERIES) * (args.k_width + args.v_width) + 2 * scores);
        float* next = memory.data();
        const auto take = [&](size_t count) { return std::exchange(next, next + count); };
        const size_t k = args.k_width, v = args.v_width;
        const PackedAttentionScratch scratch = {
            take(BLOCK_KEYS * k), take(BLOCK_KEYS * k), take(BLOCK_KEYS * v),    take(BLOCK_KEYS * v),    take(scores),
            take(scores),         take(BLOCK_QUERIES * k), take(BLOCK_QUERIES * v), rows.data()};
#pragma omp for schedule(dynamic)
        for (size_t unit = 0; unit < units; ++unit) {
            const Tree& tree = trees[unit / args.kv_heads];
            compute(SegmentTree{tree.data(), tree.size()}, unit % args.kv_heads, scratch);
        }
    }
}

}  // namespace

void packed_attention(const PackedAttentionArgs& args, const PackedSegments& segments, int threads, Isa isa) {
    const PackedAttentionBody& body = body_of(isa);
    each_unit(args, segments, threads, [&](SegmentTree tree, size_t kv_head, const PackedAttentionScratch& scratch) {
        body.forward(args, tree, kv_head, scratch);
    });
}

void packed_attention_backward(const PackedAttentionArgs& args, const PackedAttentionGradients& gradients,
                               const PackedSegments& segments, int threads, Isa isa) {
    const PackedAttentionBody& body = body_of(isa);
    each_unit(args, segments, threads, [&](SegmentTree tree, size_t kv_head, const PackedAttentionScratch& scratch) {
        body.backward(args, gradients, tree, kv_head, scratch);
    });
}

}  // namespace porcelet
