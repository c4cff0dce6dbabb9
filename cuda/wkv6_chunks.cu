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

template <int WARPS, bool HALF>
struct ChunksForward : Chunks6<WARPS, HALF, false> {
    using Base = Chunks6<WARPS, HALF, false>;
    using Base::A, Base::RT, Base::KT, Base::VT, Base::YT, Base::LINE, Base::SIDE, Base::WIDE, Base::ROWS, Base::s;
    using Where = typename Base::Where;
    struct Own {
        Sum S[N / 8], Y[2];
    };
    using Threads = Team<Own, WARPS>;
    static constexpr int FLOATS = Base::RATE;
    const float *start;
    void *y;
    float *end, *kept;  // kept may be null, if no backward will follow

    ON_GPU void work(int64_t block, Threads &team, float *shared) const {
        const Where where = this->where(block);
        this->begin(team, shared, where);
        team.warps([&](int warp, Own &own) {
            Base::plain(own.S, where, warp, [&](int64_t at, float &x) { x = start[at]; });
        });
        for (int64_t t = 0;; t += C) {
            team.warps([&](int warp, Own &own) {
                typename Base::Read read[LANES];
                if (t < s.T) this->template gather<false>(read, where, t, warp, nullptr);
                if (t > 0) finish(own, shared, warp, where, t - C);
                if (t < s.T) this->template spread<false>(read, shared, this->count(t), warp);
            });
            if (t >= s.T) break;
            team.each([&](int thread) {
                this->ask(thread, where, t + C, nullptr);
                Base::factors(shared, thread);
            });
            float *to = kept && t % KEEP == 0 ? kept + (block * s.segments(KEEP) + t / KEEP) * ROWS * N : nullptr;
            team.warps([&](int warp, Own &own) {
                if (to) Base::keep(own.S, to, warp);
#pragma unroll 1
                for (int h = warp; h < HALVES; h += WARPS) Base::between(shared, h);
#pragma unroll
                for (int n = 0; n < 2; n++) {
                    clear(own.Y[n]);
                    Base::add_state(own.Y[n], own.S, shared + RT + n * 8 * LINE);
                }
                Base::update(own.S, shared, warp, shared + VT, shared + KT);
            });
        }
        team.warps([&](int warp, Own &own) {
            Base::plain(own.S, where, warp, [&](int64_t at, float &x) { end[at] = x; });
        });
    }

    // y of a warp's rows, which what its tokens hear of each other is added to
    ON_GPU void finish(Own &own, float *shared, int warp, const Where &where, int64_t t) const {
        Base::over_tokens(shared + VT, warp, [&](int o, const Left &x) {
#pragma unroll
            for (int n = 0; n < 2; n++) {
                Right y;
                lanes([&](int g, int i, int l) {
                    const float *at = shared + A + (n * 8 + g) * SIDE + o * 8 + i;
                    y.x[l][0] = at[0], y.x[l][1] = at[4];
                });
                multiply(own.Y[n], x, y);
            }
        });
#pragma unroll
        for (int n = 0; n < 2; n++) {
            cells(own.Y[n], [&](int row, int column, float &x) {
                shared[YT + (n * 8 + column) * WIDE + warp * 16 + row] = x;
            });
        }
        this->write(y, shared, warp, where, t);
    }
};

template <int WARPS, bool HALF>
struct ChunksBackward : Chunks6<WARPS, HALF, true> {
    using Base = Chunks6<WARPS, HALF, true>;
    using Base::A, Base::X, Base::RT, Base::KT, Base::VT, Base::YT, Base::OVER, Base::DECAY, Base::RATE, Base::BONUS;
    using Base::LINE, Base::SIDE, Base::MET, Base::FOUND, Base::ENDS, Base::DU, Base::DW;
    using Base::WIDE, Base::ROWS, Base::PARTS, Base::THREADS, Base::EACH, Base::s;
    static constexpr int BESIDE = HALF && WARPS == 4 ? 3 : 0;
    using Where = typename Base::Where;
    struct Own {
        Sum S[N / 8], G[N / 8], dr[N / 8 / WARPS];
    };
    using Threads = Team<Own, WARPS>;
    static constexpr int FLOATS = DW + 2 * N;
    const float *kept;
    const void *dy;
    const float *dend;
    void *dr, *dw, *dk, *dv;  // but for dv, of each of PARTS parts, which are to be added up, if PARTS > 1
    float *du, *dstart, *room;

