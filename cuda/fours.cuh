// Four neighbouring numbers, read and written at a time, in memory (fp32 or bf16) and in shared memory.

#pragma once

#include "mma.cuh"

// Four numbers as they lie in memory: two all of bf16, or four of fp32.
struct Bits {
    uint32_t x[4];
};

// `NARROW`: one by one, as they may lie anywhere. What is not there is 0.
template <bool NARROW>
ON_GPU Bits bits_of(const void *from, int64_t at, bool half, bool there) {
    Bits found = {};
    const char *first = static_cast<const char *>(from) + (half ? at * 2 : at * 4);
#ifdef __CUDACC__
    if (!NARROW) {
        if (there && half) {
            const uint2 two = *reinterpret_cast<const uint2 *>(first);
            found.x[0] = two.x, found.x[1] = two.y;
        }
        if (there && !half) {
            const uint4 four = *reinterpret_cast<const uint4 *>(first);
            found.x[0] = four.x, found.x[1] = four.y, found.x[2] = four.z, found.x[3] = four.w;
        }
        return found;
    }
#endif
    if (!there) return found;
    const auto two = reinterpret_cast<const uint16_t *>(first);
    const auto four = reinterpret_cast<const uint32_t *>(first);
#pragma unroll
    for (int i = 0; i < 4; i++) {
        if (!half)
            found.x[i] = four[i];
        else
            found.x[i / 2] |= static_cast<uint32_t>(two[i]) << i % 2 * 16;
    }
    return found;
}

ON_GPU Quad quad(const Bits &all, bool half) {
    const uint32_t bits[4] = {half ? all.x[0] << 16 : all.x[0], half ? all.x[0] & 0xffff0000u : all.x[1],
                              half ? all.x[1] << 16 : all.x[2], half ? all.x[1] & 0xffff0000u : all.x[3]};
    Quad found;
    memcpy(found.x, bits, 16);
    return found;
}

ON_GPU Quad tf32(const Quad &x) { return {{tf32(x.x[0]), tf32(x.x[1]), tf32(x.x[2]), tf32(x.x[3])}}; }

// Four numbers go to memory, to a place that is a multiple of 16 bytes.
ON_GPU void write(float *to, const Quad &x) {
    Four all;
    memcpy(&all, x.x, 16);
    store(to, all);
}

ON_GPU void put(void *to, int64_t at, bool half, const Quad &x, bool narrow) {
    if (narrow) {
#pragma unroll
        for (int i = 0; i < 4; i++) put(to, at + i, half, x.x[i]);
    } else if (half) {
        store(static_cast<uint16_t *>(to) + at, Two{to_bf16s(x.x[0], x.x[1]), to_bf16s(x.x[2], x.x[3])});
    } else {
        write(static_cast<float *>(to) + at, x);
    }
}

// what 16 lanes beside each other have, added up in all of them
template <int COUNT>
ON_GPU void add_sixteen(float (&x)[LANES][COUNT]) {
#pragma unroll
    for (int n = 0; n < COUNT; n++) {
#ifdef __CUDACC__
#pragma unroll
        for (int far = 1; far < 16; far *= 2) x[0][n] += __shfl_xor_sync(0xffffffffu, x[0][n], far);
#else
        for (int first = 0; first < LANES; first += 16) {
            float sum = 0.0f;
            for (int lane = first; lane < first + 16; lane++) sum += x[lane][n];
            for (int lane = first; lane < first + 16; lane++) x[lane][n] = sum;
        }
#endif
    }
}

// What lanes with the same t have, 16 numbers each, added up: a lane has the sums of two, 2g and 2g + 1.
template <int FAR = 16>
ON_GPU void scatter(float (&x)[LANES][16]) {
#ifdef __CUDACC__
    const bool late = threadIdx.x & FAR;
#pragma unroll
    for (int i = 0; i < FAR / 2; i++) {
        const float first = x[0][i], second = x[0][i + FAR / 2];
        x[0][i] = (late ? second : first) + __shfl_xor_sync(0xffffffffu, late ? first : second, FAR);
    }
    if constexpr (FAR > 4) scatter<FAR / 2>(x);
#else
    for (int t = 0; t < 4; t++) {
        float sums[16] = {};
        for (int lane = t; lane < LANES; lane += 4)
            for (int i = 0; i < 16; i++) sums[i] += x[lane][i];
        for (int lane = t; lane < LANES; lane += 4)
            for (int i = 0; i < 2; i++) x[lane][i] = sums[lane / 4 * 2 + i];
    }
#endif
}

// Factors whose inner index goes from lane to lane, t and t + 4: the transpose of 8 rows from m on, 16 columns,
ON_GPU Left apart_turned(const float *m, int wide) {
    Left a;
    lanes([&](int g, int t, int l) {
        const float *at = m + t * wide + g;
        a.x[l][0] = at[0], a.x[l][1] = at[8], a.x[l][2] = at[4 * wide], a.x[l][3] = at[4 * wide + 8];
    });
    return a;
}

// and 8 rows, 8 columns
ON_GPU Right apart(const float *m, int wide) {
    Right b;
    lanes([&](int g, int t, int l) { b.x[l][0] = m[t * wide + g], b.x[l][1] = m[(t + 4) * wide + g]; });
    return b;
}
