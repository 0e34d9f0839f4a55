#include "cpu/step/adam.h"

#include <algorithm>
#include <stdexcept>

#include "cpu/common/threads.h"
#include "cpu/step/kernels.h"
#include "cpu/step/work_items.h"

namespace fishleg::cpu {
namespace {

/// An item's entries; where the gradient is given as packed factors, with it computed for this item alone.
AdamSlice slice_of(const AdamTensor& tensor, const WorkItem& item, const Engine* engine) {
    if (!tensor.factors.left) return {item.column_begin, item.column_end};
    const int64_t begin = item.row_begin * tensor.columns;
    AdamSlice slice{begin + item.column_begin, begin + item.column_end, item.row_end - item.row_begin, tensor.columns};
    const Rectangle mine{item.row_begin, item.row_end, item.column_begin, item.column_end};
    slice.grad = multiply_into_scratch(*engine, tensor.factors, mine, &slice.grad_stride);
    return slice;
}

/// Whether the operands alone tell that their product is finite.
bool surely_finite(const AdamTensor& tensor, const Engine* engine) {
    const PackedFactors& f = tensor.factors;
    if (!f.left) return false;
    const double left = largest(*engine, f.left, tensor.count / tensor.columns, f.depth);
    const double right = largest(*engine, f.right, tensor.columns, f.depth);
    return left * right * static_cast<double>(f.depth) < 1e38;  // sums of float32
}

}  // namespace

bool adam_step(const std::vector<AdamTensor>& tensors, const AdamOptions& options) {
    std::vector<WorkItem> items;
    for (size_t t = 0; t < tensors.size(); ++t) {
        const AdamTensor& tensor = tensors[t];
        const bool packed = tensor.factors.left && tensor.factors.right && options.engine && tensor.columns > 0;
        if (tensor.count && !(tensor.value && tensor.exp_avg && tensor.exp_avg_sq && (tensor.grad || packed)))
            throw std::invalid_argument("'" + tensor.name + "' should have λ, both moments and a gradient");
        if (packed)
            split(static_cast<int>(t), tensor.count / tensor.columns, tensor.columns, items);
        else
            split(static_cast<int>(t), 1, tensor.count, items);
    }
    const int threads = threads_for(tensors, options.threads, [](const AdamTensor& t) { return t.count; });
    std::vector<char> sure(tensors.size(), 0), finite(items.size(), 0);
    parallel_for_uneven(static_cast<int64_t>(tensors.size()), threads,
                        [&](int64_t t) { sure[t] = surely_finite(tensors[t], options.engine); });
    const auto count = static_cast<int64_t>(items.size());
    parallel_for(count, threads, [&](int64_t i) {
        const AdamTensor& tensor = tensors[items[i].index];
        finite[i] = sure[items[i].index] ||
                    kernels(tensor.dtype).finite(tensor, slice_of(tensor, items[i], options.engine));
    });
    if (std::find(finite.begin(), finite.end(), 0) != finite.end()) return false;
    parallel_for(count, threads, [&](int64_t i) {
        const AdamTensor& tensor = tensors[items[i].index];
        kernels(tensor.dtype).adam(tensor, slice_of(tensor, items[i], options.engine), options.lr, options.beta1,
                                   options.beta2, options.eps);
    });
    return true;
}

}  // namespace fishleg::cpu
