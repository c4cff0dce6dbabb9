// Numbers of bf16 in twelve bits, without loss: a matrix of weights has few exponents, so each panel has a code of four
// bits for the 15 that most of its numbers have, and one for exponent 0. Sign and the seven bits of a mantissa are as they
// are. Numbers of other exponents are 0 in their place, and stand after all panels, to be added to the sums of these: one
// in thousands, so that 12 bits are read where 16 were.
//
// Eight numbers of each of a panel's 16 rows are a turn of three lines: word `row` of the first has mantissas of four, a
// byte each, and in the bytes' highest bits the sign of the number before (of byte 0 that of the last), so that a
// rotation brings both to their places; the second likewise of the next four; word `row` of the third has the eight
// codes. A panel begins with what its codes stand for, 16 powers of two. After all panels comes at which of the other
// numbers each begins; then these.
#pragma once

#include "forms.h"

#include <utility>

namespace product {

struct Twelve : Floats {
    typedef uint8_t Number;
    static constexpr int64_t TURN = 8, BYTES = 192, CODES = 16, HEAD = 64;  // bytes of a turn, and of what codes stand for
    static int64_t panel(int64_t words) { return HEAD + (words + TURN - 1) / TURN * BYTES; }
};

namespace twelve {

struct Other {
    int32_t place;  // k * PANEL + row
    float value;
};

// where things lie, of a matrix (out, in)
struct Lying {
    int64_t panels, apart;
    const uint8_t *data;
    Lying(const void *data, int64_t out, int64_t in)
        : panels((out + PANEL - 1) / PANEL), apart(Twelve::panel(in)), data(static_cast<const uint8_t *>(data)) {}
    const uint8_t *panel(int64_t n) const { return data + n * apart; }
    const int32_t *starts() const { return reinterpret_cast<const int32_t *>(panel(panels)); }
    const Other *others() const { return reinterpret_cast<const Other *>(starts() + panels + 1); }
};

// What add_others will read of these panels, and where it will look of the next ones.
inline void ask(const Lying &lying, int64_t first, int64_t count) {
    const int32_t *starts = lying.starts() + first;
    const auto *from = reinterpret_cast<const char *>(lying.others() + starts[0]);
    const auto *end = reinterpret_cast<const char *>(lying.others() + starts[count]);
    __builtin_prefetch(starts + 2 * count);
    for (; from < end; from += 64) __builtin_prefetch(from);
}

// The other numbers of `count` panels from `first` on, times rows of x, are added to sums that are whole. (A product and
// its sum are one operation on all processors that read numbers so.)
inline void add_others(const Lying &lying, int64_t first, int64_t count, int64_t rows, const Asked &x, const Room &to) {
    const int32_t *starts = lying.starts() + first;
    for (int64_t r = 0; r < rows && starts[0] < starts[count]; r++)
        for (int64_t n = 0; n < count; n++)
            for (const Other *other = lying.others() + starts[n]; other < lying.others() + starts[n + 1]; other++) {
                float &y = to[r][(first + n) * PANEL + other->place % PANEL];
                y = __builtin_fmaf(other->value, x.start[r * x.step + other->place / PANEL], y);
            }
}

// `count` words of rows of x with some panels; only for processors that have the vectors for it
template <int PANELS, int ROWS_OF_X>
void panels(const Piece<uint8_t> &p);

#if defined(__AVX512F__)

// number J of a turn, of all rows
template <int J>
inline Vec number(const uint8_t *turn, __m512i powers) {
    const __m512i size = _mm512_loadu_si512(turn + J / 4 * 64), codes = _mm512_loadu_si512(turn + 128);
    const __m512i power = _mm512_permutexvar_epi32(_mm512_srli_epi32(codes, 4 * J), powers);
    const __m512i sign_and_mantissa = _mm512_set1_epi32(static_cast<int32_t>(0x807f0000));
    return (Vec)_mm512_ternarylogic_epi32(_mm512_rol_epi32(size, (80 - 8 * J) % 32), sign_and_mantissa, power, 0xea);
}

// calls with_each(integral constant J) for the first `count` numbers of a turn
template <class With, int... J>
inline void turn(int64_t count, const With &with_each, std::integer_sequence<int, J...>) {
    ((J < count ? with_each(std::integral_constant<int, J>()) : void()), ...);
}
typedef std::make_integer_sequence<int, Twelve::TURN> Turn;

template <int PANELS, int ROWS_OF_X>
void panels(const Piece<uint8_t> &p) {
    constexpr int64_t LINE = 64;
    Vec found[ROWS_OF_X][PANELS];
    __m512i powers[PANELS];
#pragma GCC unroll 32
    for (int i = 0; i < PANELS; i++) {
        powers[i] = _mm512_loadu_si512(p.w + i * p.apart);
#pragma GCC unroll 32
        for (int r = 0; r < ROWS_OF_X; r++) found[r][i] = Vec{};
    }
    const auto add = [&](const uint8_t *w, const float *x, int64_t count) {
        const auto one = [&](auto j) {
            constexpr int J = decltype(j)::value;
            Vec w_[PANELS];
#pragma GCC unroll 32
            for (int i = 0; i < PANELS; i++) w_[i] = number<J>(w + i * p.apart, powers[i]);
#pragma GCC unroll 32
            for (int r = 0; r < ROWS_OF_X; r++) {
                const Vec x_ = all(x[r * p.x_step + J]);
#pragma GCC unroll 32
                for (int i = 0; i < PANELS; i++) found[r][i] = Floats::added(found[r][i], w_[i], x_);
            }
        };
        turn(count, one, Turn());
    };
    const uint8_t *w = p.w + Twelve::HEAD;
    int64_t k = 0;
    for (; k + Twelve::TURN <= p.count; k += Twelve::TURN, w += Twelve::BYTES) {
        if (ROWS_OF_X < TALL) {
            const uint8_t *soon = w + SOON + (w - p.w + SOON < p.apart ? 0 : (PANELS - 1) * p.apart);
#pragma GCC unroll 32
            for (int i = 0; i < PANELS; i++)
                for (int64_t line = 0; line < Twelve::BYTES; line += LINE)
                    __builtin_prefetch(soon + i * p.apart + line, 0, 1);  // to the second cache: faster than to the first
        }
        add(w, p.x + k, Twelve::TURN);
    }
    if (k < p.count) add(w, p.x + k, p.count - k);
#pragma GCC unroll 32
    for (int r = 0; r < ROWS_OF_X; r++)
#pragma GCC unroll 32
        for (int i = 0; i < PANELS; i++)
            if (p.room > i * WIDTH) store_some(p.to + r * p.to_step + i * WIDTH, found[r][i], p.room - i * WIDTH);
}

#endif

}  // namespace twelve
}  // namespace product
