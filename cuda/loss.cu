// Cross-entropy of rows of logits on a GPU, which become its gradient in their place; rwkvpipe/kernel/loss.py has it in
// PyTorch. A row is a block's: its largest logit and the sum of exponentials in one pass, the gradient in another.

#include "grid.cuh"

namespace {

constexpr int WIDTH = 512;
constexpr float NONE = -HUGE_VALF;

// Exponentials are powers of two here, of numbers scaled by this; what they are measured from is rounded once and then
// the same number for all, so that its rounding is nobody's error.
ON_GPU float scaled(float x) {
#ifdef __CUDA_ARCH__
    return __fmul_rn(x, LOG2E);  // not made one with what is added to it
#else
    return x * LOG2E;
#endif
}

// the largest of some numbers, the first place that has it (or of as many as are read at once), and the sum of
// exponentials measured from it
struct Top {
    float most, total;
    int64_t at;

    ON_GPU static float from(float most) { return most == NONE ? 0.0f : scaled(most); }
    ON_GPU static float beside(float x, float base) { return power(fmaf(x, LOG2E, -base)); }

    ON_GPU void add(const Top &other) {
        const bool moved = other.most > most || (other.most == most && other.at < at);
        const float now = fmaxf(other.most, most), base = from(now);
        total = total * power(scaled(most) - base) + other.total * power(scaled(other.most) - base);
        at = moved ? other.at : at, most = now;
    }

    // WIDE numbers at a place
    template <int WIDE>
    ON_GPU void add(const float *x, int64_t place) {
        float now = most, sum = 0.0f;
#pragma unroll
        for (int i = 0; i < WIDE; i++) now = fmaxf(x[i], now);
        const float base = from(now);
#pragma unroll
        for (int i = 0; i < WIDE; i++) sum += beside(x[i], base);
        total = total * power(scaled(most) - base) + sum;
        at = now > most ? place : at, most = now;
    }

    // the logarithm of the sum of all exponentials, less `told`
    ON_GPU float loss(float told) const { return logf(total * power(-fmaf(most, LOG2E, -from(most)))) + (most - told); }
};

// `Way::WIDE` numbers of 16 bytes lie beside each other; a thread takes AHEAD times as many at once.
template <class Way>
struct Loss : Way {
    using Way::WIDE;
    static constexpr int THREADS = WIDTH, FLOATS = WIDTH * 4, AHEAD = WIDE > 1 ? 2 : 8;
    static constexpr int64_t STEP = WIDTH * WIDE, ALL = STEP * AHEAD;
    struct Own {
        Top top;
    };
    using Threads = Block<Own, WIDTH>;
    int64_t V;
    bool any_half;
    float scale, pull;
    void *logits;
    const int64_t *chosen, *real;  // chosen: below 0 where there is no loss; real: not 0 if the largest is drawn to 0
    float *losses;

    ON_GPU bool half() const { return Way::HALVES == ANY ? any_half : Way::HALVES == 1; }

    // V numbers of a row; `to` is where they begin
    ON_GPU void work(int64_t row, Threads &threads, float *shared) const {
        Top *tops = reinterpret_cast<Top *>(shared);
        const int64_t wanted = chosen[row], to = row * V;
        threads.each([&](int thread, Own &own) {
            own.top = {NONE, 0.0f, V};
            for (int64_t first = thread * WIDE; first < V; first += ALL) read(own.top, to, first);
            tops[thread] = own.top;
        });
        for (int apart = WIDTH / 2; apart; apart /= 2)
            threads.each([&](int thread, Own &) {
                if (thread < apart) tops[thread].add(tops[thread + apart]);
            });
        threads.each([&](int thread, Own &) {
            if (thread) return;
            Top &top = tops[0];
            if (top.at < V) top.at += first_of(top.most, to + top.at);
            // NaN where no logit is wanted's: nobody waits for a card to look before
            const float told = wanted < 0 ? 0.0f : wanted < V ? get(logits, to + wanted, half()) : NAN;
            losses[row] = wanted < 0 ? 0.0f : top.loss(told);
        });
        threads.each([&](int thread, Own &) {
            const Top top = tops[0];
            const float drawn = real[row] ? pull * top.most : 0.0f;
            // from the end on, which was read last and is still near
            for (int64_t first = (V - 1) / ALL * ALL + thread * WIDE; first >= 0; first -= ALL)
                write(top, to, first, wanted, drawn);
        });
    }

    ON_GPU void read(Top &top, int64_t to, int64_t first) const {
        float x[AHEAD][WIDE];
#pragma unroll
        for (int i = 0; i < AHEAD; i++)
            if (first + i * STEP < V) fetch<WIDE>(x[i], logits, to + first + i * STEP, half());
#pragma unroll
        for (int i = 0; i < AHEAD; i++)
            if (first + i * STEP < V) top.add<WIDE>(x[i], first + i * STEP);
    }

    // how many of WIDE numbers at a place come before `most`
    ON_GPU int first_of(float most, int64_t place) const {
        float x[WIDE];
        fetch<WIDE>(x, logits, place, half());
        int found = 0;
#pragma unroll
        for (int i = WIDE - 1; i >= 0; i--) found = x[i] == most ? i : found;
        return found;
    }

    ON_GPU void write(const Top &top, int64_t to, int64_t first, int64_t wanted, float drawn) const {
        float x[AHEAD][WIDE];
#pragma unroll
        for (int i = 0; i < AHEAD; i++)
            if (first + i * STEP < V) fetch<WIDE>(x[i], logits, to + first + i * STEP, half());
        const float by = scale / top.total, base = Top::from(top.most);
#pragma unroll
        for (int i = 0; i < AHEAD; i++) {
            const int64_t at = first + i * STEP;
            if (at >= V) continue;
            if (wanted < 0) {
#pragma unroll
                for (int n = 0; n < WIDE; n++) x[i][n] = 0.0f;
            } else {
#pragma unroll
                for (int n = 0; n < WIDE; n++) x[i][n] = Top::beside(x[i][n], base) * by;
            }
            add(x[i], wanted - at, -scale);
            add(x[i], top.at - at, drawn);
            lay_down<WIDE>(logits, to + at, half(), x[i]);
        }
    }

    // to the number of x at a place, if there is one
    ON_GPU static void add(float *x, int64_t place, float number) {
        if (place < 0 || place >= WIDE) return;
#pragma unroll
        for (int n = 0; n < WIDE; n++) x[n] += n == place ? number : 0.0f;
    }
};

}  // namespace

// Given back are 0 or the GPU's error.
// takes rows V /logits: logits rows*V, chosen real rows, scale, pull, losses rows
extern "C" int loss_rows(const int64_t *z, int64_t stream, void *logits, const int64_t *chosen, const int64_t *real,
                         float scale, float pull, float *losses) {
    const auto rows = [&](auto way) {
        const Loss<decltype(way)> kernel = {{}, z[1], z[2] != 0, scale, pull, logits, chosen, real, losses};
        return launch(kernel, z[0], stream);
    };
    const bool all = wide(logits);
    return z[2] ? by_way<8, 1>(1, all && z[1] % 8 == 0, rows) : by_way<4, 0>(0, all && z[1] % 4 == 0, rows);
}
