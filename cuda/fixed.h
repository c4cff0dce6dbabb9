// Whole numbers: rows of x rounded to 16 bits for products with matrices of 8, or of both factors for products with one
// another, whose sums are exact.
//
// Some numbers of a row share what they are times, so that the largest of them becomes the most there may be; beside a
// matrix of 8 bits a product's error is then that of the matrix. Sums of a block's products fit in 32 bits whatever order
// they are added in, so they are the same on every processor.
#pragma once

#include "vector.h"

#include <algorithm>
#include <limits>
#if defined(__SSE2__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace fixed {

// how many numbers share what they are times, and the largest whole number
struct Scale {
    int64_t block, most;
    int64_t blocks(int64_t n) const { return (n + block - 1) / block; }
};
constexpr Scale BESIDE_8 = {512, 32767}, ALIKE = {256, 2895};
static_assert(BESIDE_8.block * BESIDE_8.most * 127 < INT64_C(1) << 31);
static_assert(ALIKE.block * ALIKE.most * ALIKE.most < INT64_C(1) << 31);
constexpr float LEAST = 3.4e-34f;  // a smaller largest number counts as this: what it is times must not be none

typedef int16_t Shorts __attribute__((vector_size(4 * WIDTH)));
typedef int16_t Few __attribute__((vector_size(2 * WIDTH), aligned(2), may_alias));
typedef int8_t Bytes __attribute__((vector_size(2 * WIDTH), aligned(1), may_alias));
typedef int32_t Word __attribute__((may_alias));  // two of 16 bits

inline Shorts widened(const int8_t *p) {
#if defined(__AVX512BW__)
    return (Shorts)_mm512_cvtepi8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i *>(p)));
#elif defined(__AVX2__)
    return (Shorts)_mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i *>(p)));
#else
    return __builtin_convertvector(*reinterpret_cast<const Bytes *>(p), Shorts);
#endif
}

// each lane's two products added to its sum
inline Ints dot(Ints sum, Shorts a, Shorts b) {
#if defined(__AVX512VNNI__)
    return (Ints)_mm512_dpwssd_epi32((__m512i)sum, (__m512i)a, (__m512i)b);
#elif defined(__AVX512BW__)
    return sum + (Ints)_mm512_madd_epi16((__m512i)a, (__m512i)b);
#elif defined(__AVX2__)
    return sum + (Ints)_mm256_madd_epi16((__m256i)a, (__m256i)b);
#elif defined(__SSE2__) && !defined(__AVX__)
    return sum + (Ints)_mm_madd_epi16((__m128i)a, (__m128i)b);
#elif defined(__aarch64__)
    const int16x8_t x = (int16x8_t)a, y = (int16x8_t)b;
    const int32x4_t low = vmull_s16(vget_low_s16(x), vget_low_s16(y)), high = vmull_high_s16(x, y);
    return sum + (Ints)vpaddq_s32(low, high);
#else
    for (int i = 0; i < WIDTH; i++) sum[i] += a[2 * i] * b[2 * i] + a[2 * i + 1] * b[2 * i + 1];
    return sum;
#endif
}

// a + b c, by one instruction where there is one: what compilers make of such a sum differs from place to place
inline Vec joined(Vec a, Vec b, Vec c) {
#if defined(__AVX512F__)
    return (Vec)_mm512_fmadd_ps((__m512)b, (__m512)c, (__m512)a);
#elif defined(__FMA__)
    return (Vec)_mm256_fmadd_ps((__m256)b, (__m256)c, (__m256)a);
#elif defined(__aarch64__)
    return (Vec)vfmaq_f32((float32x4_t)a, (float32x4_t)b, (float32x4_t)c);
#else
    return a + b * c;
#endif
}

// y times `up`, rounded, as whole numbers: the product is rounded first, with a multiplication that no compiler joins to
// anything, so that the same numbers come out everywhere
inline Ints whole(Vec y, Vec up) {
    const Vec x = y * up;
#if defined(__AVX512F__)
    return (Ints)_mm512_cvtps_epi32((__m512)x);
#elif defined(__AVX__)
    return (Ints)_mm256_cvtps_epi32((__m256)x);
#elif defined(__SSE2__)
    return (Ints)_mm_cvtps_epi32((__m128)x);
#elif defined(__aarch64__)
    return (Ints)vcvtnq_s32_f32((float32x4_t)x);
#else
    const float magic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to a whole number
    return __builtin_convertvector((x + magic) - magic, Ints);
#endif
}

