// Inner products of lists of vectors.
#pragma once

#include <vector>

#include "cpu/step/table.h"

namespace fishleg::cpu {

/// Σ ⟨x, y⟩ over all pairs; the same for any number of threads.
double inner(const std::vector<Pair>& pairs, int threads);

}  // namespace fishleg::cpu
