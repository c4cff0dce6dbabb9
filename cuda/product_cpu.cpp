// A matrix in panels times many rows of x: what a model whose matrices lie so reads texts with (rwkvpipe/kernel/panels.py).
// Its numbers have the bits that matvec.h gives them.

#include "matvec.h"

namespace {

using namespace product;

constexpr int64_t DEEP = 384;  // numbers of each row that are multiplied before the next ones
constexpr int64_t MANY = 16;   // rows that make it worth to lay them, and the matrix as floats, side by side

// rows of x, and panels, whose sums the registers have room for
#if defined(__AVX512F__)
constexpr int HIGH = 8, BROAD = 3;
#elif defined(__AVX__) || defined(__aarch64__)
constexpr int HIGH = 6, BROAD = 1;
#else
constexpr int HIGH = 3, BROAD = 1;
#endif

// PANELS panels of `deep` numbers times HIGH rows of x, whose numbers lie side by side for each k; `soon` is what is to
// be multiplied next: a line of it is asked for with every 8 numbers
template <int PANELS>
void tile(const float *w, const float *x, int64_t deep, const Piece<float> &p, const char *soon) {
    constexpr int VECTORS = PANELS * SPAN;
    Vec found[HIGH][VECTORS];
    for (int r = 0; r < HIGH; r++)
        for (int i = 0; i < VECTORS; i++)
            found[r][i] = p.onward ? load_some(p.to + r * p.to_step + i * WIDTH, p.room - i * WIDTH) : Vec{};
    for (int64_t k = 0; k < deep; k++) {
        if (k % 8 == 0) __builtin_prefetch(soon + 8 * k, 0, 2);
        Vec w_[VECTORS];
#pragma GCC unroll 32
        for (int i = 0; i < VECTORS; i++) w_[i] = load(w + i / SPAN * deep * PANEL + i % SPAN * WIDTH);
#pragma GCC unroll 32
        for (int r = 0; r < HIGH; r++) {
            const Vec x_ = all(x[r]);
#pragma GCC unroll 32
            for (int i = 0; i < VECTORS; i++) found[r][i] += w_[i] * x_;
        }
        w += PANEL, x += HIGH;
    }
    for (int r = 0; r < HIGH; r++) {
        for (int i = 0; i < VECTORS; i++) {
            const int64_t left = p.room - i * WIDTH;
            if (left <= 0) break;
            const Vec y = p.scale ? found[r][i] * load_some(p.scale + i * WIDTH, left) : found[r][i];
            store_some(p.to + r * p.to_step + i * WIDTH, y, left);
        }
    }
}

// PANELS panels, as floats, times whole tiles of rows that are laid, and the rest of them as they are
template <int PANELS>
void tiles(Piece<float> p, const float *laid, int64_t rows, const char *soon) {
    int64_t r = 0;
    for (; r + HIGH <= rows; r += HIGH, soon += 8 * p.count) {
        tile<PANELS>(p.w, laid + r * p.count, p.count, p, soon);
        p.x += HIGH * p.x_step, p.to += HIGH * p.to_step;
    }
    down<Wide>(p, PANELS, rows - r);
}

template <class Form>
void many(const Matrix &m, int64_t rows, const Room &x, const Room &to) {
    typedef typename Form::Number Number;
    const int64_t apart = m.in * PANEL;
    float *numbers = scratch(BROAD * PANEL * DEEP + rows * DEEP), *laid = numbers + BROAD * PANEL * DEEP;
    for (int64_t k = 0; k < m.in; k += DEEP) {
        const int64_t deep = std::min(DEEP, m.in - k);
        for (int64_t r = 0; r + HIGH <= rows; r += HIGH)
            for (int64_t i = 0; i < HIGH; i++)
                for (int64_t l = 0; l < deep; l++) laid[r * deep + l * HIGH + i] = x[r + i][k + l];
        for (int64_t o = 0; o < m.out; o += BROAD * PANEL) {
            const Number *w = static_cast<const Number *>(m.data) + o / PANEL * apart + k * PANEL;
            const int64_t count = std::min<int64_t>(BROAD, (m.out - o + PANEL - 1) / PANEL);
            for (int64_t i = 0; i < count; i++)
                for (int64_t j = 0; j < deep * PANEL; j += WIDTH)
                    store(numbers + i * deep * PANEL + j, Form::at(w + i * apart + j));
            const float *scale = k + deep == m.in && m.scale ? m.scale + o : nullptr;
            Piece<float> p = {numbers, deep * PANEL, deep, x.start + k, x.step, to.start + o, to.step, m.out - o, scale, k > 0};
            const char *soon = reinterpret_cast<const char *>(w + count * apart);
            if (count == BROAD) {
                tiles<BROAD>(p, laid, rows, soon);
                continue;
            }
            for (int64_t i = 0; i < count; i++) {
                tiles<1>(p, laid, rows, soon);
                p.w += p.apart, p.to += PANEL, p.room -= PANEL;
                if (p.scale) p.scale += PANEL;
            }
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
    const int64_t size = std::max(MANY, (s[0] / threads + HIGH) / HIGH * HIGH);
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
