// What the forward and the backward of RWKV-7 on tensor cores share; wkv7_chunks.cu has the formulas.
//
// Of 16 tokens a lane holds, in the two Sums (or left factors) n = 0 and 1 of a pair, columns 2t and 2t + 1: tokens
// 4t + 2n and 4t + 2n + 1. So the four that it multiplies in both lie beside each other, and are one load of 16 bytes.
// Where numbers lie in shared memory is chosen so that no two lanes that are served together want one bank.
//
// What a chunk reads of memory is asked for while the one before it is computed, and waits at STAGE until it is its
// turn. Of r w k a b a thread has two channels of four tokens, a quarter: the two quarters of a half lie in one warp.

#pragma once

#include "chunks.cuh"

namespace {

enum { R, W, K, V, A, B_ };       // bits of Sizes::halves
constexpr float RATES = 0.52876637f;      // log2 of log2(e)
constexpr float STEEP = 0.7f * LOG2E;     // a log2 decay below its negative (the soft clamp's are above) stands alone
constexpr float NEVER = -1e4f;            // a w whose rate of decay is 0
constexpr float STEEPEST = 36.0f * LOG2E; // a log2 decay below its negative counts as this: 2e-16 of the state

// Tokens [t + first, t + first + count) of a chunk; all others of the 16 leave the state as it is.
struct Window {
    int64_t t;
    int first, count;
    ON_GPU bool has(int token) const { return token >= first && token < first + count; }
    // of four tokens of a quarter, a bit each
    ON_GPU unsigned quarter(int q) const { return ((1u << count) - 1) << first >> 4 * q & 15; }
};

// HALF: all inputs and results of a token are bf16, but for w, which mixed precision leaves in fp32, and begin at
// multiples of 16 bytes. BACK: with what the backward needs beyond.
template <int WARPS_, bool HALF, bool BACK>
struct Chunks : Tiles<WARPS_> {
    using Base = Tiles<WARPS_>;
    using Base::WARPS, Base::THREADS, Base::ROWS, Base::s;
    using Place = typename Base::Place;
    static constexpr int LINE = N + 4, WIDE = ROWS + 4;         // floats from a token to the next
    static constexpr int SIZE = C * C, COPIES = BACK ? 2 : 1;   // of a matrix; the second one is the transpose
    static constexpr int AB = 0, AK = SIZE, RB = 2 * SIZE, RK = 3 * SIZE, M = 4 * SIZE, TURNED = 5 * SIZE;
    // (C, LINE) of each; the same again as (N, C), r~ and a~ for the backward alone
    static constexpr int RT = COPIES * TURNED, AT = RT + C * LINE, KT = AT + C * LINE, BT = KT + C * LINE;
    static constexpr int KC = BT + C * LINE, BC = KC + N * C, RC = BC + N * C, AC = RC + (BACK ? N * C : 0);
    static constexpr int VT = AC + (BACK ? N * C : 0), MIDDLE = VT + C * WIDE, LAST = MIDDLE + N, COMMON = LAST + N;
    // of the backward: dY, and the sums of log2 decays from the middle on, up to each border between tokens
    static constexpr int YT = COMMON, SUMS = YT + C * WIDE;
    // floats that wait until it is their turn
    static constexpr int STAGED = HALF ? 3 * C * N + C * ROWS / (BACK ? 1 : 2) : 0;

    const void *r, *w, *k, *v, *a, *b;

    // where numbers lie: of (C, N), (N, C), (C, C), (C, ROWS)
    ON_GPU static constexpr int line(int token, int x) {
        return token * LINE + ((x / 8 * 8 + x % 8 / 2) ^ (token & 8) ^ (x % 2 + x / 32) % 2 * 4);
    }
    ON_GPU static constexpr int column(int x, int token) { return (x ^ x / 8 % 2) * C + (token ^ (x & 6) * 2); }
    ON_GPU static constexpr int spot(int row, int x) { return row * C + (x ^ (row & 4) * 2); }
    ON_GPU static constexpr int wide(int token, int x) { return token * WIDE + (x ^ (token & 8)); }
    ON_GPU static constexpr int token(int n, int x) { return x / 2 * 4 + 2 * n + x % 2; }
    ON_GPU static constexpr int spread(int x) { return x ^ x / 32 * 16; }

    // what a thread has of r a k b and w, as they lie in memory
    using Couple = std::conditional_t<HALF, uint32_t, Pair>;
    struct Factors {
        Couple rakb[4][4];
        Pair w[4];  // w in bf16 is the first half of it, as it is
    };

