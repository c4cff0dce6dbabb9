// What surrounds the recurrences channel by channel on a GPU, in one pass each, with its gradient;
// rwkvpipe/kernel/blend.py and gate.py have the formulas in PyTorch. Tensors are in fp32 or bf16, sums in fp32. Where
// all are of kinds that come often and begin at a multiple of 16 bytes, a thread has four channels, else one.

#include "grid.cuh"

namespace {

constexpr int MOST = 6;  // mixes of one input
constexpr int WIDTH = 256;
constexpr int WIDE = 4;  // channels of a thread, where tensors allow it

struct Nothing {};

// (tokens, D), divided among threads: each has WIDE channels of a run of tokens
template <class Way>
struct Channels : Way {
    using Way::WIDE;
    static constexpr int THREADS = WIDTH, FLOATS = 0;
    using Threads = Block<Nothing, WIDTH>;
    int64_t tokens, D, run, halves;

    EITHER int64_t blocks() const { return ((tokens + run - 1) / run * (D / WIDE) + WIDTH - 1) / WIDTH; }
    ON_GPU bool half(int tensor) const { return (Way::HALVES == ANY ? halves : Way::HALVES) >> tensor & 1; }

    // f(first token of a run, the one after its last, first channel)
    template <class F>
    ON_GPU void over(int64_t block, Threads &threads, F f) const {
        threads.alone([&](int thread, Nothing &) {
            const int64_t number = block * WIDTH + thread, begin = number / (D / WIDE) * run;
            if (begin < tokens) f(begin, begin + run < tokens ? begin + run : tokens, number % (D / WIDE) * WIDE);
        });
    }
};

template <class Way>
struct Mixing : Channels<Way> {
    enum { IN, OUT };  // x, last and m; what comes out, and its gradient
    int64_t T;
    int count;
    const void *x, *last, *m[MOST];

    ON_GPU void shares(float (*share)[Way::WIDE], int64_t channel) const {
#pragma unroll
        for (int i = 0; i < MOST; i++)
            if (i < count) fetch<Way::WIDE>(share[i], m[i], channel, this->half(IN));
    }
};

template <class Way>
struct MixForward : Mixing<Way> {
    using Base = Mixing<Way>;
    using Base::D, Base::T, Base::WIDE, Base::IN, Base::OUT, Base::x, Base::last;
    static constexpr int AHEAD = 4;  // tokens that are read at once
    void *out[MOST];

    ON_GPU void work(int64_t block, typename Base::Threads &threads, float *) const {
        this->over(block, threads, [&](int64_t begin, int64_t end, int64_t channel) {
            float share[MOST][WIDE], was[WIDE];
            this->shares(share, channel);
            int64_t row = (begin + T - 1) / T, start = row * T, at = begin * D + channel;  // the next row that begins
            if (begin != start) fetch<WIDE>(was, x, at - D, this->half(IN));
            for (int64_t first = begin; first < end; first += AHEAD) {
                float now[AHEAD][WIDE];
#pragma unroll
                for (int t = 0; t < AHEAD; t++)
                    if (first + t < end) fetch<WIDE>(now[t], x, at + t * D, this->half(IN));
#pragma unroll
                for (int t = 0; t < AHEAD; t++, at += D) {
                    if (first + t >= end) continue;
                    if (first + t == start) {
                        fetch<WIDE>(was, last, row * D + channel, this->half(IN));
                        row++, start += T;
                    }
                    mix(was, now[t], share, at);
                }
            }
        });
    }

    // `was` becomes `now`
    ON_GPU void mix(float *was, const float *now, const float (*share)[WIDE], int64_t at) const {
        float far[WIDE], found[WIDE];
#pragma unroll
        for (int c = 0; c < WIDE; c++) far[c] = was[c] - now[c], was[c] = now[c];
#pragma unroll
        for (int i = 0; i < MOST; i++) {
            if (i >= this->count) break;
#pragma unroll
            for (int c = 0; c < WIDE; c++) found[c] = now[c] + far[c] * share[i][c];
            lay_down<WIDE>(out[i], at, this->half(OUT), found);
        }
    }
};

// dx_t = sum of dy_t (1 - m) + dy_{t+1} m; sums of each run for dm
template <class Way>
struct MixBackward : Mixing<Way> {
    using Base = Mixing<Way>;
    using Base::D, Base::T, Base::WIDE, Base::IN, Base::OUT, Base::x, Base::last, Base::count;
    const void *dy[MOST];
    void *dx, *dlast;
    float *sums;  // (runs, count, D)

