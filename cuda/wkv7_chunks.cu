// The recurrence of RWKV-7 and its gradient on tensor cores, 16 tokens at a time, for heads of 64 channels;
// rwkvpipe/kernel/wkv7.py has the reference, and the same algebra in PyTorch.
//
// With c_t the sum of the log decays of the chunk up to t, and m its value in the middle,
//     r~ = r exp(c_t - m), a~ = a exp(c_{t-1} - m), k~ = k exp(m - c_t), b~ = b exp(m - c_t), S~ = S exp(m):
//     A_ab = a~ b~^T, A_ak = a~ k~^T (below the diagonal), A_rb = r~ b~^T, A_rk = r~ k~^T (and on it);
//     M = (1 - A_ab)^-1;  U = M (A_ak V + a~ S~^T);  Y = r~ S~^T + A_rb U + A_rk V;
//     the state after the chunk is (S~ + U^T b~ + V^T k~) exp(c_end - m).
// RWKV-7's soft clamp keeps each half of a decay within exp(5). A chunk that decays faster (the first token of a
// document may forget all before) is taken in pieces, at least of one token, by the same steps with all other tokens
// left out, which is right for any decay.
//
// Backward, with G~ the gradient of the state after the chunk times exp(c_end - m):
//     dU = A_rb^T dY + b~ G~^T;  Z = M^T dU;  dV = A_rk^T dY + k~ G~^T + A_ak^T Z;
//     dA_ab = Z U^T, dA_ak = Z V^T, dA_rb = dY U^T, dA_rk = dY V^T (masked as the above);
//     dr~ = dY S~ + dA_rb b~ + dA_rk k~;  da~ = Z S~ + dA_ab b~ + dA_ak k~;
//     db~ = U G~ + dA_ab^T a~ + dA_rb^T r~;  dk~ = V G~ + dA_ak^T a~ + dA_rk^T r~;
//     the gradient of the state before is (G~ + dY^T r~ + Z^T a~) exp(m).
// What c_t moves, summed from the end, is the gradient of the log decays; what leaves the chunk is moved by the last.
//
// States are fp32 sums in registers, a row of tiles each warp, [value][key]; factors have eleven bits (tf32), and the
// inverse is fp32. Everything is kept transposed, value by token, so that what was found is the next left factor as it
// lies. The forward keeps one state in 64 tokens; the backward walks forward again from there, four chunks.

#include "wkv7_chunks.cuh"

namespace {

template <int WARPS>
struct ChunksForward : Chunks<WARPS> {
    using Base = Chunks<WARPS>;
    using Base::AK, Base::RB, Base::RK, Base::RT, Base::VT, Base::WIDE, Base::ROWS, Base::s;
    using Place = typename Base::Place;
    struct Own {
        Sum S[N / 8];
    };
    using Threads = Team<Own, WARPS>;
    static constexpr int YT = Base::COMMON, FLOATS = YT + C * WIDE;
    const float *start;
    void *y;
    float *end, *kept;  // kept may be null, if no backward will follow

    ON_GPU void work(int64_t block, Threads &team, float *shared) const {
        const Place place = this->place(block);
        Base::begin(team, shared);
        team.warps([&](int warp, Own &own) {
            Base::plain(own.S, place, warp, [&](int64_t at, float &x) { x = start[at]; });
        });
        for (int64_t t = 0, turn = 0; t < s.T; t += C) {
            if (kept && t % KEEP == 0) {
                float *to = kept + (block * s.segments(KEEP) + t / KEEP) * ROWS * N;
                team.warps([&](int warp, Own &own) {
                    Base::packed(own.S, to, warp, [](float &memory, float &x) { memory = x; });
                });
            }
            const Window whole = this->whole(t);
            const unsigned pieces = this->pieces(team, shared, place, whole, turn);
            const int count = Base::count(pieces);
            for (int n = 0; n < count; n++) {
                const Window at = Base::piece(whole, pieces, n);
                if (count > 1) this->decays(team, shared, place, at, turn++);
                this->load(team, shared, place, at, nullptr, 0, t + C);
                step(team, shared, at);
            }
            team.each([&](int thread) {
                for (int i = thread; i < whole.count * ROWS; i += Base::THREADS) {
                    const int64_t to = place.tokens.at(t + i / ROWS) + place.part * ROWS + i % ROWS;
                    put(y, to, s.half(V), shared[YT + i / ROWS * WIDE + i % ROWS]);
                }
            });
        }
        team.warps([&](int warp, Own &own) {
            Base::plain(own.S, place, warp, [&](int64_t at, float &x) { end[at] = x; });
        });
    }