    // four tokens, the quarter q, and the channels x and x + 1; of a lane of the warp `which` of four
    struct Spot {
        int q, x;
    };
    ON_GPU static Spot spot_of(int which, int lane) {
        return {which / 2 * 2 + lane / 16, which % 2 * 16 + lane / 8 % 2 * 32 + lane % 8 * 2};
    }

    // the chunk at t; of none of the tokens if there are none
    ON_GPU Window whole(int64_t t) const {
        return {t, 0, t < 0 || t >= s.T ? 0 : static_cast<int>(s.T - t < C ? s.T - t : C)};
    }

    // chunk n of so many tokens from t on
    ON_GPU static Window part(int64_t t, int tokens, int n) {
        return {t + n * C, 0, tokens - n * C < C ? tokens - n * C : C};
    }

    // where channel x of the first token of a quarter lies
    ON_GPU static int64_t begin(const Place &place, Window at, int q, int x) {
        return place.tokens.at(at.t + 4 * q) + x;
    }

    // two neighbouring numbers of each of four tokens of a tensor, from `first` on; 0 of tokens that `has` lacks
    ON_GPU void couples(Couple *to, const void *from, int tensor, int64_t first, int64_t step, unsigned has) const {
        if constexpr (HALF) {
            const uint16_t *at = static_cast<const uint16_t *>(from) + first;
#pragma unroll
            for (int o = 0; o < 4; o++, at += step)
                to[o] = has >> o & 1 ? *reinterpret_cast<const uint32_t *>(at) : 0;
        } else {
#pragma unroll
            for (int o = 0; o < 4; o++)
#pragma unroll
                for (int e = 0; e < 2; e++)
                    to[o].x[e] = has >> o & 1 ? get(from, first + o * step + e, s.half(tensor)) : 0.0f;
        }
    }

    // the same of w
    ON_GPU void couples(Pair *to, int64_t first, int64_t step, unsigned has) const {
        if constexpr (HALF) {
            const int size = s.half(W) ? 2 : 4;
            const char *at = static_cast<const char *>(w) + first * size;
#pragma unroll
            for (int o = 0; o < 4; o++, at += step * size) {
                to[o] = {};
                if (!(has >> o & 1)) continue;
                if (size == 2)
                    to[o].x[0] = *reinterpret_cast<const float *>(at);
                else
                    to[o] = *reinterpret_cast<const Pair *>(at);
            }
        } else {
            couples(to, w, W, first, step, has);
        }
    }

    ON_GPU Pair wide_w(Pair found) const {
        uint32_t word;
        memcpy(&word, &found, 4);
        return HALF && s.half(W) ? wide_of(word) : found;
    }

    // r a k b and w of a spot in a window, from memory
    ON_GPU void read(Factors &to, const Place &place, Window at, Spot spot) const {
        const int64_t first = begin(place, at, spot.q, spot.x), step = place.tokens.step;
        const unsigned has = at.quarter(spot.q);
        couples(to.rakb[0], r, R, first, step, has), couples(to.rakb[1], a, A, first, step, has);
        couples(to.rakb[2], k, K, first, step, has), couples(to.rakb[3], b, B_, first, step, has);
        couples(to.w, first, step, has);
    }

    // Where eight numbers from x on lie at STAGE, in fours of 16 bytes: of a token of r a k b, and of w in fp32.
    ON_GPU static constexpr int staged(int which, int token, int x) {
        return (which * C + token) * (N / 2) + (x >> 1 ^ (token & 4) * 2);
    }
    ON_GPU static constexpr int staged_w(int token, int x) { return 2 * C * N + token * N + spread(x); }
    ON_GPU static constexpr int staged_values(int which, int token, int x) {
        return 3 * C * N + (which * C + token) * (ROWS / 2) + (x >> 1 ^ (token & 1) * (ROWS / 4));
    }

    // Asks for all that `load` wants of a window, and of `more`, if there is such (like v), if it can wait at STAGE.
    ON_GPU void ask(float *stage, const Place &place, Window at, const void *more, int warp) const {
        if constexpr (!HALF) return;
        const auto from = [&](const void *tensor, int64_t first) { return static_cast<const uint16_t *>(tensor) + first; };
        lanes([&](int g, int t, int) {
            const int thread = fresh(32 * warp + 4 * g + t);
#pragma unroll
            for (int i = 0; i < C * N / 8; i += THREADS) {
                const int token = static_cast<unsigned>(thread + i) / (N / 8), x = thread % (N / 8) * 8;
                const bool none = !at.has(token);
                const int64_t first = place.tokens.at(at.t + token) + x;
                bring(stage + staged(0, token, x), from(r, first), none);
                bring(stage + staged(1, token, x), from(a, first), none);
                bring(stage + staged(2, token, x), from(k, first), none);
                bring(stage + staged(3, token, x), from(b, first), none);
                if (s.half(W)) {
                    bring(stage + staged_w(token, x), from(w, first), none);
                } else {  // lanes beside each other ask for what lies beside each other
                    bring(stage + staged_w(token, x / 2), from(w, 2 * first - x), none);
                    bring(stage + staged_w(token, N / 2 + x / 2), from(w, 2 * first - x + N), none);
                }
            }
            const int token = static_cast<unsigned>(thread) / (ROWS / 8), x = thread % (ROWS / 8) * 8;
            const int64_t first = place.tokens.at(at.t + token) + place.part * ROWS + x;
            bring(stage + staged_values(0, token, x), from(v, first), !at.has(token));
            if (BACK && more) bring(stage + staged_values(1, token, x), from(more, first), !at.has(token));
        });
    }

