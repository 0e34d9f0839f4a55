// The θ step's passes over parameters, and the decision whether, and how far, to step.
#include "cuda/device/theta.h"

#include "cuda/device/entries.h"
#include "cuda/launch.h"

namespace fishleg::cuda {
namespace {

using ThetaTable = PartTable<ThetaPart>;

constexpr size_t shared_bytes = entry_threads / warp_size * sizeof(Sums);

/// What is read of one entry.
struct Entry {
    float g, momentum, factor, y, theta, polar;
};

/// What m averages: g, or Q g where momentum is "after".
template <bool after>
__device__ __forceinline__ float averaged(const Part& p, const Entry& e) {
    return !after ? e.g : p.diagonal ? e.factor * e.factor * e.g : e.y;
}

/// Before the products: x = A∘m̂ (A∘g where momentum is "after"), whether g is zero, and all of a Diagonal's nat.
template <bool after>
__global__ void __launch_bounds__(entry_threads, 3) prepare_kernel(const __grid_constant__ ThetaTable table) {
    FISHLEG_SHARED(Sums, shared);
    const PartWork<ThetaPart> work = work_of(table);
    const ThetaPart& p = work.item;
    if (blockIdx.x == 0 && threadIdx.x == 0) {
        *table.arrivals = 0;  // of this step's decision
    }
    Sums sums{};
    for_entries<Entry>(
        work,
        [&](const Place& at) {
            Entry e{};
            e.g = gradient(p, at);
            e.momentum = p.momentum[at.matrix];
            e.factor = p.factor ? p.factor[at.matrix] : 1;
            return e;
        },
        [&](const Place& at, const Entry& e) {
            sums.c += e.g != 0;
            const float ahead = lerp(e.momentum, averaged<after>(p, e), p.lead_weight);
            if (p.diagonal) {
                const float nat = after ? ahead : e.factor * e.factor * ahead;
                sums.a += static_cast<double>(nat) * nat;
                sums.b += static_cast<double>(after ? e.g : ahead) * nat;
            } else {
                p.x[at.padded] = e.factor * (after ? e.g : ahead);
            }
        });
    write_sum(sums, shared, p.sums + work.tile);
}

/// After the products, where momentum is "after": nat = m̂ of Kronecker blocks, from y = Q g.
__global__ void __launch_bounds__(entry_threads, 3) measure_kernel(const __grid_constant__ ThetaTable table) {
    FISHLEG_SHARED(Sums, shared);
    const PartWork<ThetaPart> work = work_of(table);
    const ThetaPart& p = work.item;
    Sums sums{};
    for_entries<Entry>(
        work,
        [&](const Place& at) {
            Entry e{};
            e.g = gradient(p, at);
            e.momentum = p.momentum[at.matrix];
            e.y = p.y[at.padded];
            return e;
        },
        [&](const Place&, const Entry& e) {
            sums.c += e.g != 0;
            const float nat = lerp(e.momentum, e.y, p.lead_weight);
            sums.a += static_cast<double>(nat) * nat;
            sums.b += static_cast<double>(e.g) * nat;
        });
    write_sum(sums, shared, p.sums + work.tile);
}

/// nat/‖nat‖ of blocks whose polar factors are computed.
template <bool after>
__global__ void __launch_bounds__(entry_threads, 3) unit_kernel(const __grid_constant__ ThetaTable table) {
    const PartWork<ThetaPart> work = work_of(table);
    const ThetaPart& p = work.item;
    const double norm = p.nat->norm * p.nat->correction;
    const float scale = static_cast<float>(norm > 0 ? 1 / norm : 1);
    for_entries<Entry>(
        work,
        [&](const Place& at) {
            Entry e{};
            e.g = p.diagonal ? gradient(p, at) : 0;
            e.momentum = after || p.diagonal ? p.momentum[at.matrix] : 0;
            e.factor = p.diagonal ? p.factor[at.matrix] : 1;
            e.y = p.diagonal ? 0 : p.y[at.padded];
            return e;
        },
        [&](const Place& at, const Entry& e) {
            const float ahead = lerp(e.momentum, averaged<after>(p, e), p.lead_weight);
            p.polar[at.padded] = scale * (after ? ahead : p.diagonal ? e.factor * e.factor * ahead : e.y);
        });
}

/// m ← βm + (1−β)g and θ ← θ − lr·(c·nat + wd·θ), where the step is taken.
template <bool after>
__global__ void __launch_bounds__(entry_threads, 3) update_kernel(const __grid_constant__ ThetaTable table) {
    const PartWork<ThetaPart> work = work_of(table);
    const ThetaPart& p = work.item;
    if (!p.nat->taken) {
        return;
    }
    const float lr = p.lr_pointer ? *p.lr_pointer : p.lr;
    const float move = static_cast<float>(lr * p.nat->scale), decay = lr * p.decay;
    for_entries<Entry>(
        work,
        [&](const Place& at) {
            Entry e{};
            e.g = gradient(p, at);
            e.momentum = p.momentum[at.matrix];
            e.factor = p.diagonal ? p.factor[at.matrix] : 1;
            e.y = p.diagonal ? 0 : p.y[at.padded];
            e.polar = p.polar ? p.polar[at.padded] : 0;
            e.theta = p.theta ? read(p.theta, p.theta_type, at.theta) : 0;
            return e;
        },
        [&](const Place& at, const Entry& e) {
            const float x = averaged<after>(p, e), ahead = lerp(e.momentum, x, p.lead_weight);
            const float nat = p.polar ? e.polar : after ? ahead : p.diagonal ? e.factor * e.factor * ahead : e.y;
            p.momentum[at.matrix] = lerp(e.momentum, x, p.weight);
            if (p.theta) {
                write(p.theta, p.theta_type, at.theta, moved(e.theta, nat, move, decay));
            }
        });
}

constexpr int sum_threads = 256;

/// Blocks' sums and, for the last thread block of them, what is to be decided.
struct DecisionTable {
    static constexpr int capacity = static_cast<int>((table_bytes - 16 - sizeof(ThetaDecision)) / sizeof(NatSums));
    ThetaDecision decision;
    int32_t count, tiles;
    NatSums items[capacity];
};

/// Norms, scales and whether to step, by one thread block, from all blocks' statistics.
__device__ __forceinline__ void decide(const ThetaDecision& decision, Sums* shared) {
    const int t = static_cast<int>(threadIdx.x);
    Sums sums{};  // a: norms that are not finite; b: Σ lr₀² m̂ᵀnat
    for (int k = t; k < decision.count; k += sum_threads) {
        const NatStatistics& nat = decision.statistics[k];
        decision.norms[k] = static_cast<float>(nat.norm);
        if (decision.wide_norms) {
            decision.wide_norms[k] = nat.norm;
        }
        sums.a += !finite(static_cast<float>(nat.norm));
        sums.b += nat.power;
    }
    sums = block_sum(sums, shared);
    __syncthreads();
    if (t == 0) {
        *decision.ok = sums.a == 0;
        *shared = sums;
    }
    __syncthreads();
    const bool taken = shared->a == 0;
    const double power = shared->b;
    for (int k = t; k < decision.count; k += sum_threads) {
        NatStatistics& nat = decision.statistics[k];
        double c = 1;
        if (decision.normalize == Normalize::rms || decision.normalize == Normalize::spectral) {
            c = rms_scale(nat.norm, nat.entries, nat.gradient_is_zero);
        } else if (decision.normalize == Normalize::trust) {
            c = trust_scale(power, decision.kappa);
        }
        nat.scale = nat.flat ? polar_scale(nat.norm, nat.entries, nat.gradient_is_zero) : c / nat.correction;
        decision.scales[k] = nat.scale;
        nat.taken = taken;
        if (taken && nat.step) {
            *nat.step += 1;
        }
    }
}

/// A thread block adds up one block's tiles; the last one to be done decides.
__global__ void __launch_bounds__(sum_threads) decision_kernel(const __grid_constant__ DecisionTable table) {
    FISHLEG_SHARED(Sums, shared);
    const NatSums& nat = table.items[blockIdx.x];
    Sums sums{};
    for (int i = static_cast<int>(threadIdx.x); i < nat.first_count; i += sum_threads) {
        sums = sums + nat.first[i];
    }
    for (int i = static_cast<int>(threadIdx.x); i < nat.second_count; i += sum_threads) {
        sums = sums + nat.second[i];
    }
    sums = block_sum(sums, shared);
    if (threadIdx.x == 0) {
        const double step = nat.step_pointer ? *nat.step_pointer : nat.step;
        const double correction = 1 - pow(nat.beta, step + nat.times);
        const double powers = nat.squared ? correction * correction : correction;
        NatStatistics found{};
        found.norm = sqrt(sums.a) / correction, found.power = sums.b / powers * nat.base_lr * nat.base_lr;
        found.correction = correction, found.entries = nat.entries;
        found.gradient_is_zero = sums.c == 0, found.flat = nat.flat, found.step = nat.counted;
        *nat.statistics = found;
    }
    if (last_to_arrive(table.decision.arrivals, table.decision.count, shared)) {
        decide(table.decision, shared);
    }
}

}  // namespace

int64_t tiles(const Part& p) { return p.count == 0 ? 1 : (p.count + tile_entries - 1) / tile_entries; }

void prepare_all(const Parts<ThetaPart>& parts, bool after, Stream stream) {
    launch_all("prepare", after ? prepare_kernel<true> : prepare_kernel<false>, parts,
               [](const Part& p) { return tiles(p); }, entry_threads, shared_bytes, stream);
}

void measure_all(const Parts<ThetaPart>& parts, Stream stream) {
    launch_all("measure", measure_kernel, parts, [](const Part& p) { return p.diagonal ? 0 : tiles(p); },
               entry_threads, shared_bytes, stream);
}

void unit_all(const Parts<ThetaPart>& parts, bool after, Stream stream) {
    launch_all("unit", after ? unit_kernel<true> : unit_kernel<false>, parts,
               [](const ThetaPart& p) { return p.polar ? tiles(p) : 0; }, entry_threads, 0, stream);
}

void update_all(const Parts<ThetaPart>& parts, bool after, Stream stream) {
    launch_all("update", after ? update_kernel<true> : update_kernel<false>, parts,
               [](const Part& p) { return tiles(p); }, entry_threads, 0, stream);
}

void decide_theta(std::vector<NatSums>& nat_sums, const ThetaDecision& decision, Stream stream) {
    const auto add = [&](DecisionTable& table, const NatSums& nat) {
        if (table.count == DecisionTable::capacity) {
            return false;
        }
        table.decision = decision;
        table.items[table.count] = nat;
        return true;
    };
    launch_tables("decision", decision_kernel, nat_sums, [](const NatSums&) { return int64_t{1}; }, add, sum_threads,
                  shared_bytes, stream);
}

}  // namespace fishleg::cuda
