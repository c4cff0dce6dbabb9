// A matrix in panels times many rows of x: what a model whose matrices lie so reads texts with (rwkvpipe/kernel/panels.py),
// its numbers with the bits that matvec.h gives them. And products of fp32 in training: rwkvpipe/kernel/product.py says
// when these are used, and when torch's are.

#include "narrow.h"
#include "parts.h"

namespace {

using namespace product;

constexpr int64_t MANY = 16;  // rows that make it worth to lay them together, and the matrix as floats

template <class Form>
void many(const Matrix &m, int64_t rows, int threads, const Asked &x, float *to) {
    const tiles::Kept<Form> second = {static_cast<const typename Form::Number *>(m.data), m.words()};
    const tiles::Sizes sizes = {rows, m.out, m.words(), m.out};
    const tiles::Times times = {x.by, x.by_step, 1, nullptr, 0};
    tiles::multiply(tiles::Plain{x.start, x.step, false}, second, sizes, threads, to, m.scale, false, times);
}

#if defined(__AVX512F__)
void many_in_twelve(const Matrix &m, int64_t rows, int threads, const Asked &x, float *to) {
    const twelve::Lying lying(m.data, m.out, m.in);
    const tiles::Plain first = {x.start, x.step, false};
    tiles::multiply(first, tiles::Twelves{lying}, {rows, m.out, m.in, m.out}, threads, to, nullptr, false);
    share((rows + MANY - 1) / MANY, threads, [&](int64_t n) {
        const int64_t r = n * MANY;
        const Asked from = {x.start + r * x.step, x.step, nullptr, 0};
        twelve::add_others(lying, 0, lying.panels, std::min(MANY, rows - r), from, {to + r * m.out, m.out});
    });
}
#endif

// rows of x as a matrix multiplies them, rounded where it is in whole numbers
Asked asked(const Matrix &m, int64_t rows, int threads, const Room &x) {
    if (m.kind != INT8) return {x.start, x.step, nullptr, 0};
    const int64_t words = m.words(), blocks = fixed::BESIDE_8.blocks(m.in);
    float *start = scratch(rows * (words + blocks), ASKED), *by = start + rows * words;
    share((rows + MANY - 1) / MANY, rows * m.in < LARGE ? 1 : threads, [&](int64_t n) {
        for (int64_t r = n * MANY; r < std::min(rows, (n + 1) * MANY); r++)
            fixed::rounded(fixed::BESIDE_8, x[r], m.in, reinterpret_cast<int16_t *>(start + r * words), by + r * blocks, 1);
    });
    return {start, words, by, blocks};
}

// a factor: whether what is added up lies side by side, and how far it is to the next
struct Factor {
    const float *start;
    bool along;
    int64_t step;
    // from row or column `first`, and from k on
    Factor from(int64_t first, int64_t k) const {
        return {start + (along ? first * step + k : k * step + first), along, step};
    }
};

// A factor rounded to pairs of whole numbers along what is added up; what those of each row or column are times lies block
// after block, `apart`.
struct Rounded {
    tiles::Plain pairs;
    const float *by;
    int64_t apart;
};

constexpr int64_t PIECE = 16 * fixed::ALIKE.block;  // numbers each way that are rounded before they are multiplied

// `count` rows or columns of a factor, `deep` numbers of each
Rounded rounded(const Factor &x, int64_t count, int64_t deep, int threads, Purpose what) {
    constexpr fixed::Scale scale = fixed::ALIKE;
    const int64_t words = (deep + 1) / 2, apart = (count + tiles::WIDE - 1) / tiles::WIDE * tiles::WIDE;
    float *pairs = scratch(words * count + scale.blocks(deep) * apart, what), *by = pairs + words * count;
    for (int64_t n = 0; n < scale.blocks(deep); n++) zero(by + n * apart + count, apart - count);
    if (x.along) {
        share((count + MANY - 1) / MANY, threads, [&](int64_t n) {
            for (int64_t i = n * MANY; i < std::min(count, (n + 1) * MANY); i++) {
                int16_t *to = reinterpret_cast<int16_t *>(pairs + i * words);
                fixed::rounded(scale, x.start + i * x.step, deep, to, by + i, apart);
            }
        });
        return {{pairs, words, false}, by, apart};
    }
    const int64_t across = (count + fixed::SOME - 1) / fixed::SOME;
    share(across * scale.blocks(deep), threads, [&](int64_t n) {
        const int64_t k = n / across * scale.block, c = n % across * fixed::SOME;
        const fixed::Block block = {std::min(scale.block, deep - k), std::min(fixed::SOME, count - c)};
        fixed::rounded_down(scale, block, x.from(c, k).start, x.step, pairs + k / 2 * count + c, count,
                            by + n / across * apart + c);
    });
    return {{pairs, count, true}, by, apart};
}

// The product of both rounded, piece by piece: each number's blocks are added in their order, whatever the pieces.
void multiply_rounded(const tiles::Sizes &s, int threads, const Factor &x, const Factor &w, float *to, bool add) {
    for (int64_t k = 0; k < s.deep; k += PIECE)
        for (int64_t c = 0; c < s.columns; c += PIECE) {
            const int64_t deep = std::min(PIECE, s.deep - k), wide = std::min(PIECE, s.columns - c);
            const Rounded second = rounded(w.from(c, k), wide, deep, threads, GIVEN);
            const tiles::Pairs pairs = {{second.pairs.start, second.pairs.step, w.along}};
            for (int64_t r = 0; r < s.rows; r += PIECE) {
                const int64_t tall = std::min(PIECE, s.rows - r);
                const Rounded first = rounded(x.from(r, k), tall, deep, threads, ASKED);
                const tiles::Times times = {first.by, 1, first.apart, second.by, second.apart};
                tiles::multiply(first.pairs, pairs, {tall, wide, (deep + 1) / 2, s.step}, threads,
                                to + r * s.step + c, nullptr, add || k > 0, times);
            }
        }
}

// of few rows; x is what a matrix in ROWS reads, `of` what the others do
void few(const Matrix &m, int64_t rows, int threads, const Asked &of, const Room &x, const Room &to) {
    const int64_t pieces = std::max<int64_t>(1, std::min<int64_t>(threads, m.out * m.in / LARGE));
    const int64_t size = (m.out / pieces + PANEL) / PANEL * PANEL;
    share((m.out + size - 1) / size, threads, [&](int64_t n) {
        const int64_t begin = n * size, end = std::min(m.out, begin + size);
        switch (m.kind) {
            case ROWS: return by_rows(m, begin, end, rows, x, to);
            case FP32: return part<Wide>(m, begin, end, rows, of, to);
            case BF16: return part<Half>(m, begin, end, rows, of, to);
            case INT8: return part<Pair>(m, begin, end, rows, of, to);
#if defined(__AVX512F__)
            case TWELVE: return part<Twelve>(m, begin, end, rows, of, to);
#endif
        }
    });
}

}  // namespace

