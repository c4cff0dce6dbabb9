// A few rows of numbers times matrices that are read once for all of them, on a GPU: what a token of a few texts costs.
// The rows may be normalised before, and mixed with those of the token before; what comes of a product may be bent,
// squared, or added to what is there.
//
// A block has 256 threads, of which each has four columns in every ACROSS, for some rows of a matrix at a time. What it
// multiplies them by lies in shared memory, STAGED numbers of it. What a matrix has next is asked for before what came
// is used. All sums are fp32 in one order, so a row has the same bits whatever rows are beside it.

#pragma once

#include "plain.cuh"

namespace {

constexpr int WIDTH = 256, WARP = 32, WARPS = WIDTH / WARP, ACROSS = 4 * WIDTH, STAGED = 8 * ACROSS;
constexpr int BUSY = 264, MOST_ROWS = 8;  // blocks that keep a large card busy; rows that there may be

enum Becomes { ITSELF, TANGENT, SIGMOID, SQUARED, ADDED };

ON_GPU float bent(float x, Becomes how) {
    if (how == TANGENT) return tanhf(x);
    if (how == SIGMOID) return sigmoid(x);
    if (how == SQUARED) return x > 0.0f ? x * x : x == x ? 0.0f : x;
    return x;
}

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

// Each of MANY numbers of of(what a thread keeps), a power of two, summed over a warp: the first of them becomes the
// sum of number lane / (32 / MANY); of more than 32 the first EACH become those that are the lane's. That takes a third
// of the exchanges that sums in all lanes would.
template <int MANY>
struct Sums {
    static constexpr int EACH = MANY > WARP ? MANY / WARP : 1, LANES = MANY > WARP ? 1 : WARP / MANY;
};

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
        for (int l = 0; l < WARP; l++)
            for (int i = 0; i < Sums<MANY>::EACH; i++)
                of(threads.own[first + l])[i] = sums[l][l / Sums<MANY>::LANES * Sums<MANY>::EACH + i];
    }
#endif
}

