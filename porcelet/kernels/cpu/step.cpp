#include "step.h"

#include <omp.h>

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
    for (const Instruction& instruction : instructions_) {
        instruction.compute(instruction.narrowed ? taken : rows, team);
        if (instruction.meets) team.meet();
    }
}

}  // namespace porcelet
