// What the drivers (linear.cpp) and the bodies for one instruction set (linear_*.cpp) agree on.
//
// A packed weight is laid out as kernels/linear.py describes: tiles of 16 output rows; in a tile one block a group of 32 input columns:
// the values in lines of 64 bytes, then 16 half scales and, where the format has them, 16 half minima.
#pragma once

#include <cstddef>
#include <cstdint>

#include "isa.h"
#include "team.h"

namespace porcelet {

constexpr size_t TILE = 16;   // output rows, one a vector lane
constexpr size_t GROUP = 32;  // input columns that share a scale
constexpr size_t LINE = 64;   // bytes: a quad of columns of all rows of a tile, or two quads in four bits
constexpr size_t MOST_TOKENS = 4;  // that a body's registers hold at once

// Unsigned numbers q of a weight scale * q + minimum or, symmetric, scale * (q - 128) and scale * (q - 8).
enum class Format : size_t { int8, int4, int8_symmetric, int4_symmetric };
constexpr size_t FORMATS = 4;

constexpr bool is_int4(Format format) { return format == Format::int4 || format == Format::int4_symmetric; }
constexpr bool is_symmetric(Format format) { return format == Format::int8_symmetric || format == Format::int4_symmetric; }
constexpr Format in_bytes(Format format) { return is_symmetric(format) ? Format::int8_symmetric : Format::int8; }
constexpr size_t lines(Format format) { return is_int4(format) ? 4 : 8; }
constexpr size_t halves_bytes(Format format) { return (is_symmetric(format) ? 1 : 2) * TILE * sizeof(uint16_t); }
constexpr size_t block_bytes(Format format) { return lines(format) * LINE + halves_bytes(format); }

// One instruction set's body.
//   quantize  turns the groups [first, last) of one token's `groups` into records of `record_bytes`. A group takes two bytes a value if
//             its largest exceeds `wide_from` times the mean of the token's groups' largest
//   multiply  [format][tokens - 1]: `columns` outputs of each token from tiles that lie one behind the other. Tiles go `tiles` at a time,
//             tokens up to `tokens`
//   spread    blocks of a format of four bits as those of `in_bytes(format)`: the same weights
struct LinearBody {
    size_t record_bytes, tiles, tokens;
    void (*quantize)(const float* x, size_t groups, size_t first, size_t last, float wide_from, std::byte* records);
    using Multiply = void (*)(const uint8_t* packed, size_t groups, const std::byte* const* records, float* const* out, size_t columns);
    Multiply multiply[FORMATS][MOST_TOKENS];
    void (*spread)(Format format, const uint8_t* from, size_t blocks, uint8_t* to);
};

extern const LinearBody linear_scalar, linear_avx2, linear_avxvnni, linear_avx512, linear_avx512vnni;

const LinearBody& linear_body(Isa isa);  // `isa` must be supported

// Activations [rows, heads, 32 * groups] as records [rows, heads, groups]; a linear layer's have one head. Rows of x lie `x_stride`
// floats apart, heads `head_stride`.
struct QuantizeArgs {
    const LinearBody* body;
    const float* x;
    size_t x_stride, head_stride, heads, groups;
    float wide_from;
    std::byte* records;

    size_t row_values() const { return heads * groups * GROUP; }
};

void quantize(const QuantizeArgs& args, size_t rows, const Team& team);

struct PackedMatrix {
    Format format;
    const uint8_t* first;
    size_t groups, N;  // columns / 32, rows

    size_t tiles() const { return (N + TILE - 1) / TILE; }
    const uint8_t* tile(size_t number) const { return first + number * groups * block_bytes(format); }
};

// out [rows, N] = activations times the transposed packed weight.
struct LinearArgs {
    const LinearBody* body;
    PackedMatrix weight;
    const std::byte* records;
    float* out;
};

void linear_packed(const LinearArgs& args, size_t rows, const Team& team);

// Outputs of the tiles [first, last) for any number of tokens, each with its records and the place of the matrix's first output.
void multiply_tiles(const LinearBody& body, const PackedMatrix& weight, size_t first, size_t last, size_t tokens,
                    const std::byte* const* records, float* const* out);

}  // namespace porcelet
