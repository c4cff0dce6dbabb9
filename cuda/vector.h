// Vectors of floats as wide as the processor that this is compiled for, without a word of assembly.
#pragma once

#include <cstdint>

#if defined(__AVX512F__)
constexpr int WIDTH = 16;
constexpr int BLOCK = 4;  // vectors that an inner loop holds of each operand: what the registers have room for
#elif defined(__AVX__)
constexpr int WIDTH = 8;
constexpr int BLOCK = 2;
#else
constexpr int WIDTH = 4;  // NEON, SSE2; where there is neither, the compiler makes four scalars of it
constexpr int BLOCK = 2;
#endif

typedef float Vec __attribute__((vector_size(4 * WIDTH)));
typedef int32_t Ints __attribute__((vector_size(4 * WIDTH)));
typedef float Loose __attribute__((vector_size(4 * WIDTH), aligned(4), may_alias));  // at any address

inline Vec load(const float *from) { return *reinterpret_cast<const Loose *>(from); }
inline void store(float *to, Vec x) { *reinterpret_cast<Loose *>(to) = x; }
inline Vec all(float x) { return x - Vec{}; }

// the last 0 to WIDTH - 1 floats of a row, filled up by zeros; and back
__attribute__((noinline)) inline Vec load_tail(const float *from, int64_t n) {
    float part[WIDTH] = {};
    for (int64_t i = 0; i < n; i++) part[i] = from[i];
    return load(part);
}
__attribute__((noinline)) inline void store_tail(float *to, Vec x, int64_t n) {
    for (int64_t i = 0; i < n; i++) to[i] = x[i];
}

// the next vector of a row that has n floats left
inline Vec load_some(const float *from, int64_t n) { return n >= WIDTH ? load(from) : load_tail(from, n); }
inline void store_some(float *to, Vec x, int64_t n) { n >= WIDTH ? store(to, x) : store_tail(to, x, n); }

inline void copy(float *to, const float *from, int64_t n) {
    int64_t i = 0;
    for (; i + WIDTH <= n; i += WIDTH) store(to + i, load(from + i));
    for (; i < n; i++) to[i] = from[i];
}

inline void zero(float *to, int64_t n) {
    int64_t i = 0;
    for (; i + WIDTH <= n; i += WIDTH) store(to + i, Vec{});
    for (; i < n; i++) to[i] = 0;
}

// Where a vector is a whole line of cache, what is read again only much later is written past the caches: no line is
// fetched to be overwritten, and none is driven out. Smaller pieces would wait for the rest of their line.
constexpr bool STREAMS = WIDTH == 16;

// whether rows of n floats, one behind the other from `to` on, are whole lines; else they are stored as ever
inline bool in_lines(const float *to, int64_t n) {
    return STREAMS && n % WIDTH == 0 && reinterpret_cast<uintptr_t>(to) % sizeof(Vec) == 0;
}
inline void stream(float *to, Vec x) {
#if defined(__AVX512F__) && defined(__clang__)
    __builtin_nontemporal_store(x, reinterpret_cast<Vec *>(to));
#elif defined(__AVX512F__)
    __builtin_ia32_movntps512(to, x);
#else
    store(to, x);
#endif
}
// before another thread may read what was streamed
inline void settle() {
#if defined(__AVX512F__)
    __builtin_ia32_sfence();
#endif
}

// the lanes of a vector as the arguments of a shuffle of two
#if defined(__AVX512F__)
#define LANES(of) \
    of(0), of(1), of(2), of(3), of(4), of(5), of(6), of(7), of(8), of(9), of(10), of(11), of(12), of(13), of(14), of(15)
#elif defined(__AVX__)
#define LANES(of) of(0), of(1), of(2), of(3), of(4), of(5), of(6), of(7)
#else
#define LANES(of) of(0), of(1), of(2), of(3)
#endif
#if defined(__clang__)
#define SHUFFLE(a, b, of) __builtin_shufflevector(a, b, LANES(of))
#else
#define SHUFFLE(a, b, of) __builtin_shuffle(a, b, Ints{LANES(of)})
#endif

// lanes that lie `apart` (a power of two) added: those of a where this bit of a lane's number is 0, else those of b
template <int apart>
inline Vec folded(Vec a, Vec b) {
#define HERE(lane) ((lane & apart) ? -1 : 0)
#define THERE(lane) ((lane & apart) ? WIDTH + (lane ^ apart) : lane ^ apart)
    const Ints second = {LANES(HERE)};  // a choice, not a shuffle, of which a processor does fewer at a time
    return (second ? b : a) + SHUFFLE(a, b, THERE);
#undef HERE
#undef THERE
}

// the sums over the lanes of WIDTH vectors, as the lanes of one; x is used up
template <int apart = WIDTH / 2>
inline Vec sums(Vec *x) {
#pragma GCC unroll 8
    for (int i = 0; i < apart; i++) x[i] = folded<apart>(x[i], x[i + apart]);
    if constexpr (apart > 1) return sums<apart / 2>(x);
    return x[0];
}

