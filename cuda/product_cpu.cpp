// A matrix in panels times many rows of x: what a model whose matrices lie so reads texts with (rwkvpipe/kernel/panels.py).
// Its numbers have the bits that matvec.h gives them.

#include "matvec.h"

namespace {

using namespace product;

constexpr int64_t DEEP = 384;  // numbers of each row that are multiplied before the next ones
constexpr int64_t MANY = 16;   // rows that make it worth to lay them, and the matrix as floats, side by side

template <class Form>
void many(const Matrix &m, int64_t rows, const Room &x, const Room &to) {
    typedef typename Form::Number Number;
    const int64_t apart = m.in * PANEL, step = DEEP + WIDTH;  // rows must not lie where a cache has them all in one place
    float *numbers = scratch(AT_8 * PANEL * DEEP + rows * step), *laid = numbers + AT_8 * PANEL * DEEP;
    for (int64_t k = 0; k < m.in; k += DEEP) {
        const int64_t deep = std::min(DEEP, m.in - k);
        const bool last = k + deep == m.in;
        for (int64_t r = 0; r < rows; r++) copy(laid + r * step, x[r] + k, deep);
        for (int64_t o = 0; o < m.out; o += AT_8 * PANEL) {
            const Number *w = static_cast<const Number *>(m.data) + o / PANEL * apart + k * PANEL;
            const int64_t count = std::min<int64_t>(AT_8, (m.out - o + PANEL - 1) / PANEL);
            for (int64_t i = 0; i < count; i++)
                for (int64_t j = 0; j < deep * PANEL; j += WIDTH)
                    store(numbers + i * deep * PANEL + j, Form::at(w + i * apart + j));
            const float *scale = last && m.scale ? m.scale + o : nullptr;
            down<Wide>({numbers, deep * PANEL, deep, laid, step, to.start + o, to.step, m.out - o, scale, k > 0}, count, rows);
        }
    }
}

}  // namespace

void times(const Matrix &m, int64_t rows, int threads, const Room &x, const Room &to) {
    const int64_t pieces = std::max<int64_t>(1, std::min<int64_t>(threads, m.out * m.in / LARGE));
    const int64_t size = (m.out / pieces + PANEL) / PANEL * PANEL;
    share((m.out + size - 1) / size, threads, [&](int64_t n) {
        const int64_t begin = n * size, end = std::min(m.out, begin + size);
        switch (m.kind) {
            case ROWS: return by_rows(m, begin, end, rows, x, to);
            case FP32: return part<Wide>(m, begin, end, rows, x, to);
            case BF16: return part<Half>(m, begin, end, rows, x, to);
            case INT8: return part<Byte>(m, begin, end, rows, x, to);
        }
    });
}

extern "C" {

// sizes: rows out in, and how the matrix lies; data: where it does; x (rows, in), to (rows, out)
void panels_times(const int64_t *s, int threads, const void *const *data, const float *scale, float *x, float *to) {
    const Matrix m = {data[0], scale, s[1], s[2], static_cast<Kind>(s[3])};
    if (s[0] < MANY) return times(m, s[0], threads, {x, m.in}, {to, m.out});
    const int64_t size = std::max(MANY, (s[0] / threads + TALL) / TALL * TALL);
    share((s[0] + size - 1) / size, threads, [&](int64_t n) {
        const int64_t begin = n * size, rows = std::min(size, s[0] - begin);
        const Room from = {x + begin * m.in, m.in}, here = {to + begin * m.out, m.out};
        switch (m.kind) {
            case BF16: return many<Half>(m, rows, from, here);
            case INT8: return many<Byte>(m, rows, from, here);
            default: return many<Wide>(m, rows, from, here);
        }
    });
}

}  // extern "C"
