#include "cpu/step/step_plan.h"

#include <cmath>
#include <stdexcept>
#include <string>
#include <utility>

#include "cpu/common/threads.h"
#include "cpu/gemm/products.h"
#include "cpu/step/work_items.h"
#include "formulas.h"

namespace fishleg::cpu {
namespace {

int64_t elements(const Block& block) { return block.rows * block.columns; }

[[noreturn]] void refuse(const Block& block, const std::string& what) {
    throw std::invalid_argument("block '" + block.name + "': " + what);
}

bool momentum_is_after(const Block& block) {
    return block.source == Source::after || block.source == Source::after_diagonal;
}

/// ‖nat‖ of each block into `norms`, and the bias corrections into `passes`. Sets `power` to Σ lr₀² m̂ᵀ nat. Returns
/// whether all norms are finite.
bool measure(const std::vector<Block>& blocks, int times, const std::vector<Sums>& totals, std::vector<Pass>& passes,
             double* norms, double& power) {
    double corrected = 1, last_count = 0;
    bool ok = true;
    power = 0;
    for (size_t b = 0; b < blocks.size(); ++b) {
        const Block& block = blocks[b];
        const double count = (block.step ? *block.step : 0) + times;
        if (b == 0 || count != last_count || block.beta != blocks[b - 1].beta)  // most blocks are alike
            corrected = 1 - std::pow(block.beta, count);
        last_count = count;
        passes[b].scale = 1 / corrected;
        norms[b] = std::sqrt(totals[b].square) / corrected;
        ok = ok && std::isfinite(norms[b]);
        const double correction = momentum_is_after(block) ? corrected : corrected * corrected;
        power += block.base_lr * block.base_lr * totals[b].power / correction;
    }
    return ok;
}

}  // namespace

StepPlan::StepPlan(std::vector<Block> blocks) : blocks_(std::move(blocks)) {
    for (size_t b = 0; b < blocks_.size(); ++b) {
        const Block& block = blocks_[b];
        if (block.rows < 0 || block.columns < 0)
            refuse(block, "its shape should not be negative but is: " + std::to_string(block.rows) + ", " +
                              std::to_string(block.columns));
        if (block.dtype != Dtype::float32 && block.dtype != Dtype::float64)
            refuse(block, "λ should be float32 or float64");
        int64_t column = 0;
        for (const Part& part : block.parts) {
            if (part.first != column || part.width < 1)
                refuse(block, "its parameters should follow each other, but one starts at column " +
                                  std::to_string(part.first) + " where " + std::to_string(column) + " are taken");
            column += part.width;
        }
        if (column != block.columns)
            refuse(block, "its parameters should fill " + std::to_string(block.columns) + " columns but fill: " +
                              std::to_string(column));
        split(static_cast<int>(b), block.rows, block.columns, items_);
    }
    gradient_seen_.assign(blocks_.size(), -1);
}

void StepPlan::check() const {
    for (const Block& block : blocks_) {
        if (elements(block) == 0) continue;
        const bool diagonal = block.source == Source::diagonal || block.source == Source::after_diagonal;
        if (!block.momentum || !block.step) refuse(block, "it has no momentum or counter");
        const bool packed = block.source == Source::low_rank && block.factors.left && block.factors.right;
        if (packed && (!engine_ || block.dtype != Dtype::float32))
            refuse(block, "nothing multiplies its packed factors");
        if (diagonal ? !block.diagonal : !block.given && !packed)
            refuse(block, "what its natural gradient is made of is missing");
        if (block.source == Source::low_rank && !block.product) refuse(block, "Q m of the step before is missing");
        for (const Part& part : block.parts)
            if (part.moves && !part.param.data) refuse(block, "a parameter has no memory");
    }
}

Pass StepPlan::pass_of(const Block& block, int times) const {
    const double before = times == 1 ? 1 : block.beta;  // β to the power of times − 1
    return {1 - before * block.beta, 1 - block.beta, before, 0};
}

void StepPlan::average(const std::vector<void*>& outs, const ThetaOptions& options) {
    if (outs.size() != blocks_.size())
        throw std::invalid_argument("outs should have one place a block, " + std::to_string(blocks_.size()) +
                                    ", but has: " + std::to_string(outs.size()));
    std::vector<char> found(items_.size(), 0);
    const int threads = threads_for(blocks_, options.threads, elements);
    parallel_for(static_cast<int64_t>(items_.size()), threads, [&](int64_t i) {
        const WorkItem& item = items_[i];
        if (!outs[item.index]) return;
        const Block& block = blocks_[item.index];
        found[i] = kernels(block.dtype).average(block, item, pass_of(block, options.times), outs[item.index]);
    });
    for (size_t b = 0; b < blocks_.size(); ++b) gradient_seen_[b] = outs[b] ? 0 : -1;
    for (size_t i = 0; i < items_.size(); ++i)
        if (found[i]) gradient_seen_[items_[i].index] = 1;
}

/// f(item), with the item's rows and columns of Q g where the block has that as packed factors. Where there is scratch
/// memory, the first pass writes them there. Otherwise both multiply, which is faster on matrix units: operands stay in
/// cache, Q g does not.
template <class F>
void StepPlan::with_given(const WorkItem& item, bool first, F f) const {
    const Block& block = blocks_[item.index];
    if (!block.factors.left || block.source != Source::low_rank) return f(item);
    const Rectangle mine{item.row_begin, item.row_end, item.column_begin, item.column_end};
    WorkItem with = item;
    if (block.scratch) {
        float* place = block.scratch + item.row_begin * block.columns + item.column_begin;
        if (first) multiply_rectangle(*engine_, block.factors, mine, place, block.columns);
        with.given = place;
        with.given_stride = block.columns;
    } else {
        with.given = multiply_into_scratch(*engine_, block.factors, mine, &with.given_stride);
    }
    f(with);
}

/// The first pass: of each block the sums of what the step will be.
std::vector<Sums> StepPlan::sums(const ThetaOptions& options, const std::vector<Pass>& passes,
                                 const std::vector<int>& seen) const {
    std::vector<Sums> found(items_.size()), totals(blocks_.size());
    const int threads = threads_for(blocks_, options.threads, elements);
    parallel_for(static_cast<int64_t>(items_.size()), threads, [&](int64_t i) {
        const Block& block = blocks_[items_[i].index];
        const bool low_rank = block.source == Source::low_rank;  // such a gradient is not zero
        const bool look = options.normalize == Normalize::rms && !low_rank && seen[items_[i].index] < 0;
        with_given(items_[i], true, [&](const WorkItem& item) {
            found[i] = kernels(block.dtype).sums(block, item, passes[item.index], look,
                                                 options.normalize == Normalize::trust);
        });
    });
    for (size_t i = 0; i < items_.size(); ++i) {  // in this order whatever the threads
        Sums& total = totals[items_[i].index];
        total.square += found[i].square;
        total.power += found[i].power;
        total.gradient = total.gradient || found[i].gradient;
    }
    return totals;
}

bool StepPlan::theta_step(const ThetaOptions& options, double* norms) {
    check();
    const std::vector<int> seen = std::exchange(gradient_seen_, std::vector<int>(blocks_.size(), -1));
    std::vector<Pass> passes(blocks_.size());
    for (size_t b = 0; b < blocks_.size(); ++b) passes[b] = pass_of(blocks_[b], options.times);
    const std::vector<Sums> totals = sums(options, passes, seen);
    double power;
    if (!measure(blocks_, options.times, totals, passes, norms, power)) return false;
    for (size_t b = 0; b < blocks_.size(); ++b) {
        const Block& block = blocks_[b];
        if (options.normalize == Normalize::rms) {
            const bool low_rank = block.source == Source::low_rank;
            const bool zero = !low_rank && (seen[b] < 0 ? !totals[b].gradient : seen[b] == 0);
            if (block.fixed_scale > 0)
                passes[b].scale = zero ? 0 : block.fixed_scale;
            else
                passes[b].scale *= rms_scale(norms[b], elements(block), zero);
        } else if (options.normalize == Normalize::trust) {
            passes[b].scale *= trust_scale(power, options.kappa);
        }
    }
    const int threads = threads_for(blocks_, options.threads, elements);
    parallel_for(static_cast<int64_t>(items_.size()), threads, [&](int64_t i) {
        const int b = items_[i].index;
        with_given(items_[i], false,
                   [&](const WorkItem& item) { kernels(blocks_[b].dtype).apply(blocks_[b], item, passes[b]); });
    });
    for (Block& block : blocks_)
        if (block.step) *block.step += 1;
    return true;
}

}  // namespace fishleg::cpu
