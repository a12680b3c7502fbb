// Assignments (token t, choice a), numbered t * A + a, are sorted by expert. Every thread takes its range of every expert's rows:
// the work is even however the tokens are spread, and in the second half one thread has an output of a token for all its experts.
// It adds them up in ascending order, which the token's own choice fixes.
#include "experts.h"

#include <algorithm>

#include "float_body.h"
#include "matrix.h"

namespace porcelet {
namespace {

constexpr size_t PIECE = 64;  // most outputs at once

// A counting sort: the assignments of expert e become order[starts[e] .. starts[e + 1]), ascending.
void sort_by_expert(const ExpertsArgs& args, size_t count) {
    size_t* const starts = args.starts;
    std::fill(starts, starts + args.E + 1, 0);
    for (size_t i = 0; i < count; ++i) ++starts[args.indices[i] + 1];
    for (size_t e = 0; e < args.E; ++e) starts[e + 1] += starts[e];
    for (size_t i = 0; i < count; ++i) args.order[starts[args.indices[i]]++] = i;
    for (size_t e = args.E; e > 0; --e) starts[e] = starts[e - 1];  // each had moved to the next one's
    starts[0] = 0;
}

// Calls visit(expert, first assignment, count, first row, rows) for every expert with tokens and this member's share of an
// expert's `height` rows of `width` floats.
template <class Visit>
void each_piece(const ExpertsArgs& args, size_t height, size_t width, const Team& team, Visit visit) {
    const auto [begin, end] = share_rows(height, team);
    const size_t piece = std::min(PIECE, piece_rows(width));
    for (size_t expert = 0; expert < args.E; ++expert) {
        const size_t start = args.starts[expert], count = args.starts[expert + 1] - start;
        if (!count) continue;
        for (size_t row = begin; row < end; row += piece)
            visit(expert, args.order + start, count, row, std::min(piece, end - row));
    }
}

// hidden = silu(gate(x)) * up(x), an assignment a row.
void activate(const ExpertsArgs& args, const MatrixBody& body, const Team& team) {
    const size_t D = args.D, F = args.F;
    const auto silu_mul = float_body(args.isa).silu_mul;
    alignas(64) float gate[MAX_TOKENS][PIECE] = {}, up[MAX_TOKENS][PIECE] = {};
    each_piece(args, F, D, team, [&](size_t expert, const size_t* order, size_t count, size_t row, size_t height) {
        const Matrix weight = {args.gate_up + expert * 2 * F * D, D};
        each_block(count, body.tokens, [&](size_t, size_t, size_t first, size_t tokens) {
            const auto x_of = [&](size_t t) { return args.x.from(order[first + t] / args.A).first; };
            dot_tokens(body, weight.from(row), height, D, tokens, x_of, [&](size_t t) { return gate[t]; });
            dot_tokens(body, weight.from(F + row), height, D, tokens, x_of, [&](size_t t) { return up[t]; });
            for (size_t t = 0; t < tokens; ++t) {
                silu_mul(gate[t], up[t], gate[t], PIECE);  // whole pieces: a value never meets the loop's scalar end
                std::copy(gate[t], gate[t] + height, args.hidden + order[first + t] * F + row);
            }
        });
    });
}

// out = sum over a token's assignments of weight * down(hidden).
void combine(const ExpertsArgs& args, const MatrixBody& body, size_t rows, const Team& team) {
    const size_t D = args.D, F = args.F;
    const auto [begin, end] = share_rows(D, team);
    for (size_t t = 0; t < rows; ++t) {
        float* const out = args.out + t * args.out_stride;
        std::fill(out + begin, out + end, 0.0f);
    }
    float values[MAX_TOKENS][PIECE];
    each_piece(args, D, F, team, [&](size_t expert, const size_t* order, size_t count, size_t row, size_t height) {
        const Matrix weight = {args.down + expert * D * F, F};
        each_block(count, body.tokens, [&](size_t, size_t, size_t first, size_t tokens) {
            const auto x_of = [&](size_t t) { return args.hidden + order[first + t] * F; };
            dot_tokens(body, weight.from(row), height, F, tokens, x_of, [&](size_t t) { return values[t]; });
            for (size_t t = 0; t < tokens; ++t) {
                const size_t assignment = order[first + t];
                float* const out = args.out + assignment / args.A * args.out_stride + row;
                body.add_scaled(out, args.weights[assignment], values[t], height);
            }
        });
    });
}

}  // namespace

void experts_float(const ExpertsArgs& args, size_t rows, const Team& team) {
    const MatrixBody& body = matrix_body(args.isa);
    if (team.index == 0) sort_by_expert(args, rows * args.A);
    team.meet();
    activate(args, body, team);
    team.meet();
    combine(args, body, rows, team);
}

}  // namespace porcelet