    ON_GPU void step(Threads &team, float *shared, Window at) const {
        this->between(team, shared);
        team.warps([&](int warp, Own &own) {
            Base::times(own.S, shared + Base::MIDDLE);
            Sum U[2];
            Base::find_u(U, own.S, shared, warp);
#pragma unroll
            for (int n = 0; n < 2; n++) {
                Sum Y;
                clear(Y);
                Base::add_state(Y, own.S, shared + RT + n * 8 * LONG);
                Base::add_rows(Y, shared + VT, warp, shared + RK + n * 8 * SHORT, SHORT, true);
                Base::add_sums(Y, U, shared + RB + n * 8 * SHORT, SHORT, true);
                cells(Y, [&](int row, int column, float &x) {
                    if (at.has(n * 8 + column)) shared[YT + (n * 8 + column) * WIDE + warp * 16 + row] = x;
                });
            }
            Base::update(own.S, U, shared, warp);
            Base::times(own.S, shared + Base::LAST);
        });
    }
};

template <int WARPS>
struct ChunksBackward : Chunks<WARPS> {
    using Base = Chunks<WARPS>;
    using Base::AB, Base::AK, Base::RB, Base::RK, Base::M, Base::RT, Base::AT, Base::KT, Base::BT, Base::VT;
    using Base::WIDE, Base::ROWS, Base::PARTS, Base::THREADS, Base::s;
    using Place = typename Base::Place;
    struct Own {
        Sum S[N / 8], G[N / 8];
    };
    using Threads = Team<Own, WARPS>;
    static constexpr int YT = Base::COMMON, UT = YT + C * WIDE, ZT = UT + C * WIDE, DV = ZT + C * WIDE;
    static constexpr int SM = DV + C * WIDE, GM = SM + ROWS * LONG, ENDS = GM + ROWS * LONG, FOUND = ENDS + WARPS * N;
    static constexpr int FLOATS = FOUND + 4 * C * LONG;
    const float *kept;
    const void *dy;
    const float *dend;
    void *dr, *dw, *dk, *dv, *da, *db;  // but for dv, of each of PARTS parts, which are to be added up, if PARTS > 1
    float *dstart, *room;

    ON_GPU void work(int64_t block, Threads &team, float *shared) const {
        const Place place = this->place(block);
        Base::begin(team, shared);
        float *states = room + block * (KEEP / C) * ROWS * N;
        team.warps([&](int warp, Own &own) {
            Base::plain(own.G, place, warp, [&](int64_t at, float &x) { x = dend[at]; });
        });
        int64_t turn = 0;
        for (int64_t segment = s.segments(KEEP) - 1; segment >= 0; segment--) {
            const int64_t begin = segment * KEEP, chunks = ((s.T < begin + KEEP ? s.T : begin + KEEP) - begin + C - 1) / C;
            recall(team, kept + (block * s.segments(KEEP) + segment) * ROWS * N);
            // forward through all chunks but the last, then back through all
            for (int64_t job = 0; job < 2 * chunks - 1; job++) {
                const bool back = job >= chunks - 1;
                const int64_t chunk = back ? 2 * chunks - 2 - job : job;
                float *state = states + chunk * ROWS * N;
                if (job < chunks) {
                    team.warps([&](int warp, Own &own) {
                        Base::packed(own.S, state, warp, [](float &memory, float &x) { memory = x; });
                    });
                }
                through(team, shared, place, begin + chunk * C, back, state, turn);
            }
        }
        team.warps([&](int warp, Own &own) {
            Base::plain(own.G, place, warp, [&](int64_t at, float &x) { dstart[at] = x; });
        });
    }

