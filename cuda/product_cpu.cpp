// A matrix in panels times many rows of x: what a model whose matrices lie so reads texts with (rwkvpipe/kernel/panels.py),
// its numbers with the bits that matvec.h gives them. And products of fp32 in training: rwkvpipe/kernel/product.py says
// when these are used, and when torch's are.

#include "tiles.h"

namespace {

using namespace product;

constexpr int64_t MANY = 16;  // rows that make it worth to lay them together, and the matrix as floats

template <class Form>
void many(const Matrix &m, int64_t rows, int threads, const Asked &x, float *to) {
    const tiles::Kept<Form> second = {static_cast<const typename Form::Number *>(m.data), m.words()};
    const tiles::Sizes sizes = {rows, m.out, m.words()};
    tiles::multiply({x.start, x.step, false}, second, sizes, threads, to, m.scale, false, {x.by, x.by_step});
}

// rows of x as a matrix multiplies them, rounded where it is in whole numbers
Asked asked(const Matrix &m, int64_t rows, int threads, const Room &x) {
    if (m.kind != INT8) return {x.start, x.step, nullptr, 0};
    const int64_t words = m.words(), blocks = fixed::blocks(m.in);
    float *start = scratch(rows * (words + blocks), ASKED), *by = start + rows * words;
    share((rows + MANY - 1) / MANY, rows * m.in < LARGE ? 1 : threads, [&](int64_t n) {
        for (int64_t r = n * MANY; r < std::min(rows, (n + 1) * MANY); r++)
            fixed::rounded(x[r], m.in, reinterpret_cast<int16_t *>(start + r * words), by + r * blocks);
    });
    return {start, words, by, blocks};
}

}  // namespace

void times(const Matrix &m, int64_t rows, int threads, const Room &x, const Room &to) {
    const int64_t pieces = std::max<int64_t>(1, std::min<int64_t>(threads, m.out * m.in / LARGE));
    const int64_t size = (m.out / pieces + PANEL) / PANEL * PANEL;
    const Asked of = asked(m, rows, threads, x);
    share((m.out + size - 1) / size, threads, [&](int64_t n) {
        const int64_t begin = n * size, end = std::min(m.out, begin + size);
        switch (m.kind) {
            case ROWS: return by_rows(m, begin, end, rows, x, to);
            case FP32: return part<Wide>(m, begin, end, rows, of, to);
            case BF16: return part<Half>(m, begin, end, rows, of, to);
            case INT8: return part<Pair>(m, begin, end, rows, of, to);
        }
    });
}

extern "C" {

// sizes: rows out in, and how the matrix lies; data: where it does; x (rows, in), to (rows, out)
// takes R out width lies: data 1 of any, scale? out, x R*width, to R*out
void panels_times(const int64_t *s, int threads, const void *const *data, const float *scale, float *x, float *to) {
    const Matrix m = {data[0], scale, s[1], s[2], static_cast<Kind>(s[3])};
    if (s[0] < MANY) return times(m, s[0], threads, {x, m.in}, {to, m.out});
    const Asked of = asked(m, s[0], threads, {x, m.in});
    switch (m.kind) {
        case BF16: return many<Half>(m, s[0], threads, of, to);
        case INT8: return many<Pair>(m, s[0], threads, of, to);
        default: return many<Wide>(m, s[0], threads, of, to);
    }
}

// sizes: rows deep columns, whether x and w are turned (x is (deep, rows) in memory, w (columns, deep)), and whether the
// product (rows, columns) is added to what is there
// takes R deep columns x_turned turned add: x R*deep, w deep*columns, to R*columns
void multiply(const int64_t *s, int threads, const float *x, const float *w, float *to) {
    const int64_t rows = s[0], deep = s[1], columns = s[2];
    const tiles::Plain first = {x, s[3] ? rows : deep, s[3] != 0}, second = {w, s[4] ? deep : columns, s[4] != 0};
    tiles::multiply(first, second, {rows, columns, deep}, threads, to, nullptr, s[5] != 0);
}

}  // extern "C"
