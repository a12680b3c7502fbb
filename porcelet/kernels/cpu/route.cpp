#include "route.h"

#include <algorithm>
#include <cmath>

namespace porcelet {
namespace {

bool better(float a, float b) { return a > b || (std::isnan(a) && !std::isnan(b)); }

// The indices of the `count` best of `size` values, best first; of equal ones the lower index.
void best(const float* values, size_t size, size_t count, int64_t* indices) {
    for (size_t i = 0; i < size; ++i) {
        size_t place = std::min(i, count);
        while (place > 0 && better(values[i], values[indices[place - 1]])) {
            if (place < count) indices[place] = indices[place - 1];
            --place;
        }
        if (place < count) indices[place] = static_cast<int64_t>(i);
    }
}

// exp(x - largest) over their sum; NaN or plus infinity among the logits makes all NaN.
void softmax(const float* logits, size_t size, float* scores) {
    const float largest = *std::max_element(logits, logits + size);
    float sum = 0;
    for (size_t i = 0; i < size; ++i) sum += scores[i] = std::exp(logits[i] - largest);
    for (size_t i = 0; i < size; ++i) scores[i] /= sum;
}

// V3: the sum of the group's two best; V2: its best one.
float group_score(const float* choice, size_t members, bool two) {
    int64_t indices[2];
    best(choice, members, two ? 2 : 1, indices);
    return two ? choice[indices[0]] + choice[indices[1]] : choice[indices[0]];
}

// Experts outside the best `kept_groups` groups go to minus infinity.
void keep_best_groups(const RouteArgs& args, float* choice, float* group_scores) {
    const size_t members = args.E / args.groups;
    for (size_t g = 0; g < args.groups; ++g) group_scores[g] = group_score(choice + g * members, members, args.bias);
    for (size_t g = 0; g < args.groups; ++g) {
        size_t rank = 0;
        for (size_t other = 0; other < args.groups; ++other)
            rank += better(group_scores[other], group_scores[g]) || (other < g && !better(group_scores[g], group_scores[other]));
        if (rank >= args.kept_groups) std::fill(choice + g * members, choice + (g + 1) * members, -INFINITY);
    }
}

void route_token(const RouteArgs& args, size_t token) {
    const float* logits = args.logits + token * args.E;
    int64_t* indices = args.indices + token * args.A;
    float* weights = args.weights + token * args.A;
    float* scores = args.scratch + token * (2 * args.E + args.groups);
    float* choice = scores + args.E;
    if (args.bias) {
        for (size_t i = 0; i < args.E; ++i) scores[i] = 1.0f / (1.0f + std::exp(-logits[i]));
        for (size_t i = 0; i < args.E; ++i) choice[i] = scores[i] + args.bias[i];
    } else {
        softmax(logits, args.E, scores);
        std::copy(scores, scores + args.E, choice);
    }
    if (args.groups > 1) keep_best_groups(args, choice, choice + args.E);
    best(choice, args.E, args.A, indices);
    float sum = 0;
    for (size_t a = 0; a < args.A; ++a) sum += weights[a] = scores[indices[a]];
    const float divisor = args.bias && args.normalize ? sum + 1e-20f : 1.0f;
    for (size_t a = 0; a < args.A; ++a) weights[a] = weights[a] / divisor * args.scale;
}

}  // namespace

void route(const RouteArgs& args, size_t rows, const Team& team) {
    const auto [first, last] = team.share(rows);
    for (size_t token = first; token < last; ++token) route_token(args, token);
}

}  // namespace porcelet