    ON_GPU void work(int64_t block, typename Base::Threads &threads, float *) const {
        this->over(block, threads, [&](int64_t begin, int64_t end, int64_t channel) {
            float share[MOST][WIDE], dm[MOST][WIDE] = {}, next[WIDE] = {}, now[WIDE], was[WIDE];
            this->shares(share, channel);
            int64_t row = (end - 1) / T, start = row * T, at = (end - 1) * D + channel;
            if (end < this->tokens && end != start + T) after(next, share, at + D);
            fetch<WIDE>(now, x, at, this->half(IN));
            for (int64_t token = end - 1; token >= begin; token--, at -= D) {
                const bool begins = token == start;
                float before[WIDE] = {}, pulls[MOST][WIDE];
                if (token) fetch<WIDE>(before, x, at - D, this->half(IN));
                gradients(pulls, at);
                copy(was, before);
                if (begins) fetch<WIDE>(was, last, row * D + channel, this->half(IN));
                add(pulls, share, dm, was, now, next);
                lay_down<WIDE>(dx, at, this->half(IN), now);  // what `add` left there
                if (begins) {
                    lay_down<WIDE>(dlast, row * D + channel, this->half(IN), next);
                    row--, start -= T;
#pragma unroll
                    for (int c = 0; c < WIDE; c++) next[c] = 0.0f;
                }
                copy(now, before);
            }
#pragma unroll
            for (int i = 0; i < MOST; i++)
                if (i < count) lay_down<WIDE>(sums, (begin / this->run * count + i) * D + channel, false, dm[i]);
        });
    }

    ON_GPU static void copy(float *to, const float *from) {
#pragma unroll
        for (int c = 0; c < WIDE; c++) to[c] = from[c];
    }

    ON_GPU void gradients(float (*pulls)[WIDE], int64_t at) const {
#pragma unroll
        for (int i = 0; i < MOST; i++)
            if (i < count) fetch<WIDE>(pulls[i], dy[i], at, this->half(OUT));
    }

    // what a token hands to the one before it
    ON_GPU void after(float *next, const float (*share)[WIDE], int64_t at) const {
        float pulls[MOST][WIDE];
        gradients(pulls, at);
#pragma unroll
        for (int i = 0; i < MOST; i++)
#pragma unroll
            for (int c = 0; c < WIDE; c++)
                if (i < count) next[c] += pulls[i][c] * share[i][c];
    }

    // `now` becomes its gradient, `next` what the token hands on
    ON_GPU void add(const float (*pulls)[WIDE], const float (*share)[WIDE], float (*dm)[WIDE], const float *was,
                    float *now, float *next) const {
        float far[WIDE], whole[WIDE] = {}, shifted[WIDE] = {};
#pragma unroll
        for (int c = 0; c < WIDE; c++) far[c] = was[c] - now[c];
#pragma unroll
        for (int i = 0; i < MOST; i++) {
            if (i >= count) break;
#pragma unroll
            for (int c = 0; c < WIDE; c++) {
                const float g = pulls[i][c];
                whole[c] += g, shifted[c] += g * share[i][c], dm[i][c] += g * far[c];
            }
        }
#pragma unroll
        for (int c = 0; c < WIDE; c++) now[c] = whole[c] - shifted[c] + next[c], next[c] = shifted[c];
    }
};

// max(x, 0)^2, or its gradient
template <class Way>
struct Square : Way {
    using Way::WIDE;
    static constexpr int THREADS = WIDTH, FLOATS = 0, EACH = 8, TIMES = EACH / WIDE;
    using Threads = Block<Nothing, WIDTH>;
    int64_t count, halves;
    const void *x, *dy;
    void *out;

