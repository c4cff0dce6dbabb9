// The gradient of RWKV-7's recurrence on tensor cores; wkv7_chunks.cu has the formulas.

#pragma once

#include "wkv7_gradients.cuh"

namespace {

template <int WARPS, bool HALF>
struct Backward : Gradients<WARPS, HALF> {
    using Base = Gradients<WARPS, HALF>;
    using Base::AB, Base::AK, Base::RB, Base::RK, Base::M, Base::SIZE, Base::TURNED;
    using Base::RT, Base::AT, Base::KT, Base::BT, Base::RC, Base::AC, Base::VT, Base::YT;
    using Base::UT, Base::ZT, Base::DV, Base::SM, Base::GM, Base::ENDS, Base::STAGE, Base::dv;
    using Base::ROWS, Base::s;
    using Place = typename Base::Place;
    using Spot = typename Base::Spot;
    using Factors = typename Base::Factors;
    static constexpr int AHEAD = WARPS > 1 ? 4 / WARPS : 1;  // a warp alone has no registers for all that it has to do
    struct Own {
        Sum S[N / 8], G[N / 8];
        typename Base::Factors again[LANES][AHEAD];  // of the chunk, for the gradients of its decays
    };
    using Threads = Team<Own, WARPS>;
    const float *kept;
    const void *dy;
    const float *dend;
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
            for (int which = warp; which < 4; which += WARPS) Base::keys(shared, which / 2, which % 2);
        });
        team.alone(ask);
        team.warps([&](int warp, Own &own) {
            turns(warp, own, [&](Spot spot, Factors &again) {
                if (WARPS == 1) this->read(again, place, at, spot);
                this->channels(shared, again.rakb, place, at, spot);
            });
        });
        team.warps([&](int warp, Own &own) {
            turns(warp, own, [&](Spot spot, Factors &again) {
                if (WARPS == 1) this->read(again, place, at, spot);
                this->decays(shared, again.w, place, at, spot);
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
            Base::lay(state, shared + SM, warp, i), Base::lay(grad, shared + GM, warp, i);
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
};

}  // namespace
