#include "fp8.h"

#include <cassert>
#include <vector>

namespace porcelet {

const Fp8Body& fp8_body(Isa isa) {
    assert(supported(isa));
    switch (isa) {
#ifdef __x86_64__
        case Isa::avx2:
        case Isa::avxvnni: return fp8_avx2;
        case Isa::avx512:
        case Isa::avx512vnni: return fp8_avx512;
#endif
        default: return fp8_scalar;
    }
}

Fp8Rows::Fp8Rows(Isa isa, const Fp8Matrix& weight, size_t first, size_t rows, size_t tokens, size_t slot)
    : matrix_(matrix_body(isa)), body_(fp8_body(isa)), weight_(weight), first_(first), rows_(rows) {
    if (tokens <= matrix_.tokens) return;
    thread_local std::vector<float> scratch[2];
    std::vector<float>& floats = scratch[slot];
    if (floats.size() < rows * weight.K) floats.resize(rows * weight.K);
    body_.widen(weight, first, rows, floats.data());
    widened_ = floats.data();
}

void linear_fp8(const LinearFp8Args& args, size_t rows, const Team& team) {
    const auto [begin, end] = share_rows(args.N, team);
    const size_t piece = piece_rows(args.weight.K);
    for (size_t row = begin; row < end; row += piece) {
        const auto x_of = [&](size_t t) { return args.x.from(t).first; };
        const auto out_of = [&, row](size_t t) { return args.out + t * args.N + row; };
        Fp8Rows(args.isa, args.weight, row, std::min(piece, end - row), rows, 0).dot(rows, x_of, out_of);
    }
}

}  // namespace porcelet