    ON_GPU void work(int64_t block, Threads &threads, float *) const {
        const bool half = (Way::HALVES == ANY ? halves : Way::HALVES) & 1;
        threads.alone([&](int thread, Nothing &) {
            const int64_t first = (block * TIMES * WIDTH + thread) * WIDE;
            float up[TIMES][WIDE], pull[TIMES][WIDE];
#pragma unroll
            for (int i = 0; i < TIMES; i++) {
                const int64_t at = first + i * WIDTH * WIDE;
                if (at >= count) continue;
                fetch<WIDE>(up[i], x, at, half);
                if (dy) fetch<WIDE>(pull[i], dy, at, half);
            }
#pragma unroll
            for (int i = 0; i < TIMES; i++) {
                const int64_t at = first + i * WIDTH * WIDE;
                if (at >= count) continue;
#pragma unroll
                for (int c = 0; c < WIDE; c++) {
                    const float number = positive(up[i][c]);
                    up[i][c] = number * (dy ? 2.0f * pull[i][c] : number);
                }
                lay_down<WIDE>(out, at, half, up[i]);
            }
        });
    }
};

// v, moved towards `first` by the share sigmoid(z + v0), or its gradient
template <class Way>
struct Leaning : Channels<Way> {
    enum { V, FIRST, Z, V0 };
    const void *v, *first, *z, *v0;

    ON_GPU bool half(int tensor) const { return tensor == V0 ? this->halves >> V0 & 1 : Channels<Way>::half(tensor); }

    // how far values at a place are to go, and by which share
    ON_GPU void way(float *value, float *far, float *part, const float *by, int64_t at) const {
        fetch<Way::WIDE>(value, v, at, half(V));
        fetch<Way::WIDE>(far, first, at, half(FIRST));
        fetch<Way::WIDE>(part, z, at, half(Z));
#pragma unroll
        for (int c = 0; c < Way::WIDE; c++) far[c] -= value[c], part[c] = sigmoid(part[c] + by[c]);
    }
};

template <class Way>
struct LeanForward : Leaning<Way> {
    using Base = Leaning<Way>;
    using Base::D, Base::WIDE;
    void *out;

    ON_GPU void work(int64_t block, typename Base::Threads &threads, float *) const {
        this->over(block, threads, [&](int64_t begin, int64_t end, int64_t channel) {
            float by[WIDE], value[WIDE], far[WIDE], part[WIDE];
            fetch<WIDE>(by, this->v0, channel, this->half(Base::V0));
            for (int64_t at = begin * D + channel; at < end * D; at += D) {
                this->way(value, far, part, by, at);
#pragma unroll
                for (int c = 0; c < WIDE; c++) value[c] += far[c] * part[c];
                lay_down<WIDE>(out, at, this->half(Base::V), value);
            }
        });
    }
};

template <class Way>
struct LeanBackward : Leaning<Way> {
    using Base = Leaning<Way>;
    using Base::D, Base::WIDE;
    const void *dout;
    void *dv, *dfirst, *dz;
    float *sums;  // (runs, D)

    ON_GPU void work(int64_t block, typename Base::Threads &threads, float *) const {
        this->over(block, threads, [&](int64_t begin, int64_t end, int64_t channel) {
            float by[WIDE], sum[WIDE] = {}, rest[WIDE], far[WIDE], part[WIDE], d[WIDE];
            fetch<WIDE>(by, this->v0, channel, this->half(Base::V0));
            for (int64_t at = begin * D + channel; at < end * D; at += D) {
                fetch<WIDE>(d, dout, at, this->half(Base::V));
                this->way(rest, far, part, by, at);
#pragma unroll
                for (int c = 0; c < WIDE; c++) {
                    const float moved = d[c] * part[c], slope = moved * far[c] * (1.0f - part[c]);
                    rest[c] = d[c] - moved, part[c] = moved, far[c] = slope;
                    sum[c] += slope;
                }
                lay_down<WIDE>(dv, at, this->half(Base::V), rest);
                lay_down<WIDE>(dfirst, at, this->half(Base::FIRST), part);
                lay_down<WIDE>(dz, at, this->half(Base::Z), far);
            }
            lay_down<WIDE>(sums, begin / this->run * D + channel, false, sum);
        });
    }
};

bool fours(int64_t D) { return D % WIDE == 0; }

template <class Way>
Mixing<Way> mixing(const int64_t *z, int64_t run, const void *x, const void *last, const void *const *m) {
    Mixing<Way> found = {{{}, z[0] * z[1], z[2], run, z[4] | z[5] << 1}, z[1], static_cast<int>(z[3]), x, last, {}};
    for (int64_t i = 0; i < z[3]; i++) found.m[i] = m[i];
    return found;
}

// f(the way): what comes in and what comes out may be in bf16
template <class F>
int mixed(const int64_t *z, bool all, const void *const *m, const void *const *y, F f) {
    for (int64_t i = 0; i < z[3]; i++) all = all && wide(m[i], y[i]);
    return by_way<WIDE, 0, 2, 3>(z[4] | z[5] << 1, fours(z[2]) && all, f);
}

// the same of v, first and z
template <class F>
int leant(const int64_t *s, bool all, F f) {
    return by_way<WIDE, 0, 7>(s[2] & 7, fours(s[1]) && all, f);
}

}  // namespace

