// Compiled once for each instruction set, with FISHLEG_ISA its name. Nothing here may come from a header that is also
// compiled elsewhere (the linker would keep one copy of an inline function, whatever instructions it has): formulas.h
// is static for that reason.
#include "cpu/step/kernels.h"

#include "formulas.h"

namespace fishleg::cpu::FISHLEG_ISA {
namespace {

constexpr int64_t whole = int64_t{1} << 40;  // no limit
constexpr int64_t segment = 512;  // elements at a time where some have to be brought into a row: they stay in L1

template <class T, class From>
void gather(const void* from, int64_t stride, int64_t count, T* to) {
    const From* source = static_cast<const From*>(from);
    for (int64_t j = 0; j < count; ++j) to[j] = static_cast<T>(widen(source[j * stride]));
}

template <class T, class To>
void scatter(const T* from, int64_t count, void* to, int64_t stride) {
    To* target = static_cast<To*>(to);
    for (int64_t j = 0; j < count; ++j) narrow(from[j], target[j * stride]);
}

template <class T>
constexpr Dtype dtype_of = sizeof(T) == 8 ? Dtype::float64 : Dtype::float32;

int64_t size_of(Dtype dtype) { return dtype == Dtype::float64 ? 8 : dtype == Dtype::float32 ? 4 : 2; }

void* at(const View& view, int64_t row, int64_t column) {
    return static_cast<char*>(view.data) + (row * view.row_stride + column * view.column_stride) * size_of(view.dtype);
}

template <class T>
bool is_plain(const View& view) {
    return view.dtype == dtype_of<T> && view.column_stride == 1;
}

/// `count` elements of a view as a row of T: its own memory where it is one, `scratch` otherwise.
template <class T>
T* row_of(const View& view, int64_t row, int64_t column, int64_t count, T* scratch) {
    if (!view.data) {
        for (int64_t j = 0; j < count; ++j) scratch[j] = 0;
        return scratch;
    }
    void* from = at(view, row, column);
    if (is_plain<T>(view)) return static_cast<T*>(from);
    switch (view.dtype) {
        case Dtype::bfloat16: gather<T, BFloat16>(from, view.column_stride, count, scratch); break;
        case Dtype::float16: gather<T, Float16>(from, view.column_stride, count, scratch); break;
        default: gather<T, T>(from, view.column_stride, count, scratch);
    }
    return scratch;
}

/// The way back, where row_of() took it.
template <class T>
void put_back(const T* row, const View& view, int64_t i, int64_t column, int64_t count) {
    if (is_plain<T>(view)) return;
    void* to = at(view, i, column);
    if constexpr (sizeof(T) == 4) {
        if (view.dtype == Dtype::bfloat16) return scatter<T, BFloat16>(row, count, to, view.column_stride);
        if (view.dtype == Dtype::float16) return scatter<T, Float16>(row, count, to, view.column_stride);
    }
    scatter<T, T>(row, count, to, view.column_stride);
}

/// Calls f(part, row, first column within the part, offset in the block's matrices, count) for every run of consecutive
/// elements, none of them longer than `longest`.
template <class F>
void for_runs(const Block& block, const WorkItem& item, int64_t longest, F f) {
    for (int64_t row = item.row_begin; row < item.row_end; ++row) {
        for (const Part& part : block.parts) {
            const int64_t begin = part.first > item.column_begin ? part.first : item.column_begin;
            const int64_t last = part.first + part.width;
            const int64_t end = last < item.column_end ? last : item.column_end;
            for (int64_t column = begin; column < end; column += longest) {
                const int64_t left = end - column, count = left < longest ? left : longest;
                f(part, row, column - part.first, row * block.columns + column, count);
            }
        }
    }
}

template <class T>
int64_t longest_run(const Block& block) {
    for (const Part& part : block.parts) {
        if (!is_plain<T>(part.param) || !part.grad.data || !is_plain<T>(part.grad)) return segment;
    }
    return whole;
}

template <class T>
bool any(const T* x, int64_t count) {
    int found = 0;
#pragma omp simd reduction(| : found)
    for (int64_t j = 0; j < count; ++j) found |= x[j] != T(0);
    return found != 0;
}

template <class T>
bool average(const Block& block, const WorkItem& item, const Pass& pass, void* out) {
    const T* momentum = static_cast<const T*>(block.momentum);
    const T weight = static_cast<T>(pass.average);
    bool gradient = false;
    for_runs(block, item, longest_run<T>(block), [&](const Part& part, int64_t row, int64_t column, int64_t offset,
                                                    int64_t count) {
        T scratch[segment];
        const T* g = row_of<T>(part.grad, row, column, count, scratch);
        const T* m = momentum + offset;
        T* averaged = static_cast<T*>(out) + offset;
#pragma omp simd
        for (int64_t j = 0; j < count; ++j) averaged[j] = lerp(m[j], g[j], weight);
        gradient = gradient || any(g, count);
    });
    return gradient;
}

/// One element of a block: what `source` makes of it.
template <class T, Source source>
struct Element {
    const T* given;
    const T* product;
    const T* momentum;
    const T* diagonal;
    T weight, follow, nesterov;

