// The λ step's passes over memory, and inner products. Host functions; each is one launch unless it says otherwise.
#pragma once

#include <vector>

#include "cuda/tables.h"

namespace fishleg::cuda {

/// x = A∘u, for u in g; of a Diagonal Q u, into ``grad``.
void gather_all(const Parts<AuxPart>& parts, Stream stream);

/// Each part's sums become (uᵀv, vᵀF v, vᵀv); u is the part's g.
void aux_dots_all(const Parts<AuxPart>& parts, Stream stream);

/// 𝒜 and α from all those sums.
void aux_loss(const AuxLossJob& job, Stream stream);

/// x = u and y = w = α(F v + γv) − u; of a Diagonal the gradient 2 d∘u∘w (d²∘w in place of w: ``precondition``), and
/// each part's sums become (Σ gradient², 0, 0).
void residual_all(const Parts<AuxPart>& parts, bool precondition, Stream stream);

/// Whether the λ step is taken.
void decide_aux(const AuxDecision& decision, Stream stream);

int64_t tiles(const AdamTensor& t);

/// Adam, where the step is taken.
void adam_all(std::vector<AdamTensor>& tensors, Stream stream);

/// Counters of steps on the device.
void count_all(std::vector<Counter>& counters, Stream stream);

int64_t tiles(const Pair& p);

/// ``out`` = Σ ⟨x, y⟩ over the pairs, whose sums follow one another from ``sums`` on: two launches. ``more`` further
/// sums behind them are added.
void inner_all(std::vector<Pair>& pairs, Sums* sums, int64_t more, float* out, Stream stream);

}  // namespace fishleg::cuda
