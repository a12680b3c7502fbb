#include "step.h"

#include <omp.h>

#include <algorithm>

namespace porcelet {

size_t Program::run(size_t rows, size_t taken, int threads) const {
    if (threads == 1) {
        walk(rows, taken, Team());
        return 0;
    }
    Barrier barrier(threads <= omp_get_num_procs());  // else the one waited for has no processor while another spins
#pragma omp parallel num_threads(threads)
    walk(rows, taken, {static_cast<size_t>(omp_get_thread_num()), static_cast<size_t>(omp_get_num_threads()), &barrier});
    return barrier.meetings();
}

void Program::walk(size_t rows, size_t taken, const Team& team) const {
    const auto count_of = [=](const Instruction& instruction) {
        const size_t count = instruction.narrowed ? taken : rows;
        return instruction.limit ? std::min(count, static_cast<size_t>(*instruction.limit)) : count;
    };
    Team member = team;
    for (size_t i = 0; i < instructions_.size(); ++i) {
        const Instruction& now = instructions_[i];
        const size_t count = count_of(now);
        member.whole_rows = now.keeps_rows(count, team.size);
        now.compute(count, member);
        const Instruction* const next = i + 1 < instructions_.size() ? &instructions_[i + 1] : nullptr;
        const bool goes_on = member.whole_rows && next && count_of(*next) == count && next->keeps_rows(count, team.size);
        if (now.meets && !goes_on) team.meet();
    }
}

}  // namespace porcelet
