// Cross-entropy of rows of logits, which become its gradient in their place; rwkvpipe/kernel/loss.py has it in PyTorch.
//
// A task is a few rows, each on its own, so the result does not depend on the number of threads.

#include "threads.h"
#include "vector.h"

#include <algorithm>
#include <cmath>

namespace {

constexpr int64_t ROWS = 8;  // of a task

struct Loss {
    int64_t V;
    float scale, pull;

    // x becomes scale (softmax(x) - 1 at the target), and pull times the largest x is added where that is
    float row(float *x, int64_t target, bool real) const {
        const float top = largest(x);
        const int64_t at = std::find(x, x + V, top) - x;
        if (target < 0) {
            zero(x, V);
            if (real && at < V) x[at] = pull * top;
            return 0;
        }
        const float wanted = x[target];
        Vec total = {};
        for (int64_t j = 0; j < V; j += WIDTH) {
            const Vec e = only(exponential(load_some(x + j, V - j) - top), V - j);
            store_some(x + j, e, V - j);
            total += e;
        }
        const float whole = sum(total), by = scale / whole;
        for (int64_t j = 0; j < V; j += WIDTH) store_some(x + j, load_some(x + j, V - j) * by, V - j);
        x[target] -= scale;
        if (real && at < V) x[at] += pull * top;
        return std::log(whole) + (top - wanted);
    }

    float largest(const float *x) const {
        float top = x[0];
        int64_t j = 0;
        if (V >= WIDTH) {
            Vec most = load(x);
            for (j = WIDTH; j + WIDTH <= V; j += WIDTH) {
                const Vec y = load(x + j);
                most = y > most ? y : most;
            }
            for (int i = 0; i < WIDTH; i++) top = std::max(top, most[i]);
        }
        for (; j < V; j++) top = std::max(top, x[j]);
        return top;
    }
};

}  // namespace

extern "C" {

// sizes: rows and V. targets are below 0 where there is none, real is not 0 where the largest logit is drawn to 0
// takes R V: logits R*V, targets real R, scale pull, losses R
void loss_rows(const int64_t *s, int threads, float *logits, const int64_t *targets, const int64_t *real, float scale,
               float pull, float *losses) {
    const Loss it = {s[1], scale, pull};
    share((s[0] + ROWS - 1) / ROWS, threads, [&](int64_t n) {
        for (int64_t i = n * ROWS; i < std::min(s[0], (n + 1) * ROWS); i++)
            losses[i] = it.row(logits + i * it.V, targets[i], real[i] != 0);
    });
}

}  // extern "C"
