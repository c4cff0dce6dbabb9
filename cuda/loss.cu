// Cross-entropy of rows of logits on a GPU, which become its gradient in their place; rwkvpipe/kernel/loss.py has it in
// PyTorch. A row is a block's: its largest logit and the sum of exponentials in one pass, the gradient in another.

#include "grid.cuh"

namespace {

constexpr int WIDTH = 512, FEW = 32, EACH = 8;  // FEW: threads that go through what WIDTH have found

// the largest of some numbers, where it is first, and the sum of exponentials beside it
struct Top {
    float most, total;
    int64_t at;

    ON_GPU static float beside(float x, float most) { return expf(x - (most == -HUGE_VALF ? 0.0f : most)); }

    ON_GPU void add(const Top &other) {
        const bool moved = other.most > most || (other.most == most && other.at < at);
        const float now = other.most > most ? other.most : most;
        total = total * beside(most, now) + other.total * beside(other.most, now);
        at = moved ? other.at : at, most = now;
    }
};

struct Loss {
    static constexpr int THREADS = WIDTH, FLOATS = WIDTH * 4;
    struct Own {
        Top top;
    };
    using Threads = Block<Own, WIDTH>;
    int64_t V;
    bool half;
    float scale, pull;
    void *logits;
    const int64_t *chosen, *real;  // chosen: below 0 where there is no loss; real: not 0 where the largest is drawn to 0
    float *losses;

    ON_GPU void work(int64_t row, Threads &threads, float *shared) const {
        Top *tops = reinterpret_cast<Top *>(shared);
        const int64_t wanted = chosen[row];
        threads.each([&](int thread, Own &own) {
            own.top = {-HUGE_VALF, 0.0f, V};
            for (int64_t first = thread; first < V; first += WIDTH * EACH) read(own.top, row, first);
            tops[thread] = own.top;
        });
        threads.each([&](int thread, Own &) {
            for (int i = thread + FEW; thread < FEW && i < WIDTH; i += FEW) tops[thread].add(tops[i]);
        });
        threads.each([&](int thread, Own &) {
            if (thread) return;
            for (int i = 1; i < FEW; i++) tops[0].add(tops[i]);
            // NaN where no logit is wanted's: nobody waits for a card to look before
            const float told = wanted < 0 ? 0.0f : wanted < V ? get(logits, row * V + wanted, half) : NAN;
            losses[row] = wanted < 0 ? 0.0f : logf(tops[0].total) + (tops[0].most - told);
        });
        threads.each([&](int thread, Own &) {
            const Top top = tops[0];
            const float drawn = real[row] ? pull * top.most : 0.0f;
            for (int64_t first = thread; first < V; first += WIDTH * EACH) write(top, row, first, wanted, drawn);
        });
    }

    ON_GPU void read(Top &top, int64_t row, int64_t first) const {
        float x[EACH], most = top.most;
#pragma unroll
        for (int i = 0; i < EACH; i++)
            x[i] = first + i * WIDTH < V ? get(logits, row * V + first + i * WIDTH, half) : -HUGE_VALF;
#pragma unroll
        for (int i = 0; i < EACH; i++)
            if (x[i] > most) most = x[i], top.at = first + i * WIDTH;
        top.total *= Top::beside(top.most, most);
#pragma unroll
        for (int i = 0; i < EACH; i++) top.total += Top::beside(x[i], most);
        top.most = most;
    }

    ON_GPU void write(const Top &top, int64_t row, int64_t first, int64_t wanted, float drawn) const {
        float x[EACH];
        const float by = scale / top.total;
#pragma unroll
        for (int i = 0; i < EACH; i++)
            x[i] = first + i * WIDTH < V ? get(logits, row * V + first + i * WIDTH, half) : 0.0f;
#pragma unroll
        for (int i = 0; i < EACH; i++) {
            const int64_t at = first + i * WIDTH;
            if (at >= V) continue;
            float found = wanted < 0 ? 0.0f : Top::beside(x[i], top.most) * by - (at == wanted ? scale : 0.0f);
            if (at == top.at) found += drawn;
            put(logits, row * V + at, half, found);
        }
    }
};

}  // namespace

// sizes: rows, V, and whether logits are bf16. Given back are 0 or the GPU's error.
// takes rows V /logits: logits rows*V, chosen real rows, scale, pull, losses rows
extern "C" int loss_rows(const int64_t *z, int64_t stream, void *logits, const int64_t *chosen, const int64_t *real,
                         float scale, float pull, float *losses) {
    return launch(Loss{z[1], z[2] != 0, scale, pull, logits, chosen, real, losses}, z[0], stream);
}
