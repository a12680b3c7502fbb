// A recorded step: instructions that one team walks inside one parallel region, meeting after each, but between those that read the
// same and write elsewhere.
//
// Buffers have room for more rows than a step has; a run says how many there are. `narrow` goes from the batch's rows to those
// whose logits are wanted: what is appended after it runs over `taken` rows.
#pragma once

#include <functional>
#include <vector>

#include "team.h"

namespace porcelet {

class Program {
  public:
    template <class Args>
    void append(void (*driver)(const Args&, size_t, const Team&), const Args& args) {
        instructions_.push_back({[=](size_t rows, const Team& team) { driver(args, rows, team); }, narrowed_, true});
        reads_ = writes_ = nullptr;
    }

    // The same for a driver that does not meet, reads nothing that changes but `reads` and writes `writes` alone.
    template <class Args>
    void append_beside(void (*driver)(const Args&, size_t, const Team&), const Args& args, const void* reads, const void* writes) {
        if (reads && reads == reads_ && writes != writes_) instructions_.back().meets = false;
        append(driver, args);
        reads_ = reads;
        writes_ = writes;
    }

    void narrow() {
        narrowed_ = true;
        reads_ = nullptr;
    }

    // Returns how often the team met: what a step pays beside its work. One thread never does.
    size_t run(size_t rows, size_t taken, int threads) const;

    size_t size() const { return instructions_.size(); }

  private:
    struct Instruction {
        std::function<void(size_t, const Team&)> compute;
        bool narrowed, meets;
    };

    void walk(size_t rows, size_t taken, const Team& team) const;

    std::vector<Instruction> instructions_;
    bool narrowed_ = false;
    const void *reads_ = nullptr, *writes_ = nullptr;  // of the last instruction, if it is one that others may stand beside
};

}  // namespace porcelet
