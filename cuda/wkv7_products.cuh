// The products of 16 tokens of RWKV-7 that its forward and backward share; wkv7_chunks.cu has the formulas.

#pragma once

#include "wkv7_chunks.cuh"

namespace {

template <int WARPS_, bool HALF, bool BACK>
struct Products : Chunks<WARPS_, HALF, BACK> {
    using Base = Chunks<WARPS_, HALF, BACK>;
    using Base::WARPS, Base::ROWS, Base::s, Base::LINE, Base::WIDE, Base::SIZE, Base::TURNED;
    using Base::AB, Base::AK, Base::M, Base::RT, Base::AT, Base::KT, Base::BT, Base::KC, Base::BC;
    using Base::spot, Base::column, Base::wide, Base::token;
    using Place = typename Base::Place;

    // x y^T of two (C, N) or, if VALUES, (C, ROWS), what is above the diagonal (on it too, if strict) left out
    template <bool VALUES>
    ON_GPU static void outer(float *to, const float *x, const float *y, bool strict, bool round) {
        constexpr int tiles = VALUES ? ROWS / 8 : N / 8, apart = VALUES ? WIDE : LINE;
        Sum sums[2];
        clear(sums[0]), clear(sums[1]);
#pragma unroll
        for (int i = 0; i < tiles; i++) {
            const Left one = fours([&](int m, int row) { return x + four_of(row + m % 2 * 8, i, m / 2, apart); });
            const Left both = fours([&](int m, int row) { return y + four_of(row + m / 2 * 8, i, m % 2, apart); });
#pragma unroll
            for (int n = 0; n < 2; n++) multiply(sums[n], one, half_of(both, n));
        }
#pragma unroll
        for (int n = 0; n < 2; n++)
            lanes([&](int g, int t, int l) {
#pragma unroll
                for (int h = 0; h < 2; h++) {
                    Pair found;
#pragma unroll
                    for (int e = 0; e < 2; e++) {
                        const int row = g + 8 * h, x = 8 * n + 2 * t + e;
                        const float number = round ? tf32(sums[n].x[l][2 * h + e]) : sums[n].x[l][2 * h + e];
                        found.x[e] = x < row + !strict ? number : 0.0f;
                        if (BACK) to[TURNED + spot(x, row)] = found.x[e];
                    }
                    pair(to + spot(g + 8 * h, 8 * n + 2 * t)) = found;
                }
            });
    }

    // the first four of eight numbers of a token, or the last
    ON_GPU static int four_of(int token, int i, int last, int apart) {
        return token * apart + 8 * i + (i % 2 ? -(token & 8) : token & 8) + 4 * last;
    }

    // What a token takes from those before it, at AB AK RB RK, and the inverse of 1 - AB at M.
    template <class Team>
    ON_GPU void between(Team &team, float *shared) const {
        team.warps([&](int warp, auto &) {
#pragma unroll 1
            for (int which = warp; which < 4; which += WARPS) {
                const float *x = shared + (which < 2 ? AT : RT), *y = shared + (which % 2 ? KT : BT);
                outer<false>(shared + which * SIZE, x, y, which < 2, which != 0);
                if (which == 0) invert(shared);
            }
        });
    }

    // in fp32, a column each lane, from above
    ON_GPU static void invert(float *shared) {
        lanes_meet();
        lanes([&](int g, int t, int) {
            const int x = 4 * g + t;
            if (x >= C) return;
            float found[C];
#pragma unroll
            for (int i = 0; i < C; i++) {
                float sum = i == x ? 1.0f : 0.0f;
#pragma unroll
                for (int o = 0; o < i; o += 4) {
                    const Quad from = quad(shared + AB + spot(i, o));
#pragma unroll
                    for (int e = 0; e < 4; e++)
                        if (o + e < i) sum += from.x[e] * found[o + e];
                }
                found[i] = sum;
                shared[M + spot(i, x)] = tf32(sum);
            }
#pragma unroll
            for (int o = 0; o < (BACK ? C : 0); o += 4)
                quad(shared + TURNED + M + spot(x, o)) = {
                    {tf32(found[o]), tf32(found[o + 1]), tf32(found[o + 2]), tf32(found[o + 3])}};
        });
    }

    // a pair of Sums += x times the transpose of (C, N), channels 8 i to 8 i + 8: the even ones, then the odd ones
    ON_GPU static void add_channels(Sum *sums, const Left &x, const float *lines, int i) {
        const Left both = fours([&](int m, int row) {
            return lines + four_of(token(m / 2, row), i, i < N / 16 ? m % 2 : 1 - m % 2, LINE);
        });
        multiply(sums[0], x, half_of(both, 0)), multiply(sums[1], x, half_of(both, 1));
    }

