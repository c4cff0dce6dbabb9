// Whole numbers: rows of x rounded to 16 bits for products with matrices of 8, whose sums are exact.
//
// BLOCK numbers of a row share what they are times, so that the largest of them becomes MOST; a product's error is then
// that of 16 bits, which is nothing beside that of the matrix's 8. Sums of a BLOCK's products fit in 32 bits whatever
// order they are added in, so they are the same on every processor.
#pragma once

#include "vector.h"

#include <algorithm>
#if defined(__SSE2__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace fixed {

constexpr int64_t BLOCK = 512, MOST = 32767;
static_assert(BLOCK * MOST * 127 < INT64_C(1) << 31);
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

inline int64_t blocks(int64_t n) { return (n + BLOCK - 1) / BLOCK; }

// n numbers of a row rounded, an odd one with a 0 beside it; by: what those of each block are times. A block with a
// number that is not finite is times NaN.
__attribute__((noinline)) inline void rounded(const float *x, int64_t n, int16_t *to, float *by) {
    for (int64_t k = 0; k < n; k += BLOCK, by++) {
        const int64_t count = std::min(BLOCK, n - k);
        Vec most = {}, none = {};
        for (int64_t j = 0; j < count; j += WIDTH) {
            const Vec y = load_some(x + k + j, count - j), size = y < 0.0f ? -y : y;
            most = size > most ? size : most;
            none += y - y;
        }
        float largest = LEAST;
        for (int i = 0; i < WIDTH; i++) largest = std::max(largest, most[i]);
        const float up = MOST / largest;
        *by = largest / MOST + sum(none);
        const auto whole = [&](Vec y) {
            const float magic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to a whole number
            return __builtin_convertvector(__builtin_convertvector((y * up + magic) - magic, Ints), Few);
        };
        int64_t j = 0;
        for (; j + WIDTH <= count; j += WIDTH) *reinterpret_cast<Few *>(to + k + j) = whole(load(x + k + j));
        if (j == count) continue;
        const auto last = whole(load_tail(x + k + j, count - j));
        for (int64_t i = 0; i < count - j; i++) to[k + j + i] = last[i];
    }
    if (n % 2) to[n] = 0;
}

}  // namespace fixed
