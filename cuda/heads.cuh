// What surrounds RWKV's recurrences head by head on a GPU, in one pass each, with its gradient; rwkvpipe/kernel/blend.py
// and gate.py have the formulas in PyTorch. Tensors are (tokens, D) with D = H N channels, rows that all tokens share
// (D), each in fp32 or bf16; all in between is fp32. A token's numbers do not depend on the tokens beside it.
//
// A head is a power of two of threads' beside each other, four channels each, of a run of tokens; what is summed over a
// head goes from thread to thread, in one order.

#pragma once

#include "grid.cuh"

namespace {

constexpr int WIDTH = 256, EACH = 4, WIDEST = 128;

ON_GPU float log_sigmoid(float x) { return (x < 0.0f ? x : 0.0f) - log1pf(expf(-fabsf(x))); }

// `KINDS`: the tensors whose kinds Way may know
template <class Way, int64_t KINDS>
struct Heads {
    static constexpr int THREADS = WIDTH, FLOATS = 0;
    int64_t tokens, H, N, run, halves;
    int shift;  // two to this are the threads of a head

    EITHER int64_t blocks() const { return ((tokens + run - 1) / run * H + (WIDTH >> shift) - 1) / (WIDTH >> shift); }
    EITHER int lanes() const { return 1 << shift; }
    ON_GPU bool half(int tensor) const {
        return (Way::HALVES != ANY && KINDS >> tensor & 1 ? Way::HALVES : halves) >> tensor & 1;
    }

    // Where a thread is: at the first of `count` channels of a head, for `left` tokens more, in the tensors at `at`, in
    // those of one number a head at `mark`.
    struct Place {
        int64_t channel, run, at, mark;
        int count, left;
        bool first;  // of a head's threads
    };

    ON_GPU Place place(int64_t block, int thread) const {
        const int64_t number = (block * WIDTH + thread) >> shift, head = number % H, begin = number / H * run;
        const int lane = thread & (lanes() - 1), n = static_cast<int>(N) - lane * EACH;
        const int64_t channel = head * N + lane * EACH, left = tokens - begin;
        return {channel, number / H, begin * H * N + channel, begin * H + head, n < 0 ? 0 : n < EACH ? n : EACH,
                static_cast<int>(left < 0 ? 0 : left < run ? left : run), lane == 0};
    }

    ON_GPU bool there(const Place &place) const { return place.left > 0 && place.count > 0; }

    // What a kernel does with its block: token by token it begins, the threads of a head add up what they have, it ends.
    template <class Kernel, class Threads, class AddUp>
    ON_GPU static void walk(const Kernel &kernel, int64_t block, Threads &threads, AddUp add_up) {
        using Own = typename Kernel::Own;
        threads.alone([&](int thread, Own &own) {
            own.at = kernel.place(block, thread);
            kernel.rows(own.by, own.at);
        });
        for (int64_t t = 0; t < kernel.run; t++) {
            threads.alone([&](int, Own &own) {
                kernel.clear(own);
                if (kernel.there(own.at)) kernel.begin(own);
            });
            add_up();
            threads.alone([&](int, Own &own) {
                if (kernel.there(own.at)) kernel.end(own);
                kernel.on(own.at);
            });
        }
    }

    ON_GPU void on(Place &place) const { place.left--, place.at += H * N, place.mark += H; }

    ON_GPU void from(float *x, const void *tensor, int which, const Place &place, int64_t at) const {
        if constexpr (Way::WIDE == EACH) {
            fetch<EACH>(x, tensor, at, half(which));
        } else {
#pragma unroll
            for (int c = 0; c < EACH; c++) x[c] = c < place.count ? get(tensor, at + c, half(which)) : 0.0f;
        }
    }

    ON_GPU void from(float *x, const void *tensor, int which, const Place &place) const {
        from(x, tensor, which, place, place.at);
    }

    ON_GPU void row(float *x, const void *tensor, int which, const Place &place) const {
        if (place.count) from(x, tensor, which, place, place.channel);
    }

    ON_GPU void into(void *tensor, int which, const Place &place, const float *x) const {
        if constexpr (Way::WIDE == EACH) {
            lay_down<EACH>(tensor, place.at, half(which), x);
        } else {
#pragma unroll
            for (int c = 0; c < EACH; c++)
                if (c < place.count) put(tensor, place.at + c, half(which), x[c]);
        }
    }

    // (runs, COUNT, D): what a thread found for its channels' rows
    template <int COUNT>
    ON_GPU void keep(float *sums, const Place &place, const float (*found)[EACH]) const {
        if (place.run * run >= tokens) return;
#pragma unroll
        for (int i = 0; i < COUNT; i++)
#pragma unroll
            for (int c = 0; c < EACH; c++)
                if (c < place.count) sums[(place.run * COUNT + i) * H * N + place.channel + c] = found[i][c];
    }
};

// `least`: tokens of a run
template <class Way, int64_t KINDS>
Heads<Way, KINDS> heads(const int64_t *z, int64_t least) {
    int shift = 0;
    while (EACH << shift < z[2]) shift++;
    return {z[0], z[1], z[2], run_of(z[0], z[1] * z[2], least), z[3], shift};
}

}  // namespace
