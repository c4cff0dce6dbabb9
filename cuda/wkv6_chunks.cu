// The recurrences of RWKV-6 and 5.2 and their gradients on tensor cores, 16 tokens at a time, for heads of 64 channels;
// rwkvpipe/kernel/wkv6.py has the references, and the same algebra in PyTorch.
//
// Decays may be anything down to 0, so no decay is divided by, and no factor is above 1: all are products of decays. A
// chunk is a tree of halves of 8, 4, 2 and 1 tokens. What the second half of a node hears of the first passes the
// border between them: r_t times the decays before t in the second half, with k_s times those after s in the first. A
// token is in one half of each size, so X_h, 16 rows, holds r or k of each, and A, what a token hears of those before
// it, is X_h X_h^T at the places of h (row and column differ first in the bit of h), with r . u . k of a token on the
// diagonal. With r~ and k~, which hold the decays from the chunk's begin on and to its end, and `over`, all of them:
//     Y = r~ S^T + A V;  the state after the chunk is S over + V^T k~.
//
// Backward, with G the gradient of the state after the chunk and D = dY V^T, below the diagonal and mirrored:
//     dV = k~ G^T + A^T dY, dr~ = dY S, dk~ = V G, dX_h = D_h X_h, dA_tt = v_t . dy_t,
//     and the gradient of the state before is G over + dY^T r~.
// A decay moves what passes it and nothing else: of each half the gradients of what comes to later tokens, or leaves
// earlier ones, and of the chunk S G over. All of it are sums of terms that have the decay as a factor: no differences
// of large numbers, and 0 where all is forgotten.
//
// States are fp32 sums in registers, a row of tiles each warp, [value][key]; factors have eleven bits (tf32). The
// forward keeps one state in 64 tokens; the backward walks forward again from there, four chunks.

#include "wkv6_chunks.cuh"

namespace {

template <int WARPS>
struct ChunksForward : Chunks6<WARPS> {
    using Base = Chunks6<WARPS>;
    using Base::A, Base::RT, Base::VT, Base::YT, Base::WIDE, Base::ROWS, Base::s;
    using Place = typename Base::Place;
    struct Own {
        Sum S[N / 8];
    };
    using Threads = Team<Own, WARPS>;
    static constexpr int FLOATS = Base::COMMON;
    const float *start;
    void *y;
    float *end, *kept;  // kept may be null, if no backward will follow

    ON_GPU void work(int64_t block, Threads &team, float *shared) const {
        const Place place = this->place(block);
        this->begin(team, shared);
        team.warps([&](int warp, Own &own) {
            Base::plain(own.S, place, warp, [&](int64_t at, float &x) { x = start[at]; });
        });
        for (int64_t t = 0; t < s.T; t += C) {
            float *to = kept && t % KEEP == 0 ? kept + (block * s.segments(KEEP) + t / KEEP) * ROWS * N : nullptr;
            this->load(team, shared, place, t, nullptr, false, t + C);
            team.warps([&](int warp, Own &own) {
                if (to) Base::packed(own.S, to, warp, [](float &memory, float &x) { memory = x; });
#pragma unroll 1
                for (int job = warp; job < JOBS; job += WARPS) Base::between(shared, job);
            });
            team.warps([&](int warp, Own &own) { step(own, shared, warp); });
            team.each([&](int thread) {
                for (int i = thread; i < this->count(t) * ROWS; i += Base::THREADS) {
                    const int64_t at = place.tokens.at(t + i / ROWS) + place.part * ROWS + i % ROWS;
                    put(y, at, s.half(V), shared[YT + i / ROWS * WIDE + i % ROWS]);
                }
            });
        }
        team.warps([&](int warp, Own &own) {
            Base::plain(own.S, place, warp, [&](int64_t at, float &x) { end[at] = x; });
        });
    }

