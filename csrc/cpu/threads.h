// Loops over tasks on OpenMP's threads, which torch's own are where both use the same library.
#pragma once

#include <cstdint>

namespace fishleg::cpu {

/// f(i) for i in 0 … count − 1, thread t always taking the same share, so that its caches serve the next pass too.
template <class F>
void parallel_for(int64_t count, int threads, F f) {
#ifdef _OPENMP
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1 && count > 1)
#endif
    for (int64_t i = 0; i < count; ++i) f(i);
    (void)threads;
}

/// The same for tasks of different length: each goes to the thread that is free.
template <class F>
void parallel_for_uneven(int64_t count, int threads, F f) {
#ifdef _OPENMP
#pragma omp parallel for schedule(dynamic) num_threads(threads) if (threads > 1 && count > 1)
#endif
    for (int64_t i = 0; i < count; ++i) f(i);
    (void)threads;
}

}  // namespace fishleg::cpu
