// What the recurrences on tensor cores share: heads of 64 channels, 16 tokens at a time, states divided among warps.

#pragma once

#include "mma.cuh"

namespace {

constexpr int C = 16, N = 64;               // tokens of a chunk, channels of a head

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

    // A warp's state goes to memory as [tile][lane][4], all lanes beside each other, and comes from there.
    ON_GPU static void keep(const Sum *S, float *memory, int warp) {
#pragma unroll
        for (int i = 0; i < N / 8; i++)
            lanes([&](int g, int t, int l) {
                const float *x = S[i].x[l];
                quad(memory + four(warp, i, g, t)) = {{x[0], x[1], x[2], x[3]}};
            });
    }

    ON_GPU static void recall(Sum *S, const float *memory, int warp) {
#pragma unroll
        for (int i = 0; i < N / 8; i++)
            lanes([&](int g, int t, int l) {
                const Quad found = quad(memory + four(warp, i, g, t));
#pragma unroll
                for (int o = 0; o < 4; o++) S[i].x[l][o] = found.x[o];
            });
    }

    ON_GPU static int four(int warp, int i, int g, int t) { return ((warp * (N / 8) + i) * 32 + g * 4 + t) * 4; }

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
