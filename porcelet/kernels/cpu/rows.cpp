#include "rows.h"

#include <algorithm>

#include "half.h"
#include "linear.h"

namespace porcelet {

void take_rows(const TakeRowsArgs& args, size_t rows, const Team& team) {
    const auto [begin, end] = team.share(rows);
    for (size_t row = begin; row < end; ++row) {
        const float* from = args.table + static_cast<size_t>(args.index[row]) * args.stride;
        std::copy(from, from + args.width, args.out + row * args.width);
    }
}

void take_int8_rows(const TakeInt8RowsArgs& args, size_t rows, const Team& team) {
    const size_t groups = args.K / GROUP;
    const auto [begin, end] = team.share(rows * groups);
    for (size_t i = begin; i < end; ++i) {
        const size_t row = i / groups, group = i % groups, index = static_cast<size_t>(args.index[row]), lane = index % TILE;
        const uint8_t* block = args.packed + (index / TILE * groups + group) * BLOCK_BYTES;
        const uint8_t* halves = block + TILE * GROUP + lane * sizeof(uint16_t);
        uint16_t scale, minimum;
        std::memcpy(&scale, halves, sizeof scale);
        std::memcpy(&minimum, halves + TILE * sizeof minimum, sizeof minimum);
        float* out = args.out + row * args.K + group * GROUP;
        for (size_t column = 0; column < GROUP; ++column) {
            const double q = block[column / 4 * TILE * 4 + lane * 4 + column % 4];
            out[column] = static_cast<float>(q * static_cast<double>(from_half(scale)) + static_cast<double>(from_half(minimum)));
        }
    }
}

void cache_write(const CacheWriteArgs& args, size_t rows, const Team& team) {
    const auto [begin, end] = team.share(rows);
    for (size_t row = begin; row < end; ++row) {
        const float* from = args.values + row * args.values_stride;
        const size_t place = static_cast<size_t>(args.slots[row]) * args.slot_stride;
        if (args.type == CacheType::float32)
            std::copy(from, from + args.width, static_cast<float*>(args.cache) + place);
        else
            args.body->narrow(from, static_cast<uint16_t*>(args.cache) + place, args.width);
    }
}

}  // namespace porcelet