// lanes of a and b in turn: of their first halves, and of their second ones
inline void zip(Vec a, Vec b, Vec &first, Vec &second) {
#define FIRST(lane) (lane / 2 + lane % 2 * WIDTH)
#define SECOND(lane) (WIDTH / 2 + lane / 2 + lane % 2 * WIDTH)
    first = SHUFFLE(a, b, FIRST);
    second = SHUFFLE(a, b, SECOND);
#undef FIRST
#undef SECOND
}

// With WIDTH vectors: lane j of x[i] becomes lane i of x[j]. With fewer, lane (j, l) of x[i] becomes lane (l, i) of
// x[j]. y is room.
template <int COUNT = WIDTH>
inline void turn(Vec *x, Vec *y) {
#pragma GCC unroll 4
    for (int done = 1; done < COUNT; done *= 2) {
        for (int l = 0; l < COUNT / 2; l++) zip(x[l], x[l + COUNT / 2], y[2 * l], y[2 * l + 1]);
        for (int l = 0; l < COUNT; l++) x[l] = y[l];
    }
}

// to[j][i] = from[i][j] for i < rows, j < columns; the rest of each row of `to`, up to a whole vector, becomes zero.
// PAST: `to` is streamed, its rows are whole lines
template <bool PAST = false>
__attribute__((noinline)) inline void transpose(float *to, int64_t to_step, const float *from, int64_t from_step,
                                                int64_t rows, int64_t columns) {
    for (int64_t i = 0; i < rows; i += WIDTH) {
        for (int64_t j = 0; j < columns; j += WIDTH) {
            const int64_t tall = rows - i, wide = columns - j;
            Vec x[WIDTH], y[WIDTH];
            for (int l = 0; l < WIDTH; l++) x[l] = l < tall ? load_some(from + (i + l) * from_step + j, wide) : Vec{};
            turn(x, y);
            const int64_t room = to_step - i;
            for (int l = 0; l < WIDTH && l < wide; l++) {
                float *row = to + (j + l) * to_step + i;
                PAST ? stream(row, x[l]) : store_some(row, x[l], room);
            }
        }
    }
}

template <int apart = WIDTH / 2>
inline float sum(Vec x) {
    x = folded<apart>(x, x);
    if constexpr (apart > 1) return sum<apart / 2>(x);
    return x[0];
}

// e^x as 2^power (1 + rest), for x between -87.3 and 88.3; what lies beyond counts as these, NaN as NaN
inline void split_exponential(Vec x, Vec &power, Vec &rest) {
    const float low = -87.33654f, high = 88.37f;
    Vec y = x > high ? all(high) : x;
    y = y < low ? all(low) : y;
    const float magic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to a whole number, which its last bits are then
    const Vec shifted = y * 1.44269504f + magic, n = shifted - magic;
    y = y - n * 0.693359375f;
    y = y + n * 2.12194440e-4f;
    const Vec square = y * y;
    Vec p = y * 1.9875691500e-4f + 1.3981999507e-3f, q = y * 8.3334519073e-3f + 4.1665795894e-2f;
    p = p * square + q;
    q = y * 1.6666665459e-1f + 5.0000001201e-1f;
    p = p * square + q;
    rest = p * square + y;
    const Ints bits = ((Ints)shifted + 127) << 23;
    power = (Vec)bits;
}

// e^x to about one unit in the last place; 0 below -87.3
inline Vec exponential(Vec x) {
    Vec power, rest;
    split_exponential(x, power, rest);
    return x < -87.33654f ? Vec{} : rest * power + power;
}

// e^x and, with all its digits where x is next to 0 too, e^x - 1, which has lost those of a small e^x
inline Vec exponential(Vec x, Vec &less_1) {
    Vec power, rest;
    split_exponential(x, power, rest);
    less_1 = rest * power + (power - 1.0f);
    return x < -87.33654f ? Vec{} : rest * power + power;
}

// e^x - 1, with all its digits where x is next to 0 too
inline Vec exponential_less_1(Vec x) {
    Vec power, rest;
    split_exponential(x, power, rest);
    return rest * power + (power - 1.0f);
}

// 1 / (1 + e^-x)
inline Vec sigmoid(Vec x) { return 1.0f / (exponential(-x) + 1.0f); }

// log(1 / (1 + e^-x)): with y or y / 2 next to 1 its logarithm is a polynomial, Cephes' coefficients
inline Vec log_sigmoid(Vec x) {
    const Vec less = x < 0.0f ? x : Vec{}, e = exponential(x < 0.0f ? x : -x);
    const Vec twice = e < 0.41421356f ? Vec{} : all(1.0f), y = e < 0.41421356f ? e : (e - 1.0f) * 0.5f;
    Vec p = y * 7.0376836292e-2f - 1.1514610310e-1f;
    p = p * y + 1.1676998740e-1f;
    p = p * y - 1.2420140846e-1f;
    p = p * y + 1.4249322787e-1f;
    p = p * y - 1.6668057665e-1f;
    p = p * y + 2.0000714765e-1f;
    p = p * y - 2.4999993993e-1f;
    p = p * y + 3.3333331174e-1f;
    p = p * y * y * y - twice * 2.12194440e-4f - y * y * 0.5f;
    return less - (y + p + twice * 0.693359375f);
}

// x with all but the first n lanes zero
inline Vec only(Vec x, int64_t n) {
    if (n >= WIDTH) return x;
    float part[WIDTH];
    store(part, x);
    return load_tail(part, n);
}
