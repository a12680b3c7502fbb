// Which instruction set the native bodies use: the best the processor has, found at run time. The scalar bodies are the
// only ones compiled off x86-64.
#pragma once

#include <vector>

namespace porcelet {

enum class Isa { scalar, avx2, avxvnni, avx512, avx512vnni };

const char* name(Isa isa);

bool supported(Isa isa);

// All supported sets, the best first.
std::vector<Isa> supported_isas();

// The best supported set, or the one PORCELET_ISA names; read on every call, so that a test can change it.
// Throws std::invalid_argument on a name that is unknown or that this processor lacks.
Isa select_isa();

}  // namespace porcelet
