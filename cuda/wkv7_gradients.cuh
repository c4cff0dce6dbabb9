// The gradients of what RWKV-7's tokens read, from those of products, on tensor cores; wkv7_chunks.cu has the formulas.

#pragma once

#include "wkv7_products.cuh"

namespace {

template <int WARPS, bool HALF>
struct Gradients : Products<WARPS, HALF, true> {
    using Base = Products<WARPS, HALF, true>;
    using Base::AB, Base::AK, Base::RB, Base::RK, Base::TURNED, Base::WIDE;
    using Base::RT, Base::RC, Base::AC, Base::KC, Base::BC;
    using Base::VT, Base::YT, Base::SUMS;
    using Base::ROWS, Base::PARTS, Base::s;
    using Place = typename Base::Place;
    using Spot = typename Base::Spot;
    using Couple = typename Base::Couple;
    static constexpr int UT = SUMS + (C + 1) * N, ZT = UT + C * WIDE, DV = ZT + C * WIDE;
    static constexpr int SM = DV + C * WIDE, GM = SM + ROWS * N, ENDS = GM + ROWS * N, PASSED_B = ENDS + WARPS * N;
    static constexpr int REST = PASSED_B + C * N + (WARPS == 4 ? 0 : C * N);
    static constexpr int STAGE = WARPS == 4 ? GM : REST, FLOATS = REST + (WARPS == 4 ? 0 : Base::STAGED);
    // in the place of what nobody reads any more: what k~ and b~ have from the gradient of the state, ..
    static constexpr int PASSED = WARPS == 4 ? DV : PASSED_B + C * N;
    // .. and what is moved by quarters of the tokens beyond one
    static constexpr int BEFORE = SM, AFTER = BEFORE + 4 * N;
    static constexpr int FOUND = RT;  // gradients of r~ a~ k~ b~, (C, N) each, when nobody reads those any more

    void *dr, *dw, *dk, *dv, *da, *db;  // but for dv, of each of PARTS parts, which are to be added up, if PARTS > 1

    // Where a state lies for `keys`: rows g and g + 8 of sixteen beside each other, `x` the place of theirs in a tile
    ON_GPU static int both(int row, int tile, int x) {
        const int turn = row % 2 * 16;
        return row * 2 * N + tile / 2 * 32 + (tile % 2 ? 16 - turn : turn) + (x ^ row / 2 % 2 * 8);
    }

    // Eight columns of a warp's state, as a left factor, go to shared memory.
    ON_GPU static void lay(const Left &x, float *to, int warp, int tile) {
        lanes([&](int g, int t, int l) {
            quad(to + both(warp * 8 + g, tile, 4 * t)) = {{x.x[l][0], x.x[l][1], x.x[l][2], x.x[l][3]}};
        });
    }

