#include "cpu/step/inner.h"

#include "cpu/common/threads.h"
#include "cpu/step/kernels.h"
#include "cpu/step/work_items.h"

namespace fishleg::cpu {

double inner(const std::vector<Pair>& pairs, int threads) {
    std::vector<WorkItem> items;
    for (size_t k = 0; k < pairs.size(); ++k) split(static_cast<int>(k), 1, pairs[k].count, items);
    const auto& run = kernels(Dtype::float32);
    std::vector<double> sums(items.size());
    threads = threads_for(pairs, threads, [](const Pair& p) { return p.count; });
    parallel_for(static_cast<int64_t>(items.size()), threads, [&](int64_t i) {
        const WorkItem& item = items[i];
        sums[i] = run.inner(pairs[item.index], item.column_begin, item.column_end);
    });
    double total = 0;
    for (double sum : sums) total += sum;
    return total;
}

}  // namespace fishleg::cpu