    ON_GPU void work(int64_t block, Threads &team, float *shared) const {
        const Where where = this->where(block);
        float *states = room + block * (KEEP / C) * ROWS * N;
        this->begin(team, shared, where);
        team.warps([&](int warp, Own &own) {
            lanes([&](int g, int i, int) {
                const int thread = warp * 32 + g * 4 + i;
                for (int x = thread; x < 3 * N; x += THREADS) shared[DU + x] = 0.0f;
            });
            Base::plain(own.G, where, warp, [&](int64_t at, float &x) { x = dend[at]; });
        });
        for (int64_t segment = s.segments(KEEP) - 1; segment >= 0; segment--) {
            const int64_t begin = segment * KEEP, end = s.T < begin + KEEP ? s.T : begin + KEEP;
            const int chunks = static_cast<int>((end - begin + C - 1) / C);
            const float *first = kept + (block * s.segments(KEEP) + segment) * ROWS * N;
            forth(team, shared, where, begin, chunks, first, states);
            for (int chunk = chunks - 1;; chunk--) {
                const int64_t t = begin + chunk * C;
                team.warps([&](int warp, Own &own) {
                    typename Base::Read read[LANES];
                    if (chunk >= 0) {
                        this->template gather<false>(read, where, t, warp, dy);
                        if (chunk < chunks - 1)
                            Base::recall(own.S, states + chunk * ROWS * N, warp);
                        else if (chunk == 0)
                            Base::recall(own.S, first, warp);
                        else
                            Base::update(own.S, shared, warp, shared + VT, shared + KT);
                    }
                    if (chunk < chunks - 1) finish(shared, where, t + C, warp);
                    lanes_meet();
                    if (chunk >= 0) this->template spread<false>(read, shared, this->count(t), warp);
                });
                if (chunk < 0) break;
                back(team, shared, where, t);
            }
        }
        team.warps([&](int warp, Own &own) {
            Base::plain(own.G, where, warp, [&](int64_t at, float &x) { dstart[at] = x; });
            lanes([&](int g, int i, int) {
                for (int x = warp * 32 + g * 4 + i; x < N; x += THREADS) {
                    const int64_t to = (where.part * s.B * s.H + where.head) * N + x;
                    du[to] = shared[DU + x];
                    if (this->one_w) static_cast<float *>(dw)[to] = shared[DW + x] + shared[DW + N + x];
                }
            });
        });
    }

    // The states before all chunks of a segment but the last; what that needs of the one before stays in shared memory.
    ON_GPU void forth(Threads &team, float *shared, const Where &where, int64_t t, int chunks, const float *first,
                      float *states) const {
        for (int chunk = 0; chunk < chunks - 1; chunk++, t += C) {
            team.warps([&](int warp, Own &own) {
                typename Base::Read read[LANES];
                this->template gather<true>(read, where, t, warp, nullptr);
                if (chunk == 0)
                    Base::recall(own.S, first, warp);
                else
                    Base::update(own.S, shared, warp, shared + VT, shared + KT);
                Base::keep(own.S, states + chunk * ROWS * N, warp);
                lanes_meet();
                this->template spread<true>(read, shared, this->count(t), warp);
            });
            team.each([&](int thread) {
                this->ask(thread, where, t + C, nullptr);
                for (int i = thread; i < 2 * N; i += THREADS) Base::endings(shared, i % N, i / N);
            });
        }
    }

