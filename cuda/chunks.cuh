// What the recurrences on tensor cores share: heads of 64 channels, 16 tokens at a time, states divided among warps.

#pragma once

#include "mma.cuh"

namespace {

constexpr int C = 16, N = 64;               // tokens of a chunk, channels of a head
constexpr int LONG = N + 4, SHORT = C + 4;  // floats from a row to the next in shared memory

// WARPS warps do 16 rows of a state each; a head takes N / (16 WARPS) blocks.
template <int WARPS_>
struct Tiles {
    static constexpr int WARPS = WARPS_, THREADS = 32 * WARPS, ROWS = 16 * WARPS, PARTS = N / ROWS, WIDE = ROWS + 4;

    Sizes s;

    // where a block works
    struct Place {
        int64_t head;
        int part;
        Head tokens;
    };

    ON_GPU Place place(int64_t block) const {
        return {block / PARTS, static_cast<int>(block % PARTS), s.head(block / PARTS)};
    }

    // Each column of a warp's state times what is at `factors`.
    ON_GPU static void times(Sum *S, const float *factors) {
#pragma unroll
        for (int i = 0; i < N / 8; i++)
            cells(S[i], [&](int, int column, float &x) { x *= factors[i * 8 + column]; });
    }

    // sum += transpose of (C, ROWS) rows in shared memory, this warp's 16 columns, times (C, 8) or its transpose
    ON_GPU static void add_rows(Sum &sum, const float *rows, int warp, const float *m, int wide, bool turned) {
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const Left x = left_turned(rows + i * 8 * WIDE + warp * 16, WIDE);
            multiply(sum, x, turned ? right_turned(m + i * 8, wide) : right(m + i * 8 * wide, wide));
        }
    }

    // sum += x times (C, 8) or its transpose, where x are two Sums side by side
    ON_GPU static void add_sums(Sum &sum, const Sum *x, const float *m, int wide, bool turned) {
#pragma unroll
        for (int i = 0; i < 2; i++)
            multiply(sum, left(x[i]), turned ? right_turned(m + i * 8, wide) : right(m + i * 8 * wide, wide));
    }

    // sum += a warp's state times the transpose of 8 tokens' rows (8, N)
    ON_GPU static void add_state(Sum &sum, const Sum *S, const float *tokens) {
#pragma unroll
        for (int i = 0; i < N / 8; i++) multiply(sum, left(S[i]), right_turned(tokens + i * 8, LONG));
    }

    // A warp's state goes to shared memory, to eleven bits.
    ON_GPU static void lay(Sum *S, float *to, int warp) {
#pragma unroll
        for (int i = 0; i < N / 8; i++)
            cells(S[i], [&](int row, int column, float &x) { to[(warp * 16 + row) * LONG + i * 8 + column] = tf32(x); });
    }

    // f(float in memory, number of S): a warp's state as [tile][lane][4], all lanes beside each other
    template <class F>
    ON_GPU static void packed(Sum *S, float *memory, int warp, F f) {
#pragma unroll
        for (int i = 0; i < N / 8; i++)
            lanes([&](int g, int t, int l) {
                float *at = memory + ((warp * (N / 8) + i) * 32 + g * 4 + t) * 4;
#pragma unroll
                for (int o = 0; o < 4; o++) f(at[o], S[i].x[l][o]);
            });
    }

    // f(place in a state of (H, N, N), number of S)
    template <class F>
    ON_GPU static void plain(Sum *S, Place place, int warp, F f) {
        const int64_t first = (place.head * N + place.part * ROWS + warp * 16) * N;
#pragma unroll
        for (int i = 0; i < N / 8; i++)
            cells(S[i], [&](int row, int column, float &x) { f(first + row * N + i * 8 + column, x); });
    }
};

// Forward and Backward for what a head is divided into, as types; -1 where it cannot be
template <template <int> class Forward, template <int> class Backward, class F>
int divided(int64_t parts, F f) {
    if (parts == 1) return f(Forward<4>(), Backward<4>());
    if (parts == 2) return f(Forward<2>(), Backward<2>());
    if (parts == 4) return f(Forward<1>(), Backward<1>());
    return -1;
}

// floats that a forward keeps of (B, T, H, N, ...), and that a backward wants as room
int64_t chunks_kept(const int64_t *z) {
    return z[0] * z[2] * Sizes{z[0], z[1], z[2], z[3], z[4]}.segments(KEEP) * N * N;
}

int64_t chunks_room(const int64_t *z) { return z[0] * z[2] * (KEEP / C) * N * N; }

}  // namespace
