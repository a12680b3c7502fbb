#include "attention.h"

#include <algorithm>
#include <vector>

namespace porcelet {
namespace {

constexpr size_t QUERIES = 8;  // of a group that go over the keys together: their sums stay in the first-level cache
constexpr size_t SMALLEST_PART = 128;

// One new token: which sequence, how many cached tokens it sees, in how many parts, and where its partial results begin.
struct Row {
    size_t row, sequence, length, parts, first_partial;
};

// Calls visit(row) for every row served.
template <class Visit>
void each_row(const AttentionArgs& args, size_t rows, size_t part, Visit visit) {
    size_t partials = 0;
    for (size_t b = 0; static_cast<size_t>(args.offsets[b]) < rows; ++b) {
        const size_t first = static_cast<size_t>(args.offsets[b]), end = static_cast<size_t>(args.offsets[b + 1]);
        if (end - first > args.most) continue;
        for (size_t row = first; row < end; ++row) {
            const size_t length = static_cast<size_t>(args.lengths[b]) - (end - 1 - row), parts = (length + part - 1) / part;
            visit(Row{row, b, length, parts, partials});
            if (parts > 1) partials += parts;
        }
    }
}

// Room of the calling thread, kept for its next call.
float* scratch(size_t count) {
    thread_local std::vector<float> memory;
    if (memory.size() < count) memory.resize(count);
    return memory.data();
}

CacheView of_head(CacheView view, size_t offset) {
    if (view.type == CacheType::float32)
        view.first = static_cast<const float*>(view.first) + offset;
    else
        view.first = static_cast<const uint16_t*>(view.first) + offset;
    return view;
}

}  // namespace

size_t attention_part(size_t group, size_t k_width, size_t v_width, size_t page_size) {
    // Partial results are at most an eighth of the keys they stand for: absorbed MLA has up to 128 queries a key.
    const size_t wanted = std::max(SMALLEST_PART, 8 * group * (v_width + 2) / k_width);
    return (wanted + page_size - 1) / page_size * page_size;
}

void attention(const AttentionArgs& args, size_t rows, const Team& team) {
    const size_t group = args.heads / args.kv_heads, blocks = (group + QUERIES - 1) / QUERIES, size = args.v_width + 2;
    const size_t part = attention_part(group, args.k_width, args.v_width, args.page_size);
    size_t items = 0, long_rows = 0;
    each_row(args, rows, part, [&](const Row& r) { items += r.parts, long_rows += r.parts > 1; });
    items *= args.kv_heads * blocks;

    float* const scores = scratch(QUERIES * (part + size) + 4 * std::max(args.k_width, args.v_width));
    float* const whole = scores + QUERIES * part;  // the partial result of a row with one part
    float* const widened = whole + QUERIES * size;
    const auto compute = [&](const Row& r, size_t kv_head, size_t block, size_t index) {
        const size_t head = kv_head * group + block * QUERIES, queries = std::min(QUERIES, group - block * QUERIES);
        // Partial results lie [row, head, part], so that one head's are merged from neighbours.
        float* const partial = r.parts > 1 ? args.partials + (r.first_partial * args.heads + head * r.parts + index) * size : whole;
        args.body->attend({args.q + (r.row * args.heads + head) * args.k_width, queries,
                           of_head(args.k, kv_head * args.k_head_stride), of_head(args.v, kv_head * args.v_head_stride),
                           args.tables + r.sequence * args.max_pages, args.page_size, index * part,
                           std::min(r.length, (index + 1) * part), args.k_width, args.v_width, args.scale, scores, widened, partial,
                           r.parts > 1 ? r.parts * size : size});
        for (size_t i = 0; r.parts == 1 && i < queries; ++i)
            args.body->merge(whole + i * size, 1, args.v_width, args.out + (r.row * args.heads + head + i) * args.v_width);
    };
    const auto [begin, end] = team.share(items);
    size_t item = 0;
    each_row(args, rows, part, [&, begin = begin, end = end](const Row& r) {
        const size_t count = r.parts * args.kv_heads * blocks;
        for (size_t i = std::max(begin, item); i < std::min(end, item + count); ++i) {
            const size_t index = (i - item) / (args.kv_heads * blocks), rest = (i - item) % (args.kv_heads * blocks);
            compute(r, rest / blocks, rest % blocks, index);
        }
        item += count;
    });
    if (!long_rows) return;
    team.meet();
    const auto [first, last] = team.share(long_rows * args.heads);
    size_t seen = 0;
    each_row(args, rows, part, [&, first = first, last = last](const Row& r) {
        if (r.parts == 1) return;
        for (size_t i = std::max(first, seen); i < std::min(last, seen + args.heads); ++i) {
            const size_t head = i - seen;
            args.body->merge(args.partials + (r.first_partial * args.heads + head * r.parts) * size, r.parts, args.v_width,
                             args.out + (r.row * args.heads + head) * args.v_width);
        }
        seen += args.heads;
    });
}

}  // namespace porcelet
