// The threads that walk one step together, inside one OpenMP region. A driver `void name(const NameArgs&, size_t rows, const Team&)`
// does its member's share of an operation: its inputs are ready when it begins, and whoever calls it sees to it that all members
// meet before the outputs are read.
#pragma once

#include <atomic>
#include <cstddef>
#include <utility>

namespace porcelet {

// Where all threads of a team wait for each other. They spin: the waits are shorter than a sleep and a wake-up.
class Barrier {
  public:
    explicit Barrier(size_t size) : size_(size) {}

    void meet() {
        const size_t round = round_.load(std::memory_order_acquire);
        if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == size_) {
            arrived_.store(0, std::memory_order_relaxed);
            round_.store(round + 1, std::memory_order_release);
            return;
        }
        while (round_.load(std::memory_order_acquire) == round) {
#ifdef __x86_64__
            __builtin_ia32_pause();
#endif
        }
    }

  private:
    const size_t size_;
    std::atomic<size_t> arrived_{0}, round_{0};
};

struct Team {
    size_t index, size;
    Barrier* barrier;  // null for a team of one

    void meet() const {
        if (size > 1) barrier->meet();
    }

    // This member's unbroken range [first, last) of `count` things.
    std::pair<size_t, size_t> share(size_t count) const { return {count * index / size, count * (index + 1) / size}; }
};

}  // namespace porcelet
