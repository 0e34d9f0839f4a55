#include "cpu/step/step_plan.h"

#include <algorithm>
#include <cmath>
#include <stdexcept>

#include "cpu/common/threads.h"
#include "formulas.h"

namespace fishleg::cpu {
namespace {

constexpr int64_t task_size = 32768;     // elements: small enough to share out evenly
constexpr int64_t widest = 2048;         // columns, where there are several rows
constexpr int64_t serial_below = 32768;  // elements in all: waking a thread takes longer than these

/// Pieces of about task_size elements of a rows × columns matrix, in whole panels of products.h, whatever the number of
/// threads.
void split(int block, int64_t rows, int64_t columns, std::vector<Task>& tasks) {
    if (rows == 0 || columns == 0) return;
    const int64_t column_count = rows == 1 ? task_size : std::min(columns, widest);
    const int64_t row_count = std::max<int64_t>(1, task_size / column_count / panel) * panel;
    for (int64_t r = 0; r < rows; r += row_count)
        for (int64_t c = 0; c < columns; c += column_count)
            tasks.push_back({block, r, std::min(rows, r + row_count), c, std::min(columns, c + column_count)});
}

template <class Items, class Count>
int threads_for(const Items& items, int threads, Count count) {
    int64_t all = 0;
    for (const auto& item : items) all += count(item);
    return all < serial_below ? 1 : threads;
}

int64_t elements(const Block& block) { return block.rows * block.columns; }

[[noreturn]] void refuse(const Block& block, const std::string& what) {
    throw std::invalid_argument("block '" + block.name + "': " + what);
}

}  // namespace

Plan::Plan(std::vector<Block> blocks) : blocks_(std::move(blocks)) {
    for (size_t b = 0; b < blocks_.size(); ++b) {
        const Block& block = blocks_[b];
        if (block.rows < 0 || block.columns < 0)
            refuse(block, "its shape should not be negative but is: " + std::to_string(block.rows) + ", " +
                              std::to_string(block.columns));
        if (block.dtype != Dtype::float32 && block.dtype != Dtype::float64)
            refuse(block, "λ should be float32 or float64");
        int64_t column = 0;
        for (const Piece& piece : block.pieces) {
            if (piece.first != column || piece.width < 1)
                refuse(block, "its parameters should follow each other, but one starts at column " +
                                  std::to_string(piece.first) + " where " + std::to_string(column) + " are taken");
            column += piece.width;
        }
        if (column != block.columns)
            refuse(block, "its parameters should fill " + std::to_string(block.columns) + " columns but fill: " +
                              std::to_string(column));
        split(static_cast<int>(b), block.rows, block.columns, tasks_);
    }
    gradient_seen_.assign(blocks_.size(), -1);
}

void Plan::check() const {
    for (const Block& block : blocks_) {
        if (elements(block) == 0) continue;
        const bool diagonal = block.source == Source::diagonal || block.source == Source::after_diagonal;
        if (!block.momentum || !block.step) refuse(block, "it has no momentum or counter");
        const bool packed = block.source == Source::thin && block.factors.left && block.factors.right;
        if (packed && (!engine_ || block.dtype != Dtype::float32)) refuse(block, "nothing multiplies its panels");
        if (diagonal ? !block.diagonal : !block.given && !packed) refuse(block, "what its natural gradient is made of is missing");
        if (block.source == Source::thin && !block.product) refuse(block, "Q m of the step before is missing");
        for (const Piece& piece : block.pieces)
            if (piece.moves && !piece.param.data) refuse(block, "a parameter has no memory");
    }
}

Pass Plan::pass_of(const Block& block, int times) const {
    const double before = times == 1 ? 1 : block.beta;  // β to the power of times − 1
    return {1 - before * block.beta, 1 - block.beta, before, 0};
}

void Plan::average(const std::vector<void*>& outs, const ThetaOptions& options) {
    if (outs.size() != blocks_.size())
        throw std::invalid_argument("outs should have one place a block, " + std::to_string(blocks_.size()) +
                                    ", but has: " + std::to_string(outs.size()));
    std::vector<char> found(tasks_.size(), 0);
    const int threads = threads_for(blocks_, options.threads, elements);
    parallel_for(static_cast<int64_t>(tasks_.size()), threads, [&](int64_t i) {
        const Task& task = tasks_[i];
        if (!outs[task.block]) return;
        const Block& block = blocks_[task.block];
        found[i] = kernels(block.dtype).average(block, task, pass_of(block, options.times), outs[task.block]);
    });
    for (size_t b = 0; b < blocks_.size(); ++b) gradient_seen_[b] = outs[b] ? 0 : -1;
    for (size_t i = 0; i < tasks_.size(); ++i)
        if (found[i]) gradient_seen_[tasks_[i].block] = 1;
}

/// f(task), with the task's part of Q g where the block has it as panels. Where there is a place for it, the first pass
/// writes it there. Otherwise both multiply, which is faster on matrix units: operands stay in cache, Q g does not.
template <class F>
void Plan::with_given(const Task& task, bool first, F f) const {
    const Block& block = blocks_[task.block];
    if (!block.factors.left || block.source != Source::thin) return f(task);
    const Part part{task.row_begin, task.row_end, task.column_begin, task.column_end};
    Task with = task;
    if (block.room) {
        float* place = block.room + task.row_begin * block.columns + task.column_begin;
        if (first) multiply_part(*engine_, block.factors, part, place, block.columns);
        with.given = place;
        with.given_stride = block.columns;
    } else {
        with.given = part_of(*engine_, block.factors, part, &with.given_stride);
    }
    f(with);
}

bool Plan::theta_step(const ThetaOptions& options, double* norms) {
    check();
    const bool trust = options.normalize == Normalize::trust;
    const int threads = threads_for(blocks_, options.threads, elements);
    const std::vector<int> seen = gradient_seen_;
    gradient_seen_.assign(blocks_.size(), -1);

    std::vector<Pass> passes(blocks_.size());
    for (size_t b = 0; b < blocks_.size(); ++b) passes[b] = pass_of(blocks_[b], options.times);
    std::vector<Sums> parts(tasks_.size());
    parallel_for(static_cast<int64_t>(tasks_.size()), threads, [&](int64_t i) {
        const Block& block = blocks_[tasks_[i].block];
        const bool thin = block.source == Source::thin;  // such a gradient is not zero
        const bool look = options.normalize == Normalize::rms && !thin && seen[tasks_[i].block] < 0;
        with_given(tasks_[i], true, [&](const Task& task) {
            parts[i] = kernels(block.dtype).sums(block, task, passes[task.block], look, trust);
        });
    });

    std::vector<Sums> totals(blocks_.size());
    for (size_t i = 0; i < tasks_.size(); ++i) {  // in this order whatever the threads
        Sums& total = totals[tasks_[i].block];
        total.square += parts[i].square;
        total.power += parts[i].power;
        total.gradient = total.gradient || parts[i].gradient;
    }
    double power = 0, corrected = 1, last_count = 0;
    bool ok = true;
    for (size_t b = 0; b < blocks_.size(); ++b) {
        const Block& block = blocks_[b];
        const bool after = block.source == Source::after || block.source == Source::after_diagonal;
        const double count = (block.step ? *block.step : 0) + options.times;
        if (b == 0 || count != last_count || block.beta != blocks_[b - 1].beta)  // most blocks are alike
            corrected = 1 - std::pow(block.beta, count);
        last_count = count;
        passes[b].scale = 1 / corrected;
        norms[b] = std::sqrt(totals[b].square) / corrected;
        ok = ok && std::isfinite(norms[b]);
        power += block.base_lr * block.base_lr * totals[b].power / (after ? corrected : corrected * corrected);
    }
    if (!ok) return false;
    for (size_t b = 0; b < blocks_.size(); ++b) {
        const Block& block = blocks_[b];
        if (options.normalize == Normalize::rms) {
            const bool thin = block.source == Source::thin;
            const bool zero = !thin && (seen[b] < 0 ? !totals[b].gradient : seen[b] == 0);
            passes[b].scale *= rms_scale(norms[b], elements(block), zero);
        } else if (trust) {
            passes[b].scale *= trust_scale(power, options.kappa);
        }
    }
    parallel_for(static_cast<int64_t>(tasks_.size()), threads, [&](int64_t i) {
        const int b = tasks_[i].block;
        with_given(tasks_[i], false,
                   [&](const Task& task) { kernels(blocks_[b].dtype).apply(blocks_[b], task, passes[b]); });
    });
    for (Block& block : blocks_)
        if (block.step) *block.step += 1;
    return true;
}

namespace {

/// A task's entries; where the gradient is a product of panels, with it computed for this task alone.
Runs runs_of(const AdamTensor& tensor, const Task& task, const Engine* engine) {
    if (!tensor.factors.left) return {task.column_begin, task.column_end};
    const int64_t begin = task.row_begin * tensor.columns;
    Runs runs{begin + task.column_begin, begin + task.column_end, task.row_end - task.row_begin, tensor.columns};
    runs.grad = part_of(*engine, tensor.factors, {task.row_begin, task.row_end, task.column_begin, task.column_end},
                        &runs.grad_stride);
    return runs;
}

/// Whether the operands alone tell that their product is finite.
bool surely_finite(const AdamTensor& tensor, const Engine* engine) {
    const Factors& f = tensor.factors;
    if (!f.left) return false;
    const double left = largest(*engine, f.left, tensor.count / tensor.columns, f.depth);
    const double right = largest(*engine, f.right, tensor.columns, f.depth);
    return left * right * static_cast<double>(f.depth) < 1e38;  // sums of float32
}

}  // namespace

bool adam_step(const std::vector<AdamTensor>& tensors, const AdamOptions& options) {
    std::vector<Task> tasks;
    for (size_t t = 0; t < tensors.size(); ++t) {
        const AdamTensor& tensor = tensors[t];
        const bool packed = tensor.factors.left && tensor.factors.right && options.engine && tensor.columns > 0;
        if (tensor.count && !(tensor.value && tensor.exp_avg && tensor.exp_avg_sq && (tensor.grad || packed)))
            throw std::invalid_argument("'" + tensor.name + "' should have λ, both moments and a gradient");
        if (packed)
            split(static_cast<int>(t), tensor.count / tensor.columns, tensor.columns, tasks);
        else
            split(static_cast<int>(t), 1, tensor.count, tasks);
    }
    const int threads = threads_for(tensors, options.threads, [](const AdamTensor& t) { return t.count; });
    std::vector<char> sure(tensors.size(), 0), finite(tasks.size(), 0);
    parallel_for_uneven(static_cast<int64_t>(tensors.size()), threads,
                        [&](int64_t t) { sure[t] = surely_finite(tensors[t], options.engine); });
    const auto each = static_cast<int64_t>(tasks.size());
    parallel_for(each, threads, [&](int64_t i) {
        const AdamTensor& tensor = tensors[tasks[i].block];
        finite[i] = sure[tasks[i].block] ||
                    kernels(tensor.dtype).finite(tensor, runs_of(tensor, tasks[i], options.engine));
    });
    if (std::find(finite.begin(), finite.end(), 0) != finite.end()) return false;
    parallel_for(each, threads, [&](int64_t i) {
        const AdamTensor& tensor = tensors[tasks[i].block];
        kernels(tensor.dtype).adam(tensor, runs_of(tensor, tasks[i], options.engine), options.lr, options.beta1,
                                   options.beta2, options.eps);
    });
    return true;
}

double inner(const std::vector<Pair>& pairs, int threads) {
    std::vector<Task> tasks;
    for (size_t k = 0; k < pairs.size(); ++k) split(static_cast<int>(k), 1, pairs[k].count, tasks);
    const auto& run = kernels(Dtype::float32);
    std::vector<double> parts(tasks.size());
    parallel_for(static_cast<int64_t>(tasks.size()), threads_for(pairs, threads, [](const Pair& p) { return p.count; }),
                 [&](int64_t i) {
                     const Task& task = tasks[i];
                     parts[i] = run.inner(pairs[task.block], task.column_begin, task.column_end);
                 });
    double total = 0;
    for (double part : parts) total += part;
    return total;
}

}  // namespace fishleg::cpu
