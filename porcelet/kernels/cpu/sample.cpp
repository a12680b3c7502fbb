// Top-k and top-p without sorting the vocabulary. Both keep a beginning of one order, the larger logit first and of equals the
// lower id, so each is a search for the last token kept. A token's place in that order is one 64-bit code; the search spreads
// codes over buckets, steps into the one that holds the end, and sorts only when few are left. Few codes are made to begin
// with: for top-k those of logits no less than the k-th largest block maximum, for top-p those that share the leading bits of
// the weight at which the cumulative probability is reached.
#include "sample.h"

#include <algorithm>
#include <cassert>
#include <cmath>
#include <cstring>
#include <functional>
#include <limits>
#include <vector>

#include "sample_body.h"

namespace porcelet {
namespace {

constexpr size_t BUCKETS = 2048, FEW = 128;
constexpr float NO_WEIGHT = -87.0f;  // the exponent below which a token has no weight: 1e-38 of the best one's

using Code = uint64_t;  // ascending in the order of sampling

Code encode(float logit, size_t token) {
    const float positive = logit + 0.0f;  // -0 and 0 are equals
    uint32_t bits;
    std::memcpy(&bits, &positive, sizeof bits);
    const uint32_t descending = bits >> 31 ? bits : ~bits & 0x7fffffffu;
    return static_cast<Code>(descending) << 32 | token;
}

Cut decode(Code code) {
    const uint32_t descending = static_cast<uint32_t>(code >> 32);
    const uint32_t bits = descending >> 31 ? descending : ~descending & 0x7fffffffu;
    Cut cut;
    std::memcpy(&cut.logit, &bits, sizeof bits);
    cut.token = static_cast<int32_t>(static_cast<uint32_t>(code));
    return cut;
}

// Exponent and five bits of a weight in 0..1.
uint32_t leading_bits(float weight) {
    uint32_t bits;
    std::memcpy(&bits, &weight, sizeof bits);
    return bits >> 18;
}

// What one thread needs for a row; kept between calls.
struct Scratch {
    std::vector<float> peaks, ordered_peaks, weights;
    std::vector<double> sums, masses = std::vector<double>(leading_bits(1.0f) + 1);
    std::vector<Code> codes;

    void fit(size_t V) {
        peaks.resize(num_blocks(V));
        sums.resize(num_blocks(V));
        weights.resize(V);
        codes.resize(V);
    }
};

// The last code, in ascending order, before which the others measure less than `limit` together.
template <class Measure>
Code last_kept(Code* begin, Code* end, double limit, Measure measure) {
    double before = 0;
    while (static_cast<size_t>(end - begin) > FEW) {
        const auto [low, high] = std::minmax_element(begin, end);
        const Code first = *low, range = *high - first;
        int shift = 0;
        while (range >> shift >= BUCKETS) ++shift;
        double measured[BUCKETS] = {};
        for (const Code* code = begin; code != end; ++code) measured[(*code - first) >> shift] += measure(*code);
        const size_t last = range >> shift;
        size_t bucket = 0;
        while (bucket < last && before + measured[bucket] < limit) before += measured[bucket++];
        end = std::remove_if(begin, end, [=](Code code) { return (code - first) >> shift != bucket; });
    }
    std::sort(begin, end);
    for (before += measure(*begin); begin + 1 != end && before < limit; before += measure(*begin)) ++begin;
    return *begin;
}

// One row of logits and the draw from it.
class Row {
  public:
    Row(const float* logits, size_t V, const SampleBody& body, Scratch& scratch)
        : logits(logits), V(V), body(body), scratch(scratch) {}

    void choose(const Choice& choice, int64_t* token, float* logprob) {
        scratch.fit(V);
        const bool has_nan = body.peaks(logits, V, scratch.peaks.data());
        best = *std::max_element(scratch.peaks.begin(), scratch.peaks.end());
        if (has_nan || !std::isfinite(best)) {
            *token = 0;
            *logprob = std::numeric_limits<float>::quiet_NaN();
        } else if (choice.temperature > 0) {
            draw(choice, token, logprob);
        } else {
            body.weights(logits, V, best, 1.0f, NO_WEIGHT, scratch.weights.data());
            *token = static_cast<int64_t>(std::find(logits, logits + V, best) - logits);
            *logprob = static_cast<float>(-std::log(total()));
        }
    }

  private:
    const float* logits;
    const size_t V;
    const SampleBody& body;
    Scratch& scratch;
    float best = 0;

    void draw(const Choice& choice, int64_t* token, float* logprob) {
        const double inverse = 1.0 / static_cast<double>(choice.temperature);
        const float largest = std::numeric_limits<float>::max();
        const float floor = std::max(NO_WEIGHT, std::log(choice.min_p));
        body.weights(logits, V, best, static_cast<float>(std::min(inverse, static_cast<double>(largest))), floor,
                     scratch.weights.data());
        if (choice.top_k > 0 && static_cast<size_t>(choice.top_k) < V) keep_top_k(static_cast<size_t>(choice.top_k));
        if (choice.top_p < 1) keep_top_p(static_cast<double>(choice.top_p));
        const double sum = total();
        const size_t drawn = at(choice.uniform * sum);
        *token = static_cast<int64_t>(drawn);
        *logprob = static_cast<float>((static_cast<double>(logits[drawn]) - static_cast<double>(best)) * inverse - std::log(sum));
    }

