// The gradient of RWKV-7's recurrence on tensor cores; wkv7_chunks.cu has the formulas.

#pragma once

#include "wkv7_products.cuh"

namespace {

template <int WARPS, bool HALF>
struct Backward : Products<WARPS, HALF, true> {
    using Base = Products<WARPS, HALF, true>;
    using Base::AB, Base::AK, Base::RB, Base::RK, Base::M, Base::SIZE, Base::TURNED, Base::LINE, Base::WIDE;
    using Base::RT, Base::AT, Base::KT, Base::BT, Base::RC, Base::AC, Base::KC, Base::BC;
    using Base::VT, Base::YT, Base::SUMS;
    using Base::ROWS, Base::PARTS, Base::THREADS, Base::s;
    using Place = typename Base::Place;
    struct Own {
        Sum S[N / 8], G[N / 8];
    };
    using Threads = Team<Own, WARPS>;
    static constexpr int UT = SUMS + (C + 1) * N, ZT = UT + C * WIDE, DV = ZT + C * WIDE;
    static constexpr int SM = DV + C * WIDE, GM = SM + ROWS * N, ENDS = GM + ROWS * N, PASSED_B = ENDS + WARPS * N;
    static constexpr int FLOATS = PASSED_B + C * N + (WARPS == 4 ? 0 : C * N);
    // in the place of what nobody reads any more: what k~ and b~ have from the gradient of the state, ..
    static constexpr int PASSED = WARPS == 4 ? DV : PASSED_B + C * N;
    // .. and what is moved by quarters of the tokens beyond one
    static constexpr int BEFORE = SM, AFTER = BEFORE + 4 * N;
    static constexpr int FOUND = RT;  // gradients of r~ a~ k~ b~, (C, N) each, when nobody reads those any more
    const float *kept;
    const void *dy;
    const float *dend;
    void *dr, *dw, *dk, *dv, *da, *db;  // but for dv, of each of PARTS parts, which are to be added up, if PARTS > 1
    float *dstart, *room;

    ON_GPU void work(int64_t block, Threads &team, float *shared) const {
        const Place place = this->place(block);
        float *states = room + block * (KEEP / C) * ROWS * N;
        team.warps([&](int warp, Own &own) {
            Base::plain(own.G, place, warp, [&](int64_t at, float &x) { x = dend[at]; });
        });
        for (int64_t segment = s.segments(KEEP) - 1; segment >= 0; segment--) {
            const int64_t begin = segment * KEEP, end = s.T < begin + KEEP ? s.T : begin + KEEP;
            const int64_t chunks = (end - begin + C - 1) / C;
            recall(team, kept + (block * s.segments(KEEP) + segment) * ROWS * N);
            // forward through all chunks but the last, then back through all
            for (int64_t job = 0; job < 2 * chunks - 1; job++) {
                const bool back = job >= chunks - 1;
                const int64_t chunk = back ? 2 * chunks - 2 - job : job;
                float *state = states + chunk * ROWS * N;
                if (job < chunks) {
                    team.warps([&](int warp, Own &own) { Base::keep(own.S, state, warp); });
                }
                through(team, shared, place, begin + chunk * C, back, state);
            }
        }
        team.warps([&](int warp, Own &own) {
            Base::plain(own.G, place, warp, [&](int64_t at, float &x) { dstart[at] = x; });
        });
    }

    ON_GPU void recall(Threads &team, const float *from) const {
        team.warps([&](int warp, Own &own) { Base::recall(own.S, from, warp); });
    }