    ON_GPU void recall(Threads &team, const float *from) const {
        team.warps([&](int warp, Own &own) {
            Base::packed(own.S, const_cast<float *>(from), warp, [](float &memory, float &x) { x = memory; });
        });
    }

    // The state, or its gradient, goes through a chunk. In pieces: for each gradient first the state once more up to
    // there.
    ON_GPU void through(Threads &team, float *shared, const Place &place, int64_t t, bool back, const float *state,
                        int64_t &turn) const {
        const Window whole = this->whole(t);
        const unsigned pieces = this->pieces(team, shared, place, whole, turn);
        const int count = Base::count(pieces);
        for (int goal = count - 1, n = 0; goal >= 0;) {
            const Window at = Base::piece(whole, pieces, n);
            if (count > 1) this->decays(team, shared, place, at, turn++);
            if (back && n == 0) recall(team, state);
            this->load(team, shared, place, at, dy, YT, back ? t - C : t + C);
            this->between(team, shared);
            team.warps([&](int warp, Own &own) { values(own, shared, warp, at, back && n == goal); });
            if (back && n == goal) gradients(team, shared, place, at);
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
                Base::outer(shared + which * AK, x, y, WIDE, ROWS / 8, which < 2, true);
            }
        });
        team.warps([&](int warp, Own &) {
#pragma unroll 1
            for (int i = warp; i < 4 * (N / 8); i += WARPS) keys(shared, i / (N / 8), i % (N / 8));
        });
        team.each([&](int thread) {
            for (int x = thread; x < N; x += THREADS) channel(shared, place, at, x);
            for (int i = thread; i < C * ROWS; i += THREADS)
                if (at.has(i / ROWS)) {
                    const int64_t to = place.tokens.at(at.t + i / ROWS) + place.part * ROWS + i % ROWS;
                    put(dv, to, s.half(V), shared[DV + i / ROWS * WIDE + i % ROWS]);
                }
        });
    }

    // A warp's rows. The state goes through the window; `now`, so does its gradient, and u, z and dv are found, and
    // what the end of the window moves.
    ON_GPU void values(Own &own, float *shared, int warp, Window at, bool now) const {
        if (now && at.count == 1) alone(own, shared, warp, at);
        Base::times(own.S, shared + Base::MIDDLE);
        Sum U[2];
        if (now) {
            Base::times(own.G, shared + Base::LAST);
            Base::lay(own.S, shared + SM, warp);
            Base::lay(own.G, shared + GM, warp);
        }
        Base::find_u(U, own.S, shared, warp);
        Base::update(own.S, U, shared, warp);
        if (!now) {
            Base::times(own.S, shared + Base::LAST);
            return;
        }
        if (at.count > 1) {
#pragma unroll
            for (int i = 0; i < N / 8; i++) {
                lanes([&](int, int, int l) {
                    for (int o = 0; o < 4; o++) own.S[i].x[l][o] *= own.G[i].x[l][o];
                });
                columns(own.S[i], [&](int column, float x) { shared[ENDS + warp * N + i * 8 + column] = x; });
            }
        }
        store(U, shared + UT, warp);
        Sum Z[2], D[2];
        from_end(D, own.G, shared, BT, RB, warp);
#pragma unroll
        for (int n = 0; n < 2; n++) clear(Z[n]), Base::add_sums(Z[n], D, shared + M + n * 8, SHORT, false);
        store(Z, shared + ZT, warp);
        from_end(D, own.G, shared, KT, RK, warp);
#pragma unroll
        for (int n = 0; n < 2; n++) {
            Base::add_sums(D[n], Z, shared + AK + n * 8, SHORT, false);
            cells(D[n], [&](int row, int column, float &x) {
                shared[DV + (n * 8 + column) * WIDE + warp * 16 + row] = x;
            });
        }
#pragma unroll
        for (int i = 0; i < N / 8; i++) {
            Base::add_rows(own.G[i], shared + YT, warp, shared + RT + i * 8, LONG, false);
            Base::add_sums(own.G[i], Z, shared + AT + i * 8, LONG, false);
        }
        Base::times(own.G, shared + Base::MIDDLE);
    }

    // Of a single token all that its decay moves is known: no difference of large numbers.
    ON_GPU static void alone(const Own &own, float *shared, int warp, Window at) {
#pragma unroll
        for (int i = 0; i < N / 8; i++) {
            Sum moved = own.S[i];
            lanes([&](int g, int t, int l) {
#pragma unroll
                for (int o = 0; o < 4; o++) {
                    const int x = i * 8 + 2 * t + o % 2;
                    const float y = shared[YT + at.first * WIDE + warp * 16 + g + o / 2 * 8];
                    const float r = shared[RT + at.first * LONG + x], G = own.G[i].x[l][o] * shared[Base::LAST + x];
                    moved.x[l][o] *= shared[Base::MIDDLE + x] * (G + r * y);
                }
            });
            columns(moved, [&](int column, float x) { shared[ENDS + warp * N + i * 8 + column] = x; });
        }
    }

    // G~ x~^T + dY^T A, transposed as all here, for x~ and A at these places
    ON_GPU static void from_end(Sum *D, const Sum *G, float *shared, int tokens, int matrix, int warp) {
#pragma unroll
        for (int n = 0; n < 2; n++) {
            clear(D[n]);
            Base::add_state(D[n], G, shared + tokens + n * 8 * LONG);
            Base::add_rows(D[n], shared + YT, warp, shared + matrix + n * 8, SHORT, false);
        }
    }

    ON_GPU static void store(Sum *x, float *to, int warp) {
#pragma unroll
        for (int n = 0; n < 2; n++)
            cells(x[n], [&](int row, int column, float &found) {
                to[(n * 8 + column) * WIDE + warp * 16 + row] = tf32(found);
            });
    }

    // dr~, da~, dk~ or db~ of 8 keys; the dA lie where the A lay
    ON_GPU static void keys(float *shared, int which, int tile) {
        const int first = which == 0 ? YT : which == 1 ? ZT : which == 2 ? VT : UT, second = which < 2 ? SM : GM;
        const int one = which == 1 ? AB : which == 2 ? RK : RB, other = which == 0 ? RK : which == 3 ? AB : AK;
        const int with_one = which < 2 ? BT : RT, with_other = which < 2 ? KT : AT;
        Sum sum;
        clear(sum);
#pragma unroll
        for (int o = 0; o < ROWS / 8; o++)
            multiply(sum, left(shared + first + o * 8, WIDE), right(shared + second + o * 8 * LONG + tile * 8, LONG));
#pragma unroll
        for (int o = 0; o < 2; o++) {
            const Left x = which < 2 ? left(shared + one + o * 8, SHORT) : left_turned(shared + one + o * 8 * SHORT, SHORT);
            multiply(sum, x, right(shared + with_one + o * 8 * LONG + tile * 8, LONG));
            const Left z = which < 2 ? left(shared + other + o * 8, SHORT) : left_turned(shared + other + o * 8 * SHORT, SHORT);
            multiply(sum, z, right(shared + with_other + o * 8 * LONG + tile * 8, LONG));
        }
        cells(sum, [&](int row, int column, float &x) {
            shared[FOUND + (which * C + row) * LONG + tile * 8 + column] = x;
        });
    }

    // the gradients of a channel, from the last token on
    ON_GPU void channel(float *shared, const Place &place, Window at, int x) const {
        const int64_t apart = PARTS > 1 ? place.part * s.B * s.T * s.H * N : 0;
        const auto half = [&](int tensor) { return PARTS == 1 && s.half(tensor); };
        const float middle = shared[Base::DECAY + (C / 2 - 1) * N + x];
        float end = 0.0f, by_next = 0.0f;
        for (int warp = 0; warp < WARPS; warp++) end += shared[ENDS + warp * N + x];
        float moved = end;
#pragma unroll 2
        for (int o = at.first + at.count - 1; o >= at.first; o--) {
            const int64_t to = apart + place.tokens.at(at.t + o) + x;
            const int from = o * LONG + x;
            const float sum = shared[Base::DECAY + o * N + x] - middle;
            const float before = (o ? shared[Base::DECAY + (o - 1) * N + x] : 0.0f) - middle;
            const float dr_ = shared[FOUND + from] * expf(sum), da_ = shared[FOUND + C * LONG + from] * expf(before);
            const float dk_ = shared[FOUND + 2 * C * LONG + from] * expf(-sum);
            const float db_ = shared[FOUND + 3 * C * LONG + from] * expf(-sum);
            // with the inputs as they are: rounded ones would cost half as much error again
            moved += by_next + dr_ * this->read(this->r, R, place, at, o, x);
            moved -= db_ * this->read(this->b, B_, place, at, o, x) + dk_ * this->read(this->k, K, place, at, o, x);
            by_next = da_ * this->read(this->a, A, place, at, o, x);
            if (at.count == 1) moved = end;
            put(dr, to, half(R), dr_), put(da, to, half(A), da_), put(dk, to, half(K), dk_), put(db, to, half(B_), db_);
            put(dw, to, half(W), -moved * rate_of(this->read(this->w, W, place, at, o, x)));
        }
    }
};

}  // namespace

