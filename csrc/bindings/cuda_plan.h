// A plan of CUDA kernels with what it is handed at a step, read off lists of tensors. Every ``read_`` returns whether all
// of them lie as the plan has them. Memory is kept from step to step.
#pragma once

#include <algorithm>
#include <array>
#include <optional>
#include <span>
#include <utility>
#include <vector>

#include "bindings/cuda_tensors.h"
#include "bindings/lists.h"
#include "cuda/host/plan.h"

namespace fishleg {

using Rates = std::array<double, 4>;  // of a parameter group: β, lr₀, lr, weight decay

struct TensorPlan : TensorChecks {
    explicit TensorPlan(cuda::Plan given) : TensorChecks(given.device()), plan(std::move(given)) {
        for (const cuda::BlockLayout& b : plan.blocks()) {
            if (b.kind == cuda::Kind::uncovered) {
                continue;
            }
            covered_.push_back(&b);
            for (const cuda::PartLayout& part : b.parts) {
                parts_.push_back({&part, covered_.size() - 1});
            }
        }
    }
    TensorPlan(TensorPlan&&) = default;

    bool read_gradients(const pybind11::list& tensors, const std::optional<pybind11::list>& factors) {
        g.assign(parts_.size(), 0), factor.assign(parts_.size(), 0);
        check(tensors, parts_.size(), "gradients");
        for (size_t i = 0; i < parts_.size(); ++i) {
            const cuda::PartLayout& part = *parts_[i].layout;
            TensorView t;
            if (item(tensors, i).is_none()) {
                continue;
            }
            if (!here(item(tensors, i), t) || !lies(t, part.shape, part.g_strides, part.g_type)) {
                return false;
            }
            g[i] = t.address();
        }
        return !factors || read_gradient_factors(*factors);
    }

    /// Kept as they are where there is no gradient.
    bool read_parameters(const pybind11::list& tensors, const pybind11::list& grads) {
        theta.assign(parts_.size(), 0);
        check(tensors, parts_.size(), "parameters");
        for (size_t i = 0; i < parts_.size(); ++i) {
            const cuda::PartLayout& part = *parts_[i].layout;
            TensorView t;
            if (!here(item(tensors, i), t) ||
                !lies(t, part.shape, part.theta_strides, part.theta_type, part.first_row)) {
                return false;
            }
            const int64_t skipped = part.first_row > 0 ? part.first_row * t.strides[0] * (t.bits / 8) : 0;
            theta[i] = item(grads, i).is_none() ? 0 : t.address() + skipped;
        }
        return true;
    }

    /// Each block: P or d, S or None, A or None. Without a list: where they were at the latest op.
    bool read_operators(const std::optional<pybind11::list>& given) {
        if (!given) {
            return true;
        }
        const pybind11::list& tensors = *given;
        operators.clear();
        check(tensors, 3 * covered_.size(), "operators");
        for (size_t k = 0; k < covered_.size(); ++k) {
            const cuda::BlockLayout& b = *covered_[k];
            if (!(b.kind == cuda::Kind::diagonal ? dense(item(tensors, 3 * k), b.m * b.n, operators, true)
                                                 : square(item(tensors, 3 * k), b.m) &&
                                                       square(item(tensors, 3 * k + 1), b.n)) ||
                !optional_dense(item(tensors, 3 * k + 2), b.m * b.n, operators)) {
                return false;
            }
        }
        return true;
    }

    /// The blocks' own, which are looked at again only where they have been replaced.
    bool read_momenta(const pybind11::list& tensors) {
        if (identical(tensors, momenta_)) {
            return true;
        }
        const bool fit = read_dense(tensors, momentum);
        momenta_ = fit ? copied(tensors) : pybind11::list();
        return fit;
    }

    /// One (m, n) without gaps, each block.
    bool read_dense(const pybind11::list& tensors, std::vector<int64_t>& to) {
        to.clear();
        check(tensors, covered_.size(), "matrices");
        for (size_t k = 0; k < covered_.size(); ++k) {
            if (!dense(item(tensors, k), covered_[k]->m * covered_[k]->n, to)) {
                return false;
            }
        }
        return true;
    }

    /// Each block: R or d and its two moments, L and its two moments or three None.
    bool read_adam(const pybind11::list& tensors) {
        adam.clear();
        check(tensors, 6 * covered_.size(), "tensors of λ");
        for (size_t i = 0; i < 6 * covered_.size(); ++i) {
            const cuda::BlockLayout& b = *covered_[i / 6];
            const bool left = i % 6 < 3, diagonal = b.kind == cuda::Kind::diagonal;
            if (!optional_dense(item(tensors, i), diagonal ? b.m * b.n : left ? b.m * b.m : b.n * b.n, adam)) {
                return false;
            }
        }
        return true;
    }