    ON_GPU static void step(Own &own, float *shared, int warp) {
#pragma unroll
        for (int n = 0; n < 2; n++) {
            Sum Y;
            clear(Y);
            Base::add_state(Y, own.S, shared + RT + n * 8 * LONG);
            Base::add_rows(Y, shared + VT, warp, shared + A + n * 8 * SHORT, SHORT, true);
            cells(Y, [&](int row, int column, float &x) {
                shared[YT + (n * 8 + column) * WIDE + warp * 16 + row] = x;
            });
        }
        Base::update(own.S, shared, warp);
    }
};

template <int WARPS>
struct ChunksBackward : Chunks6<WARPS> {
    using Base = Chunks6<WARPS>;
    using Base::A, Base::X, Base::RT, Base::KT, Base::OWN, Base::VT, Base::YT, Base::OVER;
    using Base::WIDE, Base::ROWS, Base::PARTS, Base::THREADS, Base::s;
    using Place = typename Base::Place;
    struct Own {
        Sum S[N / 8], G[N / 8];
    };
    using Threads = Team<Own, WARPS>;
    static constexpr int DV = OWN;  // by then nobody reads what was there
    static constexpr int D = Base::COMMON, MET = D + HALVES * C * SHORT, SM = MET + C, GM = SM + ROWS * LONG;
    static constexpr int ENDS = GM + ROWS * LONG, DU = ENDS + WARPS * N, DW = DU + N, FLOATS = DW + N;
    const float *kept;
    const void *dy;
    const float *dend;
    void *dr, *dw, *dk, *dv;  // but for dv, of each of PARTS parts, which are to be added up, if PARTS > 1
    float *du, *dstart, *room;

    ON_GPU void work(int64_t block, Threads &team, float *shared) const {
        const Place place = this->place(block);
        float *states = room + block * (KEEP / C) * ROWS * N;
        this->begin(team, shared);
        team.each([&](int thread) {
            for (int i = thread; i < HALVES * C * SHORT; i += THREADS) shared[D + i] = 0.0f;
            for (int x = thread; x < N; x += THREADS) shared[DU + x] = shared[DW + x] = 0.0f;
        });
        team.warps([&](int warp, Own &own) {
            Base::plain(own.G, place, warp, [&](int64_t at, float &x) { x = dend[at]; });
        });
        for (int64_t segment = s.segments(KEEP) - 1; segment >= 0; segment--) {
            const int64_t begin = segment * KEEP, end = s.T < begin + KEEP ? s.T : begin + KEEP;
            const int64_t chunks = (end - begin + C - 1) / C;
            recall(team, kept + (block * s.segments(KEEP) + segment) * ROWS * N);
            for (int64_t chunk = 0; chunk < chunks; chunk++) {
                float *state = states + chunk * ROWS * N;
                const bool more = chunk + 1 < chunks;
                if (more) this->load(team, shared, place, begin + chunk * C, nullptr, true, begin + (chunk + 1) * C);
                team.warps([&](int warp, Own &own) {
                    Base::packed(own.S, state, warp, [](float &memory, float &x) { memory = x; });
                    if (more) Base::update(own.S, shared, warp);
                });
            }
            for (int64_t chunk = chunks - 1; chunk >= 0; chunk--) {
                recall(team, states + chunk * ROWS * N);
                back(team, shared, place, begin + chunk * C);
            }
        }
        team.warps([&](int warp, Own &own) {
            Base::plain(own.G, place, warp, [&](int64_t at, float &x) { dstart[at] = x; });
        });
        team.each([&](int thread) {
            for (int x = thread; x < N; x += THREADS) {
                const int64_t to = (place.part * s.B * s.H + place.head) * N + x;
                du[to] = shared[DU + x];
                if (this->one_w) static_cast<float *>(dw)[to] = shared[DW + x];
            }
        });
    }

    ON_GPU void recall(Threads &team, const float *from) const {
        team.warps([&](int warp, Own &own) {
            Base::packed(own.S, const_cast<float *>(from), warp, [](float &memory, float &x) { x = memory; });
        });
    }

    // the gradients of a chunk, from the state before it and the gradient of the one after it
    ON_GPU void back(Threads &team, float *shared, Place place, int64_t t) const {
        this->load(team, shared, place, t, dy, false, t - C);
        team.warps([&](int warp, Own &) {
#pragma unroll 1
            for (int job = warp; job < JOBS + 1; job += WARPS) {
                if (job < JOBS)
                    Base::between(shared, job);
                else
                    mirror(shared);
            }
        });
        team.warps([&](int warp, Own &own) { values(own, shared, warp); });
        team.warps([&](int warp, Own &) {
#pragma unroll 1
            for (int i = warp; i < (2 + HALVES) * (N / 8); i += WARPS) keys(shared, i / (N / 8), i % (N / 8));
        });
        team.each([&](int thread) {
            for (int i = thread; i < 2 * N; i += THREADS) channel(shared, place, t, i % N, i >= N);
        });
        team.each([&](int thread) {
            for (int i = thread; i < this->count(t) * ROWS; i += THREADS) {
                const int64_t to = place.tokens.at(t + i / ROWS) + place.part * ROWS + i % ROWS;
                put(dv, to, s.half(V), shared[DV + i / ROWS * WIDE + i % ROWS]);
            }
            for (int x = thread; x < N; x += THREADS) decays(shared, place, t, x);
        });
    }