// sizes: B T H N, a bit for each of r w k v a b that is in bf16, and into how many parts (1, 2, 4) each head is divided.
// Given back are 0, the GPU's error, or -1 for sizes that there is no kernel for: N must be 64.
extern "C" {

// floats that the forward keeps, and that the backward wants as room
int64_t wkv7_chunks_kept(const int64_t *z) { return chunks_kept(z); }

int64_t wkv7_chunks_room(const int64_t *z) { return chunks_room(z); }

// takes B T H N /r/w/k/v/a/b parts: r w k v a b B*T*H*N, start B*H*N*N, y B*T*H*N, end B*H*N*N, kept? any
int wkv7_chunks_forward(const int64_t *z, int64_t stream, const void *r, const void *w, const void *k, const void *v,
                        const void *a, const void *b, const float *start, void *y, float *end, float *kept) {
    if (z[3] != N) return -1;
    return divided<ChunksForward, ChunksBackward>(z[5], [&](auto forward, auto) {
        using Kernel = decltype(forward);
        return launch(Kernel{{{{z[0], z[1], z[2], z[3], z[4]}}, r, w, k, v, a, b}, start, y, end, kept},
                      z[0] * z[2] * z[5], stream);
    });
}

// dr dw dk da db are as their tensors for one part, else of as many as there are parts, in fp32: whoever calls adds up
// takes B T H N /r/w/k/v/a/b parts: r w k v a b B*T*H*N, kept any, dy B*T*H*N, dend B*H*N*N, dr dw dk parts*B*T*H*N,
// dv B*T*H*N, da db parts*B*T*H*N, dstart B*H*N*N, room any
int wkv7_chunks_backward(const int64_t *z, int64_t stream, const void *r, const void *w, const void *k, const void *v,
                         const void *a, const void *b, const float *kept, const void *dy, const float *dend, void *dr,
                         void *dw, void *dk, void *dv, void *da, void *db, float *dstart, float *room) {
    if (z[3] != N) return -1;
    return divided<ChunksForward, ChunksBackward>(z[5], [&](auto, auto backward) {
        using Kernel = decltype(backward);
        return launch(Kernel{{{{z[0], z[1], z[2], z[3], z[4]}}, r, w, k, v, a, b}, kept, dy, dend, dr, dw, dk, dv, da, db,
                             dstart, room},
                      z[0] * z[2] * z[5], stream);
    });
}

}  // extern "C"
