// Chances as whole numbers, and values in the order of their bits; rwkvpipe/infer/sampling.py has the same in PyTorch.
//
// Whoever includes this must not let the compiler fuse multiplications with additions.
#pragma once

#include "vector.h"

#include <cmath>
#include <cstring>

constexpr int UNIT = 40;
constexpr double LOG2E = 1.4426950408889634, LEAST = -UNIT - 2;  // what is lighter than 2^-42 of the likeliest is 0
constexpr double POWERS[] = {0.00015461444551858103, 0.0013400428177950461, 0.009618056679025936, 0.05550327226668492,
                             0.24022650922284594, 0.6931472067028341, 1.0};  // of 2^f, |f| <= 1/2, the highest first: 3e-9 of the value
constexpr int LANES = WIDTH / 2;

typedef double Doubles __attribute__((vector_size(8 * LANES)));
typedef int64_t Longs __attribute__((vector_size(8 * LANES)));
typedef float Halves __attribute__((vector_size(4 * LANES)));
typedef float LooseHalves __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef int64_t LooseLongs __attribute__((vector_size(8 * LANES), aligned(8), may_alias));

// what a value weighs: 2^((z - top) scale + UNIT), rounded to whole
struct Weight {
    double top, scale;

    Longs of(Doubles x) const {
        x = x < LEAST ? Doubles{} + LEAST : x;
        const double magic = 6755399441055744.0, ground = 4503599627370496.0;  // 1.5 2^52, and 2^52: adding them rounds
        const Doubles shifted = x + magic, f = x - (shifted - magic);
        Doubles p = Doubles{} + POWERS[0];
        for (size_t i = 1; i < sizeof(POWERS) / sizeof(double); i++) p = p * f + POWERS[i];
        const Longs power = ((Longs)shifted << 52) + (int64_t(1023 + UNIT) << 52);
        return (Longs)(p * (Doubles)power + ground) - (int64_t(1023 + 52) << 52);
    }
    Longs operator()(const float *z) const {
        const Halves some = *reinterpret_cast<const LooseHalves *>(z);
        return of((__builtin_convertvector(some, Doubles) - top) * scale);
    }
    // of n values, filled up to whole vectors
    void all(const float *z, int64_t n, int64_t *to) const {
        for (int64_t i = 0; i < n; i += LANES) *reinterpret_cast<LooseLongs *>(to + i) = (*this)(z + i);
    }
    bool none(float z) const { return (z - top) * scale < LEAST; }
};

inline int64_t added(Longs x) {
    int64_t total = 0;
    for (int i = 0; i < LANES; i++) total += x[i];
    return total;
}

// log2 of a whole number above 0
inline double log2_of(int64_t number) {
    int power;
    const double part = std::frexp(static_cast<double>(number), &power), s = (part - 1.0) / (part + 1.0), q = s * s;
    double p = 0;
    for (int k = 17; k >= 0; k--) p = p * q + 1.0 / (2 * k + 1);
    return power + 2.0 * s * p * LOG2E;
}

// bits in the order of the values, -0 as 0; and back
inline uint32_t key_of(float x) {
    uint32_t bits;
    x += 0.0f;
    std::memcpy(&bits, &x, sizeof bits);
    return bits ^ (bits >> 31 ? 0xffffffffu : 0x80000000u);
}
inline float value_of(uint32_t key) {
    key ^= key >> 31 ? 0x80000000u : 0xffffffffu;
    float x;
    std::memcpy(&x, &key, sizeof x);
    return x;
}
