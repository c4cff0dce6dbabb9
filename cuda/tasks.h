// Tokens shared among threads in blocks of a fixed length.
//
// Gradients of what all tokens share are added up within a task and then task after task, so that they do not depend on
// the number of threads.
#pragma once

#include "threads.h"
#include "vector.h"

#include <algorithm>

constexpr int64_t TOKENS = 64;  // of a task

inline int64_t blocks(int64_t tokens) { return (tokens + TOKENS - 1) / TOKENS; }

inline void add(float *to, Vec x, int64_t left) { store_some(to, load_some(to, left) + x, left); }

// work(begin, end, sums) over all tokens; sums, `width` floats that begin as zeros, end up added in `total`
template <class Work>
void over(int64_t tokens, int threads, int64_t width, float *partial, float *total, const Work &work) {
    const int64_t tasks = blocks(tokens);
    share(tasks, threads, [&](int64_t n) {
        float *sums = partial + n * width;
        zero(sums, width);
        work(n * TOKENS, std::min(tokens, (n + 1) * TOKENS), sums);
    });
    if (!width) return;
    copy(total, partial, width);
    for (int64_t n = 1; n < tasks; n++)
        for (int64_t i = 0; i < width; i += WIDTH) add(total + i, load_some(partial + n * width + i, width - i), width - i);
}

constexpr int64_t PIECE = 16384;  // floats of a task where there are no tokens

template <class Work>
void each(int64_t count, int threads, const Work &work) {
    share((count + PIECE - 1) / PIECE, threads, [&](int64_t n) {
        for (int64_t i = n * PIECE; i < std::min(count, (n + 1) * PIECE); i += WIDTH) work(i, count - i);
    });
}
