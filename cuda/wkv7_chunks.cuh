// What the forward and the backward of RWKV-7 on tensor cores share; wkv7_chunks.cu has the formulas.

#pragma once

#include "chunks.cuh"

namespace {

enum { R, W, K, V, A, B_ };       // bits of Sizes::halves
constexpr float STEEP = 0.7f;     // a log decay below its negative (the soft clamp's are above -0.61) stands alone
constexpr float STEEPEST = 36.0f; // a log decay below its negative counts as this: exp(-36) is 2e-16 of the state

// Tokens [t + first, t + first + count) of a chunk; all others of the 16 leave the state as it is.
struct Window {
    int64_t t;
    int first, count;
    ON_GPU bool has(int token) const { return token >= first && token < first + count; }
};

template <int WARPS_>
struct Chunks : Tiles<WARPS_> {
    using Base = Tiles<WARPS_>;
    using Base::WARPS, Base::THREADS, Base::ROWS, Base::WIDE, Base::s, Base::add_rows, Base::add_sums;
    using Place = typename Base::Place;
    static constexpr int AB = 0, AK = C * SHORT, RB = 2 * AK, RK = 3 * AK, M = 4 * AK;
    static constexpr int RT = 5 * AK, AT = RT + C * LONG, KT = AT + C * LONG, BT = KT + C * LONG;
    static constexpr int VT = BT + C * LONG, DECAY = VT + C * WIDE, MIDDLE = DECAY + C * N, LAST = MIDDLE + N;
    static constexpr int FLAG = LAST + N, COMMON = FLAG + 4;

    const void *r, *w, *k, *v, *a, *b;

    ON_GPU Window whole(int64_t t) const { return {t, 0, static_cast<int>(s.T - t < C ? s.T - t : C)}; }

    ON_GPU float read(const void *from, int tensor, const Place &place, Window at, int token, int x) const {
        return at.has(token) ? get(from, place.tokens.at(at.t + token) + x, s.half(tensor)) : 0.0f;
    }

    // No turn was steep yet: what a block finds in shared memory was left there by another.
    template <class Team>
    ON_GPU static void begin(Team &team, float *shared) {
        team.each([&](int thread) {
            if (thread < 2) shared[FLAG + thread] = -1.0f;
        });
    }

    // The sums of the log decays of each channel, up to each token, go to DECAY. Gives whether one is steep. Each
    // call gives the next `turn`: what says so lies in two places in turns, so that nobody overwrites what another has
    // yet to read.
    template <class Team>
    ON_GPU bool decays(Team &team, float *shared, const Place &place, Window at, int64_t turn) const {
        team.each([&](int thread) {
            for (int x = thread; x < N; x += THREADS) {
                float rates[C], sum = 0.0f, most = 0.0f;
#pragma unroll
                for (int o = 0; o < C; o++) rates[o] = at.has(o) ? get(w, place.tokens.at(at.t + o) + x, s.half(W)) : -1e9f;
#pragma unroll
                for (int o = 0; o < C; o++) {
                    const float rate = at_most(rate_of(rates[o]), STEEPEST);
                    sum -= rate, most = fmaxf(most, rate);
                    shared[DECAY + o * N + x] = sum;
                    if (o == C / 2 - 1) shared[MIDDLE + x] = sum;
                }
                const float middle = shared[MIDDLE + x];
                shared[LAST + x] = expf(sum - middle), shared[MIDDLE + x] = expf(middle);
                if (most > STEEP) shared[FLAG + turn % 2] = static_cast<float>(turn % (1 << 24));
            }
        });
        return shared[FLAG + turn % 2] == static_cast<float>(turn % (1 << 24));
    }

    // The pieces of a chunk, as a bit for the first token of each: as long as no decay is steep, or a single token.
    // `turn` counts the calls of `decays`, whose results of the last piece are there.
    template <class Team>
    ON_GPU unsigned pieces(Team &team, float *shared, const Place &place, Window whole, int64_t &turn) const {
        unsigned found = 0;
        for (int first = 0, count = whole.count; first < whole.count;) {
            if (decays(team, shared, place, {whole.t, first, count}, turn++) && count > 1) {
                count = (count + 1) / 2;
                continue;
            }
            found |= 1u << first;
            first += count, count = whole.count - first;
        }
        return found;
    }

    ON_GPU static Window piece(Window whole, unsigned pieces, int which) {
        for (int n = 0; n < which; n++) pieces &= pieces - 1;
        int first = 0, end = 0;
        while (!(pieces >> first & 1)) first++;
        for (end = first + 1; end < whole.count && !(pieces >> end & 1);) end++;
        return {whole.t, first, end - first};
    }

    ON_GPU static int count(unsigned pieces) {
        int found = 0;
        for (; pieces; pieces &= pieces - 1) found++;
        return found;
    }