// Given back are 0, the GPU's error, or -1 for too many mixes.
extern "C" {

// floats of the sums that the backward wants, and tokens that each is of
int64_t mix_sums(const int64_t *z) {
    const int64_t run = run_of(z[0] * z[1], z[2], SUMMED);
    return (z[0] * z[1] + run - 1) / run * z[3] * z[2];
}

// takes B T D n /x /out: x B*T*D, last B*D, m n of D, out n of B*T*D
int mix_forward(const int64_t *z, int64_t stream, const void *x, const void *last, const void *const *m,
                void *const *out) {
    if (z[3] > MOST) return -1;
    return mixed(z, wide(x, last), m, out, [&](auto way) {
        const int64_t run = run_of(z[0] * z[1], z[2], 1);
        MixForward<decltype(way)> kernel = {mixing<decltype(way)>(z, run, x, last, m), {}};
        for (int64_t i = 0; i < z[3]; i++) kernel.out[i] = out[i];
        return launch(kernel, kernel.blocks(), stream);
    });
}

// takes B T D n /x /dy: x B*T*D, last B*D, m n of D, dy n of B*T*D, dx B*T*D, dlast B*D, sums any
int mix_backward(const int64_t *z, int64_t stream, const void *x, const void *last, const void *const *m,
                 const void *const *dy, void *dx, void *dlast, float *sums) {
    if (z[3] > MOST) return -1;
    return mixed(z, wide(x, last, dx, dlast, sums), m, dy, [&](auto way) {
        const int64_t run = run_of(z[0] * z[1], z[2], SUMMED);
        MixBackward<decltype(way)> kernel = {mixing<decltype(way)>(z, run, x, last, m), {}, dx, dlast, sums};
        for (int64_t i = 0; i < z[3]; i++) kernel.dy[i] = dy[i];
        return launch(kernel, kernel.blocks(), stream);
    });
}

// Gradients are like what they are of, out like v.
// takes tokens D /v/first/z/v0: v first z tokens*D, v0 D, out tokens*D
int lean_forward(const int64_t *s, int64_t stream, const void *v, const void *first, const void *z, const void *v0,
                 void *out) {
    return leant(s, wide(v, first, z, v0, out), [&](auto way) {
        const LeanForward<decltype(way)> kernel = {
            {{{}, s[0], s[1], run_of(s[0], s[1], 1), s[2]}, v, first, z, v0}, out};
        return launch(kernel, kernel.blocks(), stream);
    });
}

// floats of the sums for v0, which whoever calls adds up
int64_t lean_sums(const int64_t *s) {
    const int64_t run = run_of(s[0], s[1], SUMMED);
    return (s[0] + run - 1) / run * s[1];
}

// takes tokens D /v/first/z/v0: v first z tokens*D, v0 D, dout dv dfirst dz tokens*D, sums any
int lean_backward(const int64_t *s, int64_t stream, const void *v, const void *first, const void *z, const void *v0,
                  const void *dout, void *dv, void *dfirst, void *dz, float *sums) {
    return leant(s, wide(v, first, z, v0, dout, dv, dfirst, dz, sums), [&](auto way) {
        const LeanBackward<decltype(way)> kernel = {
            {{{}, s[0], s[1], run_of(s[0], s[1], SUMMED), s[2]}, v, first, z, v0}, dout, dv, dfirst, dz, sums};
        return launch(kernel, kernel.blocks(), stream);
    });
}

// dy may be null: then it is the value, else the gradient
// takes numbers /x: x dy? out numbers
int square(const int64_t *z, int64_t stream, const void *x, const void *dy, void *out) {
    return by_way<WIDE, 0, 1>(z[1], fours(z[0]) && wide(x, dy, out), [&](auto way) {
        const int64_t each = Square<decltype(way)>::EACH * WIDTH;
        return launch(Square<decltype(way)>{{}, z[0], z[1], x, dy, out}, (z[0] + each - 1) / each, stream);
    });
}

}  // extern "C"
