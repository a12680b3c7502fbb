#include "linear_float.h"

#include <cassert>

#include "matrix.h"

namespace porcelet {

const MatrixBody& matrix_body(Isa isa) {
    assert(supported(isa));
    switch (isa) {
#ifdef __x86_64__
        case Isa::avx2:
        case Isa::avxvnni: return matrix_avx2;
        case Isa::avx512:
        case Isa::avx512vnni: return matrix_avx512;
#endif
        default: return matrix_scalar;
    }
}

void linear_float(const LinearFloatArgs& args, size_t rows, const Team& team) {
    const MatrixBody& body = matrix_body(args.isa);
    const auto [begin, end] = share_rows(args.N, team);
    const size_t piece = piece_rows(args.K);
    for (size_t row = begin; row < end; row += piece) {
        const size_t count = std::min(piece, end - row);
        const auto x_of = [&](size_t t) { return args.x.from(t).first; };
        const auto out_of = [&](size_t t) { return args.out + t * args.out_stride + row; };
        dot_tokens(body, args.weight.from(row), count, args.K, rows, x_of, out_of);
        if (!args.bias) continue;
        for (size_t t = 0; t < rows; ++t)
            for (size_t i = 0; i < count; ++i) out_of(t)[i] += args.bias[row + i];
    }
}

}  // namespace porcelet