    // sum += 16 tokens x times four of each lane
    template <class F>
    ON_GPU static void add_tokens(Sum &sum, const Left *x, F place) {
        Right b[2];
        lanes([&](int g, int t, int l) {
            const Quad found = quad(place(g, t));
            b[0].x[l][0] = found.x[0], b[0].x[l][1] = found.x[1], b[1].x[l][0] = found.x[2], b[1].x[l][1] = found.x[3];
        });
        multiply(sum, x[0], b[0]), multiply(sum, x[1], b[1]);
    }

    // sum += x times the transpose of tokens n of a (C, C)
    ON_GPU static void add_matrix(Sum &sum, const Left *x, const float *matrix, int n) {
        add_tokens(sum, x, [&](int g, int t) { return matrix + spot(token(n, g), 4 * t); });
    }

    // sum += x times 8 channels from 8 i on, of (N, C)
    ON_GPU static void add_columns(Sum &sum, const Left *x, const float *columns, int i) {
        add_tokens(sum, x, [&](int g, int t) { return columns + 8 * i * C + column(g, 4 * t); });
    }

    // a pair of Sums as left factors
    ON_GPU static void factors(Left *to, const Sum *sums) { to[0] = left_nearly(sums[0]), to[1] = left_nearly(sums[1]); }

    // f(place in (C, ROWS), number) of a pair of Sums
    template <class F>
    ON_GPU static void places(Sum *sums, int warp, F f) {
#pragma unroll
        for (int n = 0; n < 2; n++)
            lanes([&](int g, int t, int l) {
#pragma unroll
                for (int i = 0; i < 4; i++)
                    f(value(warp, g, t, n, i / 2, i % 2), sums[n].x[l][i]);
            });
    }

    // of token 4 t + 2 n + e, value g + 8 h of a warp
    ON_GPU static int value(int warp, int g, int t, int n, int h, int e) {
        return (4 * t + 2 * n + e) * WIDE + warp * 16 + (h ? 8 - t / 2 * 8 : t / 2 * 8) + g;
    }

    // a warp's values of (C, ROWS), transposed, as left factors
    ON_GPU static void values(Left *to, const float *from, int warp) {
#pragma unroll
        for (int n = 0; n < 2; n++)
            lanes([&](int g, int t, int l) {
#pragma unroll
                for (int i = 0; i < 4; i++) to[n].x[l][i] = from[value(warp, g, t, n, i % 2, i / 2)];
            });
    }

    // U = M (X + A_ak V), transposed
    ON_GPU static void solve(Sum *U, Sum *X, const Left *v, const float *shared) {
        Left x[2];
#pragma unroll
        for (int n = 0; n < 2; n++) add_matrix(X[n], v, shared + AK, n);
        factors(x, X);
#pragma unroll
        for (int n = 0; n < 2; n++) clear(U[n]), add_matrix(U[n], x, shared + M, n);
    }

    // what the chunk writes into the state at its middle
    ON_GPU static void update(Sum *S, const Left *u, const Left *v, const float *shared) {
#pragma unroll
        for (int i = 0; i < N / 8; i++)
            add_columns(S[i], u, shared + BC, i), add_columns(S[i], v, shared + KC, i);
    }

    // A warp's values of the tokens of a window go from (C, ROWS) to a tensor, eight a lane.
    ON_GPU void give(void *to, const float *from, int warp, const Place &place, Window at) const {
        lanes_meet();
        lanes([&](int g, int t, int) {
            const int lane = 4 * g + t, o = lane / 2, x = warp * 16 + lane % 2 * 8;
            if (!at.has(o)) return;
            const Quad found[2] = {quad(from + wide(o, x)), quad(from + wide(o, x) + 4)};
            const int64_t first = place.tokens.at(at.t + o) + place.part * ROWS + x;
            if (HALF) {
                Words words;
#pragma unroll
                for (int i = 0; i < 4; i++)
                    words.x[i] = word_of({{found[i / 2].x[i % 2 * 2], found[i / 2].x[i % 2 * 2 + 1]}});
                *reinterpret_cast<Words *>(static_cast<uint16_t *>(to) + first) = words;
            } else {
                for (int i = 0; i < 8; i++) put(to, first + i, s.half(V), found[i / 4].x[i % 4]);
            }
        });
    }
};

}  // namespace