    ON_GPU static float rate(float w) { return at_most(power(w * LOG2E + RATES), STEEPEST); }

    // Whether a decay of a window is steep.
    template <class Team>
    ON_GPU bool steep(Team &team, const Place &place, Window at) const {
        return team.any([&](int warp, auto &) {
            float most = 0.0f;
            lanes([&](int g, int t, int) {
                for (int i = 32 * warp + 4 * g + t; i < C * N; i += THREADS)
                    if (at.has(i / N))
                        most = fmaxf(most, rate(get(w, place.tokens.at(at.t + i / N) + i % N, s.half(W))));
            });
            return most > STEEP;
        });
    }

    // The pieces of a chunk with a steep decay, as a bit for the first token of each: as long as none is steep, or a
    // single token.
    template <class Team>
    ON_GPU unsigned pieces(Team &team, const Place &place, Window whole) const {
        unsigned found = 0;
        for (int first = 0, count = whole.count; first < whole.count;) {
            if (count > 1 && steep(team, place, {whole.t, first, count})) {
                count = (count + 1) / 2;
                continue;
            }
            found |= 1u << first;
            first += count, count = whole.count - first;
        }
        return found;
    }

    // the whole, or a piece of it
    ON_GPU static Window piece(Window whole, unsigned pieces, int which) {
        if (!pieces) return whole;
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
    // What was asked for is read from `stage`. The backward wants r, `more` and the sums only `with_r`. Gives whether a
    // decay is steep.
    template <class Team>
    ON_GPU bool load(Team &team, float *shared, const float *stage, const Place &place, Window at,
                     const void *more, bool with_r) const {
        return team.any([&](int warp, auto &) {
            bool found = false;
            lanes([&](int g, int t, int) {
                const int lane = 4 * g + t;
                eight(shared + VT, stage, 0, v, 32 * warp + lane, place, at);
                if (BACK && with_r) eight(shared + YT, stage, 1, more, 32 * warp + lane, place, at);
                for (int which = warp; which < 4; which += WARPS)
                    found |= quarter(shared, stage, place, at, spot_of(which, lane), with_r);
            });
            return found;
        });
    }

    // twice four values of a token each thread
    ON_GPU void eight(float *to, const float *stage, int which, const void *from, unsigned thread, const Place &place,
                      Window at) const {
        const int o = thread / (ROWS / 8);
#pragma unroll
        for (int h = 0; h < 2; h++) {
            const int x = thread % (ROWS / 8) * 4 + h * (ROWS / 2);
            Quad found = {};
            if constexpr (HALF) {
                uint32_t words[2];
                memcpy(words, &pair(stage + staged_values(which, o, x)), 8);
                const Pair first = wide_of(words[0]), second = wide_of(words[1]);
                found = {{first.x[0], first.x[1], second.x[0], second.x[1]}};
            } else if (at.has(o)) {
                const int64_t first = place.tokens.at(at.t + o) + place.part * ROWS + x;
#pragma unroll
                for (int i = 0; i < 4; i++) found.x[i] = tf32(get(from, first + i, s.half(V)));
            }
            quad(to + wide(o, x)) = found;
        }
    }

    // what `read` reads, or what was asked for
    ON_GPU void take(Factors &to, const float *stage, const Place &place, Window at, Spot spot) const {
        if constexpr (HALF) {
#pragma unroll
            for (int o = 0; o < 4; o++) {
                const int token = 4 * spot.q + o;
#pragma unroll
                for (int n = 0; n < 4; n++) memcpy(&to.rakb[n][o], stage + staged(n, token, spot.x), 4);
                if (s.half(W))
                    to.w[o].x[0] = stage[staged_w(token, spot.x / 8 * 8) + spot.x % 8 / 2];
                else
                    to.w[o] = pair(stage + staged_w(token, spot.x));
            }
        } else {
            read(to, place, at, spot);
        }
    }

    // The rates of decay of two channels of four tokens, and their sum.
    ON_GPU Pair rates(Pair *to, const Pair *w, unsigned has) const {
        Pair sum = {};
#pragma unroll
        for (int o = 0; o < 4; o++) {
            const Pair wide = wide_w(w[o]);
#pragma unroll
            for (int e = 0; e < 2; e++)
                to[o].x[e] = rate(has >> o & 1 ? wide.x[e] : NEVER), sum.x[e] += to[o].x[e];
        }
        return sum;
    }

    // The same sum of the quarter beside, which 16 lanes on have.
    ON_GPU Pair beside(Pair sum, const float *stage, const Place &place, Window at, Spot spot) const {
#ifdef __CUDACC__
#pragma unroll
        for (int e = 0; e < 2; e++) sum.x[e] = __shfl_xor_sync(0xffffffffu, sum.x[e], 16);
        return sum;
#else
        (void)sum;
        Factors there;
        Pair found[4];
        take(there, stage, place, at, {spot.q ^ 1, spot.x});
        return rates(found, there.w, at.quarter(spot.q ^ 1));
#endif
    }

    // Two channels of four tokens. The sums of log2 decays begin in the middle of the chunk: a quarter that does not
    // touch it wants those of the one between. Gives whether a decay is steep.
    ON_GPU bool quarter(float *shared, const float *stage, const Place &place, Window at, Spot spot,
                        bool with_r) const {
        const int q = spot.q, x = spot.x;
        Factors asked;
        take(asked, stage, place, at, spot);
        Pair in[4][4], found[4], sums[5];
        const Pair sum = rates(found, asked.w, at.quarter(q)), between = beside(sum, stage, place, at, spot);
        float most = 0.0f;
#pragma unroll
        for (int e = 0; e < 2; e++) {
            sums[0].x[e] = q < 2 ? sum.x[e] + (q == 0 ? between.x[e] : 0.0f) : q == 2 ? 0.0f : -between.x[e];
#pragma unroll
            for (int o = 0; o < 4; o++)
                sums[o + 1].x[e] = sums[o].x[e] - found[o].x[e], most = fmaxf(most, found[o].x[e]);
        }
        if (q == 0) pair(shared + MIDDLE + x) = {{power(-sums[0].x[0]), power(-sums[0].x[1])}};
        if (q == 3) pair(shared + LAST + x) = {{power(sums[4].x[0]), power(sums[4].x[1])}};
        if (BACK && with_r) {
#pragma unroll
            for (int o = 0; o < 5; o++)
                if (o || !q) pair(shared + SUMS + (4 * q + o) * N + spread(x)) = sums[o];
        }
#pragma unroll
        for (int i = 0; i < 4; i++)
#pragma unroll
            for (int o = 0; o < 4; o++) in[i][o] = wide_of(asked.rakb[i][o]);
        factors(shared, spot, in, sums, with_r);
        return most > STEEP;
    }

    // r a k b of four tokens, times the halves of the decay, to their places; r, and in the backward a
    // transposed, `with_r`
    ON_GPU static void factors(float *shared, Spot spot, Pair (&in)[4][4], const Pair *sums, bool with_r) {
#pragma unroll
        for (int e = 0; e < 2; e++) {
            float before = power(sums[0].x[e]);
#pragma unroll
            for (int o = 0; o < 4; o++) {
                const float after = power(sums[o + 1].x[e]), less = power(-sums[o + 1].x[e]);
                in[0][o].x[e] = tf32(in[0][o].x[e] * after), in[1][o].x[e] = tf32(in[1][o].x[e] * before);
                in[2][o].x[e] = tf32(in[2][o].x[e] * less), in[3][o].x[e] = tf32(in[3][o].x[e] * less);
                before = after;
            }
        }
        const int q = spot.q, x = spot.x;
#pragma unroll
        for (int i = 0; i < 4; i++) {
            if (i == 0 && !with_r) continue;
            float *lines = shared + RT + i * C * LINE;
            const int even = line(4 * q, x), odd = line(4 * q, x + 1);
#pragma unroll
            for (int o = 0; o < 4; o++) lines[even + o * LINE] = in[i][o].x[0], lines[odd + o * LINE] = in[i][o].x[1];
            if (i < 2 && !(BACK && with_r)) continue;
            float *columns = shared + (i == 0 ? RC : i == 1 ? AC : i == 2 ? KC : BC);
#pragma unroll
            for (int e = 0; e < 2; e++)
                quad(columns + column(x + e, 4 * q)) = {{in[i][0].x[e], in[i][1].x[e], in[i][2].x[e], in[i][3].x[e]}};
        }
    }
};

}  // namespace