    // the gradients of a chunk, from the state before it and the gradient of the one after it
    ON_GPU void back(Threads &team, float *shared, const Where &where, int64_t t) const {
        team.warps([&](int warp, Own &own) {
            lanes([&](int g, int i, int) {
                this->ask(warp * 32 + g * 4 + i, where, t - C, dy);
                Base::factors(shared, warp * 32 + g * 4 + i);
            });
            Base::lay(own.S, shared, warp);
            Base::ends(own.S, own.G, shared, warp);
        });
        team.warps([&](int warp, Own &own) {
#pragma unroll 1
            for (int job = warp; job < HALVES + 2; job += WARPS) {
                if (job < HALVES)
                    Base::between(shared, job);
                else
                    Base::heard(shared, job - HALVES);
            }
            Base::keys(own.dr, shared + YT, shared, warp);
        });
        team.warps([&](int warp, Own &own) { values(own, shared, warp, where, t); });
        team.warps([&](int warp, Own &own) {
            Sum dk[N / 8 / WARPS];
            Base::keys(dk, shared + VT, shared, warp);
#pragma unroll
            for (int i = 0; i < N / 8 / WARPS; i++) {
                const int x = (warp * (N / 8 / WARPS) + i) * 8;
                cells(own.dr[i], [&](int row, int column, float &found) { shared[RT + row * LINE + x + column] = found; });
                cells(dk[i], [&](int row, int column, float &found) { shared[KT + row * LINE + x + column] = found; });
            }
#pragma unroll 1
            for (int h = warp; h < HALVES; h += WARPS) Base::halves(shared, h);
        });
        team.each([&](int thread) {
            for (int i = thread; i < 2 * N; i += THREADS) {
                if (i < N)
                    channel<false>(shared, i, this->count(t));
                else
                    channel<true>(shared, i - N, this->count(t));
            }
        });
    }

    // A warp's rows: dv, and the gradient of the state goes through the chunk.
    ON_GPU void values(Own &own, float *shared, int warp, const Where &where, int64_t t) const {
        Sum found[2];
        Base::lay(own.G, shared, warp);
#pragma unroll
        for (int n = 0; n < 2; n++) {
            clear(found[n]);
            Base::add_state(found[n], own.G, shared + KT + n * 8 * LINE);
        }
        Base::over_tokens(shared + YT, warp, [&](int o, const Left &x) {
#pragma unroll
            for (int n = 0; n < 2; n++) multiply(found[n], x, apart(shared + A + o * 8 * SIDE + n * 8, SIDE));
        });
        Base::update(own.G, shared, warp, shared + YT, shared + RT);
        lanes_meet();
#pragma unroll
        for (int n = 0; n < 2; n++)
            cells(found[n], [&](int row, int column, float &x) {
                shared[YT + (n * 8 + column) * WIDE + warp * 16 + row] = x;
            });
        this->write(dv, shared, warp, where, t);
    }

    // dr of a channel, or (AFTER) dk; what a token's decay moves that way takes the place of its row in RT or KT.
    template <bool AFTER>
    ON_GPU void channel(float *shared, int x, int count) const {
        float all[C], part[HALVES][C], passed[HALVES] = {}, through = 1.0f;
        Base::template along<AFTER>([&](int o, int token) {
            const float d = shared[DECAY + token * N + x];
            all[o] = through;
            through *= d;
#pragma unroll
            for (int h = 0; h < HALVES; h++) {
                if (o % (1 << h) == 0) passed[h] = 1.0f;
                if (o >> h & 1) part[h][o] = passed[h];
                passed[h] *= d;
            }
        });
        const float bonus = shared[BONUS + x];
        float met[C];
#pragma unroll
        for (int o = 0; o < C; o++) met[o] = quad(shared + MET + o / 4 * 4).x[o % 4];
        float end = 0.0f, own = 0.0f, sums[HALVES] = {}, sum = 0.0f, total = 0.0f;
        if (!AFTER) {
#pragma unroll
            for (int warp = 0; warp < WARPS; warp++) end += shared[ENDS + warp * N + x];
            end *= shared[OVER + x];
        }
        // from the token that comes last, as what a decay moves is the sum of what comes after
        Base::template along<!AFTER>([&](int turn, int token) {
            const int o = C - 1 - turn, raw = token * N + x;
            const float mine = shared[(AFTER ? Base::RAW_K : Base::RAW_R) + raw];
            const float other = shared[(AFTER ? Base::RAW_R : Base::RAW_K) + raw];
            float &whole = shared[(AFTER ? KT : RT) + token * LINE + x];
            const float passing = whole * all[o], both = met[token] * other;
            float found = passing, moved = end + sum;
            sum += passing * mine;
#pragma unroll
            for (int h = 0; h < HALVES; h++) {
                if (o % (1 << h) == (1 << h) - 1) sums[h] = 0.0f;
                if (o >> h & 1) {
                    const float half = shared[X + (h * C + token) * LINE + x] * part[h][o];
                    found += half, moved += sums[h], sums[h] += half * mine;
                }
            }
            own += both * mine;
            whole = moved;
            if (token < count) total += moved;
            shared[FOUND + (AFTER ? C * N : 0) + raw] = found + bonus * both;
        });
        if (!AFTER) shared[DU + x] += own;
        if (this->one_w) shared[DW + (AFTER ? N : 0) + x] -= total * shared[RATE + x];
    }

