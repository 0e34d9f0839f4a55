// The λ step: the auxiliary loss, w, Adam; what Q u gathers; inner products. Products are products.cu's.
#include "cuda/device/auxiliary.h"

#include "cuda/device/entries.h"
#include "cuda/device/theta.h"
#include "cuda/launch.h"

namespace fishleg::cuda {
namespace {

constexpr size_t shared_bytes = entry_threads / warp_size * sizeof(Sums);

struct Entry {
    float u, v, fv, d;
};

using AuxTable = PartTable<AuxPart>;

__device__ __forceinline__ Entry loaded(const AuxPart& p, const Place& at) {
    Entry e{};
    e.u = gradient(p, at);
    e.v = p.v[at.matrix];
    e.fv = p.fv[at.matrix];
    e.d = p.diagonal ? p.factor[at.matrix] : 0;
    return e;
}

/// x = A∘u of Kronecker blocks; all of a Diagonal's Q u.
__global__ void __launch_bounds__(entry_threads, 3) gather_kernel(const __grid_constant__ AuxTable table) {
    const PartWork<AuxPart> work = work_of(table);
    const AuxPart& p = work.item;
    for_entries<Entry>(
        work,
        [&](const Place& at) {
            Entry e{};
            e.u = gradient(p, at);
            e.d = p.factor ? p.factor[at.matrix] : 1;
            return e;
        },
        [&](const Place& at, const Entry& e) {
            if (p.diagonal) {
                p.grad[at.matrix] = e.d * e.d * e.u;
            } else {
                p.x[at.padded] = e.d * e.u;
            }
        });
}

__global__ void __launch_bounds__(entry_threads, 3) dots_kernel(const __grid_constant__ AuxTable table) {
    FISHLEG_SHARED(Sums, shared);
    const PartWork<AuxPart> work = work_of(table);
    const AuxPart& p = work.item;
    Sums sums{};
    for_entries<Entry>(
        work, [&](const Place& at) { return loaded(p, at); },
        [&](const Place&, const Entry& e) {
            const double v = e.v;
            sums = sums + Sums{e.u * v, v * e.fv, v * v};
        });
    write_sum(sums, shared, p.sums + work.tile);
}

constexpr int total_threads = 1024;
constexpr size_t total_bytes = total_threads / warp_size * sizeof(Sums);

__global__ void __launch_bounds__(total_threads) aux_loss_kernel(const __grid_constant__ AuxLossJob job) {
    FISHLEG_SHARED(Sums, shared);
    const Sums sums = total(job.sums, job.count, shared);
    if (threadIdx.x == 0) {
        const double uQu = sums.a, vFv = sums.b + job.damping * sums.c;
        // Sampled Hessians may have negative curvature.
        const double alpha = job.learn_scale || !(vFv > 0) ? 1.0 : uQu / vFv;
        *job.out = {alpha, 0.5 * vFv - uQu, uQu};
        *job.loss = static_cast<float>(0.5 * vFv - uQu);
        *job.alpha = static_cast<float>(alpha);
    }
}

template <bool precondition>
__global__ void __launch_bounds__(entry_threads, 3) residual_kernel(const __grid_constant__ AuxTable table) {
    FISHLEG_SHARED(Sums, shared);
    const PartWork<AuxPart> work = work_of(table);
    const AuxPart& p = work.item;
    const float alpha = static_cast<float>(p.aux->alpha), damping = p.damping;
    Sums sums{};
    for_entries<Entry>(
        work, [&](const Place& at) { return loaded(p, at); },
        [&](const Place& at, const Entry& e) {
            float w = alpha * (e.fv + damping * e.v) - e.u;
            if (p.diagonal) {
                w = precondition ? e.d * e.d * w : w;
                const float grad = 2 * e.d * e.u * w;
                p.grad[at.matrix] = grad;
                sums.a += static_cast<double>(grad) * grad;
            } else {
                p.x[at.padded] = e.u;
                p.y[at.padded] = w;
            }
        });
    write_sum(sums, shared, p.sums + work.tile);
}

__global__ void __launch_bounds__(total_threads) aux_decision_kernel(const __grid_constant__ AuxDecision decision) {
    FISHLEG_SHARED(Sums, shared);
    const Sums sums = total(decision.sums, decision.count, shared);
    if (threadIdx.x == 0) {
        *decision.ok = finite(sums.a) && finite(static_cast<float>(decision.aux->loss)) &&
                       static_cast<float>(decision.aux->power) != 0;
    }
}

constexpr int adam_entries = 2048;  // a tile's

__global__ void __launch_bounds__(entry_threads, 3) adam_kernel(const __grid_constant__ Table<AdamTensor> table) {
    FISHLEG_SHARED(Adam<float>, shared);
    const Work<AdamTensor> work = work_of(table);
    const AdamTensor& t = work.item;
    if (!*t.ok) {
        return;
    }
    if (threadIdx.x == 0) {
        const double step = (t.step_pointer ? *t.step_pointer : t.step) + 1;
        *shared = adam_rule<float>(t.lr_pointer ? *t.lr_pointer : t.lr, t.beta1, t.beta2, t.eps, step);
    }
    __syncthreads();
    const Adam<float> rule = *shared;
    const int64_t first = static_cast<int64_t>(work.tile) * adam_entries;
#pragma unroll 4
    for (int k = 0; k < adam_entries; k += entry_threads) {
        const int64_t i = first + k + threadIdx.x;
        if (i < t.count) {
            adam(rule, t.grad[i], t.value[i], t.exp_avg[i], t.exp_avg_sq[i]);
        }
    }
}

__global__ void count_kernel(const __grid_constant__ Table<Counter> table) {
    const Counter& c = table.items[blockIdx.x];
    if (threadIdx.x == 0 && *c.ok) {
        *c.value += 1;
    }
}

__global__ void __launch_bounds__(entry_threads, 3) inner_kernel(const __grid_constant__ Table<Pair> table) {
    FISHLEG_SHARED(Sums, shared);
    const Work<Pair> work = work_of(table);
    const Pair& p = work.item;
    const int64_t first = static_cast<int64_t>(work.tile) * tile_entries;
    Sums sums{};
#pragma unroll 4
    for (int k = 0; k < tile_entries; k += entry_threads) {
        const int64_t i = first + k + threadIdx.x;
        if (i < p.count) {
            sums.a += static_cast<double>(read(p.x, p.x_type, i)) * read(p.y, p.y_type, i);
        }
    }
    write_sum(sums, shared, p.sums + work.tile);
}

__global__ void __launch_bounds__(total_threads) total_kernel(const __grid_constant__ Total t) {
    FISHLEG_SHARED(Sums, shared);
    const Sums sums = total(t.sums, t.count, shared);
    if (threadIdx.x == 0) {
        *t.out = static_cast<float>(sums.a);
    }
}

}  // namespace

void gather_all(const Parts<AuxPart>& parts, Stream stream) {
    launch_all("gather", gather_kernel, parts, [](const Part& p) { return tiles(p); }, entry_threads, 0, stream);
}

void aux_dots_all(const Parts<AuxPart>& parts, Stream stream) {
    launch_all("aux_dots", dots_kernel, parts, [](const Part& p) { return tiles(p); }, entry_threads, shared_bytes,
               stream);
}

void aux_loss(const AuxLossJob& job, Stream stream) {
    launch("aux_loss", aux_loss_kernel, 1, total_threads, total_bytes, stream, job);
}

void residual_all(const Parts<AuxPart>& parts, bool precondition, Stream stream) {
    launch_all("residual", precondition ? residual_kernel<true> : residual_kernel<false>, parts,
               [](const Part& p) { return tiles(p); }, entry_threads, shared_bytes, stream);
}

void decide_aux(const AuxDecision& decision, Stream stream) {
    launch("aux_decision", aux_decision_kernel, 1, total_threads, total_bytes, stream, decision);
}

int64_t tiles(const AdamTensor& t) { return (t.count + adam_entries - 1) / adam_entries; }

void adam_all(std::vector<AdamTensor>& tensors, Stream stream) {
    launch_all("adam", adam_kernel, tensors, [](const AdamTensor& t) { return tiles(t); }, entry_threads,
               sizeof(Adam<float>), stream);
}

void count_all(std::vector<Counter>& counters, Stream stream) {
    launch_all("count", count_kernel, counters, [](const Counter&) { return int64_t{1}; }, warp_size, 0, stream);
}

int64_t tiles(const Pair& p) { return (p.count + tile_entries - 1) / tile_entries; }

void inner_all(std::vector<Pair>& pairs, Sums* sums, int64_t more, float* out, Stream stream) {
    int64_t count = 0;
    for (Pair& p : pairs) {
        p.sums = sums + count;
        count += tiles(p);
    }
    launch_all("inner", inner_kernel, pairs, [](const Pair& p) { return tiles(p); }, entry_threads, shared_bytes,
               stream);
    launch("total", total_kernel, 1, total_threads, total_bytes, stream, Total{sums, count + more, out});
}

}  // namespace fishleg::cuda