    // The state, or its gradient, goes through a chunk. In pieces: for each gradient first the state once more up to
    // there.
    ON_GPU void through(Threads &team, float *shared, const Place &place, int64_t t, bool back,
                        const float *state) const {
        const Window whole = this->whole(t);
        unsigned pieces = 0;
        for (int goal = 0, n = 0; goal >= 0;) {
            const Window at = Base::piece(whole, pieces, n);
            if (back && n == 0) recall(team, state);
            const bool steep = this->load(team, shared, place, at, back ? dy : nullptr, back ? t - C : t + C);
            if (steep && !pieces && whole.count > 1) {
                pieces = this->pieces(team, place, whole), goal = Base::count(pieces) - 1;
                continue;
            }
            const bool now = back && n == goal;
            this->between(team, shared);
            team.warps([&](int warp, Own &own) {
                if (now) {
                    values(own, shared, warp, at);
                    this->give(dv, shared + DV, warp, place, at);
                } else {
                    onward(own, shared, warp);
                }
            });
            if (now) gradients(team, shared, place, at);
            if (n < goal) {
                n++;
            } else {
                goal = back ? goal - 1 : -1, n = 0;
            }
        }
    }

    ON_GPU void gradients(Threads &team, float *shared, const Place &place, Window at) const {
        team.warps([&](int warp, Own &) {
#pragma unroll 1
            for (int which = warp; which < 4; which += WARPS) {
                const float *x = shared + (which < 2 ? ZT : YT), *y = shared + (which % 2 ? VT : UT);
                Base::template outer<true>(shared + which * SIZE, x, y, which < 2, false);
            }
        });
        team.warps([&](int warp, Own &) {
#pragma unroll 1
            for (int which = warp; which < 4; which += WARPS) keys(shared, which);
        });
        team.each([&](int thread) {
            for (int q = thread / 32; q < 4; q += WARPS) channels(shared, place, at, q, 2 * (thread % 32));
        });
        team.each([&](int thread) {
            for (int q = thread / 32; q < 4; q += WARPS) decays(shared, place, at, q, 2 * (thread % 32));
        });
    }

    // A warp's rows of the state go through the window.
    ON_GPU static void onward(Own &own, float *shared, int warp) {
        Sum X[2], U[2];
        Left v[2], u[2];
        Base::values(v, shared + VT, warp);
        Base::times(own.S, shared + Base::MIDDLE);
        clear(X[0]), clear(X[1]);
#pragma unroll
        for (int i = 0; i < N / 8; i++) {
            const Left state = left_nearly(own.S[i]);
            Base::add_channels(X, state, shared + AT, i);
        }
        Base::solve(U, X, v, shared);
        Base::factors(u, U);
        Base::update(own.S, u, v, shared);
        Base::times(own.S, shared + Base::LAST);
    }

    // A warp's rows of the state's gradient go back through the window; u, z and dv are found, and what the state and
    // its gradient in the middle move together.
    ON_GPU static void values(Own &own, float *shared, int warp, Window at) {
        if (at.count == 1) alone(own, shared, warp, at);
        Sum X[2], D[2], E[2], U[2];
        Left v[2], y[2], x[2];
        Base::times(own.S, shared + Base::MIDDLE);
        Base::times(own.G, shared + Base::LAST);
#pragma unroll
        for (int n = 0; n < 2; n++) clear(X[n]), clear(D[n]), clear(E[n]);
#pragma unroll
        for (int i = 0; i < N / 8; i++) {
            const Left state = left_nearly(own.S[i]), grad = left_nearly(own.G[i]);
            Base::add_channels(X, state, shared + AT, i);
            Base::add_channels(D, grad, shared + BT, i), Base::add_channels(E, grad, shared + KT, i);
            lay(state, shared + SM, warp, i), lay(grad, shared + GM, warp, i);
        }
        if (at.count > 1) together(own, shared, warp);
        Base::values(v, shared + VT, warp), Base::values(y, shared + YT, warp);
        Base::solve(U, X, v, shared);
        Base::places(U, warp, [&](int to, float found) { shared[UT + to] = nearly(found); });
#pragma unroll
        for (int n = 0; n < 2; n++) {
            Base::add_matrix(D[n], y, shared + TURNED + RB, n);
            Base::add_matrix(E[n], y, shared + TURNED + RK, n);
        }
        Base::factors(x, D);
#pragma unroll
        for (int n = 0; n < 2; n++) clear(U[n]), Base::add_matrix(U[n], x, shared + TURNED + M, n);
        Base::factors(x, U);
        Base::places(U, warp, [&](int to, float found) { shared[ZT + to] = nearly(found); });
#pragma unroll
        for (int n = 0; n < 2; n++) Base::add_matrix(E[n], x, shared + TURNED + AK, n);
        Base::places(E, warp, [&](int to, float found) { shared[DV + to] = found; });
#pragma unroll
        for (int i = 0; i < N / 8; i++) {
            Base::add_columns(own.G[i], y, shared + RC, i);
            Base::add_columns(own.G[i], x, shared + AC, i);
        }
        Base::times(own.G, shared + Base::MIDDLE);
#pragma unroll
        for (int i = 0; i < N / 8; i++) clear(own.S[i]);  // which is recalled, and so needs no registers until then
    }

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

