#include "isa.h"

#include <cstdlib>
#include <stdexcept>
#include <string>

#ifdef __x86_64__
#include <cpuid.h>
#endif

namespace porcelet {
namespace {

constexpr Isa best_first[] = {Isa::avx512vnni, Isa::avx512, Isa::avxvnni, Isa::avx2, Isa::scalar};

#ifdef __x86_64__
bool has_f16c() {  // __builtin_cpu_supports knows this name only since GCC 11
    unsigned eax, ebx, ecx, edx;
    return __get_cpuid(1, &eax, &ebx, &ecx, &edx) && (ecx & bit_F16C);
}

bool has_avxvnni() {
    unsigned eax, ebx, ecx, edx;
    return __get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx) && (eax >> 4 & 1);
}

bool detect(Isa isa) {
    switch (isa) {
        case Isa::scalar: return true;
        case Isa::avx2: return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c();
        case Isa::avxvnni: return detect(Isa::avx2) && has_avxvnni();
        case Isa::avx512:
            return detect(Isa::avx2) && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                   __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
        case Isa::avx512vnni: return detect(Isa::avx512) && __builtin_cpu_supports("avx512vnni");
    }
    return false;
}
#else
bool detect(Isa isa) { return isa == Isa::scalar; }
#endif

std::string supported_names() {
    std::string names;
    for (Isa isa : supported_isas()) names += (names.empty() ? "" : ", ") + std::string(name(isa));
    return names;
}

}  // namespace

const char* name(Isa isa) {
    switch (isa) {
        case Isa::scalar: return "scalar";
        case Isa::avx2: return "avx2";
        case Isa::avxvnni: return "avxvnni";
        case Isa::avx512: return "avx512";
        case Isa::avx512vnni: return "avx512vnni";
    }
    return "?";
}

bool supported(Isa isa) {
    static const bool table[] = {detect(Isa::scalar), detect(Isa::avx2), detect(Isa::avxvnni),
                                 detect(Isa::avx512), detect(Isa::avx512vnni)};
    return table[static_cast<int>(isa)];
}

std::vector<Isa> supported_isas() {
    std::vector<Isa> found;
    for (Isa isa : best_first)
        if (supported(isa)) found.push_back(isa);
    return found;
}

Isa select_isa() {
    static const Isa fastest = supported_isas().front();
    const char* wanted = std::getenv("PORCELET_ISA");
    if (!wanted) return fastest;
    for (Isa isa : best_first)
        if (supported(isa) && wanted == std::string(name(isa))) return isa;
    throw std::invalid_argument("PORCELET_ISA is '" + std::string(wanted) + "'; this processor runs: " + supported_names());
}

}  // namespace porcelet
