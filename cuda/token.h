// What is alike in all families for one token: what a call is given, its two ends, and what layers are made of.
#pragma once

#include "matvec.h"
#include "norm.h"

#include <algorithm>

inline int64_t whole(int64_t n) { return (n + WIDTH - 1) / WIDTH * WIDTH; }

// x + (last - x) (share + more)
inline void mix(const float *x, const float *last, const float *share, float *to, int64_t n, const float *more = nullptr) {
    for (int64_t j = 0; j < n; j += WIDTH) {
        const int64_t left = n - j;
        const Vec now = load_some(x + j, left), each = load_some(share + j, left);
        const Vec by = more ? each + load_some(more + j, left) : each;
        store_some(to + j, now + (load_some(last + j, left) - now) * by, left);
    }
}

// n numbers that will be changed soon
inline void ask(const float *x, int64_t n) {
    for (int64_t j = 0; j < n; j += 16) __builtin_prefetch(x + j, 1);
}

template <class Change>
inline void change(float *x, int64_t n, const Change &how) {
    for (int64_t j = 0; j < n; j += WIDTH) store_some(x + j, how(load_some(x + j, n - j)), n - j);
}

inline void add(float *to, const float *x, int64_t n) {
    for (int64_t j = 0; j < n; j += WIDTH) store_some(to + j, load_some(to + j, n - j) + load_some(x + j, n - j), n - j);
}

inline Vec tangent(Vec x) { return sigmoid(x + x) * 2.0f - 1.0f; }

inline Vec squared(Vec x) {
    const Vec up = x < 0.0f ? Vec{} : x;
    return up * up;
}

// Calls work(begin, count, threads) for rows that share all of a model's matrices, which each piece reads
template <class Work>
inline void in_pieces(int64_t rows, int threads, const Work &work) {
    const int64_t pieces = std::min<int64_t>(threads, (rows + 3) / 4);
    if (pieces <= 1) return work(0, rows, threads);
    const int64_t size = (rows + pieces - 1) / pieces;
    share((rows + size - 1) / size, threads, [&](int64_t n) { work(n * size, std::min(size, rows - n * size), 1); });
}

struct Given {
    int64_t rows, L, D, H, F, V;
    const float *const *fixed, *const *vectors;
    const void *const *matrices;
    const float *const *scales;
    const int64_t *lies;  // of each matrix its Kind
    float *const *att_x, *const *memory, *const *ffn_x;
    const int64_t *ids;
    float *logits;

    enum Fixed { EMB, LN0, LN0_BIAS, LN_OUT, LN_OUT_BIAS };

    void embed(int64_t begin, int64_t count, const Room &x) const {
        for (int64_t i = 0; i < count; i++) {
            const float *from = fixed[EMB] + ids[begin + i] * D;
            fixed[LN0] ? norm(from, fixed[LN0], fixed[LN0_BIAS], x[i], D) : copy(x[i], from, D);
        }
    }
    Matrix numbered(int64_t n, int64_t out, int64_t in) const {
        return {matrices[n], scales[n], out, in, static_cast<Kind>(lies[n])};
    }
    // logits of a stream, by the matrix of number `last`
    void finish(int64_t begin, int64_t count, int threads, int64_t last, const Room &x, const Room &normed) const {
        for (int64_t i = 0; i < count; i++) norm(x[i], fixed[LN_OUT], fixed[LN_OUT_BIAS], normed[i], D);
        times(numbered(last, V, D), count, threads, normed, {logits + begin * V, V});
    }
};
