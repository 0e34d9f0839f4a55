// The engine on AMX: tiles of 16 × 32 bfloat16 numbers, products summed in float32.
//
// A panel is, for every 32 of its depth, two tiles: those of a left operand hold lanes as rows, those of a right operand
// pairs of consecutive depth as rows and lanes as columns, as TDPBF16PS reads them.
//
// The second engine, "amx split", has every number as the sum of two, what bfloat16 holds of it and what that leaves:
// four tiles for every 32 of the depth. Three products of the four make XY to 2⁻¹⁷ of |X||Y|, at a third of the speed.
#include "cpu/gemm/engine.h"

#if defined(__linux__) && defined(__AMX_BF16__) && defined(__AVX512BF16__)

#include <cpuid.h>
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cstring>

#include "cpu/gemm/transpose16.h"

namespace fishleg::cpu {
namespace {

constexpr int64_t tile = 512;  // elements

struct alignas(64) Configuration {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {};
    uint8_t rows[16] = {};
};

void enter(void* saved) {
    _tile_storeconfig(saved);
    Configuration full;
    for (int t = 0; t < 8; ++t) full.row_bytes[t] = 64, full.rows[t] = 16;
    asm volatile("" ::: "memory");  // GCC believes that the next line reads eight bytes
    _tile_loadconfig(&full);
}

void leave(const void* saved) {
    if (*static_cast<const uint8_t*>(saved))
        _tile_loadconfig(saved);
    else
        _tile_release();
}

__mmask16 first(int64_t count) {
    return count >= 16 ? 0xffff : count <= 0 ? 0 : static_cast<__mmask16>((1u << count) - 1);
}

/// What bfloat16 leaves of x.
__m512 rest(__m512 x) {
    const __m512i wide = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(x));
    return _mm512_sub_ps(x, _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16)));
}

/// 16 numbers, or what bfloat16 leaves of them.
template <bool low>
__m512 load(__mmask16 there, const float* x) {
    const __m512 all = _mm512_maskz_loadu_ps(there, x);
    return low ? rest(all) : all;
}

/// A tile's 16 lanes, depth along the memory: 32 numbers of each.
template <bool rests>
void along_depth(const Lanes& from, int64_t lane, int64_t depth, __m512i rows[16]) {
    const int64_t left = from.depth - depth;
    const __mmask16 begin = first(left), end = first(left - 16);
    for (int64_t i = 0; i < 16; ++i) {
        if (lane + i >= from.lanes) {
            rows[i] = _mm512_setzero_si512();
            continue;
        }
        const float* x = from.source + (lane + i) * from.lane_stride + depth;
        const __m512 b = end ? load<rests>(end, x + 16) : _mm512_setzero_ps();
        rows[i] = (__m512i)_mm512_cvtne2ps_pbh(b, load<rests>(begin, x));
    }
}

/// The same with lanes along the memory: 16 pairs of consecutive depth, each of all 16 lanes.
template <bool rests>
void along_lanes(const Lanes& from, int64_t lane, int64_t depth, __m512i rows[16]) {
    const __mmask16 there = first(from.lanes - lane);
    for (int64_t r = 0; r < 16; ++r) {
        const int64_t k = depth + 2 * r;
        const float* x = from.source + k * from.depth_stride + lane;
        const __m512 a = k < from.depth ? load<rests>(there, x) : _mm512_setzero_ps();
        const __m512 b = k + 1 < from.depth ? load<rests>(there, x + from.depth_stride) : _mm512_setzero_ps();
        const __m512i even = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(a));
        const __m512i odd = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(b));
        rows[r] = _mm512_or_si512(even, _mm512_slli_epi32(odd, 16));
    }
}

/// Two tiles: 32 lanes from a depth on.
template <bool rests>
void pack_tiles(Side side, const Lanes& from, int64_t depth, uint16_t* out) {
    const bool by_lane = from.depth_stride == 1;
    for (int64_t lane = 0; lane < panel; lane += 16, out += tile) {
        __m512i rows[16];
        (by_lane ? along_depth<rests> : along_lanes<rests>)(from, lane, depth, rows);
        if (by_lane != (side == Side::left)) transpose16(rows);
        for (int i = 0; i < 16; ++i) _mm512_storeu_si512(out + 32 * i, rows[i]);
    }
}

void pack(Side side, const Lanes& from, void* to) {
    auto* out = static_cast<uint16_t*>(to);
    for (int64_t depth = 0; depth < from.depth; depth += 32, out += 2 * tile) pack_tiles<false>(side, from, depth, out);
}

