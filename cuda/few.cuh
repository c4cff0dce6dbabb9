// A few rows of numbers times matrices that are read once for all of them, on a GPU: what a token of a few texts costs.
// The rows may be normalised before, and mixed with those of the token before; what comes of a product may be bent,
// squared, or added to what is there.
//
// A block has 256 threads, of which each has four columns in every ACROSS, for some rows of a matrix at a time. What it
// multiplies them by it makes itself, in shared memory, where that is little (STAGED numbers); else a kernel before has
// made it once for all blocks, which read it where it lies. What a matrix has next is asked for before what came is
// used. All sums are fp32 in one order, so a row has the same bits whatever rows are beside it.

#pragma once

#include "rows.cuh"

namespace {

constexpr int STAGED = 8 * ACROSS;
constexpr int BUSY = 264, MOST_ROWS = 8;  // blocks that keep a large card busy; rows that there may be

enum Becomes { ITSELF, TANGENT, SIGMOID, SQUARED, ADDED };

ON_GPU float bent(float x, Becomes how) {
    if (how == TANGENT) return tanhf(x);
    if (how == SIGMOID) return sigmoid(x);
    if (how == SQUARED) return positive(x) * positive(x);
    return x;
}

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
// is mixed into what it multiplies (or null), where products go, a row of them every `step`, and rows that are as they
// are multiplied.
struct Part {
    const void *matrix;
    const float *scale;
    const float *share;
    float *to;
    int outs, step;
    Becomes how;
    const float *made = nullptr;
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
    float *made = nullptr;  // where rows are made, (parts, rows, columns)
    int rows = 0, each = 0, blocks = 0, starts[MOST] = {};  // the last: the first block of each part

    // what normalises and mixes four columns
    struct Beside {
        float weight[4], bias[4], share[4];
        bool mixed;
    };

    ON_GPU Beside beside(int column, const float *share) const {
        Beside found;
        found.mixed = share;
        if (norm.weight) {
            fetch<4>(found.weight, norm.weight, column, false);
            fetch<4>(found.bias, norm.bias, column, false);
        }
        if (share) fetch<4>(found.share, share, column, false);
        return found;
    }

    // asks for what `make` reads of so many rows from `row` on, but for those that a kernel before may still write
    ON_GPU void look_ahead(int thread, const float *share, int64_t row, int count) const {
        const auto ask = [thread](const float *from, int numbers) {
#pragma unroll 1  // there is at most one, in most
            for (int c = thread * LINE / 4; c < numbers; c += WIDTH * LINE / 4) soon(from + c);
        };
        if (norm.weight) ask(norm.weight, columns), ask(norm.bias, columns);
        if (share) ask(share, columns), ask(before + row, count * columns);
    }

    // the four columns of a row that lie at `at`, as they are multiplied; normalised ones are kept if `told`
    ON_GPU void make(float *y, int64_t at, const Beside &with, float mean, float by, bool told) const {
        float other[4];
        fetch<4>(y, x, at, false);
        if (norm.weight)
#pragma unroll
            for (int i = 0; i < 4; i++) y[i] = (y[i] - mean) * by * with.weight[i] + with.bias[i];
        if (told) lay_down<4>(normed, at, false, y);
        if (!with.mixed) return;
        fetch<4>(other, before, at, false);
#pragma unroll
        for (int i = 0; i < 4; i++) y[i] += (other[i] - y[i]) * with.share[i];
    }
};

// Rows as they are multiplied, normalised and mixed for each part; a block has a row of one.
struct Making : Given {
    static constexpr int THREADS = WIDTH, FLOATS = 2 + 2 * WARPS;
    struct Own {
        float sums[1];
    };
    using Threads = Block<Own, THREADS>;

    ON_GPU void work(int64_t number, Threads &threads, float *shared) const {
        const int part = static_cast<int>(number) / rows;
        const int64_t row = (number - part * rows) * columns;
        const float *share = parts[part].share;
        threads.alone([&](int thread, Own &) { look_ahead(thread, share, row, 1); });
        take_turn();
        moments<1>(threads, shared, shared + 2, x + row, columns, 1);
        threads.alone([&](int thread, Own &) {
            for (int c = thread * 4; c < columns; c += ACROSS) {
                float y[4];
                make(y, row + c, beside(c, share), shared[0], shared[1], normed && part == 0);
                lay_down<4>(made, number * columns + c, false, y);
            }
        });
    }
};

// Of matrices whose numbers have so many bytes; of those of one byte more rows are asked for at a time.
template <int BYTES, int ROWS>
struct Few : Given {
    static constexpr int THREADS = WIDTH, BESIDE = 2, SPAN = STAGED / ROWS;
    static constexpr int OUTS = BYTES == 1 ? (ROWS == 1 ? 16 : WARP / ROWS) : ROWS <= 2 ? 8 : 4;
    static constexpr int SUMS = OUTS * ROWS, FLOATS = STAGED + WARPS * SUMS + 2 * ROWS + 2 * WARPS * ROWS;
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

