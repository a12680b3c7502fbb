// A block of a prompt's queries on its way over the pages, for ordinary attention (prompt_attention.cpp) and for MLA's expanded form
// (expanded_attention.cpp).
//
// Scores are a product with the page's keys, turned over so that neighbouring lanes are neighbouring keys; the softmax goes on from page
// to page (Milakov and Gimelshein, 2018), and the values are added by a second product. What a token does not see yet has weight zero.
#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

#include "cache_pages.h"

namespace porcelet {

// Floats that a thread keeps for its next call; from a line of the cache on, for a vector that lies across two takes twice as long.
class Room {
  public:
    float* sized(size_t count) {
        const size_t lines = (count + FLOATS - 1) / FLOATS;
        if (lines_.size() < lines) lines_.resize(lines);
        return lines_.data()->floats;
    }

  private:
    static constexpr size_t FLOATS = 16;
    struct alignas(FLOATS * sizeof(float)) Line {
        float floats[FLOATS];
    };
    std::vector<Line> lines_;
};

// Rows are queries, `group` of each token; the first token sees `first_visible` cached ones, itself among them.
class PromptBlock {
  public:
    PromptBlock(const FloatBody& body, const MatrixBody& matrices, size_t rows, size_t group, size_t first_visible, size_t page_size,
                size_t width, float scale)
        : body_(body), matrices_(matrices), rows_(rows), group_(group), first_visible_(first_visible),
          row_scores_(whole_scores(page_size)), width_(width), scale_(scale) {
        thread_local Room scores, sums, states;
        scores_ = scores.sized(rows * row_scores_);
        sums_ = sums.sized(rows * width);
        states_ = states.sized(rows * 2);
        std::fill(sums_, sums_ + rows * width, 0.0f);
        for (size_t row = 0; row < rows; ++row) {
            states_[2 * row] = -INFINITY;
            states_[2 * row + 1] = 0.0f;
        }
    }

    // Cached tokens that the last row sees.
    size_t length() const { return visible(rows_ - 1); }

    // Goes over the cached tokens [token, token + count). `score` gets the rows of a call, how many, and where each one's scores go;
    // `values` gives the values as a matrix, once the scores are there.
    template <class Score, class Values>
    void go_over(size_t token, size_t count, Score score, Values values) {
        // The first tokens of a block may not see a page that the last ones do.
        size_t blind = 0;
        while (visible(blind) <= token) ++blind;
        const auto score_of = [&](size_t row) { return scores_ + row * row_scores_; };
        const auto sum_of = [&](size_t row) { return sums_ + row * width_; };
        for (size_t row = blind; row < rows_; row += matrices_.tokens) {
            float* out[MAX_TOKENS];
            const size_t n = std::min(matrices_.tokens, rows_ - row);
            for (size_t i = 0; i < n; ++i) out[i] = score_of(row + i);
            score(row, n, out);
        }
        for (size_t row = blind; row < rows_; ++row)
            body_.soften(score_of(row), std::min(count, visible(row) - token), row_scores_, scale_, &states_[2 * row], sum_of(row), width_);
        const Matrix added = values();
        each_rows(
            matrices_, rows_ - blind, [&](size_t row) { return score_of(blind + row); }, [&](size_t row) { return sum_of(blind + row); },
            [&](size_t n, const float** x, float** out) { matrices_.mix_on[n - 1](added, count, width_, x, out, 0); });
    }

    // Writes every row's result to out_of(row).
    template <class OutOf>
    void finish(OutOf out_of) const {
        for (size_t row = 0; row < rows_; ++row) {
            float* const out = out_of(row);
            for (size_t i = 0; i < width_; ++i) out[i] = sums_[row * width_ + i] / states_[2 * row + 1];
        }
    }

  private:
    size_t visible(size_t row) const { return first_visible_ + row / group_; }

    const FloatBody& body_;
    const MatrixBody& matrices_;
    const size_t rows_, group_, first_visible_, row_scores_, width_;
    const float scale_;
    float *scores_, *sums_, *states_;
};

}  // namespace porcelet