    // the sums over a warp's rows of the state times its gradient
    ON_GPU static void together(const Own &own, float *shared, int warp) {
        Sum both[N / 8];
#pragma unroll
        for (int i = 0; i < N / 8; i++)
            lanes([&](int, int, int l) {
#pragma unroll
                for (int o = 0; o < 4; o++) both[i].x[l][o] = own.S[i].x[l][o] * own.G[i].x[l][o];
            });
        all_columns(both, [&](int column, Pair x) { pair(shared + ENDS + warp * N + column) = x; });
    }

    // Of a single token all that its decay moves is known: no difference of large numbers.
    ON_GPU static void alone(const Own &own, float *shared, int warp, Window at) {
        Sum moved[N / 8];
#pragma unroll
        for (int i = 0; i < N / 8; i++)
            lanes([&](int g, int t, int l) {
#pragma unroll
                for (int o = 0; o < 4; o++) {
                    const int x = i * 8 + 2 * t + o % 2, row = warp * 16 + g + o / 2 * 8;
                    const float y = cut(shared[YT + Base::wide(at.first, row)]);
                    const float r = cut(shared[RT + Base::line(at.first, x)]);
                    const float grad = own.G[i].x[l][o] * shared[Base::LAST + x] + r * y;
                    moved[i].x[l][o] = own.S[i].x[l][o] * (shared[Base::MIDDLE + x] * grad);
                }
            });
        all_columns(moved, [&](int column, Pair x) { pair(shared + ENDS + warp * N + column) = x; });
    }

