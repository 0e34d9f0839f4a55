// The θ step's passes over parameters. Host functions; each is one launch (one for every two hundred parameters).
#pragma once

#include <vector>

#include "cuda/tables.h"

namespace fishleg::cuda {

/// Tiles of a part, at least one, and so the number of Sums that a pass writes.
int64_t tiles(const Part& p);

/// x, whether g is zero, and a Diagonal's sums. ``after``: momentum averages Q g.
void prepare_all(const Parts<ThetaPart>& parts, bool after, Stream stream);

/// The sums of nat = m̂ of Kronecker blocks, where momentum averages Q g; over ``prepare_all``'s.
void measure_all(const Parts<ThetaPart>& parts, Stream stream);

/// nat/‖nat‖ into ``polar``, where there is that.
void unit_all(const Parts<ThetaPart>& parts, bool after, Stream stream);

/// m and θ, where the step is taken.
void update_all(const Parts<ThetaPart>& parts, bool after, Stream stream);

/// Norms, scales and whether to step; counters on the device go up where it is taken. After ``prepare_all``.
void decide_theta(std::vector<NatSums>& nat_sums, const ThetaDecision& decision, Stream stream);

}  // namespace fishleg::cuda