    /// What m averages: g, or Q g where momentum comes after Q.
    T averaged(int64_t j, T g) const {
        if constexpr (source == Source::after) return given[j];
        if constexpr (source == Source::after_diagonal) return diagonal[j] * diagonal[j] * g;
        return g;
    }
    T next_product(int64_t j) const { return lerp(product[j], given[j], follow); }
    T nat(int64_t j, T g) const {
        if constexpr (source == Source::product) return given[j];
        if constexpr (source == Source::low_rank) return lerp(given[j], next_product(j), nesterov);
        if constexpr (source == Source::diagonal) return diagonal[j] * diagonal[j] * lerp(momentum[j], g, weight);
        return lerp(momentum[j], averaged(j, g), weight);
    }
};

template <class T, Source source>
Element<T, source> element(const Block& block, const WorkItem& item, const Pass& pass, int64_t offset) {
    const auto from = [&](const void* base) { return base ? static_cast<const T*>(base) + offset : nullptr; };
    const T* given = from(block.given);
    if (item.given) {
        const int64_t row = offset / block.columns - item.row_begin;
        const int64_t column = offset % block.columns - item.column_begin;
        given = static_cast<const T*>(item.given) + row * item.given_stride + column;
    }
    return {given, from(block.product), from(block.momentum), from(block.diagonal), static_cast<T>(pass.average),
            static_cast<T>(pass.follow), static_cast<T>(pass.nesterov)};
}

constexpr bool reads_gradient(Source source) {
    return source == Source::diagonal || source == Source::after_diagonal;
}

template <class T, Source source>
Sums sums(const Block& block, const WorkItem& item, const Pass& pass, bool with_gradient, bool with_power) {
    Sums total;
    const bool read = reads_gradient(source) || with_gradient || with_power;
    // Runs are short, so that a float holds their sum.
    for_runs(block, item, segment, [&](const Part& part, int64_t row, int64_t column, int64_t offset, int64_t count) {
        T scratch[segment];
        const T* g = read ? row_of<T>(part.grad, row, column, count, scratch) : nullptr;
        const auto e = element<T, source>(block, item, pass, offset);
        T square = 0, power = 0;
#pragma omp simd reduction(+ : square)
        for (int64_t j = 0; j < count; ++j) {
            const T nat = e.nat(j, reads_gradient(source) ? g[j] : T(0));
            square += nat * nat;
        }
        if (with_power) {
            for (int64_t j = 0; j < count; ++j) {
                const bool after = source == Source::after || source == Source::after_diagonal;
                power += e.nat(j, g[j]) * (after ? g[j] : lerp(e.momentum[j], g[j], e.weight));
            }
        }
        total.square += square;
        total.power += power;
        total.gradient = total.gradient || (read && any(g, count));
    });
    return total;
}

template <class T, Source source>
void apply(const Block& block, const WorkItem& item, const Pass& pass) {
    T* momentum = static_cast<T*>(block.momentum);
    T* product = static_cast<T*>(block.product);
    for_runs(block, item, longest_run<T>(block), [&](const Part& part, int64_t row, int64_t column, int64_t offset,
                                                    int64_t count) {
        T gradient_scratch[segment], param_scratch[segment];
        const T* g = row_of<T>(part.grad, row, column, count, gradient_scratch);
        T* theta = part.moves ? row_of<T>(part.param, row, column, count, param_scratch) : param_scratch;
        const auto e = element<T, source>(block, item, pass, offset);
        T* m = momentum + offset;
        T* q = source == Source::low_rank ? product + offset : nullptr;
        const T move = static_cast<T>(part.lr * pass.scale), decay = static_cast<T>(part.lr * part.weight_decay);
        if (part.moves) {
#pragma omp simd
            for (int64_t j = 0; j < count; ++j) {
                const T nat = e.nat(j, g[j]), averaged = e.averaged(j, g[j]);
                if constexpr (source == Source::low_rank) q[j] = e.next_product(j);
                m[j] = lerp(m[j], averaged, e.follow);
                theta[j] = moved(theta[j], nat, move, decay);
            }
            put_back<T>(theta, part.param, row, column, count);
        } else {
            for (int64_t j = 0; j < count; ++j) m[j] = lerp(m[j], e.averaged(j, g[j]), e.follow);
        }
    });
}

template <class T>
Sums dispatch_sums(const Block& block, const WorkItem& item, const Pass& pass, bool with_gradient, bool with_power) {
    switch (block.source) {
        case Source::product: return sums<T, Source::product>(block, item, pass, with_gradient, with_power);
        case Source::low_rank: return sums<T, Source::low_rank>(block, item, pass, with_gradient, with_power);
        case Source::diagonal: return sums<T, Source::diagonal>(block, item, pass, with_gradient, with_power);
        case Source::after: return sums<T, Source::after>(block, item, pass, with_gradient, with_power);
        default: return sums<T, Source::after_diagonal>(block, item, pass, with_gradient, with_power);
    }
}

template <class T>
void dispatch_apply(const Block& block, const WorkItem& item, const Pass& pass) {
    switch (block.source) {
        case Source::product: return apply<T, Source::product>(block, item, pass);
        case Source::low_rank: return apply<T, Source::low_rank>(block, item, pass);
        case Source::diagonal: return apply<T, Source::diagonal>(block, item, pass);
        case Source::after: return apply<T, Source::after>(block, item, pass);
        default: return apply<T, Source::after_diagonal>(block, item, pass);
    }
}

template <class T, class Grad>
bool finite_run(const Grad* g, int64_t count) {
    T left = 0;  // x − x is 0 where x is finite, and not a number elsewhere
#pragma omp simd reduction(+ : left)
    for (int64_t j = 0; j < count; ++j) left += widen(g[j]) - widen(g[j]);
    return left == T(0);
}

template <class T, class Grad>
void adam_run(const Adam<T>& rule, const Grad* g, int64_t count, T* value, T* exp_avg, T* exp_avg_sq) {
#pragma omp simd
    for (int64_t j = 0; j < count; ++j) adam(rule, static_cast<T>(widen(g[j])), value[j], exp_avg[j], exp_avg_sq[j]);
}

/// f(gradient, first entry, count) for each row, the gradient as what it is stored as.
template <class T, class F>
void for_rows(const AdamTensor& tensor, const AdamSlice& slice, F f) {
    const int64_t count = slice.end - slice.begin;
    for (int64_t row = 0; row < slice.rows; ++row) {
        const int64_t begin = slice.begin + row * slice.stride;
        if (slice.grad)
            f(slice.grad + row * slice.grad_stride, begin, count);
        else if (tensor.grad_dtype == Dtype::bfloat16)
            f(static_cast<const BFloat16*>(tensor.grad) + begin, begin, count);
        else
            f(static_cast<const T*>(tensor.grad) + begin, begin, count);
    }
}

template <class T>
bool all_finite(const AdamTensor& tensor, const AdamSlice& slice) {
    bool all = true;
    for_rows<T>(tensor, slice, [&](const auto* g, int64_t, int64_t count) { all = finite_run<T>(g, count) && all; });
    return all;
}

template <class T>
void adam_of_slice(const AdamTensor& tensor, const AdamSlice& slice, double lr, double beta1, double beta2,
                   double eps) {
    const Adam<T> rule = adam_rule<T>(lr, beta1, beta2, eps, tensor.step);
    for_rows<T>(tensor, slice, [&](const auto* g, int64_t begin, int64_t count) {
        adam_run(rule, g, count, static_cast<T*>(tensor.value) + begin, static_cast<T*>(tensor.exp_avg) + begin,
                 static_cast<T*>(tensor.exp_avg_sq) + begin);
    });
}

template <class T>
void probe(const void* vectors, int64_t stride, const void* along, int64_t count, double dots[4], double squares[4]) {
    const T *a = static_cast<const T*>(vectors), *b = a + stride, *c = b + stride, *d = c + stride;
    const T* z = static_cast<const T*>(along);
    constexpr int64_t run = 4 * segment;  // of which a float holds the sum as well as a product of matrices does
    for (int k = 0; k < 4; ++k) dots[k] = squares[k] = 0;
    for (int64_t first = 0; first < count; first += run) {
        const int64_t last = count - first < run ? count : first + run;
        T az = 0, bz = 0, cz = 0, dz = 0, aa = 0, bb = 0, cc = 0, dd = 0;  // chains that do not wait for each other
#pragma omp simd reduction(+ : az, bz, cz, dz, aa, bb, cc, dd)
        for (int64_t j = first; j < last; ++j) {
            az += a[j] * z[j], bz += b[j] * z[j], cz += c[j] * z[j], dz += d[j] * z[j];
            aa += a[j] * a[j], bb += b[j] * b[j], cc += c[j] * c[j], dd += d[j] * d[j];
        }
        dots[0] += az, dots[1] += bz, dots[2] += cz, dots[3] += dz;
        squares[0] += aa, squares[1] += bb, squares[2] += cc, squares[3] += dd;
    }
}

template <class T>
void add(const void* vector, double c, int64_t count, double* out) {
    const T* x = static_cast<const T*>(vector);
#pragma omp simd
    for (int64_t j = 0; j < count; ++j) out[j] += c * x[j];
}

template <class T, class Stored>
double inner_run(const Pair& pair, int64_t begin, int64_t end) {
    const Stored* x = static_cast<const Stored*>(pair.x);
    const Stored* y = static_cast<const Stored*>(pair.y);
    double total = 0;
    for (int64_t first = begin; first < end; first += segment) {
        const int64_t last = end - first < segment ? end : first + segment;
        T sum = 0;
#pragma omp simd reduction(+ : sum)
        for (int64_t j = first; j < last; ++j) sum += widen(x[j]) * widen(y[j]);
        total += sum;
    }
    return total;
}

double inner(const Pair& pair, int64_t begin, int64_t end) {
    switch (pair.dtype) {
        case Dtype::float64: return inner_run<double, double>(pair, begin, end);
        case Dtype::bfloat16: return inner_run<float, BFloat16>(pair, begin, end);
        case Dtype::float16: return inner_run<float, Float16>(pair, begin, end);
        default: return inner_run<float, float>(pair, begin, end);
    }
}

}  // namespace

#define FISHLEG_TEXT2(x) #x
#define FISHLEG_TEXT(x) FISHLEG_TEXT2(x)
extern const Kernels float32_kernels, float64_kernels;
const Kernels float32_kernels = {
    FISHLEG_TEXT(FISHLEG_ISA), average<float>, dispatch_sums<float>, dispatch_apply<float>, all_finite<float>,
    adam_of_slice<float>, probe<float>, add<float>, inner};
const Kernels float64_kernels = {
    FISHLEG_TEXT(FISHLEG_ISA), average<double>, dispatch_sums<double>, dispatch_apply<double>, all_finite<double>,
    adam_of_slice<double>, probe<double>, add<double>, inner};

}  // namespace fishleg::cpu::FISHLEG_ISA