    // dr~ and da~ (pair 0), or dk~ and db~, of 32 channels; the dA lie where the A lay. Of the last two, what comes by
    // the state goes to PASSED, the rest to FOUND.
    ON_GPU static void keys(float *shared, int pair, int half) {
        constexpr int TILES = N / 16;
        const float *first[] = {shared + (pair ? VT : YT), shared + (pair ? UT : ZT)};
        const float *state = shared + (pair ? GM : SM);
        Sum sums[2][TILES];
#pragma unroll
        for (int i = 0; i < 2 * TILES; i++) clear(sums[i / TILES][i % TILES]);
#pragma unroll
        for (int o = 0; o < ROWS / 8; o++) {
            Left x[2];  // values t and t + 8 of four in turns
#pragma unroll
            for (int n = 0; n < 2; n++)
                x[n] = fours([&](int m, int row) {
                    return first[n] + Base::wide(row + m % 2 * 8, o / 2 * 16 + m / 2 * 8) + o % 2 * 4;
                });
#pragma unroll
            for (int i = 0; i < TILES; i++) {
                Right y;
                lanes([&](int g, int t, int l) {
                    const Pair found = ::pair(state + both(4 * o + t, half * TILES + i, 2 * g));
                    y.x[l][0] = found.x[0], y.x[l][1] = found.x[1];
                });
                multiply(sums[0][i], x[0], y), multiply(sums[1][i], x[1], y);
            }
        }
        if (pair) {
#pragma unroll
            for (int n = 0; n < 2; n++)
#pragma unroll
                for (int i = 0; i < TILES; i++)
                    write(sums[n][i], shared + (n ? PASSED_B : PASSED), half * TILES + i), clear(sums[n][i]);
        }
        Left by[2][2][2];  // of each of the two: what it has from b~ and k~, or from r~ and a~
        matrix(by[0][0], shared + (pair ? TURNED + RK : RB)), matrix(by[0][1], shared + (pair ? TURNED + AK : RK));
        matrix(by[1][0], shared + (pair ? TURNED + RB : AB)), matrix(by[1][1], shared + (pair ? TURNED + AB : AK));
#pragma unroll
        for (int i = 0; i < TILES; i++) {
            const int tile = half * TILES + i;
            Right from[2][2];
            Base::channels_of(from[0], shared + (pair ? RC : BC), tile);
            Base::channels_of(from[1], shared + (pair ? AC : KC), tile);
#pragma unroll
            for (int n = 0; n < 2; n++) {
#pragma unroll
                for (int o = 0; o < 4; o++) multiply(sums[n][i], by[n][o / 2][o % 2], from[o / 2][o % 2]);
                write(sums[n][i], shared + FOUND + (2 * pair + n) * C * N, tile);
            }
        }
    }

    // a (C, C) as left factors, to eleven bits
    ON_GPU static void matrix(Left *to, const float *from) {
        lanes([&](int g, int t, int l) {
#pragma unroll
            for (int h = 0; h < 2; h++) {
                const Quad found = quad(from + Base::spot(g + 8 * h, 4 * t));
                to[0].x[l][h] = nearly(found.x[0]), to[0].x[l][2 + h] = nearly(found.x[1]);
                to[1].x[l][h] = nearly(found.x[2]), to[1].x[l][2 + h] = nearly(found.x[3]);
            }
        });
    }

    // where numbers of a (C, N) that `keys` finds lie
    ON_GPU static constexpr int cell(int token, int x) { return token * N + (Base::spread(x) ^ token % 4 * 8); }

    ON_GPU static void write(const Sum &sum, float *to, int tile) {
        lanes([&](int g, int t, int l) {
            pair(to + cell(g, 8 * tile + 2 * t)) = {{sum.x[l][0], sum.x[l][1]}};
            pair(to + cell(g + 8, 8 * tile + 2 * t)) = {{sum.x[l][2], sum.x[l][3]}};
        });
    }

    // two neighbouring numbers of a gradient of each of four tokens, as `couples` reads them
    ON_GPU void give_pairs(void *to, int tensor, int64_t first, int64_t step, unsigned has, const Pair *x) const {
        if (HALF && PARTS == 1 && (tensor != W || s.half(W))) {
            uint16_t *at = static_cast<uint16_t *>(to) + first;
#pragma unroll
            for (int o = 0; o < 4; o++, at += step)
                if (has >> o & 1) *reinterpret_cast<uint32_t *>(at) = word_of(x[o]);
        } else if (HALF) {
            float *at = static_cast<float *>(to) + first;
#pragma unroll
            for (int o = 0; o < 4; o++, at += step)
                if (has >> o & 1) pair(at) = x[o];
        } else {
#pragma unroll
            for (int o = 0; o < 4; o++)
#pragma unroll
                for (int e = 0; e < 2; e++)
                    if (has >> o & 1) put(to, first + o * step + e, PARTS == 1 && s.half(tensor), x[o].x[e]);
        }
    }

    ON_GPU int64_t apart(const Place &place) const { return PARTS > 1 ? place.part * s.B * s.T * s.H * N : 0; }

