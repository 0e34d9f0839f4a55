// Denormal numbers, which take a processor a hundred cycles each, as zeros: on the calling thread and OpenMP's others.
#pragma once

#include <cstdint>
#include <vector>

namespace fishleg::cpu {

/// Whether this processor's setting is known here.
bool can_flush_denormals();

/// Have operands and results that are denormal count as zero, on so many threads. Returns each thread's setting before.
std::vector<uint32_t> flush_denormals(int threads);

/// Put back what ``flush_denormals`` returned.
void restore_denormals(const std::vector<uint32_t>& settings);

}  // namespace fishleg::cpu