    // dr~, da~, dk~ or db~; the dA lie where the A lay. Of the last two, what comes by the state goes to PASSED, the
    // rest to FOUND.
    ON_GPU static void keys(float *shared, int which) {
        const float *first = shared + (which == 0 ? YT : which == 1 ? ZT : which == 2 ? VT : UT);
        const float *state = shared + (which < 2 ? SM : GM), *turned = shared + (which < 2 ? 0 : TURNED);
        const float *one = turned + (which == 1 ? AB : which == 2 ? RK : RB);
        const float *other = turned + (which == 0 ? RK : which == 3 ? AB : AK);
        const float *with_one = shared + (which < 2 ? BC : RC), *with_other = shared + (which < 2 ? KC : AC);
        float *found = shared + FOUND + which * C * N;
        Sum sums[N / 8];
#pragma unroll
        for (int i = 0; i < N / 8; i++) clear(sums[i]);
#pragma unroll
        for (int o = 0; o < ROWS / 8; o++) {
            Left x;  // values t and t + 8 of four in turns
            lanes([&](int g, int t, int l) {
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    const int token = g + i % 2 * 8;
                    x.x[l][i] = first[Base::wide(token, o / 2 * 16 + i / 2 * 8) + o % 2 * 4 + t];
                }
            });
#pragma unroll
            for (int i = 0; i < N / 8; i++) {
                Right y;
                lanes([&](int g, int t, int l) {
                    const Pair found = pair(state + both(4 * o + t, i, 2 * g));
                    y.x[l][0] = found.x[0], y.x[l][1] = found.x[1];
                });
                multiply(sums[i], x, y);
            }
        }
        if (which >= 2) {
            float *passed = shared + (which == 2 ? PASSED : PASSED_B);
#pragma unroll
            for (int i = 0; i < N / 8; i++) write(sums[i], passed, i), clear(sums[i]);
        }
        Left x[2], z[2];
        matrix(x, one), matrix(z, other);
#pragma unroll
        for (int i = 0; i < N / 8; i++) {
            Base::add_columns(sums[i], x, with_one, i), Base::add_columns(sums[i], z, with_other, i);
            write(sums[i], found, i);
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
    ON_GPU static constexpr int cell(int token, int x) { return token * N + (x ^ token % 4 * 8); }

    ON_GPU static void write(const Sum &sum, float *to, int tile) {
        lanes([&](int g, int t, int l) {
            pair(to + cell(g, 8 * tile + 2 * t)) = {{sum.x[l][0], sum.x[l][1]}};
            pair(to + cell(g + 8, 8 * tile + 2 * t)) = {{sum.x[l][2], sum.x[l][3]}};
        });
    }

    // two neighbouring numbers of a gradient of each of four tokens, as `pairs` reads them
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
    ON_GPU void channels(float *shared, const Place &place, Window at, int q, int x) const {
        const int64_t first = Base::begin(place, at, q, x), step = place.tokens.step, to = apart(place) + first;
        const unsigned has = at.quarter(q);
        Pair r[4], a[4], k[4], b[4], owns[4], nexts[4], olds[4];
        this->pairs(r, this->r, R, first, step, has), this->pairs(a, this->a, A, first, step, has);
        this->pairs(k, this->k, K, first, step, has), this->pairs(b, this->b, B_, first, step, has);
#pragma unroll
        for (int o = 0; o < 4; o++) {
            const float *passed = shared + cell(4 * q + o, x), *found = passed + FOUND;
            const Pair dr = pair(found), da = pair(found + C * N);
            const Pair dk = pair(found + 2 * C * N), db = pair(found + 3 * C * N);
            const Pair by_k = pair(passed + PASSED), by_b = pair(passed + PASSED_B);
            const float *sums = shared + SUMS + (4 * q + o) * N + x;
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
        pair(shared + AFTER + q * N + x) = later, pair(shared + BEFORE + q * N + x) = old;
    }

    // the gradients of w of two channels of four tokens
    ON_GPU void decays(float *shared, const Place &place, Window at, int q, int x) const {
        const int64_t first = Base::begin(place, at, q, x), step = place.tokens.step;
        const unsigned has = at.quarter(q);
        Pair found[4], beyond = {};
        this->pairs(found, this->w, W, first, step, has);
        const auto add = [&](int from) {
            const Pair more = pair(shared + from + x);
            beyond.x[0] += more.x[0], beyond.x[1] += more.x[1];
        };
#pragma unroll
        for (int i = 0; i < WARPS; i++) add(ENDS + i * N);
#pragma unroll
        for (int i = 0; i < 4; i++)
            if (i != q && at.count > 1) add((i < q ? BEFORE : AFTER) + i * N);
#pragma unroll
        for (int o = 0; o < 4; o++) {
            const Pair here = pair(shared + FOUND + cell(4 * q + o, x));
#pragma unroll
            for (int e = 0; e < 2; e++) {
                const float moved = at.count > 1 ? beyond.x[e] + here.x[e] : beyond.x[e];
                found[o].x[e] = -moved * least(power(found[o].x[e] * LOG2E), 1e4f);
            }
        }
        give_pairs(dw, W, apart(place) + first, step, has, found);
    }
};

}  // namespace
