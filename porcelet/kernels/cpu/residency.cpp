#include "residency.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <stdexcept>

namespace porcelet {
namespace {

constexpr double REMEMBERED = 64;      // choices over which the share of repeated experts is averaged
constexpr double WORTH_READING = 0.5;  // that share from which on reading ahead is right more often than wrong: the disk is what is short

}  // namespace

Residency::Residency(const std::string& path, size_t budget) : budget_(budget) {
    file_ = open(path.c_str(), O_RDONLY | O_CLOEXEC);
    struct stat status;
    void* mapped = MAP_FAILED;
    if (file_ >= 0 && fstat(file_, &status) == 0) {
        size_ = static_cast<size_t>(status.st_size);
        mapped = mmap(nullptr, size_, PROT_READ, MAP_SHARED, file_, 0);
    }
    if (mapped == MAP_FAILED) {
        const std::string reason = std::strerror(errno);
        if (file_ >= 0) close(file_);
        throw std::runtime_error(path + " cannot be mapped: " + reason);
    }
    mapping_ = static_cast<char*>(mapped);
    madvise(mapping_, size_, MADV_RANDOM);  // or a fault would read the neighbours, too
    posix_fadvise(file_, 0, 0, POSIX_FADV_DONTNEED);  // what is resident is what we brought
}

Residency::~Residency() {
    munmap(mapping_, size_);
    close(file_);
}

size_t Residency::add_layer(size_t start, size_t record_bytes, size_t experts) {
    Layer layer = {};
    layer.start = start, layer.record_bytes = record_bytes, layer.experts = experts, layer.first_number = experts_.size();
    layers_.push_back(layer);
    for (size_t e = 0; e < experts; ++e) experts_.push_back({start + e * record_bytes, record_bytes, false, 0, {}});
    return layers_.size() - 1;
}

size_t Residency::admit(size_t layer, const size_t* starts, size_t first, const Team& team) {
    if (team.index == 0) last_ = choose(layer, starts, first);
    team.meet();
    // A call takes a millisecond an expert, mostly for its pages' table entries.
    for (size_t i = team.index; i < going_.size(); i += team.size) let_go(experts_[going_[i]]);
    for (size_t i = team.index; i < coming_.size(); i += team.size) ask_for(experts_[coming_[i]]);
    return last_;
}

// Decides by one thread what goes and comes; returns the end of the experts that fit together.
size_t Residency::choose(size_t number, const size_t* starts, size_t first) {
    Layer& layer = layers_[number];
    going_.clear();
    coming_.clear();
    for (const size_t passed : passing_)
        if (experts_[passed].resident) used_.splice(used_.end(), used_, experts_[passed].place);
    passing_.clear();
    if (first == 0) {
        layer.num_before = layer.last_choice.size();
        layer.num_repeated = 0;
        layer.last_choice.clear();
        ++layer.step;
    }
    size_t last = first, chosen = 0;
    for (; last < layer.experts; ++last) {
        if (starts[last] == starts[last + 1]) continue;
        if ((chosen + 1) * layer.record_bytes > budget_ && chosen > 0) break;
        ++chosen;
        Expert& expert = experts_[layer.first_number + last];
        layer.last_choice.push_back(layer.first_number + last);
        layer.num_repeated += layer.step > 1 && expert.step + 1 == layer.step;
        expert.step = layer.step;
        if (expert.resident) {
            ++counts_.hits;
            used_.splice(used_.begin(), used_, expert.place);
        } else {
            ++counts_.misses;
            take(layer.first_number + last);
        }
    }
    const size_t wanted = chosen * layer.record_bytes;
    const Layer& next = layers_[(number + 1) % layers_.size()];
    if (last == layer.experts) {
        // What a prompt's many tokens chose says nothing of the next token.
        const size_t count = layer.last_choice.size();
        if (count > 0 && layer.num_before > 0 && layer.num_before <= 2 * count)
            repeats_ += (static_cast<double>(layer.num_repeated) / count - repeats_) / REMEMBERED;
        if (wanted < budget_ && repeats_ > WORTH_READING && next.last_choice.size() <= 2 * count) prefetch(next, budget_ - wanted);
    }
    if (wanted * layers_.size() > budget_) passing_ = coming_;
    make_room();
    return last;
}

// Takes what the layer chose last, as far as there is room beside what is about to be computed.
void Residency::prefetch(const Layer& layer, size_t room) {
    for (const size_t number : layer.last_choice) {
        if (room < layer.record_bytes) break;
        room -= layer.record_bytes;
        if (experts_[number].resident) continue;  // in its place: being expected is not being used
        ++counts_.prefetched;
        take(number);
    }
}

void Residency::take(size_t number) {
    Expert& expert = experts_[number];
    expert.resident = true;
    expert.place = used_.insert(used_.begin(), number);
    counts_.bytes_read += expert.bytes;
    counts_.resident_bytes += expert.bytes;
    coming_.push_back(number);
}

// Lets the least recently used go. What was chosen or prefetched now is at the other end, and fits.
void Residency::make_room() {
    while (counts_.resident_bytes > budget_) {
        Expert& expert = experts_[used_.back()];
        going_.push_back(used_.back());
        used_.pop_back();
        expert.resident = false;
        counts_.resident_bytes -= expert.bytes;
    }
}

// Advice may be refused, for want of memory say. Then pages come as they are read and go as the system likes: slower, not wrong.
void Residency::let_go(const Expert& expert) const {
    madvise(mapping_ + expert.start, expert.bytes, MADV_DONTNEED);
    posix_fadvise(file_, static_cast<off_t>(expert.start), static_cast<off_t>(expert.bytes), POSIX_FADV_DONTNEED);
}

void Residency::ask_for(const Expert& expert) const { madvise(mapping_ + expert.start, expert.bytes, MADV_WILLNEED); }

Residency::Counts Residency::counts() const { return counts_; }

}  // namespace porcelet
