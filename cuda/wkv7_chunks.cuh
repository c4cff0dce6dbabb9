// What the forward and the backward of RWKV-7 on tensor cores share; wkv7_chunks.cu has the formulas.
//
// Of 16 tokens a lane holds, in the two Sums (or left factors) n = 0 and 1 of a pair, columns 2t and 2t + 1: tokens
// 4t + 2n and 4t + 2n + 1. So the four that it multiplies in both lie beside each other, and are one load of 16 bytes.
// Where numbers lie in shared memory is chosen so that no two lanes that are served together want one bank.

#pragma once

#include "chunks.cuh"

namespace {

enum { R, W, K, V, A, B_ };       // bits of Sizes::halves
constexpr float RATES = 0.52876637f;      // log2 of log2(e)
constexpr float STEEP = 0.7f * LOG2E;     // a log2 decay below its negative (the soft clamp's are above) stands alone
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

    const void *r, *w, *k, *v, *a, *b;

    // where numbers lie: of (C, N), (N, C), (C, C), (C, ROWS)
    ON_GPU static constexpr int line(int token, int x) {
        return token * LINE + ((x / 8 * 8 + x % 8 / 2) ^ (token & 8) ^ (x % 2 + x / 32) % 2 * 4);
    }
    ON_GPU static constexpr int column(int x, int token) { return x * C + (token ^ (x & 6) * 2); }
    ON_GPU static constexpr int spot(int row, int x) { return row * C + (x ^ (row & 4) * 2); }
    ON_GPU static constexpr int wide(int token, int x) { return token * WIDE + (x ^ (token & 8)); }
    ON_GPU static constexpr int token(int n, int x) { return x / 2 * 4 + 2 * n + x % 2; }

    ON_GPU Window whole(int64_t t) const { return {t, 0, static_cast<int>(s.T - t < C ? s.T - t : C)}; }

    // where channel x of the first token of a quarter lies
    ON_GPU static int64_t begin(const Place &place, Window at, int q, int x) {
        return place.tokens.at(at.t + 4 * q) + x;
    }

    // two neighbouring numbers of each of four tokens of a tensor, from `first` on; 0 of tokens that `has` lacks
    ON_GPU void pairs(Pair *to, const void *from, int tensor, int64_t first, int64_t step, unsigned has) const {
        if (HALF && tensor == W && !s.half(W)) {
            const float *at = static_cast<const float *>(from) + first;
#pragma unroll
            for (int o = 0; o < 4; o++, at += step) to[o] = has >> o & 1 ? pair(at) : Pair{};
        } else if (HALF) {
            const uint16_t *at = static_cast<const uint16_t *>(from) + first;
#pragma unroll
            for (int o = 0; o < 4; o++, at += step)
                to[o] = wide_of(has >> o & 1 ? *reinterpret_cast<const uint32_t *>(at) : 0);
        } else {
#pragma unroll
            for (int o = 0; o < 4; o++)
#pragma unroll
                for (int e = 0; e < 2; e++)
                    to[o].x[e] = has >> o & 1 ? get(from, first + o * step + e, s.half(tensor)) : 0.0f;
        }
    }

    ON_GPU static float rate(float w) { return least(power(w * LOG2E + RATES), STEEPEST); }

