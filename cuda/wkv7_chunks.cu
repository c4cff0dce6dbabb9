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
// What c_t moves, summed from the end, is the gradient of the log decays. The last one moves what leaves the chunk: S~ G~,
// and b~ (U G~) + k~ (V G~) of all tokens, of which those after t are in the sum from the end with the other sign, and so
// are left out of both.
//
// States are fp32 sums in registers, a row of tiles each warp, [value][key]; factors have eleven bits (tf32), and the
// inverse is fp32. Everything is kept transposed, value by token, so that what was found is the next left factor as it
// lies. The forward keeps one state in 64 tokens; the backward walks forward again from there, four chunks.

#include <initializer_list>

#include "wkv7_backward.cuh"

namespace {

template <int WARPS, bool HALF>
struct Forward : Products<WARPS, HALF, false> {
    using Base = Products<WARPS, HALF, false>;
    using Base::RB, Base::RK, Base::SIZE, Base::RT, Base::AT, Base::VT, Base::WIDE, Base::ROWS, Base::s;
    using Place = typename Base::Place;
    struct Own {
        Sum S[N / 8];
    };
    using Threads = Team<Own, WARPS>;
    static constexpr int YT = Base::COMMON, STAGE = YT + C * WIDE, FLOATS = STAGE + Base::STAGED, BESIDE = WARPS == 4 ? 4 : 1;
    const float *start;
    void *y;
    float *end, *kept;  // kept may be null, if no backward will follow

    ON_GPU void work(int64_t block, Threads &team, float *shared) const {
        const Place place = this->place(block);
        team.warps([&](int warp, Own &own) {
            Base::plain(own.S, place, warp, [&](int64_t at, float &x) { x = start[at]; });
        });
        for (int64_t t = 0; t < s.T; t += C) {
            const Window whole = this->whole(t);
            unsigned pieces = 0;
            for (int n = 0, count = 1; n < count; n++) {
                const Window at = Base::piece(whole, pieces, n);
                if (HALF && (!t || pieces))
                    team.warps([&](int warp, Own &) {
                        this->ask(shared + STAGE, place, at, nullptr, warp);
                        arrived();
                    });
                const bool steep = this->load(team, shared, shared + STAGE, place, at, nullptr, true);
                if (steep && !pieces && whole.count > 1) {
                    pieces = this->pieces(team, place, whole), count = Base::count(pieces), n = -1;
                    continue;
                }
                if (n == count - 1)
                    team.alone([&](int warp, Own &) {
                        this->ask(shared + STAGE, place, this->whole(t + C), nullptr, warp);
                    });
                this->between(team, shared, true);
                const bool keeps = kept && t % KEEP == 0 && n == 0;
                float *to = keeps ? kept + (block * s.segments(KEEP) + t / KEEP) * ROWS * N : nullptr;
                team.warps([&](int warp, Own &own) {
                    if (to) Base::keep(own.S, to, warp);
                    step(own, shared, warp);
                    this->give(y, shared + YT, warp, place, at);
                    arrived();
                });
            }
        }
        team.warps([&](int warp, Own &own) {
            Base::plain(own.S, place, warp, [&](int64_t at, float &x) { end[at] = x; });
        });
    }