    // r a k b times their halves of the decay, v, and `more` (like v) go to shared memory, to eleven bits. The halves
    // meet in the middle of the chunk: there a state is multiplied by what is at MIDDLE, and at the end by LAST.
    // What the chunk at `next` reads, if there is one, is asked for meanwhile.
    template <class Team>
    ON_GPU void load(Team &team, float *shared, const Place &place, Window at, const void *more, int more_at,
                     int64_t next) const {
        team.each([&](int thread) {
            for (int i = thread; i < 6 * C; i += THREADS) {
                const int64_t t = next + i % C;
                if (t < 0 || t >= s.T) continue;
                const int which = i / C, size = s.half(which) ? 2 : 4;
                const void *from = which < 3 ? (which == R ? r : which == W ? w : k) : which == V ? v : which == A ? a : b;
                const char *line = static_cast<const char *>(from) + place.tokens.at(t) * size;
                soon(line);
                if (size == 4) soon(line + 128);
            }
#pragma unroll 2
            for (int i = thread; i < C * N; i += THREADS) {
                const int o = i / N, x = i % N, to = o * LONG + x;
                const float middle = shared[DECAY + (C / 2 - 1) * N + x], sum = shared[DECAY + i] - middle;
                const float before = (o ? shared[DECAY + i - N] : 0.0f) - middle;
                shared[RT + to] = tf32(read(r, R, place, at, o, x) * expf(sum));
                shared[AT + to] = tf32(read(a, A, place, at, o, x) * expf(before));
                shared[KT + to] = tf32(read(k, K, place, at, o, x) * expf(-sum));
                shared[BT + to] = tf32(read(b, B_, place, at, o, x) * expf(-sum));
            }
#pragma unroll 2
            for (int i = thread; i < C * ROWS; i += THREADS) {
                const int o = i / ROWS, x = i % ROWS;
                shared[VT + o * WIDE + x] = tf32(read(v, V, place, at, o, place.part * ROWS + x));
                if (more) shared[more_at + o * WIDE + x] = tf32(read(more, V, place, at, o, place.part * ROWS + x));
            }
        });
    }

    // x y^T of two (C, 8 * tiles) in shared memory, what is above the diagonal (on it too, if strict) left out
    ON_GPU static void outer(float *to, const float *x, const float *y, int wide, int tiles, bool strict, bool round) {
#pragma unroll
        for (int n = 0; n < 2; n++) {
            Sum sum;
            clear(sum);
            for (int i = 0; i < tiles; i++)
                multiply(sum, left(x + i * 8, wide), right_turned(y + n * 8 * wide + i * 8, wide));
            cells(sum, [&](int row, int column, float &found) {
                const bool seen = n * 8 + column < row + !strict;
                to[row * SHORT + n * 8 + column] = !seen ? 0.0f : round ? tf32(found) : found;
            });
        }
    }

    // What a token takes from those before it, at AB AK RB RK, and the inverse of 1 - AB at M.
    template <class Team>
    ON_GPU void between(Team &team, float *shared) const {
        team.warps([&](int warp, auto &) {
#pragma unroll 1
            for (int which = warp; which < 4; which += WARPS) {
                const float *x = shared + (which < 2 ? AT : RT), *y = shared + (which % 2 ? KT : BT);
                outer(shared + which * AK, x, y, LONG, N / 8, which < 2, which != 0);
            }
        });
        team.each([&](int thread) {
            if (thread >= C) return;
            float found[C];  // a column of the inverse, from above, in fp32
#pragma unroll
            for (int i = 0; i < C; i++) {
                float sum = i == thread ? 1.0f : 0.0f;
#pragma unroll
                for (int o = 0; o < i; o++) sum += shared[AB + i * SHORT + o] * found[o];
                found[i] = sum;
                shared[M + i * SHORT + thread] = tf32(sum);
            }
        });
    }

    // u of the chunk, transposed, from the state at its middle
    ON_GPU static void find_u(Sum *U, const Sum *S, const float *shared, int warp) {
        Sum X[2];
#pragma unroll
        for (int n = 0; n < 2; n++) {
            clear(X[n]), clear(U[n]);
            Base::add_state(X[n], S, shared + AT + n * 8 * LONG);
            add_rows(X[n], shared + VT, warp, shared + AK + n * 8 * SHORT, SHORT, true);
        }
#pragma unroll
        for (int n = 0; n < 2; n++) add_sums(U[n], X, shared + M + n * 8 * SHORT, SHORT, true);
    }

    // what the chunk writes into the state at its middle
    ON_GPU static void update(Sum *S, const Sum *U, const float *shared, int warp) {
#pragma unroll
        for (int i = 0; i < N / 8; i++) {
            add_sums(S[i], U, shared + BT + i * 8, LONG, false);
            add_rows(S[i], shared + VT, warp, shared + KT + i * 8, LONG, false);
        }
    }
};

}  // namespace