    // Whether a decay of a window is steep.
    template <class Team>
    ON_GPU bool steep(Team &team, const Place &place, Window at) const {
        return team.any([&](int thread) {
            float most = 0.0f;
            for (int i = thread; i < C * N; i += THREADS)
                if (at.has(i / N)) most = fmaxf(most, rate(get(w, place.tokens.at(at.t + i / N) + i % N, s.half(W))));
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
    // What the chunk at `next` reads, if there is one, is asked for meanwhile. Gives whether a decay is steep.
    template <class Team>
    ON_GPU bool load(Team &team, float *shared, const Place &place, Window at, const void *more, int64_t next) const {
        return team.any([&](int thread) {
            ask(thread, place, more, next);
            eight(shared + VT, v, thread, place, at);
            if (BACK && more) eight(shared + YT, more, thread, place, at);
            bool found = false;
            for (int q = thread / 32; q < 4; q += WARPS) found |= quarter(shared, place, at, q, thread % 32);
            return found;
        });
    }

    ON_GPU void ask(int thread, const Place &place, const void *more, int64_t next) const {
#pragma unroll 1
        for (int i = thread; i < 7 * C; i += THREADS) {
            const int64_t t = next + i % C;
            const int which = i / C, size = (HALF && which != W) || s.half(which < 6 ? which : V) ? 2 : 4;
            const void *one = which == R ? r : which == W ? w : which == K ? k : v;
            const void *from = which < A ? one : which == A ? a : which == B_ ? b : more;
            if (t < 0 || t >= s.T || !from) continue;
            const char *line = static_cast<const char *>(from) + place.tokens.at(t) * size;
            soon(line);
            if (size == 4) soon(line + 128);
        }
    }

    // eight values of a token each thread
    ON_GPU void eight(float *to, const void *from, int thread, const Place &place, Window at) const {
        const int o = thread / (ROWS / 8), x = thread % (ROWS / 8) * 8;
        const int64_t first = place.tokens.at(at.t + o) + place.part * ROWS + x;
        Quad found[2] = {};
        if (at.has(o)) {
            if (HALF) {
                const Words words = *reinterpret_cast<const Words *>(static_cast<const uint16_t *>(from) + first);
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    const Pair two = wide_of(words.x[i]);
                    found[i / 2].x[i % 2 * 2] = two.x[0], found[i / 2].x[i % 2 * 2 + 1] = two.x[1];
                }
            } else {
#pragma unroll
                for (int i = 0; i < 8; i++) found[i / 4].x[i % 4] = tf32(get(from, first + i, s.half(V)));
            }
        }
        quad(to + wide(o, x)) = found[0], quad(to + wide(o, x) + 4) = found[1];
    }

    // Two channels of four tokens. The sums of log2 decays begin in the middle of the chunk: a quarter that does not
    // touch it looks at the decays of the one between. Gives whether a decay is steep.
    ON_GPU bool quarter(float *shared, const Place &place, Window at, int q, int lane) const {
        const int x = 2 * lane;
        const int64_t first = begin(place, at, q, x), step = place.tokens.step;
        const int between = q == 0 ? 1 : 2;
        const unsigned has = at.quarter(q), inner = q == 0 || q == 3 ? at.quarter(between) : 0;
        Pair in[4][4], rates[4], inner_rates[4], sums[5], end = {};
        pairs(rates, w, W, first, step, has);
        pairs(inner_rates, w, W, begin(place, at, between, x), step, inner);
        pairs(in[0], r, R, first, step, has), pairs(in[1], a, A, first, step, has);
        pairs(in[2], k, K, first, step, has), pairs(in[3], b, B_, first, step, has);
        float most = 0.0f;
        sums[0] = {};
#pragma unroll
        for (int o = 0; o < 4; o++)
#pragma unroll
            for (int e = 0; e < 2; e++) {
                const float found = has >> o & 1 ? rate(rates[o].x[e]) : 0.0f;
                sums[o + 1].x[e] = sums[o].x[e] - found, most = fmaxf(most, found);
                if (inner >> o & 1) end.x[e] += rate(inner_rates[o].x[e]);
            }
#pragma unroll
        for (int e = 0; e < 2; e++) {
            const float from = q == 3 ? -end.x[e] : q == 2 ? 0.0f : end.x[e] - sums[4].x[e];
#pragma unroll
            for (int o = 0; o < 5; o++) sums[o].x[e] += from;
        }
        if (q == 0) pair(shared + MIDDLE + x) = {{power(-sums[0].x[0]), power(-sums[0].x[1])}};
        if (q == 3) pair(shared + LAST + x) = {{power(sums[4].x[0]), power(sums[4].x[1])}};
        if (BACK) {
#pragma unroll
            for (int o = 0; o < 5; o++)
                if (o || !q) pair(shared + SUMS + (4 * q + o) * N + x) = sums[o];
        }
        factors(shared, q, x, in, sums);
        return most > STEEP;
    }

    // r a k b of four tokens, times the halves of the decay, to their places
    ON_GPU static void factors(float *shared, int q, int x, Pair (&in)[4][4], const Pair *sums) {
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
#pragma unroll
        for (int i = 0; i < 4; i++) {
            float *lines = shared + RT + i * C * LINE;
            const int even = line(4 * q, x), odd = line(4 * q, x + 1);
#pragma unroll
            for (int o = 0; o < 4; o++) lines[even + o * LINE] = in[i][o].x[0], lines[odd + o * LINE] = in[i][o].x[1];
            if (!BACK && i < 2) continue;
            float *columns = shared + (i == 0 ? RC : i == 1 ? AC : i == 2 ? KC : BC);
#pragma unroll
            for (int e = 0; e < 2; e++)
                quad(columns + column(x + e, 4 * q)) = {{in[i][0].x[e], in[i][1].x[e], in[i][2].x[e], in[i][3].x[e]}};
        }
    }
};

}  // namespace
