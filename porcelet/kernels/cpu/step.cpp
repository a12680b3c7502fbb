#include "step.h"

#include <omp.h>

#include <algorithm>

namespace porcelet {

void Program::run(size_t rows, size_t taken, int threads) const {
    if (threads == 1) return walk(rows, taken, Team());
    Barrier barrier(threads <= omp_get_num_procs());  // else the one waited for has no processor while another spins
#pragma omp parallel num_threads(threads)
    walk(rows, taken, {static_cast<size_t>(omp_get_thread_num()), static_cast<size_t>(omp_get_num_threads()), &barrier});
}

void Program::walk(size_t rows, size_t taken, const Team& team) const {
    for (const Instruction& instruction : instructions_) {
        const size_t count = instruction.narrowed ? taken : rows;
        instruction.compute(instruction.limit ? std::min(count, static_cast<size_t>(*instruction.limit)) : count, team);
        if (instruction.meets) team.meet();
    }
}

}  // namespace porcelet
