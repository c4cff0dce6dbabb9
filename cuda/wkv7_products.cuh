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

    // What is to be found of a product, and how: itself and its transpose, without the diagonal, to eleven bits.
    struct Wanted {
        bool plain, turned, strict, round;
    };

    // x y^T of two (C, N) or, if VALUES, (C, ROWS), what is above the diagonal left out; its transpose goes to `turned`
    template <bool VALUES>
    ON_GPU static void outer(float *to, float *turned, const float *x, const float *y, Wanted wanted) {
        constexpr int tiles = VALUES ? ROWS / 8 : N / 8, apart = VALUES ? WIDE : LINE;
        Sum sums[2][2];  // of even tiles and of odd ones: two at a time take as long as one
#pragma unroll
        for (int n = 0; n < 4; n++) clear(sums[n / 2][n % 2]);
#pragma unroll
        for (int i = 0; i < tiles; i++) {
            const Left one = fours([&](int m, int row) { return x + four_of(row + m % 2 * 8, i, m / 2, apart); });
            const Left both = fours([&](int m, int row) { return y + four_of(row + m / 2 * 8, i, m % 2, apart); });
#pragma unroll
            for (int n = 0; n < 2; n++) multiply(sums[i % 2][n], one, half_of(both, n));
        }
        lanes([&](int g_, int t_, int l) {
            const int lane = fresh(4 * g_ + t_), g = lane / 4, t = lane % 4;
#pragma unroll
            for (int n = 0; n < 2; n++)
#pragma unroll
                for (int h = 0; h < 2; h++) {
                    Pair found;
#pragma unroll
                    for (int e = 0; e < 2; e++) {
                        const bool below = n < h || (n == h && 2 * t + e < g + !wanted.strict);
                        const float sum = sums[0][n].x[l][2 * h + e] + sums[1][n].x[l][2 * h + e];
                        found.x[e] = below ? (wanted.round ? tf32(sum) : sum) : 0.0f;
                        if (wanted.turned) turned[spot(8 * n + 2 * t + e, g + 8 * h)] = found.x[e];
                    }
                    if (wanted.plain) pair(to + spot(g + 8 * h, 8 * n + 2 * t)) = found;
                }
        });
    }

    // the first four of eight numbers of a token, or the last
    ON_GPU static int four_of(int token, int i, int last, int apart) {
        return token * apart + 8 * i + (i % 2 ? -(token & 8) : token & 8) + 4 * last;
    }

    // What a token takes from those before it, at AB AK RB RK, and the inverse of 1 - AB at M. Of AB there is the
    // transpose alone, and in the backward of RB and RK; without r where it is for the state alone.
    template <class Team>
    ON_GPU void between(Team &team, float *shared, bool with_r) const {
        team.warps([&](int warp, auto &) {
#pragma unroll 1
            for (int which = warp; which < (with_r ? 4 : 2); which += WARPS) {
                const float *x = shared + (which < 2 ? AT : RT), *y = shared + (which % 2 ? KT : BT);
                const bool first = which == 0, plain = BACK ? which == 1 : !first;
                float *to = shared + which * SIZE, *turned = to + (BACK ? TURNED : 0);
                outer<false>(to, turned, x, y, {plain, BACK || first, which < 2, !first});
                if (first) invert(shared, turned);
            }
        });
    }

    // in fp32, a column each lane, from above: what is found is at once added to all below it
    ON_GPU static void invert(float *shared, const float *turned) {
        lanes_meet();
        lanes([&](int g, int t, int) {
            const int x = fresh(4 * g + t);
            if (x >= C) return;
            float found[C];
#pragma unroll
            for (int i = 0; i < C; i++) found[i] = i == x ? 1.0f : 0.0f;
#pragma unroll
            for (int o = 0; o < C - 1; o++)
#pragma unroll
                for (int i = (o + 1) / 4 * 4; i < C; i += 4) {
                    const Quad from = quad(turned + spot(o, i));
#pragma unroll
                    for (int e = 0; e < 4; e++)
                        if (i + e > o) found[i + e] += from.x[e] * found[o];
                }
#pragma unroll
            for (int i = 0; i < C; i++) shared[M + spot(i, x)] = found[i] = tf32(found[i]);
#pragma unroll
            for (int o = 0; o < (BACK ? C : 0); o += 4)
                quad(shared + TURNED + M + spot(x, o)) = {{found[o], found[o + 1], found[o + 2], found[o + 3]}};
        });
    }

    // a pair of Sums += x times the transpose of (C, N), channels 8 i to 8 i + 8: the even ones, then the odd ones
    ON_GPU static void add_channels(Sum *sums, const Left &x, const float *lines, int i) {
        const Left both = fours([&](int m, int row) {
            return lines + four_of(token(m / 2, row), i, i < N / 16 ? m % 2 : 1 - m % 2, LINE);
        });
        multiply(sums[0], x, half_of(both, 0)), multiply(sums[1], x, half_of(both, 1));
    }

    // 16 tokens as two right factors, four of each lane
    template <class F>
    ON_GPU static void tokens(Right *to, F place) {
        lanes([&](int g, int t, int l) {
            const Quad found = quad(place(g, t));
#pragma unroll
            for (int e = 0; e < 4; e++) to[e / 2].x[l][e % 2] = found.x[e];
        });
    }

    // sum += x times the transpose of tokens n of a (C, C)
    ON_GPU static void add_matrix(Sum &sum, const Left *x, const float *matrix, int n) {
        Right both[2];
        tokens(both, [&](int g, int t) { return matrix + spot(token(n, g), 4 * t); });
        multiply(sum, x[0], both[0]), multiply(sum, x[1], both[1]);
    }

    // 8 channels from 8 i on, of (N, C)
    ON_GPU static void channels_of(Right *to, const float *columns, int i) {
        tokens(to, [&](int g, int t) { return columns + 8 * i * C + column(g ^ i % 2, 4 * t); });
    }

    // sum += x times these
    ON_GPU static void add_columns(Sum &sum, const Left *x, const float *columns, int i) {
        Right both[2];
        channels_of(both, columns, i);
        multiply(sum, x[0], both[0]), multiply(sum, x[1], both[1]);
    }

    // a pair of Sums as left factors
    ON_GPU static void factors(Left *to, const Sum *sums) {
        to[0] = left_nearly(sums[0]), to[1] = left_nearly(sums[1]);
    }

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
            const int lane = fresh(4 * g + t), o = lane % 16, x = warp * 16 + lane / 16 * 8;
            if (!at.has(o)) return;
            const Quad found[2] = {quad(from + wide(o, x)), quad(from + wide(o, x) + 4)};
            const int64_t first = place.tokens.at(at.t + o) + place.part * ROWS + x;
            if (HALF) {
                uint32_t words[4];
#pragma unroll
                for (int i = 0; i < 4; i++)
                    words[i] = word_of({{found[i / 2].x[i % 2 * 2], found[i / 2].x[i % 2 * 2 + 1]}});
                Four all;
                memcpy(&all, words, 16);
                store(static_cast<uint16_t *>(to) + first, all);
            } else {
                for (int i = 0; i < 8; i++) put(to, first + i, s.half(V), found[i / 4].x[i % 4]);
            }
        });
    }
};

}  // namespace
