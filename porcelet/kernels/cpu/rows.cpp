#include "rows.h"

#include <algorithm>

#include "half.h"

namespace porcelet {

void take_rows(const TakeRowsArgs& args, size_t rows, const Team& team) {
    const auto [begin, end] = team.share(rows);
    for (size_t row = begin; row < end; ++row) {
        const float* from = args.table + static_cast<size_t>(args.index[row]) * args.stride;
        std::copy(from, from + args.width, args.out + row * args.width);
    }
}

void take_packed_rows(const TakePackedRowsArgs& args, size_t rows, const Team& team) {
    const PackedMatrix& weight = args.weight;
    const bool nibbles = is_int4(weight.format), symmetric = is_symmetric(weight.format);
    const double centre = nibbles ? 8 : 128;
    const size_t values = lines(weight.format) * LINE;
    const auto [begin, end] = team.share(rows, weight.groups);
    for (size_t i = begin; i < end; ++i) {
        const size_t row = i / weight.groups, group = i % weight.groups, index = static_cast<size_t>(args.index[row]);
        const size_t lane = index % TILE;
        const uint8_t* const block = weight.tile(index / TILE) + group * block_bytes(weight.format);
        uint16_t halves[2] = {};  // scale and minimum
        for (size_t i = 0; i < (symmetric ? 1 : 2); ++i) std::memcpy(&halves[i], block + values + (i * TILE + lane) * sizeof halves[i], sizeof halves[i]);
        const double scale = from_half(halves[0]), minimum = symmetric ? -centre * scale : from_half(halves[1]);
        float* const out = args.out + row * weight.groups * GROUP + group * GROUP;
        for (size_t column = 0; column < GROUP; ++column) {
            const size_t quad = column / 4, line = quad % lines(weight.format);
            const uint8_t byte = block[line * LINE + lane * 4 + column % 4];
            const double q = nibbles ? byte >> 4 * (quad != line) & 15 : byte;
            out[column] = static_cast<float>(q * scale + minimum);
        }
    }
}

void cache_write(const CacheWriteArgs& args, size_t rows, const Team& team) {
    const auto [begin, end] = team.share(rows, args.heads);
    for (size_t i = begin; i < end; ++i) {
        const size_t row = i / args.heads, head = i % args.heads, slot = static_cast<size_t>(args.slots[row]);
        const float* from = args.values + row * args.values_stride + head * args.values_head_stride;
        const size_t place = slot / args.page_size * args.page_stride + slot % args.page_size * args.slot_stride + head * args.head_stride;
        if (args.type == CacheType::float32)
            std::copy(from, from + args.width, static_cast<float*>(args.cache) + place);
        else
            args.body->narrow(from, static_cast<uint16_t*>(args.cache) + place, args.width);
    }
}

}  // namespace porcelet
