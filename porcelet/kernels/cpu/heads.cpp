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

void heads_packed(const HeadsPackedArgs& args, size_t rows, const Team& team) {
    constexpr size_t chunk = 32;  // tokens at once
    const size_t tiles = args.weight.tiles(), record_bytes = args.weight.groups * args.body->record_bytes;
    const auto [begin, end] = team.share(args.heads * tiles);
    for (size_t item = begin; item < end;) {
        const size_t head = item / tiles, first = item % tiles, last = std::min(tiles, first + end - item);
        PackedMatrix weight = args.weight;
        weight.first += head * args.head_bytes;
        for (size_t start = 0; start < rows; start += chunk) {
            const size_t count = std::min(chunk, rows - start);
            const std::byte* records[chunk];
            float* out[chunk];
            for (size_t t = 0; t < count; ++t) {
                const size_t place = (start + t) * args.heads + head;
                records[t] = args.records + place * record_bytes;
                out[t] = args.out + place * weight.N;
            }
            multiply_tiles(*args.body, weight, first, last, count, records, out);
        }
        item += last - first;
    }
}

}  // namespace porcelet
