// Sums over the threads of a block, and what stands before a token's matrices on a GPU: the mean of a row and one by
// the root of its variance, and rows of the embedding. All sums are fp32 in one order.

#pragma once

#include "plain.cuh"

namespace {

constexpr int WIDTH = 256, WARP = 32, WARPS = WIDTH / WARP, ACROSS = 4 * WIDTH;

#ifdef __CUDACC__
// numbers of a lane's first N of x, each summed with the lane `APART` away, which keeps the other half of them
template <int N, int APART>
ON_GPU void halve(float *x, int lane) {
    const bool upper = lane & APART;
#pragma unroll
    for (int i = 0; i < (N + 1) / 2; i++) {
        const float mine = N > 1 && upper ? x[i + N / 2] : x[i], other = N > 1 && !upper ? x[i + N / 2] : x[i];
        x[i] = mine + __shfl_xor_sync(0xffffffffu, other, APART);
    }
    if constexpr (APART > 1) halve<(N + 1) / 2, APART / 2>(x, lane);
}
#endif

// Each of MANY numbers of of(what a thread keeps), a power of two up to 32, summed over a warp: the first of them
// becomes the sum of number lane / (32 / MANY). That takes a third of the exchanges that sums in all lanes would.
template <int MANY, class Threads, class Of>
ON_GPU void sum_up(Threads &threads, Of of) {
#ifdef __CUDACC__
    halve<MANY, WARP / 2>(of(threads.own), static_cast<int>(threadIdx.x) % WARP);
#else
    for (int first = 0; first < WIDTH; first += WARP) {
        float sums[WARP][MANY];
        for (int l = 0; l < WARP; l++) memcpy(sums[l], of(threads.own[first + l]), sizeof sums[l]);
        for (int apart = WARP / 2; apart; apart /= 2)
            for (int l = 0; l < WARP; l++)
                for (int i = 0; i < MANY && !(l & apart); i++)
                    sums[l][i] = sums[l ^ apart][i] = sums[l][i] + sums[l ^ apart][i];
        for (int l = 0; l < WARP; l++) of(threads.own[first + l])[0] = sums[l][l / (WARP / MANY)];
    }
#endif
}

// the same, each warp's sums to `to`, (WARPS, MANY)
template <int MANY, class Threads, class Of>
ON_GPU void sum_to(Threads &threads, float *to, Of of) {
    sum_up<MANY>(threads, of);
    threads.each([&](int thread, auto &own) {
        const int lane = thread % WARP;
        if (lane % (WARP / MANY) == 0) to[thread / WARP * MANY + lane / (WARP / MANY)] = of(own)[0];
    });
}

template <int MANY>
ON_GPU float of_warps(const float *sums, int number) {
    float total = 0.0f;
#pragma unroll
    for (int w = 0; w < WARPS; w++) total += sums[w * MANY + number];
    return total;
}

// The mean of each row of x, and one by the root of its variance: of `rows` rows of n numbers, a multiple of four, into
// `found` (2, ROWS); `room` has 2 WARPS ROWS numbers. own.sums has ROWS.
template <int ROWS, class Threads>
ON_GPU void moments(Threads &threads, float *found, float *room, const float *x, int n, int rows) {
    float *squares = room + WARPS * ROWS;
    const float by = 1.0f / static_cast<float>(n);
    const auto of = [](auto &own) { return own.sums; };
    const auto add = [&](auto from, auto squared) {
        threads.alone([&](int thread, auto &own) {
#pragma unroll
            for (int r = 0; r < ROWS; r++) {
                own.sums[r] = 0.0f;
                const float mean = from(r);
                for (int c = thread * 4; c < n && r < rows; c += ACROSS) {
                    float here[4];
                    fetch<4>(here, x + static_cast<int64_t>(r) * n, c, false);
#pragma unroll
                    for (int i = 0; i < 4; i++) {
                        const float away = here[i] - mean;
                        own.sums[r] += decltype(squared)::value ? away * away : away;
                    }
                }
            }
        });
    };
    add([](int) { return 0.0f; }, std::false_type());
    sum_to<ROWS>(threads, room, of);
    add([&](int r) { return of_warps<ROWS>(room, r) * by; }, std::true_type());
    sum_to<ROWS>(threads, squares, of);
    threads.each([&](int thread, auto &) {
        if (thread >= ROWS) return;
        found[thread] = of_warps<ROWS>(room, thread) * by;
        found[ROWS + thread] = 1.0f / sqrtf(of_warps<ROWS>(squares, thread) * by + 1e-5f);
    });
}

struct Norm {
    const float *weight, *bias;  // or null: numbers as they are
};

// ids to rows of the embedding, normalised; of an id that is none to what is no number
struct Embed {
    static constexpr int THREADS = WIDTH, FLOATS = 2 + 2 * WARPS;
    struct Own {
        float sums[1];
    };
    using Threads = Block<Own, THREADS>;
    int64_t D, V;
    const int64_t *ids;
    const float *embedding;
    Norm norm;
    float *x;

    ON_GPU void work(int64_t row, Threads &threads, float *shared) const {
        take_turn();
        const int64_t id = ids[row];
        const bool there = id >= 0 && id < V;
        const float *from = embedding + (there ? id * D : 0);
        if (norm.weight) moments<1>(threads, shared, shared + 2, from, static_cast<int>(D), 1);
        threads.alone([&](int thread, Own &) {
            for (int64_t c = thread; c < D; c += THREADS) {
                float y = from[c];
                if (norm.weight) y = (y - shared[0]) * shared[1] * norm.weight[c] + norm.bias[c];
                x[row * D + c] = there ? y : nanf("");
            }
        });
    }
};

}  // namespace
