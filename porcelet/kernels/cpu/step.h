// A recorded step: instructions that one team walks inside one parallel region, meeting after each but
// - between those that read the same and write elsewhere,
// - between those that make each row of that row alone, where every member keeps its rows from one to the next. A buffer that is lent
//   again holds as many bytes a row as before (Arena), so nobody writes to what another still reads.
//
// Buffers have room for more rows than a step has; a run says how many there are. `narrow` goes from the batch's rows to those
// whose logits are wanted: what is appended after it runs over `taken` rows.
#pragma once

#include <cstdint>
#include <functional>
#include <vector>

#include "team.h"

namespace porcelet {

class Program {
  public:
    template <class Args>
    void append(void (*driver)(const Args&, size_t, const Team&), const Args& args) {
        instructions_.push_back({[=](size_t rows, const Team& team) { driver(args, rows, team); }, limit_, narrowed_, true, 0});
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

    // The same for a driver that makes each row of that row of its inputs and of what never changes, and shares by Team::share(rows, pieces).
    template <class Args>
    void append_rows(void (*driver)(const Args&, size_t, const Team&), const Args& args) {
        append(driver, args);
        instructions_.back().row_values = args.row_values();
    }

    void narrow() {
        narrowed_ = true;
        reads_ = nullptr;
    }

    // What is appended from here on runs over `*rows` rows at most, read anew at each run; over all if there is no address.
    void limit(const int64_t* rows) {
        limit_ = rows;
        reads_ = nullptr;
    }

    // Returns how often the team met: what a step pays beside its work. One thread never does.
    size_t run(size_t rows, size_t taken, int threads) const;

    size_t size() const { return instructions_.size(); }

  private:
    struct Instruction {
        std::function<void(size_t, const Team&)> compute;
        const int64_t* limit;
        bool narrowed, meets;
        size_t row_values;  // 0 where rows do not stand for themselves

        // Whether members keep whole rows: there is enough for all, or a row is too little to be worth a meeting.
        bool keeps_rows(size_t rows, size_t members) const {
            return row_values && (rows >= MANY_ROWS * members || row_values <= SMALL_ROW);
        }
    };

    static constexpr size_t MANY_ROWS = 4, SMALL_ROW = 4096;  // rows a member; values

    void walk(size_t rows, size_t taken, const Team& team) const;

    std::vector<Instruction> instructions_;
    bool narrowed_ = false;
    const int64_t* limit_ = nullptr;
    const void *reads_ = nullptr, *writes_ = nullptr;  // of the last instruction, if it is one that others may stand beside
};

}  // namespace porcelet
