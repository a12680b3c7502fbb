// Threads that compute one step together: who they are, how they share rows or tiles, where they wait for one another.
#pragma once

#include <sched.h>

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <utility>

namespace porcelet {

// A barrier of `size` threads that spins: 700 of them make up a step, and an operating system's would cost more than the work.
class Barrier {
  public:
    // Without `spins` a thread that waits gives way at once.
    explicit Barrier(bool spins) : spins_(spins ? SPINS : 0) {}

    void meet(size_t size) {
        const uint32_t generation = generation_.load(std::memory_order_acquire);
        if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == size) {
            arrived_.store(0, std::memory_order_relaxed);
            generation_.store(generation + 1, std::memory_order_release);
            return;
        }
        for (size_t turns = 0; generation_.load(std::memory_order_acquire) == generation; ++turns)
            if (turns < spins_)
                pause();
            else
                sched_yield();  // the machine is shared: the thread waited for may need this processor
    }

    // How often all have met; to be asked when nobody waits.
    size_t meetings() const { return generation_.load(std::memory_order_relaxed); }

  private:
    static constexpr size_t SPINS = 4000;

    static void pause() {
#ifdef __x86_64__
        __builtin_ia32_pause();
#endif
    }

    const size_t spins_;
    alignas(64) std::atomic<size_t> arrived_{0};
    alignas(64) std::atomic<uint32_t> generation_{0};
};

// One thread's place in its team. Every driver is `void name(const NameArgs&, size_t rows, const Team&)`: its inputs are ready
// when it begins, it may meet inside, and it need not at its end.
struct Team {
    size_t index = 0, size = 1;
    Barrier* barrier = nullptr;
    bool whole_rows = false;  // what follows goes on with the same rows, and nobody meets in between

    void meet() const {
        if (size > 1) barrier->meet(size);
    }

    // This thread's part [first, last) of `count` equal pieces of work.
    std::pair<size_t, size_t> share(size_t count) const { return {count * index / size, count * (index + 1) / size}; }

    // Its part of `rows`, each of them `pieces` of work.
    std::pair<size_t, size_t> share(size_t rows, size_t pieces) const {
        if (!whole_rows) return share(rows * pieces);
        const auto [first, last] = share(rows);
        return {first * pieces, last * pieces};
    }
};

}  // namespace porcelet