void times(const Matrix &m, int64_t rows, int threads, const Room &x, const Room &to) {
    few(m, rows, threads, asked(m, rows, threads, x), x, to);
}

void products(const Matrix &m, int64_t rows, int threads, const Asked &x, float *to) {
    if (rows < MANY) return few(m, rows, threads, x, {}, {to, m.out});
    switch (m.kind) {
        case BF16: return many<Half>(m, rows, threads, x, to);
        case INT8: return many<Pair>(m, rows, threads, x, to);
#if defined(__AVX512F__)
        case TWELVE: return many_in_twelve(m, rows, threads, x, to);
#endif
        default: return many<Wide>(m, rows, threads, x, to);
    }
}

extern "C" {

// sizes: rows out in, and how the matrix lies; data: where it does; x (rows, in), to (rows, out)
// takes R out width lies: data 1 of any, scale? out, x R*width, to R*out
void panels_times(const int64_t *s, int threads, const void *const *data, const float *scale, float *x, float *to) {
    const Matrix m = {data[0], scale, s[1], s[2], static_cast<Kind>(s[3])};
    products(m, s[0], threads, asked(m, s[0], threads, {x, m.in}), to);
}

// whether factors can be rounded to bf16
int64_t multiply_bf16() {
#if defined(__AVX512BF16__)
    return 1;
#else
    return 0;
#endif
}

// sizes: rows deep columns, whether x and w are turned (x is (deep, rows) in memory, w (columns, deep)), whether the
// product (rows, columns) is added to what is there, and what factors are rounded to: 0 nothing, 1 whole numbers of 12
// bits, 2 bf16 (only where multiply_bf16 says that they can be)
// takes R deep columns x_turned turned add rounded: x R*deep, w deep*columns, to R*columns
void multiply(const int64_t *s, int threads, const float *x, const float *w, float *to) {
    const int64_t rows = s[0], deep = s[1], columns = s[2];
    const bool x_turned = s[3] != 0, turned = s[4] != 0, add = s[5] != 0;
    const int64_t x_step = x_turned ? rows : deep, step = turned ? deep : columns;
    if (!rows || !columns) return;
    if (!deep) return add ? void() : zero(to, rows * columns);
    const tiles::Sizes sizes = {rows, columns, deep, columns};
    const tiles::Plain first = {x, x_step, x_turned}, second = {w, step, turned};
    if (s[6] == 1) return multiply_rounded(sizes, threads, {x, !x_turned, x_step}, {w, turned, step}, to, add);
#if defined(__AVX512BF16__)
    if (s[6] == 2) {
        const tiles::Sizes words = {rows, columns, (deep + 1) / 2, columns};
        return tiles::multiply(tiles::Narrow{first, deep}, tiles::Narrow{second, deep}, words, threads, to, nullptr, add);
    }
#endif
    tiles::multiply(first, second, sizes, threads, to, nullptr, add);
}

}  // extern "C"
