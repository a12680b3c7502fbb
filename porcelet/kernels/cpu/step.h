// A recorded step: instructions that one team walks inside one parallel region, meeting after each.
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
        instructions_.push_back({[=](size_t rows, const Team& team) { driver(args, rows, team); }, narrowed_});
    }

    void narrow() { narrowed_ = true; }

    void run(size_t rows, size_t taken, int threads) const;

    size_t size() const { return instructions_.size(); }

  private:
    struct Instruction {
        std::function<void(size_t, const Team&)> compute;
        bool narrowed;
    };

    void walk(size_t rows, size_t taken, const Team& team) const;

    std::vector<Instruction> instructions_;
    bool narrowed_ = false;
};

}  // namespace porcelet
