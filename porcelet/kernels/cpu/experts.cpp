// Assignments (token t, choice a), numbered t * A + a, are sorted by expert. Every thread takes its range of every expert's rows:
// the work is even however the tokens are spread, and in the second half one thread has an output of a token for all its experts.
// It adds them up in ascending order, which the token's own choice fixes. Experts that stay on disk are computed a range at a time, as
// far as memory goes, which leaves that order as it is.
#include "experts.h"

#include <algorithm>

#include "float_body.h"
#include "matrix.h"

namespace porcelet {
namespace {

constexpr size_t PIECE = 64;  // most outputs at once

// A counting sort by one thread; the team meets.
void sort_by_expert(const Assignments& chosen, size_t rows, const Team& team) {
    size_t* const starts = chosen.starts;
    const size_t count = rows * chosen.A;
    if (team.index == 0) {
        std::fill(starts, starts + chosen.E + 1, 0);
        for (size_t i = 0; i < count; ++i) ++starts[chosen.indices[i] + 1];
        for (size_t e = 0; e < chosen.E; ++e) starts[e + 1] += starts[e];
        for (size_t i = 0; i < count; ++i) chosen.order[starts[chosen.indices[i]]++] = i;
        for (size_t e = chosen.E; e > 0; --e) starts[e] = starts[e - 1];  // each had moved to the next one's
        starts[0] = 0;
    }
    team.meet();
}

struct Range {
    size_t first, last;
};

// Calls visit(expert, assignments, count) for every expert of a range with tokens.
template <class Visit>
void each_expert(const Assignments& chosen, Range experts, Visit visit) {
    for (size_t expert = experts.first; expert < experts.last; ++expert) {
        const size_t start = chosen.starts[expert], count = chosen.starts[expert + 1] - start;
        if (count) visit(expert, chosen.order + start, count);
    }
}

// Calls visit(expert, assignments, count, first row, rows) for every expert with tokens and this member's share of an expert's
// `height` rows of `width` floats.
template <class Visit>
void each_piece(const Assignments& chosen, size_t height, size_t width, const Team& team, Visit visit) {
    const auto [begin, end] = share_rows(height, team);
    const size_t piece = std::min(PIECE, piece_rows(width));
    each_expert(chosen, {0, chosen.E}, [&, begin = begin, end = end](size_t expert, const size_t* order, size_t count) {
        for (size_t row = begin; row < end; row += piece) visit(expert, order, count, row, std::min(piece, end - row));
    });
}

// What `activate` and `combine` read of the arguments, whatever the weights.
struct Activations {
    Isa isa;
    Matrix x;
    const Assignments& chosen;
    float* out;
    size_t out_stride, D, F;
    float* hidden;
};

// Some float32 rows of an expert; as Fp8Rows.
struct FloatRows {
    const MatrixBody& body;
    Matrix weight;
    size_t rows, K;

