// The θ step's passes over parameters. Host functions; each is one launch (one for every hundred parameters).
#pragma once

#include <vector>

#include "cuda/tables.h"

namespace fishleg::cuda {

/// Tiles of a part, and so the number of Sums that a pass writes.
int64_t tiles(const Part& p);

/// x, whether g is zero, and a Diagonal's sums. ``after``: momentum averages Q g.
void prepare_all(std::vector<Part>& parts, bool after, Stream stream);

/// x = A∘u, for u in g; of a Diagonal Q u, into ``grad``.
void gather_all(std::vector<Part>& parts, Stream stream);

/// The sums of nat = m̂ of Kronecker blocks, where momentum averages Q g; over ``prepare_all``'s.
void measure_all(std::vector<Part>& parts, Stream stream);

/// nat/‖nat‖ into ``polar``, where there is that.
void unit_all(std::vector<Part>& parts, bool after, Stream stream);

/// m and θ, where the step is taken.
void update_all(std::vector<Part>& parts, bool after, Stream stream);

/// Norms, scales and whether to step: two launches.
void decide_theta(std::vector<NatSums>& nat_sums, const ThetaDecision& decision, Stream stream);

/// Counters of steps on the device.
void count_all(std::vector<Counter>& counters, Stream stream);

}  // namespace fishleg::cuda
