// Jobs that a team computes between two meetings: each member its own share from the front, so that the same weights come to the same
// processor step after step, then what others have left, from their ends. Nobody waits for a member that the machine holds up.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "team.h"

namespace porcelet {

class Jobs {
  public:
    // Makes jobs [0, count), fewer than 2^32, ready to be taken: by one member, once nobody takes the last ones, and before the team meets.
    void share_out(size_t count, size_t members) {
        if (shares_.size() < members) shares_ = std::vector<Share>(members);
        for (size_t member = 0; member < members; ++member) {
            const auto [first, last] = Team{member, members}.share(count);
            shares_[member].left.store(first << 32 | last, std::memory_order_relaxed);
        }
    }

    // Calls visit(job) for job after job until none is left.
    template <class Visit>
    void each(const Team& team, Visit visit) {
        size_t job;
        for (size_t i = 0; i < team.size; ++i)
            while (take(shares_[(team.index + i) % team.size].left, i == 0, job)) visit(job);
    }

  private:
    struct Share {
        alignas(64) std::atomic<uint64_t> left{0};  // first << 32 | last
    };

    static bool take(std::atomic<uint64_t>& share, bool own, size_t& job) {
        uint64_t left = share.load(std::memory_order_relaxed);
        while (true) {
            const uint64_t first = left >> 32, last = left & UINT32_MAX;
            if (first == last) return false;
            job = own ? first : last - 1;
            const uint64_t rest = own ? (first + 1) << 32 | last : first << 32 | (last - 1);
            if (share.compare_exchange_weak(left, rest, std::memory_order_relaxed)) return true;
        }
    }

    std::vector<Share> shares_;
};

}  // namespace porcelet
