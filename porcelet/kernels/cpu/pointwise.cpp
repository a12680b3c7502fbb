#include "pointwise.h"

#include <algorithm>
#include <cassert>

namespace porcelet {
namespace {

// Rows are shared in pieces, so that a single one occupies a team too. Full vectors, so that a value's place in its vector depends
// on its column alone.
constexpr size_t PIECE = 256;

// Calls compute(row, first column, number of columns) for this thread's pieces.
template <class Compute>
void each_piece(size_t rows, size_t width, const Team& team, Compute compute) {
    const size_t pieces = (width + PIECE - 1) / PIECE;
    const auto [begin, end] = team.share(rows, pieces);
    for (size_t i = begin; i < end; ++i) {
        const size_t column = i % pieces * PIECE;
        compute(i / pieces, column, std::min(PIECE, width - column));
    }
}

// Calls compute(row, head) for this thread's heads.
template <class Compute>
void each_head(size_t rows, size_t heads, const Team& team, Compute compute) {
    const auto [begin, end] = team.share(rows, heads);
    for (size_t i = begin; i < end; ++i) compute(i / heads, i % heads);
}

}  // namespace

const FloatBody& float_body(Isa isa) {
    assert(supported(isa));
    switch (isa) {
#ifdef __x86_64__
        case Isa::avx2:
        case Isa::avxvnni: return float_avx2;
        case Isa::avx512:
        case Isa::avx512vnni: return float_avx512;
#endif
        default: return float_scalar;
    }
}

void rms_norm(const RmsNormArgs& args, size_t rows, const Team& team) {
    each_head(rows, args.heads, team, [&](size_t row, size_t head) {
        args.body->rms_norm(args.x + row * args.x_stride + head * args.head_stride, args.weight,
                            args.out + (row * args.heads + head) * args.width, args.width, args.eps);
    });
}

void rope(const RopeArgs& args, size_t rows, const Team& team) {
    each_head(rows, args.heads, team, [&](size_t row, size_t head) {
        args.body->rope(args.x + row * args.x_stride + head * args.head_stride, args.cosine + row * args.half,
                        args.sine + row * args.half, args.out + (row * args.heads + head) * 2 * args.half, args.half,
                        args.interleaved);
    });
}

void silu_mul(const PairArgs& args, size_t rows, const Team& team) {
    each_piece(rows, args.width, team, [&](size_t row, size_t column, size_t count) {
        args.body->silu_mul(args.first + row * args.first_stride + column, args.second + row * args.second_stride + column,
                            args.out + row * args.width + column, count);
    });
}

void add(const PairArgs& args, size_t rows, const Team& team) {
    each_piece(rows, args.width, team, [&](size_t row, size_t column, size_t count) {
        const float* first = args.first + row * args.first_stride + column;
        const float* second = args.second + row * args.second_stride + column;
        float* out = args.out + row * args.width + column;
        for (size_t i = 0; i < count; ++i) out[i] = first[i] + second[i];
    });
}

void concat(const ConcatArgs& args, size_t rows, const Team& team) {
    each_head(rows, args.heads, team, [&](size_t row, size_t head) {
        const float* first = args.first + row * args.first_stride + head * args.first_head_stride;
        const float* second = args.second + row * args.second_stride + head * args.second_head_stride;
        float* out = args.out + (row * args.heads + head) * (args.first_width + args.second_width);
        std::copy(first, first + args.first_width, out);
        std::copy(second, second + args.second_width, out + args.first_width);
    });
}

}  // namespace porcelet