    template <class XOf, class OutOf>
    void dot(size_t tokens, XOf x_of, OutOf out_of) const {
        dot_tokens(body, weight, rows, K, tokens, x_of, out_of);
    }
};

// hidden = silu(gate(x)) * up(x), an assignment a row. `gate_of` and `up_of` give (expert, first row, rows, tokens) of their weight.
template <class GateOf, class UpOf>
void activate(const Activations& args, const Team& team, GateOf gate_of, UpOf up_of) {
    const size_t D = args.D, F = args.F;
    const auto silu_mul = float_body(args.isa).silu_mul;
    alignas(64) float gate[MAX_TOKENS][PIECE] = {}, up[MAX_TOKENS][PIECE] = {};
    each_piece(args.chosen, F, D, team, [&](size_t expert, const size_t* order, size_t count, size_t row, size_t height) {
        const auto gate_rows = gate_of(expert, row, height, count), up_rows = up_of(expert, row, height, count);
        each_block(count, matrix_body(args.isa).tokens, [&](size_t, size_t, size_t first, size_t tokens) {
            const auto x_of = [&](size_t t) { return args.x.from(order[first + t] / args.chosen.A).first; };
            gate_rows.dot(tokens, x_of, [&](size_t t) { return gate[t]; });
            up_rows.dot(tokens, x_of, [&](size_t t) { return up[t]; });
            for (size_t t = 0; t < tokens; ++t) {
                silu_mul(gate[t], up[t], gate[t], PIECE);  // whole pieces: a value never meets the loop's scalar end
                std::copy(gate[t], gate[t] + height, args.hidden + order[first + t] * F + row);
            }
        });
    });
}

// out = sum over a token's assignments of weight * down(hidden).
template <class DownOf>
void combine(const Activations& args, size_t rows, const Team& team, DownOf down_of) {
    const size_t D = args.D, F = args.F;
    const MatrixBody& body = matrix_body(args.isa);
    const auto [begin, end] = share_rows(D, team);
    for (size_t t = 0; t < rows; ++t) {
        float* const out = args.out + t * args.out_stride;
        std::fill(out + begin, out + end, 0.0f);
    }
    float values[MAX_TOKENS][PIECE];
    each_piece(args.chosen, D, F, team, [&](size_t expert, const size_t* order, size_t count, size_t row, size_t height) {
        const auto down_rows = down_of(expert, row, height, count);
        each_block(count, body.tokens, [&](size_t, size_t, size_t first, size_t tokens) {
            const auto x_of = [&](size_t t) { return args.hidden + order[first + t] * F; };
            down_rows.dot(tokens, x_of, [&](size_t t) { return values[t]; });
            for (size_t t = 0; t < tokens; ++t) {
                const size_t assignment = order[first + t];
                float* const out = args.out + assignment / args.chosen.A * args.out_stride + row;
                body.add_scaled(out, args.chosen.weights[assignment], values[t], height);
            }
        });
    });
}

// ---- packed weights ----

constexpr size_t PACKED_PIECE = 12, MOST = 32;  // tiles and tokens at once

// Calls visit(expert, assignments, count, first tile, last tile) for every expert of a range with tokens and this member's share of an
// expert's tiles.
template <class Visit>
void each_tiles(const Assignments& chosen, Range experts, size_t tiles, const Team& team, Visit visit) {
    const auto [begin, end] = team.share(tiles);
    each_expert(chosen, experts, [&, begin = begin, end = end](size_t expert, const size_t* order, size_t all) {
        for (size_t start = 0; start < all; start += MOST)
            for (size_t tile = begin; tile < end; tile += PACKED_PIECE)
                visit(expert, order + start, std::min(MOST, all - start), tile, std::min(end, tile + PACKED_PIECE));
    });
}

// Outputs of tiles [first, last), of `count` records, into rows of `values`.
template <class RecordOf>
void multiply_piece(const LinearBody& body, PackedMatrix weight, size_t offset, size_t first, size_t last, size_t count,
                    RecordOf record_of, float (*values)[PACKED_PIECE * TILE]) {
    weight.first += offset;
    const std::byte* records[MOST];
    float* places[MOST];
    for (size_t t = 0; t < count; ++t) {
        records[t] = record_of(t);
        places[t] = values[t] - first * TILE;
    }
    multiply_tiles(body, weight, first, last, count, records, places);
}

// hidden = silu(gate(x)) * up(x), rows in the order of the sorted assignments.
void activate(const PackedExpertsArgs& args, Range experts, const Team& team) {
    const size_t record_bytes = args.gate.groups * args.body->record_bytes, F = args.gate.N;
    alignas(64) float gate[MOST][PACKED_PIECE * TILE] = {}, up[MOST][PACKED_PIECE * TILE] = {};
    const auto visit = [&](size_t expert, const size_t* order, size_t count, size_t first, size_t last) {
        const auto record_of = [&](size_t t) { return args.records + order[t] / args.chosen.A * record_bytes; };
        const size_t offset = expert * args.gate_up_stride, row = first * TILE, height = std::min(last * TILE, F) - row;
        multiply_piece(*args.body, args.gate, offset, first, last, count, record_of, gate);
        multiply_piece(*args.body, args.up, offset, first, last, count, record_of, up);
        for (size_t t = 0; t < count; ++t) {
            args.floats->silu_mul(gate[t], up[t], gate[t], (height + TILE - 1) / TILE * TILE);
            std::copy(gate[t], gate[t] + height, args.hidden + (order - args.chosen.order + t) * F + row);
        }
    };
    each_tiles(args.chosen, experts, args.gate.tiles(), team, visit);
}

void clear(const PackedExpertsArgs& args, size_t rows, const Team& team) {
    const size_t D = args.down.N;
    const auto [first_tile, last_tile] = team.share(args.down.tiles());
    const size_t begin = std::min(D, first_tile * TILE), end = std::min(D, last_tile * TILE);
    for (size_t t = 0; t < rows; ++t) std::fill(args.out + t * D + begin, args.out + t * D + end, 0.0f);
}

// out += sum over a token's assignments to the range of weight * down(hidden).
void combine(const PackedExpertsArgs& args, Range experts, const Team& team) {
    const size_t record_bytes = args.down.groups * args.body->record_bytes, D = args.down.N;
    float values[MOST][PACKED_PIECE * TILE];
    const auto visit = [&](size_t expert, const size_t* order, size_t count, size_t first, size_t last) {
        const auto record_of = [&](size_t t) { return args.hidden_records + (order - args.chosen.order + t) * record_bytes; };
        multiply_piece(*args.body, args.down, expert * args.down_stride, first, last, count, record_of, values);
        const size_t row = first * TILE, height = std::min(last * TILE, D) - row;
        for (size_t t = 0; t < count; ++t) {
            float* const out = args.out + order[t] / args.chosen.A * D + row;
            const float weight = args.chosen.weights[order[t]];
            for (size_t i = 0; i < height; ++i) out[i] += weight * values[t][i];
        }
    };
    each_tiles(args.chosen, experts, args.down.tiles(), team, visit);
}

}  // namespace

void experts_float(const ExpertsArgs& args, size_t rows, const Team& team) {
    const size_t D = args.D, F = args.F;
    const MatrixBody& body = matrix_body(args.isa);
    const Activations all = {args.isa, args.x, args.chosen, args.out, args.out_stride, D, F, args.hidden};
    const auto gate_up_of = [&](size_t expert, size_t row, size_t height) {
        return FloatRows{body, {args.gate_up + (expert * 2 * F + row) * D, D}, height, D};
    };
    const auto gate_of = [&](size_t expert, size_t row, size_t height, size_t) { return gate_up_of(expert, row, height); };
    const auto up_of = [&](size_t expert, size_t row, size_t height, size_t) { return gate_up_of(expert, F + row, height); };
    const auto down_of = [&](size_t expert, size_t row, size_t height, size_t) {
        return FloatRows{body, {args.down + (expert * D + row) * F, F}, height, F};
    };
    sort_by_expert(args.chosen, rows, team);
    activate(all, team, gate_of, up_of);
    team.meet();
    combine(all, rows, team, down_of);
}

void experts_fp8(const Fp8ExpertsArgs& args, size_t rows, const Team& team) {
    const Activations all = {args.isa, args.x, args.chosen, args.out, args.D, args.D, args.F, args.hidden};
    const auto rows_of = [&](Fp8Matrix weight, size_t stride, size_t scales_stride, size_t slot) {
        return [=, isa = args.isa](size_t expert, size_t row, size_t height, size_t tokens) {
            const Fp8Matrix own = {weight.values + expert * stride, weight.scales + expert * scales_stride, weight.K};
            return Fp8Rows(isa, own, row, height, tokens, slot);
        };
    };
    sort_by_expert(args.chosen, rows, team);
    activate(all, team, rows_of(args.gate, args.gate_up_stride, args.gate_up_scales_stride, 0),
             rows_of(args.up, args.gate_up_stride, args.gate_up_scales_stride, 1));
    team.meet();
    combine(all, rows, team, rows_of(args.down, args.down_stride, args.down_scales_stride, 0));
}

void experts_packed(const PackedExpertsArgs& args, size_t rows, const Team& team) {
    const Assignments& chosen = args.chosen;
    const size_t F = args.gate.N, record_bytes = args.down.groups * args.body->record_bytes;
    sort_by_expert(chosen, rows, team);
    clear(args, rows, team);
    for (Range experts = {0, 0}; experts.last < chosen.E;) {
        experts.first = experts.last;
        experts.last = args.residency ? args.residency->admit(args.layer, chosen.starts, experts.first, team) : chosen.E;
        const size_t start = chosen.starts[experts.first], count = chosen.starts[experts.last] - start;
        activate(args, experts, team);
        team.meet();
        quantize({args.body, args.hidden + start * F, F, 0, 1, args.down.groups, args.wide_from, args.hidden_records + start * record_bytes},
                 count, team);
        team.meet();
        combine(args, experts, team);
        if (args.residency) team.meet();  // before the next ones take their place
    }
}

}  // namespace porcelet
