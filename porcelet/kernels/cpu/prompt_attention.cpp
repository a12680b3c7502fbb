// Attention of prompts: many new tokens of one sequence over the cached ones, themselves among them.
//
// The queries of a few tokens and of all query heads of a group form a block, which goes over the pages up to its last token.
#include <algorithm>

#include "attention.h"
#include "prompt_block.h"
#include "turn.h"

namespace porcelet {
namespace {

constexpr size_t BLOCK_ROWS = 192;  // queries in a block: turning a page's keys over is little beside multiplying them

// The new tokens [first, last) of a sequence, with one key/value head.
struct Part {
    size_t sequence, kv_head, first, last;
};

void attend_part(const AttentionArgs& args, const Part& part) {
    const size_t group = args.heads / args.kv_heads, page_size = args.page_size;
    const size_t begin = static_cast<size_t>(args.offsets[part.sequence]), end = static_cast<size_t>(args.offsets[part.sequence + 1]);
    const size_t before = static_cast<size_t>(args.lengths[part.sequence]) - (end - begin);
    const auto place = [&](size_t row) {  // of a query, and of its result
        return (begin + part.first + row / group) * args.heads + part.kv_head * group + row % group;
    };
    thread_local Room turned_room, widened_room;
    float* const turned = turned_room.sized(page_size * args.k_width);
    float* const widened = widened_room.sized(page_size * std::max(args.k_width, args.v_width));
    PromptBlock block(*args.body, *args.matrices, (part.last - part.first) * group, group, before + part.first + 1, page_size,
                      args.v_width, args.scale);
    for (size_t token = 0; token < block.length(); token += page_size) {
        const size_t count = std::min(page_size, block.length() - token);
        const size_t page = static_cast<size_t>(args.tables[part.sequence * args.max_pages + token / page_size]);
        const Matrix keys = args.k.floats(*args.body, page, part.kv_head, count, args.k_width, widened);
        turn(keys.first, keys.stride, count, args.k_width, turned, page_size);
        block.go_over(
            token, count,
            [&](size_t row, size_t n, float** out) {
                const float* x[MAX_TOKENS];
                for (size_t i = 0; i < n; ++i) x[i] = args.q + place(row + i) * args.k_width;
                args.matrices->mix[n - 1]({turned, page_size}, args.k_width, count, x, out, 0);
            },
            [&] { return args.v.floats(*args.body, page, part.kv_head, count, args.v_width, widened); });
    }
    block.finish([&](size_t row) { return args.out + place(row) * args.v_width; });
}

}  // namespace

void attend_prompts(const AttentionArgs& args, size_t rows, const Team& team) {
    const size_t tokens = std::max<size_t>(1, BLOCK_ROWS * args.kv_heads / args.heads);
    size_t number = 0;  // parts go round: neighbours are about equally long
    for (size_t b = 0; static_cast<size_t>(args.offsets[b]) < rows; ++b) {
        const size_t count = static_cast<size_t>(args.offsets[b + 1] - args.offsets[b]);
        if (count <= args.most) continue;
        for (size_t first = 0; first < count; first += tokens)
            for (size_t head = 0; head < args.kv_heads; ++head)
                if (number++ % team.size == team.index) attend_part(args, {b, head, first, std::min(count, first + tokens)});
    }
}

}  // namespace porcelet