    // all columns as they are multiplied; of a row that there is not, zeros
    ON_GPU void stage(int thread, float *staged, const float *found, const float *share, bool told) const {
        for (int c = thread * 4; c < columns; c += ACROSS) {
            const Beside with = beside(c, share);
#pragma unroll
            for (int r = 0; r < ROWS; r++) {
                float y[4] = {};
                if (r < rows) make(y, static_cast<int64_t>(r) * columns + c, with, found[r], found[ROWS + r], told);
                ::share<4>(staged + r * SPAN + c, y);
            }
        }
    }

    // four columns of some rows of a matrix, times those of each of so many rows, which lie a step apart
    ON_GPU static void add(Own &own, const Quad<BYTES> *now, const float *from, int64_t step, int rows) {
        float y[ROWS][4] = {};
#pragma unroll
        for (int r = 0; r < ROWS; r++)
            if (r < rows) fetch<4>(y[r], from, r * step, false);
#pragma unroll
        for (int o = 0; o < OUTS; o++) {
            float w[4];
            now[o].open(w);
#pragma unroll
            for (int r = 0; r < ROWS; r++)
#pragma unroll
                for (int i = 0; i < 4; i++) own.found[o][r] += w[i] * y[r][i];
        }
    }

    // before a group of outputs, each sum of which is to be one thread's: it asks for what that is times
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
        const bool staging = columns <= SPAN;
        threads.alone([&](int thread, Own &own) {
            if (thread * 4 < columns) ask(own.next, row(begin, thread * 4), end - begin);
            if (staging && begin == 0) look_ahead(thread, part.share, 0, rows);
        });
        take_turn();
        threads.alone([&](int thread, Own &) {
#pragma unroll 1  // or it would divide first
            for (int64_t i = block * THREADS + thread; i < copy.count; i += blocks * THREADS) copy.to[i] = copy.from[i];
        });
        if (norm.weight) moments<ROWS>(threads, found, room, x, columns, rows);
        if (staging)  // each thread for itself
            threads.alone([&](int thread, Own &) { stage(thread, staged, found, part.share, normed && block == 0); });
        for (int out = begin; out < end; out += OUTS) {
            threads.alone([&](int thread, Own &own) {
                begin_group(thread, own, part, end - out, out);
                for (int c = thread * 4; c < columns; c += ACROSS) {
                    Quad<BYTES> now[OUTS];
#pragma unroll
                    for (int o = 0; o < OUTS; o++) now[o] = own.next[o];
                    if (c + ACROSS < columns)
                        ask(own.next, row(out, c + ACROSS), end - out);
                    else if (out + OUTS < end)
                        ask(own.next, row(out + OUTS, thread * 4), end - out - OUTS);
                    if (staging)
                        add(own, now, staged + c, SPAN, ROWS);
                    else
                        add(own, now, part.made + c, columns, rows);
                }
            });
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
    const bool making = given.columns > Kernel::SPAN && given.norm.weight;
    if (const int status = making ? follow(Making{given}, given.count * rows, stream) : 0) return status;
    for (int n = 0; n < Given::MOST; n++) {
        given.starts[n] = n < given.count ? given.blocks : 0x7fffffff;
        if (n >= given.count) continue;
        given.blocks += (groups(n) + given.each - 1) / given.each;
        given.parts[n].made = making ? given.made + static_cast<int64_t>(n) * rows * given.columns : given.x;
    }
    if (making) given.norm = {}, given.normed = nullptr;
    return follow(Kernel{given}, given.blocks, stream);
}

template <int BYTES>
int times(const Given &given, int rows, int64_t stream) {
    if (rows <= 1) return times<BYTES, 1>(given, rows, stream);
    if (rows <= 2) return times<BYTES, 2>(given, rows, stream);
    if (rows <= 4) return times<BYTES, 4>(given, rows, stream);
    return times<BYTES, 8>(given, rows, stream);
}

}  // namespace
