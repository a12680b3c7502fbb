// Experts that stay on disk: which of them are in memory, within a budget.
//
// A file holds one record an expert (weights/offload.py) and is mapped, so a kernel reads any expert as if it were there. What decides
// is when its pages come and go: before a layer computes, its chosen experts are asked for together, so that the disk sees them all, then
// those that the next layer chose at its last step, as long as choices repeat; for them the least recently used go, out of the system's
// cache too.
// A layer that chooses more than its share of the budget, as a prompt's step does, reads past what is there: what it brings goes first.
#pragma once

#include <cstdint>
#include <list>
#include <string>
#include <vector>

#include "team.h"

namespace porcelet {

class Residency {
  public:
    struct Counts {
        uint64_t hits = 0, misses = 0;  // chosen experts that were there, or on their way, and those that were not
        uint64_t prefetched = 0;        // experts asked for ahead of their layer
        uint64_t bytes_read = 0;
        uint64_t resident_bytes = 0;
    };

    // Maps the file. Throws std::runtime_error, saying why not.
    Residency(const std::string& path, size_t budget);
    ~Residency();
    Residency(const Residency&) = delete;
    Residency& operator=(const Residency&) = delete;

    // The experts of the next layer in the order of a step: records of whole pages from byte `start` on. Returns its number.
    size_t add_layer(size_t start, size_t record_bytes, size_t experts);

    // Called by a whole team, which meets in it: makes experts [first, last) that have assignments resident together and returns `last`,
    // as far as the budget goes. `starts` are a step's assignments by expert; nobody may still read what an earlier call returned.
    size_t admit(size_t layer, const size_t* starts, size_t first, const Team& team);

    uintptr_t mapping() const { return reinterpret_cast<uintptr_t>(mapping_); }  // where the file begins
    size_t budget() const { return budget_; }
    Counts counts() const;

  private:
    struct Layer {
        size_t start, record_bytes, experts, first_number;
        std::vector<size_t> last_choice;
        size_t step = 0, num_before = 0, num_repeated = 0;  // of the choice before, and what both have in common
    };
    struct Expert {
        size_t start, bytes;
        bool resident;
        size_t step;  // of its layer, that last chose it
        std::list<size_t>::iterator place;  // in used_
    };

    size_t choose(size_t layer, const size_t* starts, size_t first);
    void prefetch(const Layer& layer, size_t room);
    void take(size_t number);
    void make_room();
    void let_go(const Expert& expert) const;
    void ask_for(const Expert& expert) const;

    int file_;
    char* mapping_;
    size_t size_, budget_;
    std::vector<Layer> layers_;
    std::vector<Expert> experts_;
    std::list<size_t> used_;                    // numbers of resident experts, the most recently used first
    std::vector<size_t> passing_;               // brought by a layer that wants more than its share
    std::vector<size_t> going_, coming_;        // what the team is to do
    size_t last_ = 0;
    double repeats_ = 1;  // share of a choice that the layer's choice before held, too
    Counts counts_;
};

}  // namespace porcelet