    // dY V^T to the matrices of each size of halves, and its diagonal
    ON_GPU static void mirror(float *shared) {
#pragma unroll
        for (int n = 0; n < 2; n++) {
            Sum sum;
            Base::outer(sum, shared + YT, shared + VT + n * 8 * WIDE, WIDE, ROWS / 8);
            cells(sum, [&](int row, int column, float &found) {
                const int to = n * 8 + column, apart = row ^ to;
                const int h = (apart > 7) + (apart > 3) + (apart > 1);
                if (row > to)
                    shared[D + (h * C + row) * SHORT + to] = shared[D + (h * C + to) * SHORT + row] = tf32(found);
                else if (row == to)
                    shared[MET + row] = found;
            });
        }
    }

    // A warp's rows: dv, what passes all of the chunk, and the gradient of the state goes through it.
    ON_GPU static void values(Own &own, float *shared, int warp) {
        Base::lay(own.S, shared + SM, warp);
        Base::lay(own.G, shared + GM, warp);
#pragma unroll
        for (int i = 0; i < N / 8; i++) {
            lanes([&](int, int, int l) {
#pragma unroll
                for (int o = 0; o < 4; o++) own.S[i].x[l][o] *= own.G[i].x[l][o];
            });
            columns(own.S[i], [&](int column, float x) { shared[ENDS + warp * N + i * 8 + column] = x; });
        }
#pragma unroll
        for (int n = 0; n < 2; n++) {
            Sum found;
            clear(found);
            Base::add_state(found, own.G, shared + KT + n * 8 * LONG);
            Base::add_rows(found, shared + YT, warp, shared + A + n * 8, SHORT, false);
            cells(found, [&](int row, int column, float &x) {
                shared[DV + (n * 8 + column) * WIDE + warp * 16 + row] = x;
            });
        }
        Base::times(own.G, shared + OVER);
#pragma unroll
        for (int i = 0; i < N / 8; i++) Base::add_rows(own.G[i], shared + YT, warp, shared + RT + i * 8, LONG, false);
    }

    // Gradients of 8 keys of r~ (which: ALL), of k~ (ALL + 1) or of an X_h, in their places
    ON_GPU static void keys(float *shared, int which, int tile) {
        float *to = shared + X + which * C * LONG + tile * 8;
        Sum sum;
        clear(sum);
        if (which < HALVES) {
#pragma unroll
            for (int o = 0; o < 2; o++)
                multiply(sum, left(shared + D + which * C * SHORT + o * 8, SHORT), right(to + o * 8 * LONG, LONG));
            lanes_meet();
        } else {
            const float *tokens = shared + (which == ALL ? YT : VT);
            const float *state = shared + (which == ALL ? SM : GM) + tile * 8;
#pragma unroll
            for (int o = 0; o < ROWS / 8; o++)
                multiply(sum, left(tokens + o * 8, WIDE), right(state + o * 8 * LONG, LONG));
        }
        cells(sum, [&](int row, int column, float &x) { to[row * LONG + column] = x; });
    }

    // dr of a channel, or (after) dk; what a token's decay moves that way takes the place of its row in RT or KT.
    ON_GPU void channel(float *shared, Place place, int64_t t, int x, bool after) const {
        const int64_t apart = PARTS > 1 ? place.part * s.B * s.T * s.H * N : 0;
        float d[C], mine[C], other[C], passed[HALVES] = {}, through = 1.0f, own = 0.0f;
        const float u_ = this->bonus(place, x);
        Base::along(after, [&](int o, int token, int) {
            d[o] = expf(-this->rate(place, t, token, x));
            mine[o] = this->read(after ? this->k : this->r, after ? K : R, place, t, token, x);
            other[o] = this->read(after ? this->r : this->k, after ? R : K, place, t, token, x);
        });
        float *whole = shared + (after ? KT : RT) + x;
        Base::along(after, [&](int o, int token, int row) {
            float found = whole[row] * through;
            whole[row] = found * mine[o];
            through *= d[o];
#pragma unroll
            for (int h = 0; h < HALVES; h++) {
                if (o % (1 << h) == 0) passed[h] = 1.0f;
                if (o >> h & 1) {
                    float &at = shared[X + h * C * LONG + row + x];
                    const float moved = at * passed[h];
                    found += moved, at = moved * mine[o];
                }
                passed[h] *= d[o];
            }
            const float met = shared[MET + token] * other[o];
            own += met * mine[o];
            if (t + token >= s.T) return;
            const bool half = PARTS == 1 && s.half(after ? K : R);
            put(after ? dk : dr, apart + place.tokens.at(t + token) + x, half, found + u_ * met);
        });
        if (!after) shared[DU + x] += own;
        float sums[HALVES] = {}, sum = 0.0f;
#pragma unroll
        for (int o = C - 1; o >= 0; o--) {
            const int row = (after ? C - 1 - o : o) * LONG;
            const float here = whole[row];
            float moved = sum;
            sum += here;
#pragma unroll
            for (int h = 0; h < HALVES; h++) {
                if (o % (1 << h) == (1 << h) - 1) sums[h] = 0.0f;
                if (o >> h & 1) moved += sums[h], sums[h] += shared[X + h * C * LONG + row + x];
            }
            whole[row] = moved;
        }
    }

