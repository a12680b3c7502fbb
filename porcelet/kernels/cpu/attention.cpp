#include "attention.h"

#include <algorithm>
#include <optional>
#include <vector>

namespace porcelet {
namespace {

constexpr size_t QUERIES = MAX_TOKENS;  // of a group that go over the keys together
constexpr size_t SMALLEST_PART = 128;
constexpr size_t MANY_PARTS = 4;  // a thread

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

// Query heads [head, head + queries) of a row over its keys [first, end), which are part number `part`: all of some groups, or
// a block of one.
struct Item {
    Row row;
    size_t head, queries, kv_head, kv_heads, part, first, end;

    const int64_t* pages(const AttentionArgs& args) const { return args.tables + row.sequence * args.max_pages + first / args.page_size; }
};

// Computes an item from pages of T, and asks memory for the first page of the one that this thread computes next.
template <class T>
void attend_part(const AttentionArgs& args, const Item& item, const Item& next, float* scores, float* partial, size_t stride) {
    const size_t length = item.end - item.first, row_scores = whole_scores(length), group = item.queries / item.kv_heads;
    const Products<T>& products = args.matrices->with(static_cast<const T*>(nullptr));
    const auto score_of = [&](size_t i) { return scores + i * row_scores; };
    const auto partial_of = [&](size_t i) { return partial + i * stride; };
    const auto page_of = [&](const CacheView& view, const Item& of, size_t number, size_t head) {
        return view.rows<T>(static_cast<size_t>(of.pages(args)[number]), of.kv_head + head);
    };
    // Calls visit(rows, first query, place, count, ahead) page by page and head by head, as they lie in memory, with the distance to the
    // rows of the next one, or to what comes `then`.
    const auto each_page = [&](const CacheView& view, MatrixOf<T> then, auto visit) {
        for (size_t place = 0; place < length; place += args.page_size) {
            const size_t number = place / args.page_size, count = std::min(args.page_size, length - place);
            for (size_t head = 0; head < item.kv_heads; ++head) {
                MatrixOf<T> following = then;
                if (head + 1 < item.kv_heads)
                    following = page_of(view, item, number, head + 1);
                else if (place + args.page_size < length)
                    following = page_of(view, item, number + 1, 0);
                const MatrixOf<T> rows = page_of(view, item, number, head);
                visit(rows, head * group, place, count, distance(rows, following));
            }
        }
    };
    each_page(args.k, page_of(args.v, item, 0, 0), [&](MatrixOf<T> keys, size_t query, size_t place, size_t count, size_t ahead) {
        const float* const q = args.q + (item.row.row * args.heads + item.head + query) * args.k_width;
        each_rows(*args.matrices, group, [&](size_t i) { return q + i * args.k_width; }, [&](size_t i) { return score_of(query + i) + place; },
                  [&](size_t n, const float** x, float** out) {
                      products.dot[n - 1](keys, count, args.k_width, x, out, {ahead, 0, TILE_ROWS});
                  });
    });
    for (size_t i = 0; i < item.queries; ++i) {
        std::fill(partial_of(i), partial_of(i) + args.v_width, 0.0f);
        args.body->exponentials(score_of(i), length, row_scores, args.scale, partial_of(i) + args.v_width);
    }
    each_page(args.v, page_of(args.k, next, 0, 0), [&](MatrixOf<T> values, size_t query, size_t place, size_t count, size_t ahead) {
        each_rows(*args.matrices, group, [&](size_t i) { return score_of(query + i) + place; }, [&](size_t i) { return partial_of(query + i); },
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
    size_t parts = 0, long_rows = 0;
    each_row(args, rows, part, [&](const Row& r) { parts += r.parts, long_rows += r.parts > 1; });
    // All groups together, so that memory is read in order, where there are items enough without cutting them apart.
    const bool together = blocks == 1 && parts >= MANY_PARTS * team.size;
    const size_t cuts = together ? 1 : args.kv_heads * blocks, queries = together ? args.heads : std::min(QUERIES, group);

    float* const scores = scratch(queries * (whole_scores(part) + size));
    float* const whole = scores + queries * whole_scores(part);  // the partial result of a row with one part
    const auto compute = [&](const Item& item, const Item& next) {
        const Row& r = item.row;
        const size_t stride = r.parts > 1 ? r.parts * size : size;
        // Partial results lie [row, head, part], so that one head's are merged from neighbours.
        float* const partial = r.parts > 1 ? args.partials + (r.first_partial * args.heads + item.head * r.parts + item.part) * size : whole;
        const auto attend = args.k.type == CacheType::float32 ? attend_part<float> : attend_part<uint16_t>;
        attend(args, item, next, scores, partial, stride);
        for (size_t i = 0; r.parts == 1 && i < item.queries; ++i)
            args.body->merge(partial + i * stride, 1, args.v_width, args.out + (r.row * args.heads + item.head + i) * args.v_width);
    };
    const auto [begin, end] = team.share(parts * cuts);
    size_t before = 0;
    std::optional<Item> waiting;  // until the one after it is known
    each_row(args, rows, part, [&, begin = begin, end = end](const Row& r) {
        const size_t count = r.parts * cuts;
        for (size_t i = std::max(begin, before); i < std::min(end, before + count); ++i) {
            const size_t index = (i - before) / cuts, cut = (i - before) % cuts, first = index * part, last = std::min(r.length, first + part);
            const size_t kv_head = cut / blocks, begun = cut % blocks * QUERIES;
            const Item item = together ? Item{r, 0, args.heads, 0, args.kv_heads, index, first, last}
                                       : Item{r, kv_head * group + begun, std::min(QUERIES, group - begun), kv_head, 1, index, first, last};
            if (waiting) compute(*waiting, item);
            waiting = item;
        }
        before += count;
    });
    if (waiting) compute(*waiting, *waiting);
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