    // What was found of a chunk's r, w and k is written.
    ON_GPU void finish(float *shared, const Where &where, int64_t t, int warp) const {
        const int64_t apart = PARTS > 1 ? where.part * s.B * s.T * s.H * N : 0;
        const int count = this->count(t);
        lanes([&](int g, int i, int) {
            const int thread = warp * 32 + g * 4 + i, x = Base::channel(thread);
#pragma unroll
            for (int n = 0; n < EACH; n++) {
                const int o = Base::token(thread, n);
                if (o >= count) continue;
                const int64_t to = apart + where.tokens.at(t + o) + x;
                const float *found = shared + FOUND + o * N + x;
                put(dr, to, PARTS == 1 && this->half(R), quad(found), this->narrow());
                put(dk, to, PARTS == 1 && this->half(K), quad(found + C * N), this->narrow());
                if (this->one_w) continue;
                const Quad before = quad(shared + RT + o * LINE + x), after = quad(shared + KT + o * LINE + x);
                Quad moved = quad(shared + RATE + o * N + x);
#pragma unroll
                for (int c = 0; c < 4; c++) moved.x[c] *= -(before.x[c] + after.x[c]);
                put(dw, to, PARTS == 1 && this->half(W), moved, this->narrow());
            }
        });
    }
};

template <int WARPS>
using AnyForward = ChunksForward<WARPS, false>;
template <int WARPS>
using AnyBackward = ChunksBackward<WARPS, false>;
template <int WARPS>
using HalfForward = ChunksForward<WARPS, true>;
template <int WARPS>
using HalfBackward = ChunksBackward<WARPS, true>;

// f of the kernels for these sizes and tensors: those for r, k and v in bf16, or those for any
template <class F>
int chosen(const int64_t *z, bool wide, F f) {
    constexpr int64_t HALF = 1 << R | 1 << K | 1 << V;
    if (z[3] != N) return -1;
    if (wide && (z[4] & HALF) == HALF) return divided<HalfForward, HalfBackward>(z[6], f);
    return divided<AnyForward, AnyBackward>(z[6], f);
}

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
    const bool all = wide(r, w, k, v, y);
    if (!wide(kept)) return -1;
    return chosen(z, all, [&](auto forward, auto) {
        using Kernel = decltype(forward);
        return launch(Kernel{{{{z[0], z[1], z[2], z[3], z[4]}}, z[5] != 0, all, r, w, k, v, u}, start, y, end, kept},
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
    const bool all = wide(r, w, k, v, dy, dr, dw, dk, dv);
    if (!wide(kept, room)) return -1;
    return chosen(z, all, [&](auto, auto backward) {
        using Kernel = decltype(backward);
        return launch(Kernel{{{{z[0], z[1], z[2], z[3], z[4]}}, z[5] != 0, all, r, w, k, v, u}, kept, dy, dend, dr, dw,
                             dk, dv, du, dstart, room},
                      z[0] * z[2] * z[6], stream);
    });
}

}  // extern "C"