    // dw of a channel
    ON_GPU void decays(float *shared, Place place, int64_t t, int x) const {
        const int64_t apart = PARTS > 1 ? place.part * s.B * s.T * s.H * N : 0;
        float end = 0.0f, sum = 0.0f;
        for (int warp = 0; warp < WARPS; warp++) end += shared[ENDS + warp * N + x];
        end *= shared[OVER + x];
#pragma unroll
        for (int o = 0; o < C; o++) {
            if (t + o >= s.T) continue;
            const float moved = end + shared[RT + o * LONG + x] + shared[KT + o * LONG + x];
            const float found = -moved * this->rate(place, t, o, x);
            sum += found;
            if (!this->one_w) put(dw, apart + place.tokens.at(t + o) + x, PARTS == 1 && s.half(W), found);
        }
        shared[DW + x] += sum;
    }
};

}  // namespace

// sizes: B T H N, a bit for each of r w k v u that is in bf16, whether there is one w for all tokens, and into how many
// parts (1, 2, 4) each head is divided. Given back are 0, the GPU's error, or -1 for sizes that there is no kernel for:
// N must be 64.
extern "C" {

// floats that the forward keeps, and that the backward wants as room
int64_t wkv6_chunks_kept(const int64_t *z) { return chunks_kept(z); }

int64_t wkv6_chunks_room(const int64_t *z) { return chunks_room(z); }

// takes B T H N /r/w/k/v/u one_w parts: r B*T*H*N, w H*N if one_w else B*T*H*N, k v B*T*H*N, u H*N, start B*H*N*N, y
// B*T*H*N, end B*H*N*N, kept? any
int wkv6_chunks_forward(const int64_t *z, int64_t stream, const void *r, const void *w, const void *k, const void *v,
                        const void *u, const float *start, void *y, float *end, float *kept) {
    if (z[3] != N) return -1;
    return divided<ChunksForward, ChunksBackward>(z[6], [&](auto forward, auto) {
        using Kernel = decltype(forward);
        return launch(Kernel{{{{z[0], z[1], z[2], z[3], z[4]}}, z[5] != 0, r, w, k, v, u}, start, y, end, kept},
                      z[0] * z[2] * z[6], stream);
    });
}

// dr dw dk are as their tensors for one part, else of as many as there are parts, in fp32; du is (parts, B, H, N) in
// fp32, as is dw where there is one w for all tokens: whoever calls adds up
// takes B T H N /r/w/k/v/u one_w parts: r B*T*H*N, w H*N if one_w else B*T*H*N, k v B*T*H*N, u H*N, kept any, dy
// B*T*H*N, dend B*H*N*N, dr parts*B*T*H*N, dw parts*B*H*N if one_w else parts*B*T*H*N, dk parts*B*T*H*N, dv B*T*H*N,
// du parts*B*H*N, dstart B*H*N*N, room any
int wkv6_chunks_backward(const int64_t *z, int64_t stream, const void *r, const void *w, const void *k, const void *v,
                         const void *u, const float *kept, const void *dy, const float *dend, void *dr, void *dw,
                         void *dk, void *dv, float *du, float *dstart, float *room) {
    if (z[3] != N) return -1;
    return divided<ChunksForward, ChunksBackward>(z[6], [&](auto, auto backward) {
        using Kernel = decltype(backward);
        return launch(Kernel{{{{z[0], z[1], z[2], z[3], z[4]}}, z[5] != 0, r, w, k, v, u}, kept, dy, dend, dr, dw, dk,
                             dv, du, dstart, room},
                      z[0] * z[2] * z[6], stream);
    });
}

}  // extern "C"