    /// Each block: R, L, P, S.
    bool read_factors(const pybind11::list& tensors) {
        operators.clear();
        check(tensors, 4 * covered_.size(), "factors and products");
        for (size_t k = 0; k < covered_.size(); ++k) {
            const int64_t m = covered_[k]->m, n = covered_[k]->n;
            if (!dense(item(tensors, 4 * k), m * m, operators) || !dense(item(tensors, 4 * k + 1), n * n, operators) ||
                !square(item(tensors, 4 * k + 2), m) || !square(item(tensors, 4 * k + 3), n)) {
                return false;
            }
        }
        return true;
    }

    /// Counters: where they are, if ``on_device`` and they are on the plan's, else their values.
    void read_steps(const pybind11::list& tensors, bool on_device) {
        const size_t count = pybind11::len(tensors);
        if (on_device != on_device_ || !identical(tensors, counters_)) {
            counters_ = pybind11::list();
            steps.assign(count, 0), host_steps_.assign(count, nullptr);
            for (size_t k = 0; k < count; ++k) {
                TensorView t;
                const bool known = view_of(item(tensors, k), t) && t.is(code_float, 32);
                if (known && on_device && mine(t)) {
                    steps[k] = t.address();
                } else if (known && t.device_type == device_cpu) {
                    host_steps_[k] = reinterpret_cast<float*>(t.address());
                }
            }
            counters_ = copied(tensors), on_device_ = on_device;
        }
        step.assign(count, 0);
        for (size_t k = 0; k < count; ++k) {
            if (host_steps_[k]) {
                step[k] = *host_steps_[k];
            } else if (!steps[k]) {
                step[k] = item(tensors, k).attr("item")().cast<double>();
            }
        }
    }

    /// Whether any counter was read from the host's memory.
    bool counts_on_host() const {
        return std::any_of(host_steps_.begin(), host_steps_.end(), [](const float* at) { return at; });
    }

    /// Those go up by one where the step was ``taken``. Returns the numbers of the others.
    std::vector<size_t> count_steps(bool taken) {
        std::vector<size_t> others;
        for (size_t k = 0; k < host_steps_.size(); ++k) {
            if (!host_steps_[k]) {
                others.push_back(k);
            } else if (taken) {
                *host_steps_[k] += 1;
            }
        }
        return others;
    }

    /// ``rates``: each group's lr on the device, or None.
    bool read_groups(std::span<const int64_t> of_block, std::span<const int64_t> of_part,
                     const std::vector<Rates>& groups, const pybind11::list& rates) {
        rate_pointers.clear(), beta.clear(), base_lr.clear(), lr.clear(), decay.clear(), group_rates_.clear();
        check(rates, groups.size(), "rates");
        for (size_t i = 0; i < groups.size(); ++i) {
            if (!optional_dense(item(rates, i), 1, group_rates_)) {
                return false;
            }
        }
        for (const int64_t group : of_block) {
            beta.push_back(groups.at(group)[0]), base_lr.push_back(groups[group][1]);
        }
        for (const int64_t group : of_part) {
            lr.push_back(groups.at(group)[2]), decay.push_back(groups[group][3]);
            rate_pointers.push_back(group_rates_[group]);
        }
        return true;
    }

    cuda::Gradients gradients() const { return {g, factor}; }

    cuda::Plan plan;
    std::vector<int64_t> g, factor, operators, momentum, theta, steps, rate_pointers, adam, v, fv;
    std::vector<double> beta, base_lr, step, lr, decay;

private:
    struct PartOfBlock {
        const cuda::PartLayout* layout;
        size_t block;  // of those that are covered
    };

    /// P or S, and its leading dimension.
    bool square(pybind11::handle tensor, int64_t size) {
        TensorView t;
        if (!here(tensor, t) || !t.is(code_float, 32) || t.ndim != 2 || t.shape[0] != size || t.shape[1] != size ||
            (size > 1 && t.strides[1] != 1)) {
            return false;
        }
        operators.push_back(t.address());
        operators.push_back(size > 1 ? t.strides[0] : size);
        return true;
    }

    /// One each block, or None.
    bool read_gradient_factors(const pybind11::list& tensors) {
        check(tensors, covered_.size(), "factors of gradients");
        block_factors_.clear();
        for (size_t k = 0; k < covered_.size(); ++k) {
            if (k > 0 && item(tensors, k).is(item(tensors, k - 1))) {
                block_factors_.push_back(block_factors_.back());
            } else if (!optional_dense(item(tensors, k), 1, block_factors_)) {
                return false;
            }
        }
        for (size_t i = 0; i < parts_.size(); ++i) {
            factor[i] = g[i] ? block_factors_[parts_[i].block] : 0;
        }
        return true;
    }

    std::vector<const cuda::BlockLayout*> covered_;
    std::vector<PartOfBlock> parts_;
    std::vector<float*> host_steps_;
    pybind11::list momenta_, counters_;  // of the latest op, alive
    bool on_device_ = false;
    std::vector<int64_t> group_rates_, block_factors_;
};

}  // namespace fishleg
