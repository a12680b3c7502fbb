// Attention of prompts: many new tokens of one sequence over the cached ones, themselves among them.
//
// The queries of a few tokens and of all query heads of a group form a block. It goes over the pages up to its last token: scores are
// a product with the page's keys, turned over so that neighbouring lanes are neighbouring keys; the softmax goes on from page to page
// (Milakov and Gimelshein, 2018), and the values are added by a second product. What a token does not see yet has weight zero.
#include <algorithm>
#include <cmath>
#include <vector>

#include "attention.h"
#include "turn.h"

namespace porcelet {
namespace {

constexpr size_t BLOCK_ROWS = 192;  // queries in a block: turning a page's keys over is little beside multiplying them

// The new tokens [first, last) of a sequence, with one key/value head.
struct Block {
    size_t sequence, kv_head, first, last;
};

// Room of the calling thread, kept for its next call.
struct Scratch {
    std::vector<float> keys, values, scores, sums, states;

    static Scratch& sized(const AttentionArgs& args, size_t rows) {
        thread_local Scratch room;
        grow(room.keys, args.page_size * args.k_width);
        grow(room.values, args.page_size * std::max(args.k_width, args.v_width));
        grow(room.scores, rows * whole_scores(args.page_size));
        grow(room.sums, rows * args.v_width);
        grow(room.states, rows * 2);
        return room;
    }

  private:
    static void grow(std::vector<float>& room, size_t count) {
        if (room.size() < count) room.resize(count);
    }
};

void attend_block(const AttentionArgs& args, const Block& block) {
    const size_t group = args.heads / args.kv_heads, rows = (block.last - block.first) * group, page_size = args.page_size;
    const size_t begin = static_cast<size_t>(args.offsets[block.sequence]), end = static_cast<size_t>(args.offsets[block.sequence + 1]);
    // A row's token sees `before` cached tokens, those of its own sequence's new ones up to itself, and itself.
    const size_t before = static_cast<size_t>(args.lengths[block.sequence]) - (end - begin);
    const auto place = [&](size_t row) {  // of a query, and of its result
        return (begin + block.first + row / group) * args.heads + block.kv_head * group + row % group;
    };
    const auto visible = [&](size_t row) { return before + block.first + row / group + 1; };
    Scratch& room = Scratch::sized(args, rows);
    std::fill(room.sums.data(), room.sums.data() + rows * args.v_width, 0.0f);
    for (size_t row = 0; row < rows; ++row) {
        room.states[2 * row] = -INFINITY;
        room.states[2 * row + 1] = 0.0f;
    }
    const size_t row_scores = whole_scores(page_size);
    const auto score_of = [&](size_t row) { return room.scores.data() + row * row_scores; };
    const auto sum_of = [&](size_t row) { return room.sums.data() + row * args.v_width; };
    const size_t length = visible(rows - 1);
    for (size_t token = 0; token < length; token += page_size) {
        const size_t count = std::min(page_size, length - token);
        const size_t page = static_cast<size_t>(args.tables[block.sequence * args.max_pages + token / page_size]);
        const Matrix keys = args.k.floats(*args.body, page, block.kv_head, count, args.k_width, room.values.data());
        turn(keys.first, keys.stride, count, args.k_width, room.keys.data(), page_size);
        // The first tokens of a block may not see a page that the last ones do.
        size_t blind = 0;
        while (visible(blind) <= token) ++blind;
        const Matrix turned = {room.keys.data(), page_size};
        each_rows(
            *args.matrices, rows - blind, [&](size_t row) { return args.q + place(blind + row) * args.k_width; },
            [&](size_t row) { return score_of(blind + row); },
            [&](size_t n, const float** x, float** out) { args.matrices->mix[n - 1](turned, args.k_width, count, x, out, 0); });
        for (size_t row = blind; row < rows; ++row)
            args.body->soften(score_of(row), std::min(count, visible(row) - token), row_scores, args.scale, &room.states[2 * row],
                              sum_of(row), args.v_width);
        const Matrix values = args.v.floats(*args.body, page, block.kv_head, count, args.v_width, room.values.data());
        each_rows(
            *args.matrices, rows - blind, [&](size_t row) { return score_of(blind + row); },
            [&](size_t row) { return sum_of(blind + row); },
            [&](size_t n, const float** x, float** out) { args.matrices->mix_on[n - 1](values, count, args.v_width, x, out, 0); });
    }
    for (size_t row = 0; row < rows; ++row) {
        float* const out = args.out + place(row) * args.v_width;
        for (size_t i = 0; i < args.v_width; ++i) out[i] = sum_of(row)[i] / room.states[2 * row + 1];
    }
}

}  // namespace

void attend_prompts(const AttentionArgs& args, size_t rows, const Team& team) {
    const size_t tokens = std::max<size_t>(1, BLOCK_ROWS * args.kv_heads / args.heads);
    size_t number = 0;  // blocks go round: neighbours are about equally long
    for (size_t b = 0; static_cast<size_t>(args.offsets[b]) < rows; ++b) {
        const size_t count = static_cast<size_t>(args.offsets[b + 1] - args.offsets[b]);
        if (count <= args.most) continue;
        for (size_t first = 0; first < count; first += tokens)
            for (size_t head = 0; head < args.kv_heads; ++head)
                if (number++ % team.size == team.index) attend_block(args, {b, head, first, std::min(count, first + tokens)});
    }
}

}  // namespace porcelet