    double total() {
        body.sums(scratch.weights.data(), V, scratch.sums.data());
        double sum = 0;
        for (const double block : scratch.sums) sum += block;
        return sum;
    }

    // The first token whose cumulative weight exceeds `target`; if rounding lets none, the last that has a weight.
    size_t at(double target) const {
        const std::vector<double>& sums = scratch.sums;
        double before = 0;
        size_t block = 0, last = 0;
        for (; block < sums.size() && before + sums[block] <= target; before += sums[block++])
            if (sums[block] > 0) last = block;
        if (block == sums.size()) {
            block = last;
            before = -INFINITY;
        }
        size_t token = block * BLOCK;
        for (size_t i = token; i < end_of(block) && before <= target; ++i) {
            if (scratch.weights[i] == 0) continue;
            token = i;
            before += static_cast<double>(scratch.weights[i]);
        }
        return token;
    }

    void keep_top_k(size_t k) {
        float bound = -INFINITY;  // the k-th largest logit is no less: k blocks have one that is not
        if (k <= scratch.peaks.size()) {
            scratch.ordered_peaks = scratch.peaks;
            const auto kth = scratch.ordered_peaks.begin() + static_cast<ptrdiff_t>(k) - 1;
            std::nth_element(scratch.ordered_peaks.begin(), kth, scratch.ordered_peaks.end(), std::greater<float>());
            bound = *kth;
        }
        Code* end = gather([=](size_t block) { return scratch.peaks[block] >= bound; }, [=](size_t i) { return logits[i] >= bound; });
        const Code last = last_kept(scratch.codes.data(), end, static_cast<double>(k), [](Code) { return 1.0; });
        body.keep(logits, V, decode(last), scratch.weights.data());
    }

    void keep_top_p(double top_p) {
        const double sum = total(), limit = top_p * sum;
        // All tokens lighter than this together weigh less than half of what is cut, so none of them is kept.
        const double bound = (sum - limit) / (2 * static_cast<double>(V));
        const auto may_be_kept = [=](size_t block) { return scratch.sums[block] >= bound; };
        const float* weights = scratch.weights.data();
        double* masses = scratch.masses.data();
        std::fill(scratch.masses.begin(), scratch.masses.end(), 0.0);
        for (size_t block = 0; block < num_blocks(V); ++block)
            if (may_be_kept(block))
                for (size_t i = block * BLOCK; i < end_of(block); ++i)
                    masses[leading_bits(weights[i])] += static_cast<double>(weights[i]);
        double before = 0;
        uint32_t bits = leading_bits(1.0f);
        while (before + masses[bits] < limit) before += masses[bits--];  // ends: what is left out does not reach from the limit to the sum
        Code* end = gather(may_be_kept, [=](size_t i) { return leading_bits(weights[i]) == bits; });
        const auto weight = [=](Code code) { return static_cast<double>(weights[static_cast<uint32_t>(code)]); };
        const Code last = last_kept(scratch.codes.data(), end, limit - before, weight);
        body.keep(logits, V, decode(last), scratch.weights.data());
    }

    size_t end_of(size_t block) const { return std::min(V, (block + 1) * BLOCK); }

    // The codes of the wanted tokens in the blocks that may have one; returns their end.
    template <class WantedBlock, class Wanted>
    Code* gather(WantedBlock wanted_block, Wanted wanted) {
        Code* end = scratch.codes.data();
        for (size_t block = 0; block < num_blocks(V); ++block) {
            if (!wanted_block(block)) continue;
            for (size_t i = block * BLOCK; i < end_of(block); ++i)
                if (wanted(i)) *end++ = encode(logits[i], i);
        }
        return end;
    }
};

const SampleBody& sample_body(Isa isa) {
    assert(supported(isa));
    switch (isa) {
#ifdef __x86_64__
        case Isa::avx2:
        case Isa::avxvnni: return sample_avx2;
        case Isa::avx512:
        case Isa::avx512vnni: return sample_avx512;
#endif
        default: return sample_scalar;
    }
}

}  // namespace

void sample(const float* logits, const SampleColumns& columns, size_t draws, size_t V, int64_t* tokens, float* logprobs,
            int threads, Isa isa) {
    const SampleBody& body = sample_body(isa);
#pragma omp parallel for num_threads(threads) schedule(dynamic) if (draws > 1)
    for (size_t i = 0; i < draws; ++i) {
        thread_local Scratch scratch;
        const Choice choice = {columns.temperature[i], columns.top_k[i], columns.top_p[i], columns.min_p[i], columns.uniform[i]};
        Row(logits + static_cast<size_t>(columns.rows[i]) * V, V, body, scratch).choose(choice, tokens + i, logprobs + i);
    }
}

void allow(const float* logits, const uint8_t* masks, float* out, size_t rows, size_t V) {
    const size_t mask_bytes = (V + 7) / 8;
    for (size_t row = 0; row < rows; ++row)
        for (size_t t = 0; t < V; ++t)
            out[row * V + t] = masks[row * mask_bytes + t / 8] >> t % 8 & 1 ? logits[row * V + t] : -INFINITY;
}

}  // namespace porcelet