// the same, each warp's sums to `to`, (WARPS, MANY)
template <int MANY, class Threads, class Of>
ON_GPU void sum_to(Threads &threads, float *to, Of of) {
    constexpr int EACH = Sums<MANY>::EACH, LANES = Sums<MANY>::LANES;
    sum_up<MANY>(threads, of);
    threads.each([&](int thread, auto &own) {
        const int lane = thread % WARP;
        if (lane % LANES) return;
#pragma unroll
        for (int i = 0; i < EACH; i++) to[thread / WARP * MANY + lane / LANES * EACH + i] = of(own)[i];
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

// Four numbers of a matrix as they lie in memory, of so many bytes each: fp32, bf16, or whole numbers.
template <int BYTES>
struct Quad {
    Raw<4> raw;

    ON_GPU void read(const void *from) { raw.read(from, 0, BYTES == 2); }
    ON_GPU void open(float *x) const {
#pragma unroll
        for (int i = 0; i < 4; i++) x[i] = raw.number(i, BYTES == 2);
    }
};

// A byte becomes a number without a conversion: as the last one of 2^23, which is then that much more. 128 more make it
// positive before.
template <>
struct Quad<1> {
    uint32_t word;

    ON_GPU void read(const void *from) { word = *static_cast<const uint32_t *>(from); }
    ON_GPU void open(float *x) const {
        const uint32_t above = word ^ 0x80808080u;
#pragma unroll
        for (int i = 0; i < 4; i++) {
#ifdef __CUDA_ARCH__
            x[i] = __uint_as_float(__byte_perm(above, 0x4b000000u, 0x7540 + i)) - 8388736.0f;
#else
            const uint32_t bits = (above >> 8 * i & 255) | 0x4b000000u;
            memcpy(x + i, &bits, 4);
            x[i] -= 8388736.0f;
#endif
        }
    }
};

// One of the matrices (outs, columns), what whole numbers of each row are times (or null), how much of the token before
// is mixed into what it multiplies (or null), and where products go, a row of them every `step`.
struct Part {
    const void *matrix;
    const float *scale;
    const float *share;
    float *to;
    int outs, step;
    Becomes how;
};

// what is copied beside, so many numbers
struct Copy {
    const float *from;
    float *to;
    int64_t count;
};

// What a kernel of few rows is told, whichever it is. A block has `each` groups of outputs of one part.
struct Given {
    static constexpr int MOST = 7;
    Part parts[MOST];
    int count, columns;
    const float *x;  // (rows, columns)
    Norm norm;
    const float *before;  // (rows, columns) that is mixed
    float *normed;        // (rows, columns), or null
    Copy copy;
    int rows = 0, each = 0, blocks = 0, starts[MOST] = {};  // the last: the first block of each part
};

// Of matrices whose numbers have so many bytes; of those of one byte twice as many rows are asked for at a time.
template <int BYTES, int ROWS>
struct Few : Given {
    static constexpr int THREADS = WIDTH, SPAN = STAGED / ROWS, OUTS = (ROWS <= 2 ? 8 : 4) * (BYTES == 1 ? 2 : 1);
    static constexpr int BESIDE = 2, SUMS = OUTS * ROWS, FLOATS = STAGED + WARPS * SUMS + 2 * ROWS + 2 * WARPS * ROWS;
    struct Own {
        Quad<BYTES> next[OUTS];
        float found[OUTS][ROWS], sums[ROWS], scale;
    };
    using Threads = Block<Own, THREADS>;

    // asks for four columns in each of the `left` rows of a matrix that lie from `row` on
    ON_GPU void ask(Quad<BYTES> *next, const char *row, int left) const {
        const int64_t step = static_cast<int64_t>(columns) * BYTES;
        if (left >= OUTS) {
#pragma unroll
            for (int o = 0; o < OUTS; o++) next[o].read(row + o * step);
            return;
        }
#pragma unroll
        for (int o = 0; o < OUTS; o++)
            if (o < left)
                next[o].read(row + o * step);
            else
                next[o] = {};
    }

    // columns from `first` on as they are multiplied; of a row that there is not, zeros
    ON_GPU void stage(int thread, float *staged, const float *found, const float *share, int first, bool told) const {
        for (int at = thread * 4; at < SPAN && first + at < columns; at += ACROSS) {
            const int c = first + at;
            float by[4], more[4], part[4];
            if (norm.weight) fetch<4>(by, norm.weight, c, false), fetch<4>(more, norm.bias, c, false);
            if (share) fetch<4>(part, share, c, false);
#pragma unroll
            for (int r = 0; r < ROWS; r++) {
                const int64_t row = static_cast<int64_t>(r) * columns;
                float y[4] = {}, other[4];
                if (r < rows) fetch<4>(y, x + row, c, false);
                if (r < rows && norm.weight)
#pragma unroll
                    for (int i = 0; i < 4; i++) y[i] = (y[i] - found[r]) * found[ROWS + r] * by[i] + more[i];
                if (r < rows && told) lay_down<4>(normed + row, c, false, y);
                if (r < rows && share) {
                    fetch<4>(other, before + row, c, false);
#pragma unroll
                    for (int i = 0; i < 4; i++) y[i] += (other[i] - y[i]) * part[i];
                }
                ::share<4>(staged + r * SPAN + at, y);
            }
        }
    }

    // four columns of some rows of a matrix, times those of each row of x
    ON_GPU static void add(Own &own, const Quad<BYTES> *now, const float *staged) {
        float w[OUTS][4];
#pragma unroll
        for (int o = 0; o < OUTS; o++) now[o].open(w[o]);
#pragma unroll
        for (int r = 0; r < ROWS; r++) {
            const Four words = *reinterpret_cast<const Four *>(staged + r * SPAN);
            float y[4];
            memcpy(y, &words, 16);
#pragma unroll
            for (int o = 0; o < OUTS; o++)
#pragma unroll
                for (int i = 0; i < 4; i++) own.found[o][r] += w[o][i] * y[i];
        }
    }

    // what comes of a row of a matrix, of which a row of x has one number: the sums of a group come one to a thread
    ON_GPU static void begin_group(int thread, Own &own, const Part &part, int left, int out) {
        memset(own.found, 0, sizeof own.found);
        own.scale = 1.0f;
        if (BYTES == 1 && thread < SUMS && thread / ROWS < left) own.scale = part.scale[out + thread / ROWS];
    }

    ON_GPU void finish(int thread, const Own &own, const float *sums, const Part &part, int out) const {
        const int o = thread / ROWS, r = thread % ROWS;
        if (thread >= SUMS || out + o >= part.outs || r >= rows) return;
        const float total = of_warps<SUMS>(sums, thread) * own.scale;
        float *to = part.to + static_cast<int64_t>(r) * part.step + out + o;
        *to = part.how == ADDED ? *to + total : bent(total, part.how);
    }

    ON_GPU void work(int64_t number, Threads &threads, float *shared) const {
        float *staged = shared, *sums = shared + STAGED, *found = sums + WARPS * SUMS, *room = found + 2 * ROWS;
        const int block = static_cast<int>(number), take = each * OUTS;
        Part part = parts[0];
        int begin = block;
#pragma unroll
        for (int n = 1; n < MOST; n++)
            if (block >= starts[n]) part = parts[n], begin = block - starts[n];
        begin *= take;
        const int end = begin + take < part.outs ? begin + take : part.outs;
        const auto row = [&](int out, int column) {
            return static_cast<const char *>(part.matrix) + (static_cast<int64_t>(out) * columns + column) * BYTES;
        };
        threads.alone([&](int thread, Own &own) {
            if (thread * 4 < columns) ask(own.next, row(begin, thread * 4), end - begin);
            for (int64_t i = block * THREADS + thread; i < copy.count; i += blocks * THREADS) copy.to[i] = copy.from[i];
        });
        if (norm.weight) moments<ROWS>(threads, found, room, x, columns, rows);
        for (int out = begin; out < end; out += OUTS) {
            threads.alone([&](int thread, Own &own) { begin_group(thread, own, part, end - out, out); });
            for (int first = 0; first < columns; first += SPAN) {
                if (first > 0) threads.each([](int, Own &) {});  // all have used what was there
                if (out == begin || columns > SPAN)
                    threads.each([&](int thread, Own &) {
                        stage(thread, staged, found, part.share, first, normed && block == 0 && out == begin);
                    });
                threads.alone([&](int thread, Own &own) {
                    const int stop = columns < first + SPAN ? columns : first + SPAN;
                    for (int c = first + thread * 4; c < stop; c += ACROSS) {
                        Quad<BYTES> now[OUTS];
#pragma unroll
                        for (int o = 0; o < OUTS; o++) now[o] = own.next[o];
                        if (c + ACROSS < columns)
                            ask(own.next, row(out, c + ACROSS), end - out);
                        else if (out + OUTS < end)
                            ask(own.next, row(out + OUTS, thread * 4), end - out - OUTS);
                        add(own, now, staged + (c - first));
                    }
                });
            }
            sum_to<SUMS>(threads, sums, [](Own &own) { return &own.found[0][0]; });
            threads.each([&](int thread, Own &own) { finish(thread, own, sums, part, out); });
        }
    }
};

template <int BYTES, int ROWS>
int times(Given given, int rows, int64_t stream) {
    typedef Few<BYTES, ROWS> Kernel;
    const auto groups = [&](int n) { return (given.parts[n].outs + Kernel::OUTS - 1) / Kernel::OUTS; };
    int all = 0;
    for (int n = 0; n < given.count; n++) all += groups(n);
    given.rows = rows, given.each = (all + BUSY - 1) / BUSY, given.blocks = 0;
    for (int n = 0; n < Given::MOST; n++) {
        given.starts[n] = n < given.count ? given.blocks : 0x7fffffff;
        if (n < given.count) given.blocks += (groups(n) + given.each - 1) / given.each;
    }
    return launch(Kernel{given}, given.blocks, stream);
}

template <int BYTES>
int times(const Given &given, int rows, int64_t stream) {
    if (rows <= 1) return times<BYTES, 1>(given, rows, stream);
    if (rows <= 2) return times<BYTES, 2>(given, rows, stream);
    if (rows <= 4) return times<BYTES, 4>(given, rows, stream);
    return times<BYTES, 8>(given, rows, stream);
}

}  // namespace