    // The gradients of r a k b of two channels of four tokens. What the decay of a token moves has three parts: what
    // reads the state from this token on (`owns`, and `a` of the next), what wrote into it before (`olds`), and what
    // lies beyond these four. With the inputs as they are: rounded ones would cost half as much error again.
    ON_GPU void channels(float *shared, const Couple (&rakb)[4][4], const Place &place, Window at, Spot spot) const {
        const int q = spot.q, x = spot.x;
        const int64_t step = place.tokens.step, to = apart(place) + Base::begin(place, at, q, x);
        const unsigned has = at.quarter(q);
        Pair r[4], a[4], k[4], b[4], owns[4], nexts[4], olds[4];
#pragma unroll
        for (int o = 0; o < 4; o++) {
            r[o] = wide_of(rakb[0][o]), a[o] = wide_of(rakb[1][o]);
            k[o] = wide_of(rakb[2][o]), b[o] = wide_of(rakb[3][o]);
        }
#pragma unroll
        for (int o = 0; o < 4; o++) {
            const float *passed = shared + cell(4 * q + o, x), *found = passed + FOUND;
            const Pair dr = pair(found), da = pair(found + C * N);
            const Pair dk = pair(found + 2 * C * N), db = pair(found + 3 * C * N);
            const Pair by_k = pair(passed + PASSED), by_b = pair(passed + PASSED_B);
            const float *sums = shared + SUMS + (4 * q + o) * N + Base::spread(x);
            const Pair before = pair(sums), after = pair(sums + N);
#pragma unroll
            for (int e = 0; e < 2; e++) {
                const float less = power(-after.x[e]), with_k = k[o].x[e] * less, with_b = b[o].x[e] * less;
                const float found_r = dr.x[e] * power(after.x[e]), found_a = da.x[e] * power(before.x[e]);
                owns[o].x[e] = found_r * r[o].x[e] - db.x[e] * with_b - dk.x[e] * with_k;
                olds[o].x[e] = by_b.x[e] * with_b + by_k.x[e] * with_k, nexts[o].x[e] = found_a * a[o].x[e];
                r[o].x[e] = found_r, a[o].x[e] = found_a;
                k[o].x[e] = (dk.x[e] + by_k.x[e]) * less, b[o].x[e] = (db.x[e] + by_b.x[e]) * less;
            }
        }
        give_pairs(dr, R, to, step, has, r), give_pairs(da, A, to, step, has, a);
        give_pairs(dk, K, to, step, has, k), give_pairs(db, B_, to, step, has, b);
        Pair later = {}, old = {};
#pragma unroll
        for (int o = 3; o >= 0; o--)
#pragma unroll
            for (int e = 0; e < 2; e++)
                owns[o].x[e] += later.x[e], later.x[e] = owns[o].x[e] + nexts[o].x[e];
#pragma unroll
        for (int o = 0; o < 4; o++) {
#pragma unroll
            for (int e = 0; e < 2; e++) owns[o].x[e] += old.x[e], old.x[e] += olds[o].x[e];
            pair(shared + FOUND + cell(4 * q + o, x)) = owns[o];
        }
        const int all = q * N + Base::spread(x);
        pair(shared + AFTER + all) = later, pair(shared + BEFORE + all) = old;
    }

    // the gradients of w of two channels of four tokens
    ON_GPU void decays(float *shared, const Pair *w, const Place &place, Window at, Spot spot) const {
        const int q = spot.q, x = spot.x;
        Pair found[4], beyond = {};
        const auto add = [&](int from) {
            const Pair more = pair(shared + from + Base::spread(x));
            beyond.x[0] += more.x[0], beyond.x[1] += more.x[1];
        };
#pragma unroll
        for (int i = 0; i < WARPS; i++) add(ENDS + i * N);
#pragma unroll
        for (int i = 0; i < 4; i++)
            if (i != q && at.count > 1) add((i < q ? BEFORE : AFTER) + i * N);
#pragma unroll
        for (int o = 0; o < 4; o++) {
            const Pair here = pair(shared + FOUND + cell(4 * q + o, x)), wide = this->wide_w(w[o]);
#pragma unroll
            for (int e = 0; e < 2; e++) {
                const float moved = at.count > 1 ? beyond.x[e] + here.x[e] : beyond.x[e];
                found[o].x[e] = -moved * at_most(power(wide.x[e] * LOG2E), 1e4f);
            }
        }
        give_pairs(dw, W, apart(place) + Base::begin(place, at, q, x), place.tokens.step, at.quarter(q), found);
    }
};

}  // namespace
