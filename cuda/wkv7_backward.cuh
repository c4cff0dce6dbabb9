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
    using Spot = typename Base::Spot;
    using Couple = typename Base::Couple;
    using Factors = typename Base::Factors;
    static constexpr int AHEAD = WARPS > 1 ? 4 / WARPS : 1;  // a warp alone has no registers for all that it has to do
    struct Own {
        Sum S[N / 8], G[N / 8];
        typename Base::Factors again[LANES][AHEAD];  // of the chunk, for the gradients of its decays
    };
    using Threads = Team<Own, WARPS>;
    static constexpr int UT = SUMS + (C + 1) * N, ZT = UT + C * WIDE, DV = ZT + C * WIDE;
    static constexpr int SM = DV + C * WIDE, GM = SM + ROWS * N, ENDS = GM + ROWS * N, PASSED_B = ENDS + WARPS * N;
    static constexpr int REST = PASSED_B + C * N + (WARPS == 4 ? 0 : C * N);
    static constexpr int STAGE = WARPS == 4 ? GM : REST, FLOATS = REST + (WARPS == 4 ? 0 : Base::STAGED);
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
            const int64_t begin = segment * KEEP;
            const int tokens = fresh(s.T - begin < KEEP ? static_cast<int>(s.T - begin) : KEEP);
            const int last = (tokens - 1) / C;
            recall(team, kept + (block * s.segments(KEEP) + segment) * ROWS * N);
            // forward through all chunks but the last, then back through all
            for (int left = last; left >= -last; left--) {
                const int chunk = last - (left < 0 ? -left : left), next = left > 0 ? chunk + 1 : chunk - 1;
                float *state = states + chunk * ROWS * N;
                if (left > 0) keep(team, state);
                const Ahead ahead = {next < 0 ? this->whole(begin - KEEP) : Base::part(begin, tokens, next),
                                     left <= 1 && next >= 0};
                const bool first = left == last && begin + KEEP >= s.T;
                through(team, shared, place, {Base::part(begin, tokens, chunk), left <= 0, first, left == 0, state}, ahead);
            }
        }
        team.warps([&](int warp, Own &own) {
            Base::plain(own.G, place, warp, [&](int64_t at, float &x) { dstart[at] = x; });
        });
    }

    ON_GPU void recall(Threads &team, const float *from) const {
        team.alone([&](int warp, Own &own) { Base::recall(own.S, from, warp); });
    }

    ON_GPU void keep(Threads &team, float *to) const {
        team.alone([&](int warp, Own &own) { Base::keep(own.S, to, warp); });
    }

    // a chunk that the state, or its gradient, goes through: whether it is the first of all, whether the state is that
    // before it already, and where that lies, or is to
    struct Job {
        Window whole;
        bool back, first, here;
        float *state;
    };

    // the chunk that comes next, and whether it is to be gone back through
    struct Ahead {
        Window at;
        bool back;
    };

    // The state, or its gradient, goes through a chunk. In pieces: for each gradient first the state once more up to
    // there.
    ON_GPU void through(Threads &team, float *shared, const Place &place, Job job, Ahead ahead) const {
        const Window whole = job.whole;
        unsigned pieces = 0;
        for (int goal = 0, n = 0; goal >= 0;) {
            const Window at = Base::piece(whole, pieces, n);
            if (job.back && n == 0 && (pieces || !job.here)) recall(team, job.state);
            if (HALF && (job.first || pieces))
                team.warps([&](int warp, Own &) {
                    this->ask(shared + STAGE, place, at, job.back ? dy : nullptr, warp);
                    arrived();
                });
            const bool steep = this->load(team, shared, shared + STAGE, place, at, dy, job.back);
            if (steep && !pieces && whole.count > 1) {
                pieces = this->pieces(team, place, whole), goal = Base::count(pieces) - 1;
                if (job.here) keep(team, job.state);
                continue;
            }
            const bool now = job.back && n == goal, last = n == goal && (goal == 0 || !job.back);
            const auto ask = [&](int warp, Own &) {
                if (last) this->ask(shared + STAGE, place, ahead.at, ahead.back ? dy : nullptr, warp);
            };
            if (!now) team.alone(ask);
            this->between(team, shared, job.back);
            team.warps([&](int warp, Own &own) {
                if (now) {
                    values(own, shared, warp, at);
                    this->give(dv, shared + DV, warp, place, at);
                } else {
                    onward(own, shared, warp);
                    arrived();
                }
            });
            if (now) gradients(team, shared, place, at, ask);
            if (n < goal) {
                n++;
            } else {
                goal = job.back ? goal - 1 : -1, n = 0;
            }
        }
    }

    template <class Ask>
    ON_GPU void gradients(Threads &team, float *shared, const Place &place, Window at, Ask ask) const {
        team.warps([&](int warp, Own &) {
#pragma unroll 1
            for (int which = warp; which < 4; which += WARPS) {
                const float *x = shared + (which < 2 ? ZT : YT), *y = shared + (which % 2 ? VT : UT);
                float *to = shared + which * SIZE;
                Base::template outer<true>(to, to + TURNED, x, y, {true, true, which < 2, false});
            }
        });
        team.warps([&](int warp, Own &own) {
            if (WARPS > 1) turns(warp, own, [&](Spot spot, Factors &again) { this->read(again, place, at, spot); });
#pragma unroll 1
            for (int which = warp; which < 4; which += WARPS) keys(shared, which / 2, which % 2);
        });
        team.alone(ask);
        team.warps([&](int warp, Own &own) {
            turns(warp, own, [&](Spot spot, Factors &again) {
                if (WARPS == 1) this->read(again, place, at, spot);
                channels(shared, again.rakb, place, at, spot);
            });
        });
        team.warps([&](int warp, Own &own) {
            turns(warp, own, [&](Spot spot, Factors &again) {
                if (WARPS == 1) this->read(again, place, at, spot);
                decays(shared, again.w, place, at, spot);
            });
            arrived();
        });
    }

    // f(spot, what is read of it) for all of a warp's
    template <class F>
    ON_GPU static void turns(int warp, Own &own, F f) {
        lanes([&](int g, int t, int l) {
#pragma unroll(AHEAD)
            for (int n = 0; n < 4 / WARPS; n++) f(Base::spot_of(warp + n * WARPS, 4 * g + t), own.again[l][n % AHEAD]);
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
        all_columns(both, [&](int column, Pair x) { pair(shared + ENDS + warp * N + Base::spread(column)) = x; });
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
        all_columns(moved, [&](int column, Pair x) { pair(shared + ENDS + warp * N + Base::spread(column)) = x; });
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
