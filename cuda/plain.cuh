// What the recurrences token by token share: how states and tokens come into a block, and go out of it.

#pragma once

#include "grid.cuh"

namespace {

// Numbers as they lie in memory: nobody waits for them before they are asked for, so many can be under way.
template <int WIDE>
struct Raw {
    uint32_t words[WIDE];

    ON_GPU void read(const void *from, int64_t at, bool half) {
        if constexpr (WIDE == 1) {
            if (half) {
                words[0] = static_cast<const uint16_t *>(from)[at];
            } else {
                const float found = static_cast<const float *>(from)[at];
                memcpy(words, &found, 4);
            }
        } else if (half) {
            const Two found = *reinterpret_cast<const Two *>(static_cast<const uint16_t *>(from) + at);
            words[0] = found.x, words[1] = found.y;
        } else {
            const Four found = *reinterpret_cast<const Four *>(static_cast<const float *>(from) + at);
            words[0] = found.x, words[1] = found.y, words[2] = found.z, words[3] = found.w;
        }
    }

    ON_GPU float number(int i, bool half) const {
        const uint32_t pair = words[WIDE > 1 ? i / 2 : 0], narrow = i & 1 ? pair & 0xffff0000u : pair << 16;
        const uint32_t bits = half ? narrow : words[i];
        float found;
        memcpy(&found, &bits, 4);
        return found;
    }
};

// WIDE numbers to shared memory, at a multiple of WIDE
template <int WIDE>
ON_GPU void share(float *to, const float *x) {
    if constexpr (WIDE == 4) {
        Four found;
        memcpy(&found, x, 16);
        *reinterpret_cast<Four *>(to) = found;
    } else {
        to[0] = x[0];
    }
}

constexpr int NOTED = 4;  // of as many tokens the backward writes down a state

// Thread (x, p) of a block holds the numbers [p EACH, (p + 1) EACH) of row x of a head's state, or of its column x.
template <class Shape>
struct Plain : Shape {
    using Shape::EACH, Shape::N, Shape::THREADS;
    static constexpr int SQUARE = N * N;
    Sizes s;
    bool fours;  // heads have a multiple of four channels, and what is read begins at a multiple of 16 bytes

    // Tensors `from`, each of the kind of a tensor of `kinds`, at tokens [t, t + count), none from `end` on: f(token of
    // them, first of WIDE channels, whether they are there, numbers of each tensor)
    template <int WIDE, int TENSORS, class F>
    ON_GPU void read(int thread, int count, Head head, int64_t t, int64_t end, const void *const *from,
                     const int *kinds, F f) const {
        for (int i = thread; i < count * (N / WIDE); i += THREADS) {
            const int x = i % (N / WIDE) * WIDE, token = i / (N / WIDE);
            Raw<WIDE> raw[TENSORS] = {};
            const bool there = x < s.N && t + token < end;
            const int64_t at = head.at(t + token) + x;
#pragma unroll
            for (int n = 0; n < TENSORS; n++)
                if (there && from[n]) raw[n].read(from[n], at, s.half(kinds[n]));
            f(token, x, there, raw);
        }
    }

    // a row of a matrix of a head, or a column; 0 where there is none
    ON_GPU void take(float *S, const float *from, int x, int p, bool column) const {
        const int n = static_cast<int>(s.N), first = p * EACH, left = x < n ? n - first : 0;
        const float *begin = from + (column ? first * n + x : x * n + first);
        if (fours && !column) {
#pragma unroll
            for (int e = 0; e < EACH; e += 4) {
                S[e] = S[e + 1] = S[e + 2] = S[e + 3] = 0.0f;
                if (e < left) fetch<4>(S + e, begin, e, false);
            }
        } else {
#pragma unroll
            for (int e = 0; e < EACH; e++) S[e] = e < left ? begin[column ? e * n : e] : 0.0f;
        }
    }

    ON_GPU void give(float *to, const float *S, int x, int p, bool column) const {
        const int n = static_cast<int>(s.N), first = p * EACH, left = x < n ? n - first : 0;
        float *begin = to + (column ? first * n + x : x * n + first);
        if (fours && !column) {
#pragma unroll
            for (int e = 0; e < EACH; e += 4)
                if (e < left) lay_down<4>(begin, e, false, S + e);
        } else {
#pragma unroll
            for (int e = 0; e < EACH; e++)
                if (e < left) begin[column ? e * n : e] = S[e];
        }
    }

    // Columns as a block writes them down for itself: SQUARE numbers, four of each thread beside each other.
    ON_GPU static void recall(float *S, const float *from, int thread) {
#pragma unroll
        for (int e = 0; e < EACH; e += 4) fetch<4>(S + e, from, (e / 4 * THREADS + thread) * 4, false);
    }

    ON_GPU static void note(float *to, const float *S, int thread) {
#pragma unroll
        for (int e = 0; e < EACH; e += 4) lay_down<4>(to, (e / 4 * THREADS + thread) * 4, false, S + e);
    }

    // the same of what is held by rows
    ON_GPU static void note_turned(float *to, const float *S, int x, int p) {
        float *begin = to + (x % EACH / 4 * THREADS + x / EACH * N + p * EACH) * 4 + x % 4;
#pragma unroll
        for (int e = 0; e < EACH; e++) begin[e * 4] = S[e];
    }
};

}  // namespace
