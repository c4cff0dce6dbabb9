// A few rows of numbers times matrices that are read once for all of them, on a GPU: what a token of a few texts costs.
// The rows may be normalised before, and mixed with those of the token before; what comes of a product may be bent,
// squared, or added to what is there.
//
// A block has 256 threads, of which each has four columns in every ACROSS, for OUTS rows of a matrix at a time. What it
// multiplies them by lies in shared memory, STAGED numbers of it. What a matrix has next is asked for before what came
// is used. All sums are fp32 in one order, so a row has the same bits whatever rows are beside it.

#pragma once

#include "plain.cuh"

namespace {

constexpr int WIDTH = 256, WARP = 32, WARPS = WIDTH / WARP, OUTS = 4, ACROSS = 4 * WIDTH, STAGED = 8 * ACROSS;
constexpr int64_t BUSY = 1024, MOST_ROWS = 8;  // blocks that keep a large card busy; rows that there may be

enum Becomes { ITSELF, TANGENT, SIGMOID, SQUARED, ADDED };

ON_GPU float bent(float x, Becomes how) {
    if (how == TANGENT) return tanhf(x);
    if (how == SIGMOID) return sigmoid(x);
    if (how == SQUARED) return x > 0.0f ? x * x : x == x ? 0.0f : x;
    return x;
}

// The mean of each row of x, and one by the root of its variance: of `rows` rows of n numbers, a multiple of four, into
// `found` (2, ROWS); `room` has 2 WARPS ROWS numbers. own.sums has ROWS.
template <int ROWS, class Threads>
ON_GPU void moments(Threads &threads, float *found, float *room, const float *x, int64_t n, int rows) {
    const auto add_up = [&](auto term) {
        threads.alone([&](int thread, auto &own) {
#pragma unroll
            for (int r = 0; r < ROWS; r++) {
                own.sums[r] = 0.0f;
                for (int64_t c = thread * 4; c < n && r < rows; c += ACROSS) {
                    float here[4];
                    fetch<4>(here, x + r * n, c, false);
#pragma unroll
                    for (int i = 0; i < 4; i++) own.sums[r] += term(here[i], r);
                }
            }
        });
        threads.add_up(WARP, ROWS, [](auto &own) { return own.sums; });
    };
    const auto meet = [&](float *sums) {
        threads.each([&](int thread, auto &own) {
            if (thread % WARP) return;
#pragma unroll
            for (int r = 0; r < ROWS; r++) sums[thread / WARP * ROWS + r] = own.sums[r];
        });
    };
    const auto all = [n](const float *sums, int r) {
        float total = 0.0f;
#pragma unroll
        for (int w = 0; w < WARPS; w++) total += sums[w * ROWS + r];
        return total / static_cast<float>(n);
    };
    add_up([](float x, int) { return x; });
    meet(room);
    add_up([&](float x, int r) {
        const float away = x - all(room, r);
        return away * away;
    });
    meet(room + WARPS * ROWS);
    threads.each([&](int thread, auto &) {
        if (thread >= ROWS) return;
        found[thread] = all(room, thread);
        found[ROWS + thread] = 1.0f / sqrtf(all(room + WARPS * ROWS, thread) + 1e-5f);
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
        if (norm.weight) moments<1>(threads, shared, shared + 2, from, D, 1);
        threads.alone([&](int thread, Own &) {
            for (int64_t c = thread; c < D; c += THREADS) {
                float y = from[c];
                if (norm.weight) y = (y - shared[0]) * shared[1] * norm.weight[c] + norm.bias[c];
                x[row * D + c] = there ? y : nanf("");
            }
        });
    }
};

// One of the matrices (outs, columns): how much of the token before is mixed into what it multiplies (or null), and
// where products go, a row of them every `step`.
struct Part {
    const void *matrix;
    const float *share;
    float *to;
    int64_t outs, step;
    Becomes how;

    EITHER int64_t groups() const { return (outs + OUTS - 1) / OUTS; }
};

// what is copied beside, so many numbers
struct Copy {
    const float *from;
    float *to;
    int64_t count;
};

template <bool HALF, int ROWS>
struct Few {
    static constexpr int THREADS = WIDTH, SPAN = STAGED / ROWS, MOST = 7;
    static constexpr int SUMS = WARPS * OUTS * ROWS, FLOATS = STAGED + SUMS + 2 * ROWS + 2 * WARPS * ROWS;
    struct Own {
        Raw<4> next[OUTS];
        float found[OUTS][ROWS], sums[ROWS];
    };
    using Threads = Block<Own, THREADS>;
    Part parts[MOST];
    int count, rows;
    int64_t columns;
    const float *x;  // (rows, columns)
    Norm norm;
    const float *before;  // (rows, columns) that is mixed
    float *normed;        // (rows, columns), or null
    Copy copy;
    int64_t groups, each;  // of outputs, and how many of these a block takes

    // a group of outputs: its first row of its part's matrix, how many there are, and where what comes of them goes
    struct Place {
        const void *matrix;
        const float *share;
        float *to;
        int64_t first, step;
        int outs;
        Becomes how;
    };

    ON_GPU Place place(int64_t group) const {
        Place found = {};
#pragma unroll
        for (int n = 0; n < MOST; n++) {
            const int64_t left = n < count ? parts[n].outs - group * OUTS : 0;
            const bool here = group >= 0 && left > 0;
            found.matrix = here ? parts[n].matrix : found.matrix;
            found.share = here ? parts[n].share : found.share;
            found.to = here ? parts[n].to : found.to;
            found.first = here ? group * OUTS : found.first;
            found.step = here ? parts[n].step : found.step;
            found.outs = here ? static_cast<int>(left < OUTS ? left : OUTS) : found.outs;
            found.how = here ? parts[n].how : found.how;
            group = here ? -1 : group - (n < count ? parts[n].groups() : 0);
        }
        return found;
    }

    // asks for four columns from `column` on, in each row of a matrix that a group has
    ON_GPU void ask(Raw<4> *next, const Place &at, int64_t column) const {
#pragma unroll
        for (int o = 0; o < OUTS; o++)
            if (column < columns && o < at.outs)
                next[o].read(at.matrix, (at.first + o) * columns + column, HALF);
            else
                next[o] = {};
    }

    // columns from `first` on as they are multiplied; of a row that there is not, zeros
    ON_GPU void stage(int thread, float *staged, const float *found, const float *share, int64_t first,
                      bool told) const {
#pragma unroll
        for (int r = 0; r < ROWS; r++)
            for (int64_t c = first + thread * 4; c < columns && c < first + SPAN; c += ACROSS) {
                float y[4] = {}, other[4], by[4];
                if (r < rows) fetch<4>(y, x + r * columns, c, false);
                if (r < rows && norm.weight) {
                    fetch<4>(by, norm.weight, c, false), fetch<4>(other, norm.bias, c, false);
#pragma unroll
                    for (int i = 0; i < 4; i++) y[i] = (y[i] - found[r]) * found[ROWS + r] * by[i] + other[i];
                }
                if (r < rows && told) lay_down<4>(normed + r * columns, c, false, y);
                if (r < rows && share) {
                    fetch<4>(by, share, c, false), fetch<4>(other, before + r * columns, c, false);
#pragma unroll
                    for (int i = 0; i < 4; i++) y[i] += (other[i] - y[i]) * by[i];
                }
                ::share<4>(staged + r * SPAN + (c - first), y);
            }
    }

    // four columns of a group's rows, times those of each row of x
    ON_GPU static void add(Own &own, const Raw<4> *now, const float *staged) {
        float w[OUTS][4];
#pragma unroll
        for (int o = 0; o < OUTS; o++)
#pragma unroll
            for (int i = 0; i < 4; i++) w[o][i] = now[o].number(i, HALF);
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

    ON_GPU void finish(int thread, const float *sums, const Place &at) const {
        const int o = thread / ROWS, r = thread % ROWS;
        if (o >= at.outs || r >= rows) return;
        float total = 0.0f;
#pragma unroll
        for (int w = 0; w < WARPS; w++) total += sums[w * OUTS * ROWS + thread];
        float *to = at.to + r * at.step + at.first + o;
        *to = at.how == ADDED ? *to + total : bent(total, at.how);
    }

    ON_GPU void work(int64_t block, Threads &threads, float *shared) const {
        float *staged = shared, *sums = shared + STAGED, *found = sums + SUMS, *room = found + 2 * ROWS;
        const int64_t begin = block * each, end = begin + each < groups ? begin + each : groups;
        Place here = place(begin);
        bool there = false;  // whether all columns lie in shared memory as this group's part has them
        threads.alone([&](int thread, Own &own) {
            ask(own.next, here, thread * 4);
            for (int64_t i = block * THREADS + thread; i < copy.count; i += (groups + each - 1) / each * THREADS)
                copy.to[i] = copy.from[i];
        });
        if (norm.weight) moments<ROWS>(threads, found, room, x, columns, rows);
        for (int64_t group = begin; group < end; group++) {
            const Place after = place(group + 1 < end ? group + 1 : groups);
            threads.alone([&](int, Own &own) { memset(own.found, 0, sizeof own.found); });
            for (int64_t first = 0; first < columns; first += SPAN) {
                if (first > 0) threads.each([](int, Own &) {});  // all have used what was there
                if (!there || columns > SPAN)
                    threads.each([&](int thread, Own &) {
                        stage(thread, staged, found, here.share, first, normed && group == 0);
                    });
                threads.alone([&](int thread, Own &own) {
                    for (int64_t c = first; c < columns && c < first + SPAN; c += ACROSS) {
                        const int64_t at = c + thread * 4;
                        Raw<4> now[OUTS];
#pragma unroll
                        for (int o = 0; o < OUTS; o++) now[o] = own.next[o];
                        if (c + ACROSS < columns)
                            ask(own.next, here, at + ACROSS);
                        else
                            ask(own.next, after, thread * 4);
                        if (at < columns) add(own, now, staged + (at - first));
                    }
                });
            }
            there = after.share == here.share;
            threads.add_up(WARP, OUTS * ROWS, [](Own &own) { return &own.found[0][0]; });
            threads.each([&](int thread, Own &own) {
                if (thread % WARP) return;
#pragma unroll
                for (int o = 0; o < OUTS; o++)
#pragma unroll
                    for (int r = 0; r < ROWS; r++) sums[(thread / WARP * OUTS + o) * ROWS + r] = own.found[o][r];
            });
            threads.each([&](int thread, Own &) { finish(thread, sums, here); });
            here = after;
        }
    }
};

// What a kernel of few rows is told, whichever it is.
struct Given {
    Part parts[7];
    int count;
    int64_t columns;
    const float *x;
    Norm norm;
    const float *before;
    float *normed;
    Copy copy;
};

template <bool HALF, int ROWS>
int times(const Given &g, int rows, int64_t stream) {
    Few<HALF, ROWS> kernel = {{}, g.count, rows, g.columns, g.x, g.norm, g.before, g.normed, g.copy, 0, 0};
    for (int n = 0; n < g.count; n++) kernel.parts[n] = g.parts[n], kernel.groups += g.parts[n].groups();
    kernel.each = (kernel.groups + BUSY - 1) / BUSY;
    return launch(kernel, (kernel.groups + kernel.each - 1) / kernel.each, stream);
}

template <bool HALF>
int times(const Given &g, int rows, int64_t stream) {
    if (rows <= 1) return times<HALF, 1>(g, rows, stream);
    if (rows <= 2) return times<HALF, 2>(g, rows, stream);
    if (rows <= 4) return times<HALF, 4>(g, rows, stream);
    return times<HALF, 8>(g, rows, stream);
}

}  // namespace
