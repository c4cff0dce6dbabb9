// How matrices lie, and what products with their numbers are made of.
#pragma once

#include "fixed.h"
#include "vector.h"

// How a matrix lies: ROWS is fp32, a row after the other. The others lie in panels of 16 rows: 16 numbers for each k,
// or for INT8 16 pairs for every two, side by side, so that what is read is added as it comes; TWELVE is told in
// twelve.h. What fills up the last panel and the last pair is never stored.
enum Kind { ROWS, FP32, BF16, INT8, TWELVE };
constexpr int PANEL = 16, SPAN = PANEL / WIDTH;

struct Matrix {
    const void *data;
    const float *scale;  // of each row, for INT8
    int64_t out, in;
    Kind kind;
    int64_t words() const { return kind == INT8 ? (in + 1) / 2 : in; }  // of a row of x
};

// rows side by side; those that are multiplied by a matrix in ROWS are filled up with zeros to whole vectors
struct Room {
    float *start;
    int64_t step;
    float *operator[](int64_t row) const { return start + row * step; }
};

// rows of x as a matrix multiplies them: numbers, or for INT8 pairs of whole ones and what each BLOCK is times
struct Asked {
    const float *start;
    int64_t step;
    const float *by;
    int64_t by_step;
};

namespace product {

constexpr int64_t LARGE = 1 << 18;  // numbers of a matrix that are worth another thread
constexpr int64_t AHEAD = 2048;     // bytes of a panel that are asked for before they are needed
constexpr int64_t SOON = 1152;      // the same of TWELVE

// rows of x, and panels, whose sums the registers have room for
#if defined(__AVX512F__)
constexpr int TALL = 12, AT_8 = 2, AT_4 = 4, AT_2 = 8, AT_1 = 4;
#elif defined(__AVX__)
constexpr int TALL = 6, AT_8 = 1, AT_4 = 1, AT_2 = 2, AT_1 = 4;
#elif defined(__aarch64__)
constexpr int TALL = 6, AT_8 = 1, AT_4 = 1, AT_2 = 2, AT_1 = 4;
#else
constexpr int TALL = 3, AT_8 = 1, AT_4 = 1, AT_2 = 1, AT_1 = 2;
#endif
constexpr int64_t TOGETHER = 8;  // panels that all rows of x meet before the next ones

typedef uint16_t Halves __attribute__((vector_size(2 * WIDTH), aligned(2), may_alias));

// sums of products of floats, a word of x each
struct Floats {
    typedef Vec Sum;
    static constexpr int64_t EACH = 1;  // numbers of a matrix's row that meet a word of x
    static constexpr bool WHOLE = false;   // whether they are whole numbers, and
    static constexpr bool SCALED = false;  // whether what they are times is of blocks of its row, too
    static int64_t panel(int64_t words) { return words * PANEL; }  // numbers of a matrix in a panel of so many words
    static Vec begun(Vec before) { return before; }
    static Vec spread(const float *x) { return all(*x); }
    static Vec added(Vec sum, Vec w, Vec x) { return sum + w * x; }
};

// numbers of a matrix as vectors of words that are multiplied
struct Wide : Floats {
    typedef float Number;
    static Vec at(const float *p) { return load(p); }
};
struct Half : Floats {
    typedef uint16_t Number;
    static Vec at(const uint16_t *p) {
#if defined(__AVX512F__)
        const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i *>(p));
        return (Vec)_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16);
#elif defined(__AVX2__)
        const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i *>(p));
        return (Vec)_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16);
#else
        return (Vec)(__builtin_convertvector(*reinterpret_cast<const Halves *>(p), Ints) << 16);
#endif
    }
};
struct Pair {
    typedef int8_t Number;
    typedef Ints Sum;
    static constexpr int64_t EACH = 2, BLOCK = fixed::BESIDE_8.block;
    static constexpr bool WHOLE = true, SCALED = false;
    static int64_t panel(int64_t words) { return words * PANEL * EACH; }
    static Vec at(const int8_t *p) { return (Vec)fixed::widened(p); }
    static Ints begun(Vec) { return Ints{}; }
    static Ints spread(const float *x) { return *reinterpret_cast<const fixed::Word *>(x) + Ints{}; }
    static Ints added(Ints sum, Vec w, Ints x) { return fixed::dot(sum, (fixed::Shorts)w, (fixed::Shorts)x); }
};

// of 16 bits on both sides
struct Alike : Pair {
    static constexpr int64_t BLOCK = fixed::ALIKE.block;
    static constexpr bool SCALED = true;
};

#if defined(__AVX512BF16__)
// two numbers of bf16 on both sides, the second of which is added first; numbers, products and sums below 2^-126 are 0
struct Two {
    typedef Vec Sum;
    static constexpr int64_t EACH = 2;
    static constexpr bool WHOLE = false, SCALED = false;
    static Vec begun(Vec before) { return before; }
    static Vec spread(const float *x) { return (Vec)(*reinterpret_cast<const fixed::Word *>(x) + Ints{}); }
    static Vec added(Vec sum, Vec w, Vec x) { return (Vec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)w, (__m512bh)x); }
};
#endif

// what becomes of a sum of whole numbers, times what they are times, and of one of floats
inline Vec ended(Ints sum, Vec before, Vec by) { return fixed::joined(before, __builtin_convertvector(sum, Vec), by); }
inline Vec ended(Vec sum, Vec, Vec) { return sum; }

// what a kernel multiplies: `count` words of each of ROWS rows of x with some panels, `apart` numbers from each other
template <class Number>
struct Piece {
    const Number *w;
    int64_t apart, count;
    const float *x;
    int64_t x_step;
    const float *by;
    int64_t by_step;
    float *to;
    int64_t to_step, room;  // outputs that there are from here on
    const float *scale;     // or null: to be multiplied later, or never
    int64_t before;         // words before these, of which `to` has the sums
};

}  // namespace product
