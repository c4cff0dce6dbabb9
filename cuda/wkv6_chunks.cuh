// What the forward and the backward of RWKV-6 and 5.2 on tensor cores share; wkv6_chunks.cu has the formulas.

#pragma once

#include "chunks.cuh"

namespace {

enum { R, W, K, V, U };                  // bits of Sizes::halves
constexpr int HALVES = 4, ALL = HALVES;  // halves of 1, 2, 4, 8; of all tokens, r~ and k~
constexpr int JOBS = HALVES + 1;         // of A: each size of halves, and the diagonal

template <int WARPS_>
struct Chunks6 : Tiles<WARPS_> {
    using Base = Tiles<WARPS_>;
    using Base::WARPS, Base::THREADS, Base::ROWS, Base::WIDE, Base::s;
    using Place = typename Base::Place;
    static constexpr int X = 0, RT = HALVES * C * LONG, KT = RT + C * LONG, OWN = KT + C * LONG;
    static constexpr int A = OWN + C * LONG, VT = A + C * SHORT, YT = VT + C * WIDE, OVER = YT + C * WIDE;
    static constexpr int COMMON = OVER + N;

    bool one_w;  // for all tokens
    const void *r, *w, *k, *v, *u;

    ON_GPU int count(int64_t t) const { return static_cast<int>(s.T - t < C ? s.T - t : C); }

    ON_GPU float read(const void *from, int tensor, Place place, int64_t t, int token, int x) const {
        return t + token < s.T ? get(from, place.tokens.at(t + token) + x, s.half(tensor)) : 0.0f;
    }

    ON_GPU float rate(Place place, int64_t t, int token, int x) const {
        if (t + token >= s.T) return 0.0f;
        const int64_t at = one_w ? place.head % s.H * N : place.tokens.at(t + token);
        return rate_of(get(w, at + x, s.half(W)));
    }

    ON_GPU float bonus(Place place, int x) const { return get(u, place.head % s.H * N + x, s.half(U)); }

    // What lies above the diagonal stays 0.
    template <class Team>
    ON_GPU void begin(Team &team, float *shared) const {
        team.each([&](int thread) {
            for (int i = thread; i < C * SHORT; i += THREADS) shared[A + i] = 0.0f;
        });
    }

    // The factors of tokens [t, t + C), to eleven bits: a thread has r of a channel, from the first token on, or k,
    // from the last one back, which is the same but for the order. `end`: only what the state after them needs. With
    // them v, and `dy`. What the chunk at `next` reads, if there is one, is asked for meanwhile.
    template <class Team>
    ON_GPU void load(Team &team, float *shared, Place place, int64_t t, const void *dy, bool end, int64_t next) const {
        team.each([&](int thread) {
            ask(thread, place, next, dy);
            for (int i = thread; i < 2 * N; i += THREADS)
                if (!end || i >= N) factors(shared, place, t, i % N, i >= N, end);
#pragma unroll 4
            for (int i = thread; i < C * ROWS; i += THREADS) {
                const int o = i / ROWS, x = i % ROWS;
                shared[VT + o * WIDE + x] = tf32(read(v, V, place, t, o, place.part * ROWS + x));
                if (dy) shared[YT + o * WIDE + x] = tf32(read(dy, V, place, t, o, place.part * ROWS + x));
            }
        });
    }

    ON_GPU void ask(int thread, Place place, int64_t t, const void *dy) const {
        for (int i = thread; i < 5 * C; i += THREADS) {
            const int which = i / C, size = s.half(which < 4 ? which : V) ? 2 : 4;
            const void *from = which == R ? r : which == W ? w : which == K ? k : which == V ? v : dy;
            if (t < 0 || t + i % C >= s.T || !from || (which == W && one_w)) continue;
            const char *line = static_cast<const char *>(from) + place.tokens.at(t + i % C) * size;
            soon(line);
            if (size == 4) soon(line + 128);
        }
    }

    // f(turn, token, place of its row in shared memory): tokens as a thread with r goes, or one with k
    template <class F>
    ON_GPU static void along(bool after, F f) {
#pragma unroll
        for (int o = 0; o < C; o++) f(o, after ? C - 1 - o : o, (after ? C - 1 - o : o) * LONG);
    }

    ON_GPU void factors(float *shared, Place place, int64_t t, int x, bool after, bool end) const {
        float d[C], mine[C], passed[HALVES] = {}, through = 1.0f;
        const float own = end ? 0.0f : bonus(place, x);
        along(after, [&](int o, int token, int) {
            d[o] = expf(-rate(place, t, token, x)), mine[o] = read(after ? k : r, after ? K : R, place, t, token, x);
        });
        along(after, [&](int o, int, int row) {
            shared[(after ? KT : RT) + row + x] = tf32(mine[o] * through);
            through *= d[o];
            if (end) return;
#pragma unroll
            for (int h = 0; h < HALVES; h++) {
                if (o % (1 << h) == 0) passed[h] = 1.0f;
                if (o >> h & 1) shared[X + h * C * LONG + row + x] = tf32(mine[o] * passed[h]);
                passed[h] *= d[o];
            }
            if (o % 2 == 0) shared[OWN + row + x] = tf32(mine[o] * own);  // where X_1 has the other one of r and k
        });
        if (after) shared[OVER + x] = through;
    }

    // sum = x y^T of (C, 8 * tiles) and 8 rows of as many
    ON_GPU static void outer(Sum &sum, const float *x, const float *y, int wide, int tiles) {
        clear(sum);
        for (int i = 0; i < tiles; i++) multiply(sum, left(x + i * 8, wide), right_turned(y + i * 8, wide));
    }

    // Job 0 is halves of 8, job 3 of 1, job 4 the diagonal.
    ON_GPU static void between(float *shared, int job) {
        const int h = job < HALVES ? HALVES - 1 - job : 0;
        const float *x = shared + X + h * C * LONG, *y = job < HALVES ? x : shared + OWN;
#pragma unroll
        for (int n = 0; n < 2; n++) {
            if (job == 0 && n) break;
            Sum sum;
            outer(sum, x, y + n * 8 * LONG, LONG, N / 8);
            cells(sum, [&](int row, int column, float &found) {
                const int to = n * 8 + column;
                const bool here = job < HALVES ? row > to && (row ^ to) >> h == 1 : row == to;
                if (here) shared[A + row * SHORT + to] = tf32(found);
            });
        }
    }

    // The state goes through the chunk.
    ON_GPU static void update(Sum *S, float *shared, int warp) {
        Base::times(S, shared + OVER);
#pragma unroll
        for (int i = 0; i < N / 8; i++) Base::add_rows(S[i], shared + VT, warp, shared + KT + i * 8, LONG, false);
    }
};

}  // namespace