// The largest of `most` and y without its sign, as the bits of floats, which are in the order of what they stand for.
inline Ints larger(Ints most, Vec y) {
    const Ints size = (Ints)y & 0x7fffffff;
    return size > most ? size : most;
}

inline int32_t largest(Ints most) {
#if defined(__AVX512F__)
    return _mm512_reduce_max_epi32((__m512i)most);
#else
    int32_t found = most[0];
    for (int i = 1; i < WIDTH; i++) found = std::max(found, most[i]);
    return found;
#endif
}

// What numbers of which the largest has these bits are times, up and down; down is NaN if there was one that is not finite
struct Turns {
    Vec up, down;
    Turns(Scale scale, Ints most) {
        const float highest = static_cast<float>(scale.most);
        const Vec size = (Vec)most, least = all(LEAST), at_least = size < least ? least : size;
        const Ints none = most >= 0x7f800000;
        up = highest / (none ? all(1.0f) : at_least);
        down = none ? all(std::numeric_limits<float>::quiet_NaN()) : at_least / highest;
    }
};

// n numbers of a row rounded, an odd one with a 0 beside it; by, at each `step`: what those of each block are times. A
// block with a number that is not finite is times NaN.
__attribute__((noinline)) inline void rounded(Scale scale, const float *x, int64_t n, int16_t *to, float *by,
                                              int64_t step) {
    for (int64_t k = 0; k < n; k += scale.block, by += step) {
        const int64_t count = std::min(scale.block, n - k), full = count / WIDTH * WIDTH;
        Ints most = {};
        for (int64_t j = 0; j < full; j += WIDTH) most = larger(most, load(x + k + j));
        if (full < count) most = larger(most, load_tail(x + k + full, count - full));
        const Turns times(scale, largest(most) + Ints{});
        *by = times.down[0];
        const auto few = [&](Vec y) { return __builtin_convertvector(whole(y, times.up), Few); };
        for (int64_t j = 0; j < full; j += WIDTH) *reinterpret_cast<Few *>(to + k + j) = few(load(x + k + j));
        if (full == count) continue;
        const auto last = few(load_tail(x + k + full, count - full));
        for (int64_t i = 0; i < count - full; i++) to[k + full + i] = last[i];
    }
    if (n % 2) to[n] = 0;
}

// rows of a block, as many at most as share what they are times, and its columns
struct Block {
    int64_t count, wide;
};

// The same down columns, of one block: rows of x become pairs of rows, and `by` is of each column.
constexpr int64_t SOME = 256;  // columns at most
__attribute__((noinline)) inline void rounded_down(Scale scale, Block block, const float *x, int64_t x_step, float *to,
                                                   int64_t to_step, float *by) {
    const int64_t count = block.count, wide = block.wide;
    Ints most[SOME / WIDTH] = {};
    Vec up[SOME / WIDTH];
    for (int64_t k = 0; k < count; k++)
        for (int64_t c = 0; c < wide; c += WIDTH)
            most[c / WIDTH] = larger(most[c / WIDTH], load_some(x + k * x_step + c, wide - c));
    for (int64_t c = 0; c < wide; c += WIDTH) {
        const Turns times(scale, most[c / WIDTH]);
        up[c / WIDTH] = times.up;
        store_some(by + c, times.down, wide - c);
    }
    for (int64_t k = 0; k < count; k += 2, x += 2 * x_step, to += to_step)
        for (int64_t c = 0; c < wide; c += WIDTH) {
            const Vec other = k + 1 < count ? load_some(x + x_step + c, wide - c) : Vec{};
            const Ints first = whole(load_some(x + c, wide - c), up[c / WIDTH]), second = whole(other, up[c / WIDTH]);
            store_some(to + c, (Vec)((first & 0xffff) | second << 16), wide - c);
        }
}

}  // namespace fixed