void pack_split(Side side, const Lanes& from, void* to) {
    auto* out = static_cast<uint16_t*>(to);
    for (int64_t depth = 0; depth < from.depth; depth += 32, out += 4 * tile) {
        pack_tiles<false>(side, from, depth, out);
        pack_tiles<true>(side, from, depth, out + 2 * tile);
    }
}

void begin(const float* c, int64_t stride, bool add) {
    if (add) {
        _tile_loadd(0, c, stride * 4);
        _tile_loadd(1, c + 16, stride * 4);
        _tile_loadd(2, c + 16 * stride, stride * 4);
        _tile_loadd(3, c + 16 * stride + 16, stride * 4);
    } else {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
    }
}

void end(float* c, int64_t stride) {
    _tile_stored(0, c, stride * 4);
    _tile_stored(1, c + 16, stride * 4);
    _tile_stored(2, c + 16 * stride, stride * 4);
    _tile_stored(3, c + 16 * stride + 16, stride * 4);
}

/// `wide`, `tall`: whether the later 16 columns, or rows, are wanted too.
template <bool wide, bool tall>
void microkernel_of(const uint16_t* a, const uint16_t* b, int64_t depth, float* c, int64_t stride, bool add) {
    begin(c, stride, add);
    for (int64_t k = 0; k < depth; k += 32, a += 2 * tile, b += 2 * tile) {
        _tile_loadd(4, a, 64);
        _tile_loadd(6, b, 64);
        _tile_dpbf16ps(0, 4, 6);
        if constexpr (wide) {
            _tile_loadd(7, b + tile, 64);
            _tile_dpbf16ps(1, 4, 7);
        }
        if constexpr (tall) {
            _tile_loadd(5, a + tile, 64);
            _tile_dpbf16ps(2, 5, 6);
            if constexpr (wide) _tile_dpbf16ps(3, 5, 7);
        }
    }
    end(c, stride);
}

void microkernel(const void* left, const void* right, int64_t depth, int64_t rows, int64_t columns, float* c,
                 int64_t stride, bool add) {
    const bool wide = columns > 16, tall = rows > 16;
    const auto with = wide ? (tall ? microkernel_of<true, true> : microkernel_of<true, false>)
                           : (tall ? microkernel_of<false, true> : microkernel_of<false, false>);
    with(static_cast<const uint16_t*>(left), static_cast<const uint16_t*>(right), depth, c, stride, add);
}

void microkernel_split(const void* left, const void* right, int64_t depth, int64_t, int64_t, float* c, int64_t stride,
                       bool add) {
    const auto *a = static_cast<const uint16_t*>(left), *b = static_cast<const uint16_t*>(right);
    begin(c, stride, add);
    for (int64_t k = 0; k < depth; k += 32, a += 4 * tile, b += 4 * tile) {
        _tile_loadd(4, a + 2 * tile, 64);  // the rests of X with Y
        _tile_loadd(6, b, 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_loadd(7, b + tile, 64);
        _tile_dpbf16ps(1, 4, 7);
        _tile_loadd(5, a + 3 * tile, 64);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
        _tile_loadd(4, a, 64);  // X with Y
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        _tile_loadd(5, a + tile, 64);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
        _tile_loadd(6, b + 2 * tile, 64);  // X with the rests of Y
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(2, 5, 6);
        _tile_loadd(7, b + 3 * tile, 64);
        _tile_dpbf16ps(1, 4, 7);
        _tile_dpbf16ps(3, 5, 7);
    }
    end(c, stride);
}

/// Whether the processor has AMX with bfloat16, AVX-512 with it, and the kernel lets this process have the tiles.
bool available() {
    unsigned a, b, c, d;
    if (!__builtin_cpu_supports("x86-64-v4") || !__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
    constexpr unsigned amx_bf16 = 1u << 22, amx_tile = 1u << 24;
    if ((d & amx_bf16) == 0 || (d & amx_tile) == 0) return false;
    if (!__get_cpuid_count(7, 1, &a, &b, &c, &d) || (a & (1u << 5)) == 0) return false;  // AVX512_BF16
    constexpr long request_permission = 0x1023, tile_data = 18;
    return syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
}

constexpr Engine engine = {"amx", 2, 32, enter, leave, pack, microkernel};
constexpr Engine split = {"amx split", 4, 32, enter, leave, pack_split, microkernel_split};

}  // namespace

const Engine* amx_engine() {
    static const bool usable = available();
    return usable ? &engine : nullptr;
}

const Engine* amx_split_engine() { return amx_engine() ? &split : nullptr; }

}  // namespace fishleg::cpu

#else

namespace fishleg::cpu {

const Engine* amx_engine() { return nullptr; }
const Engine* amx_split_engine() { return nullptr; }

}  // namespace fishleg::cpu

#endif
