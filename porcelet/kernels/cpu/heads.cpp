#include "heads.h"

#include "matrix.h"

namespace porcelet {
namespace {

constexpr size_t PIECE = 128;  // outputs of one head: what the threads share

}  // namespace

void heads_linear(const HeadsArgs& args, size_t rows, const Team& team) {
    const MatrixBody& body = matrix_body(args.isa);
    const size_t pieces = (args.outputs + PIECE - 1) / PIECE;
    const auto [begin, end] = team.share(args.heads * pieces);
    for (size_t item = begin; item < end; ++item) {
        const size_t head = item / pieces, first = item % pieces * PIECE, count = std::min(PIECE, args.outputs - first);
        const Matrix weight = {args.weight.first + head * args.weight_head_stride, args.weight.stride};
        const auto x_of = [&](size_t t) { return args.x + t * args.x_token_stride + head * args.x_head_stride; };
        const auto out_of = [&](size_t t) { return args.out + t * args.out_token_stride + head * args.out_head_stride + first; };
        if (args.mixed)
            mix_tokens(body, {weight.first + first, weight.stride}, args.inputs, count, rows, x_of, out_of);
        else
            dot_tokens(body, weight.from(first), count, args.inputs, rows, x_of, out_of);
    }
}

}  // namespace porcelet