    ON_GPU static void step(Own &own, float *shared, int warp) {
        Sum X[2], Y[2], U[2];
        Left v[2], u[2];
        Base::values(v, shared + VT, warp);
        Base::times(own.S, shared + Base::MIDDLE);
        clear(X[0]), clear(X[1]), clear(Y[0]), clear(Y[1]);
#pragma unroll
        for (int i = 0; i < N / 8; i++) {
            const Left state = left_nearly(own.S[i]);
            Base::add_channels(X, state, shared + AT, i), Base::add_channels(Y, state, shared + RT, i);
        }
        Base::solve(U, X, v, shared);
        Base::factors(u, U);
#pragma unroll
        for (int n = 0; n < 2; n++) {
            Base::add_matrix(Y[n], v, shared + RK, n);
            Base::add_matrix(Y[n], u, shared + RB, n);
        }
        Base::places(Y, warp, [&](int at, float x) { shared[YT + at] = x; });
        Base::update(own.S, u, v, shared);
        Base::times(own.S, shared + Base::LAST);
    }
};

// of bf16 alone, at multiples of 16 bytes; and of anything
template <int WARPS>
struct ChunksForward : Forward<WARPS, true> {};
template <int WARPS>
struct ChunksBackward : Backward<WARPS, true> {};
template <int WARPS>
struct ChunksAnyForward : Forward<WARPS, false> {};
template <int WARPS>
struct ChunksAnyBackward : Backward<WARPS, false> {};

// Forward and Backward as types, for what the tensors are; -1 where a head cannot be divided so
template <class F>
int chosen(const int64_t *z, std::initializer_list<const void *> tensors, F f) {
    bool half = (z[4] | 1 << W) == 63;
    for (const void *each : tensors) half = half && wide(each);
    if (half) return divided<ChunksForward, ChunksBackward>(z[5], f);
    return divided<ChunksAnyForward, ChunksAnyBackward>(z[5], f);
}

}  // namespace

// sizes: B T H N, a bit for each of r w k v a b that is in bf16, and into how many parts (1, 2, 4) each head is divided.
// Given back are 0, the GPU's error, or -1 for sizes that there is no kernel for: N must be 64, and
// what is kept, and the room, begin at multiples of 16 bytes.
extern "C" {

// floats that the forward keeps, and that the backward wants as room
int64_t wkv7_chunks_kept(const int64_t *z) { return chunks_kept(z); }

int64_t wkv7_chunks_room(const int64_t *z) { return chunks_room(z); }

// takes B T H N /r/w/k/v/a/b parts: r w k v a b B*T*H*N, start B*H*N*N, y B*T*H*N, end B*H*N*N, kept? any
int wkv7_chunks_forward(const int64_t *z, int64_t stream, const void *r, const void *w, const void *k, const void *v,
                        const void *a, const void *b, const float *start, void *y, float *end, float *kept) {
    if (z[3] != N || !wide(kept)) return -1;
    return chosen(z, {r, w, k, v, a, b, y}, [&](auto forward, auto) {
        using Kernel = decltype(forward);
        return launch(Kernel{{{{{{z[0], z[1], z[2], z[3], z[4]}}, r, w, k, v, a, b}}, start, y, end, kept}},
                      z[0] * z[2] * z[5], stream);
    });
}

// dr dw dk da db are as their tensors for one part, else of as many as there are parts, in fp32: whoever calls adds up
// takes B T H N /r/w/k/v/a/b parts: r w k v a b B*T*H*N, kept any, dy B*T*H*N, dend B*H*N*N, dr dw dk parts*B*T*H*N,
// dv B*T*H*N, da db parts*B*T*H*N, dstart B*H*N*N, room any
int wkv7_chunks_backward(const int64_t *z, int64_t stream, const void *r, const void *w, const void *k, const void *v,
                         const void *a, const void *b, const float *kept, const void *dy, const float *dend, void *dr,
                         void *dw, void *dk, void *dv, void *da, void *db, float *dstart, float *room) {
    if (z[3] != N || !wide(kept, room)) return -1;
    return chosen(z, {r, w, k, v, a, b, dy, dr, dw, dk, dv, da, db}, [&](auto, auto backward) {
        using Kernel = decltype(backward);
        const Kernel kernel{{{{{{{z[0], z[1], z[2], z[3], z[4]}}, r, w, k, v, a, b}}, dr, dw, dk, dv, da, db},
                             kept, dy, dend, dstart, room}};
        return launch(kernel, z[0] * z[2] * z[5], stream);
    });
}

}  // extern "C"
