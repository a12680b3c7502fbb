#include "attention.h"

#include <algorithm>
#include <vector>

namespace porcelet {
namespace {

constexpr size_t QUERIES = MAX_TOKENS;  // of a group that go over the keys together
constexpr size_t SMALLEST_PART = 128;

// One new token: which sequence, how many cached tokens it sees, in how many parts, and where its partial results begin.
struct Row {
    size_t row, sequence, length, parts, first_partial;
};

// Calls visit(row) for every row that is no prompt's.
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

// Where one of a group's blocks of queries, [head, head + queries), goes over a part of a row's keys, from pages of T.
template <class T>
void attend_part(const AttentionArgs& args, const Row& r, size_t head, size_t queries, size_t first, size_t end, float* scores,
                 float* partial, size_t stride) {
    const size_t kv_head = head / (args.heads / args.kv_heads), row_scores = whole_scores(end - first);
    const int64_t* const pages = args.tables + r.sequence * args.max_pages + first / args.page_size;
    const Products<T>& products = args.matrices->with(static_cast<const T*>(nullptr));
    const auto score_of = [&](size_t i) { return scores + i * row_scores; };
    const auto partial_of = [&](size_t i) { return partial + i * stride; };
    const auto page_of = [&](const CacheView& view, size_t number) { return view.rows<T>(static_cast<size_t>(pages[number]), kv_head); };
    // Calls visit(rows, place, count, ahead) page by page, with the distance to the rows of the next page, or of the first of `then`.
    const auto each_page = [&](const CacheView& view, const CacheView& then, auto visit) {
        for (size_t place = 0; place < end - first; place += args.page_size) {
            const size_t number = place / args.page_size, count = std::min(args.page_size, end - first - place);
            const bool is_last = place + args.page_size >= end - first;
            const MatrixOf<T> rows = page_of(view, number), next = is_last ? page_of(then, 0) : page_of(view, number + 1);
            visit(rows, place, count, distance(rows, next));
        }
    };
    each_page(args.k, args.v, [&](MatrixOf<T> keys, size_t place, size_t count, size_t ahead) {
        each_rows(*args.matrices, queries, [&](size_t i) { return args.q + (r.row * args.heads + head + i) * args.k_width; },
                  [&](size_t i) { return score_of(i) + place; },
                  [&](size_t n, const float** x, float** out) {
                      products.dot[n - 1](keys, count, args.k_width, x, out, {ahead, 0, TILE_ROWS});
                  });
    });
    for (size_t i = 0; i < queries; ++i) {
        std::fill(partial_of(i), partial_of(i) + args.v_width, 0.0f);
        args.body->exponentials(score_of(i), end - first, row_scores, args.scale, partial_of(i) + args.v_width);
    }
    each_page(args.v, args.v, [&](MatrixOf<T> values, size_t place, size_t count, size_t ahead) {
        each_rows(*args.matrices, queries, [&](size_t i) { return score_of(i) + place; }, partial_of,
                  [&](size_t n, const float** x, float** out) {
                      products.mix_on[n - 1](values, count, args.v_width, x, out, ahead);
                  });
    });
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

    float* const scores = scratch(QUERIES * (whole_scores(part) + size));
    float* const whole = scores + QUERIES * whole_scores(part);  // the partial result of a row with one part
    const auto compute = [&](const Row& r, size_t kv_head, size_t block, size_t index) {
        const size_t head = kv_head * group + block * QUERIES, queries = std::min(QUERIES, group - block * QUERIES);
        const size_t first = index * part, end = std::min(r.length, first + part), stride = r.parts > 1 ? r.parts * size : size;
        // Partial results lie [row, head, part], so that one head's are merged from neighbours.
        float* const partial = r.parts > 1 ? args.partials + (r.first_partial * args.heads + head * r.parts + index) * size : whole;
        const auto attend = args.k.type == CacheType::float32 ? attend_part<float> : attend_part<uint16_t>;
        attend(args, r, head, queries, first, end, scores, partial, stride);
        for (size_t i = 0; r.parts == 1 && i < queries; ++i)
            args.body->merge(partial + i * stride, 1, args.v_width, args.out + (r.row * args.heads + head + i) * args.v_width);
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
    attend_prompts(args, rows, team);
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
