// Assignments (token t, choice a), numbered t * A + a, are sorted by expert. With float32 or FP8 weights every thread takes its range of
// every expert's rows: the work is even however the tokens are spread. With packed ones it takes jobs, some tiles of an expert for some of
// its tokens, and those of others when its own are done. In the second half one thread has an output of a token for all its experts.
// It adds them up in ascending order, which the token's own choice fixes. Experts that stay on disk are computed a range at a time, as
// far as memory goes, which leaves that order as it is.
#include "experts.h"

#include <algorithm>

#include "float_body.h"
#include "matrix.h"

namespace porcelet {
namespace {

constexpr size_t PIECE = 64;  // most outputs at once

// A counting sort by one member, of which the others may read after their next meeting.
void sort_by_expert(const Assignments& chosen, size_t rows, const Team& team) {
    if (team.index > 0) return;
    size_t* const starts = chosen.starts;
    const size_t count = rows * chosen.A;
    std::fill(starts, starts + chosen.E + 1, 0);
    for (size_t i = 0; i < count; ++i) ++starts[chosen.indices[i] + 1];
    for (size_t e = 0; e < chosen.E; ++e) starts[e + 1] += starts[e];
    for (size_t i = 0; i < count; ++i) chosen.order[starts[chosen.indices[i]]++] = i;
    for (size_t e = chosen.E; e > 0; --e) starts[e] = starts[e - 1];  // each had moved to the next one's
    starts[0] = 0;
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

constexpr size_t PIECE_TILES = 12;   // at once, and at most
constexpr size_t JOBS_A_MEMBER = 2;  // at least, where tiles allow: the others wait at the end for at most one
using Values = float[PackedWork::MOST][PIECE_TILES * TILE];

// Tiles a job, if jobs take them of `times` matrices of as many.
size_t piece_tiles(const LinearBody& body, size_t tiles, size_t times, const Team& team) {
    const size_t even = std::clamp<size_t>(tiles * times / (team.size * JOBS_A_MEMBER), 1, PIECE_TILES);
    return even < body.tiles ? even : even / body.tiles * body.tiles;
}

// Lists the assignments to a range of experts and shares out what is to be done with them; by one member.
void plan(const PackedExpertsArgs& args, Range experts, const Team& team) {
    PackedWork& work = *args.work;
    work.blocks.clear();
    each_expert(args.chosen, experts, [&](size_t expert, const size_t* order, size_t count) {
        const size_t position = order - args.chosen.order;
        for (size_t start = 0; start < count; start += PackedWork::MOST)
            work.blocks.push_back({expert, position + start, std::min(PackedWork::MOST, count - start)});
    });
    const size_t blocks = work.blocks.size(), hidden_tiles = args.gate.tiles(), out_tiles = args.down.tiles();
    work.hidden_piece = piece_tiles(*args.body, hidden_tiles, blocks, team);
    work.out_piece = piece_tiles(*args.body, out_tiles, 1, team);
    const size_t hidden_pieces = (hidden_tiles + work.hidden_piece - 1) / work.hidden_piece;
    if (work.pieces_left.size() < blocks) work.pieces_left = std::vector<std::atomic<size_t>>(blocks);
    for (size_t block = 0; block < blocks; ++block) work.pieces_left[block].store(hidden_pieces, std::memory_order_relaxed);
    work.hidden.share_out(hidden_pieces * blocks, team.size);
    work.out.share_out((out_tiles + work.out_piece - 1) / work.out_piece, team.size);
}

// Outputs of tiles [first, last), of `count` records, into rows of `values`.
template <class RecordOf>
void multiply_piece(const LinearBody& body, PackedMatrix weight, size_t offset, size_t first, size_t last, size_t count,
                    RecordOf record_of, Values& values) {
    weight.first += offset;
    const std::byte* records[PackedWork::MOST];
    float* places[PackedWork::MOST];
    for (size_t t = 0; t < count; ++t) {
        records[t] = record_of(t);
        places[t] = values[t] - first * TILE;
    }
    multiply_tiles(body, weight, first, last, count, records, places);
}

// hidden = silu(gate(x)) * up(x), rows in the order of the sorted assignments; rounded by whoever ends a block's last piece.
void activate(const PackedExpertsArgs& args, const Team& team) {
    const size_t record_bytes = args.gate.groups * args.body->record_bytes, F = args.gate.N;
    PackedWork& work = *args.work;
    alignas(64) Values gate = {}, up = {};
    work.hidden.each(team, [&](size_t job) {  // all blocks' first pieces come before their second ones
        const size_t number = job % work.blocks.size(), first = job / work.blocks.size() * work.hidden_piece;
        const PackedWork::Block& block = work.blocks[number];
        const size_t last = std::min(args.gate.tiles(), first + work.hidden_piece);
        const size_t row = first * TILE, height = std::min(last * TILE, F) - row, offset = block.expert * args.gate_up_stride;
        const size_t* const order = args.chosen.order + block.first;
        const auto record_of = [&](size_t t) { return args.records + order[t] / args.chosen.A * record_bytes; };
        multiply_piece(*args.body, args.gate, offset, first, last, block.count, record_of, gate);
        multiply_piece(*args.body, args.up, offset, first, last, block.count, record_of, up);
        for (size_t t = 0; t < block.count; ++t) {
            args.floats->silu_mul(gate[t], up[t], gate[t], (height + TILE - 1) / TILE * TILE);
            std::copy(gate[t], gate[t] + height, args.hidden + (block.first + t) * F + row);
        }
        if (work.pieces_left[number].fetch_sub(1, std::memory_order_acq_rel) > 1) return;
        std::byte* const records = args.hidden_records + block.first * args.down.groups * args.body->record_bytes;
        quantize({args.body, args.hidden + block.first * F, F, 0, 1, args.down.groups, args.wide_from, records}, block.count, Team());
    });
}

// out += sum over a token's assignments to planned experts of weight * down(hidden). A job has some of the outputs for all of them.
void combine(const PackedExpertsArgs& args, size_t rows, bool begins, const Team& team) {
    const size_t record_bytes = args.down.groups * args.body->record_bytes, D = args.down.N;
    PackedWork& work = *args.work;
    Values values;
    work.out.each(team, [&](size_t job) {
        const size_t first = job * work.out_piece, last = std::min(args.down.tiles(), first + work.out_piece);
        const size_t row = first * TILE, height = std::min(last * TILE, D) - row;
        if (begins)
            for (size_t t = 0; t < rows; ++t) std::fill_n(args.out + t * D + row, height, 0.0f);
        for (const PackedWork::Block& block : work.blocks) {
            const auto record_of = [&](size_t t) { return args.hidden_records + (block.first + t) * record_bytes; };
            multiply_piece(*args.body, args.down, block.expert * args.down_stride, first, last, block.count, record_of, values);
            for (size_t t = 0; t < block.count; ++t) {
                const size_t assignment = args.chosen.order[block.first + t];
                float* const out = args.out + assignment / args.chosen.A * D + row;
                const float weight = args.chosen.weights[assignment];
                for (size_t i = 0; i < height; ++i) out[i] += weight * values[t][i];
            }
        }
    });
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
    team.meet();
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
    team.meet();
    activate(all, team, rows_of(args.gate, args.gate_up_stride, args.gate_up_scales_stride, 0),
             rows_of(args.up, args.gate_up_stride, args.gate_up_scales_stride, 1));
    team.meet();
    combine(all, rows, team, rows_of(args.down, args.down_stride, args.down_scales_stride, 0));
}

void experts_packed(const PackedExpertsArgs& args, size_t rows, const Team& team) {
    const Assignments& chosen = args.chosen;
    sort_by_expert(chosen, rows, team);
    for (Range experts = {0, 0}; experts.last < chosen.E;) {
        experts.first = experts.last;
        experts.last = args.residency ? args.residency->admit(args.layer, chosen.starts, experts.first, team) : chosen.E;
        if (team.index == 0) plan(args, experts, team);
        team.meet();
        activate(args, team);
        team.meet();
        combine(args, rows, experts.first == 0, team);
        if (args.residency) team.meet();  // before the next ones take their place
    }
}

}  // namespace porcelet
