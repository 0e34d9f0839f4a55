// Loops over tasks on OpenMP's threads, which torch's own are where both use the same library.
#pragma once

#include <cstdint>
#include <exception>

namespace fishleg::cpu {

/// Runs the tasks of a parallel loop, which no exception may leave; the first one is thrown after it.
class FirstException {
public:
    template <class F>
    void run(F& f, int64_t i) {
        try {
            f(i);
        } catch (...) {
#pragma omp critical(fishleg_first_exception)
            if (!error_) error_ = std::current_exception();
        }
    }
    void rethrow() const {
        if (error_) std::rethrow_exception(error_);
    }

private:
    std::exception_ptr error_;
};

/// f(i) for i in 0 … count − 1, thread t always taking the same share, so that its caches serve the next pass too.
template <class F>
void parallel_for(int64_t count, int threads, F f) {
    FirstException exception;
#ifdef _OPENMP
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1 && count > 1)
#endif
    for (int64_t i = 0; i < count; ++i) exception.run(f, i);
    exception.rethrow();
    (void)threads;
}

/// The same for tasks of different length: each goes to the thread that is free.
template <class F>
void parallel_for_uneven(int64_t count, int threads, F f) {
    FirstException exception;
#ifdef _OPENMP
#pragma omp parallel for schedule(dynamic) num_threads(threads) if (threads > 1 && count > 1)
#endif
    for (int64_t i = 0; i < count; ++i) exception.run(f, i);
    exception.rethrow();
    (void)threads;
}

}  // namespace fishleg::cpu
