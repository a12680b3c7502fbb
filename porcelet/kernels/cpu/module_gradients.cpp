// The Python face of the backward passes.
#include "binding.h"
#include "gradients.h"

namespace {

RmsNormBackwardArgs rms_norm_backward_args(Heads x, Heads grad, uintptr_t weight, std::tuple<uintptr_t, uintptr_t, uintptr_t> out,
                                           size_t heads, size_t width, size_t block, float eps) {
    const auto [first, stride, head_stride] = x;
    const auto [grad_first, grad_stride, grad_head] = grad;
    const auto [dx, dweight, partial] = out;
    return {&gradient_body(select_isa()), at<float>(first), stride, head_stride, at<float>(grad_first), grad_stride, grad_head,
            at<float>(weight), at<float>(dx), at<float>(dweight), at<float>(partial), heads, width, block, eps};
}

RopeBackwardArgs rope_backward_args(Heads grad, uintptr_t cosine, uintptr_t sine, uintptr_t dx, size_t heads, size_t half,
                                    bool interleaved) {
    const auto [first, stride, head_stride] = grad;
    return {&gradient_body(select_isa()), at<float>(first), stride, head_stride, at<float>(cosine), at<float>(sine), at<float>(dx),
            heads, half, interleaved};
}

SiluMulBackwardArgs silu_mul_backward_args(Rows gate, Rows up, Rows grad, uintptr_t dgate, uintptr_t dup, size_t width) {
    const auto [gate_first, gate_stride] = gate;
    const auto [up_first, up_stride] = up;
    const auto [grad_first, grad_stride] = grad;
    return {&gradient_body(select_isa()), at<float>(gate_first), gate_stride, at<float>(up_first), up_stride, at<float>(grad_first),
            grad_stride, at<float>(dgate), at<float>(dup), width};
}

SortExpertsArgs sort_experts_args(uintptr_t indices, uintptr_t starts, std::tuple<uintptr_t, uintptr_t, uintptr_t> sorted, size_t E,
                                  size_t A) {
    const auto [order, tokens, place] = sorted;
    return {at<int64_t>(indices), E, A, at<int64_t>(starts), at<int64_t>(order), at<int64_t>(tokens), at<int64_t>(place)};
}

SumRowsArgs sum_rows_args(uintptr_t from, uintptr_t place, uintptr_t out, size_t A, size_t width) {
    return {at<float>(from), at<int64_t>(place), at<float>(out), A, width};
}

ActivateArgs activate_args(uintptr_t gate_up, uintptr_t weights, uintptr_t order, uintptr_t hidden, size_t F) {
    return {&gradient_body(select_isa()), at<float>(gate_up), at<float>(weights), at<int64_t>(order), at<float>(hidden), nullptr, nullptr,
            F};
}

ActivateArgs activate_backward_args(uintptr_t gate_up, uintptr_t weights, uintptr_t order, uintptr_t hidden, uintptr_t dgate_up,
                                    uintptr_t dweights, size_t F) {
    return {&gradient_body(select_isa()), at<float>(gate_up), at<float>(weights), at<int64_t>(order), at<float>(hidden),
            at<float>(dgate_up), at<float>(dweights), F};
}

RouteBackwardArgs route_backward_args(uintptr_t logits, std::tuple<uintptr_t, uintptr_t, uintptr_t> chosen, uintptr_t dlogits, size_t E,
                                      size_t A, bool softmax, bool normalize, float scale) {
    const auto [indices, weights, grad] = chosen;
    return {at<float>(logits), at<int64_t>(indices), at<float>(weights), at<float>(grad), at<float>(dlogits), E, A, softmax, normalize,
            scale};
}

LogprobsArgs logprobs_args(uintptr_t logits, uintptr_t targets, uintptr_t log_sums, uintptr_t logprobs, size_t V) {
    return {&gradient_body(select_isa()), at<float>(logits), at<int64_t>(targets), at<float>(log_sums), at<float>(logprobs), V};
}

LogprobsBackwardArgs logprobs_backward_args(uintptr_t logits, uintptr_t targets, uintptr_t log_sums, uintptr_t grad, uintptr_t dlogits,
                                            size_t V) {
    return {&gradient_body(select_isa()), at<float>(logits), at<int64_t>(targets), at<float>(log_sums), at<float>(grad),
            at<float>(dlogits), V};
}

}  // namespace

void bind_gradients(nb::class_<Program>& program) {
    program.def("rms_norm_backward", appends(rms_norm_backward, rms_norm_backward_args))
        .def("rope_backward", appends(rope_backward, rope_backward_args))
        .def("silu_mul_backward", appends(silu_mul_backward, silu_mul_backward_args))
        .def("sort_experts", appends(sort_experts, sort_experts_args))
        .def("sum_rows", appends(sum_rows, sum_rows_args))
        .def("activate", appends(activate, activate_args))
        .def("activate_backward", appends(activate_backward, activate_backward_args))
        .def("route_backward", appends(route_backward, route_backward_args))
        .def("logprobs", appends(logprobs, logprobs_args))
        .def("logprobs_backward", appends(logprobs_backward, logprobs_backward_args));
}
