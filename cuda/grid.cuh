// What the GPU kernels are written with, so that one source makes them for a GPU (nvcc) and for the host (any C++
// compiler, where tests compare them with the reference): a block of threads that walks through phases.
//
// A kernel is a struct with THREADS, FLOATS (of shared memory), a type Threads, which is Block<what a thread keeps in
// registers, THREADS>, and work(block number, its threads, shared memory). What threads do between two barriers is a
// phase, block.each(f) with f(thread, what it keeps); where no thread reads what another wrote, block.alone(f) does
// without a barrier. On the host a phase is a loop over the threads, in any order: `grid_order` changes it, and a
// result that changes with it tells of a missing barrier.

#pragma once

#include "launch.cuh"

#ifdef __CUDACC__

template <class Own, int COUNT>
struct Block {
    Own own;

    template <class Phase>
    ON_GPU void each(Phase phase) {
        alone(phase);
        __syncthreads();
    }

    template <class Phase>
    ON_GPU void alone(Phase phase) {
        phase(static_cast<int>(threadIdx.x), own);
    }

    // Each of `many` numbers of of(what a thread keeps) becomes its sum over as many threads beside each other, a power
    // of two up to 32; the same bits in all of them.
    template <class Of>
    ON_GPU void add_up(int threads, int many, Of of) {
        float *x = of(own);
#pragma unroll
        for (int apart = 16; apart; apart /= 2) {
            if (apart >= threads) continue;
#pragma unroll
            for (int i = 0; i < many; i++) x[i] += __shfl_xor_sync(0xffffffffu, x[i], apart);
        }
    }
};

#else

inline int grid_way = 0;  // 0: threads in order; 1: from the last to the first; 2: the odd ones first

template <class Own, int COUNT>
struct Block {
    std::vector<Own> own = std::vector<Own>(COUNT);

    Block() { std::memset(static_cast<void *>(own.data()), 0xff, sizeof(Own) * COUNT); }  // nothing is there before

    template <class Phase>
    void each(Phase phase) {
        for (int n = 0; n < COUNT; n++) {
            const int odd = COUNT / 2, mixed = n < odd ? 2 * n + 1 : 2 * (n - odd);
            const int thread = grid_way == 0 ? n : grid_way == 1 ? COUNT - 1 - n : mixed;
            phase(thread, own[thread]);
        }
    }

    template <class Phase>
    void alone(Phase phase) {
        each(phase);
    }

    template <class Of>
    void add_up(int threads, int many, Of of) {
        for (int apart = threads / 2; apart; apart /= 2)
            for (int n = 0; n < COUNT; n++)
                for (int i = 0; i < many && !(n & apart); i++) {
                    float *x = of(own[n]), *other = of(own[n ^ apart]);
                    x[i] = other[i] = x[i] + other[i];
                }
    }
};

#endif

// Numbers in memory: fp32, or bf16, whichever a bit of `Sizes::halves` says of a tensor.
ON_GPU float from_bf16(uint16_t x) {
    const uint32_t bits = static_cast<uint32_t>(x) << 16;
    float wide;
    memcpy(&wide, &bits, 4);
    return wide;
}

// to the nearest, of two equally near ones the even one
ON_GPU uint16_t to_bf16(float x) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
    uint16_t found;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(found) : "f"(x));
    return found;
#else
    uint32_t bits;
    memcpy(&bits, &x, 4);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return static_cast<uint16_t>(bits >> 16 | 64);  // no number
    return static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1)) >> 16);
#endif
}

// two of them, as they lie in memory
ON_GPU uint32_t to_bf16s(float x, float next) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
    uint32_t found;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(found) : "f"(next), "f"(x));
    return found;
#else
    return to_bf16(x) | static_cast<uint32_t>(to_bf16(next)) << 16;
#endif
}

ON_GPU float get(const void *from, int64_t at, bool half) {
    return half ? from_bf16(static_cast<const uint16_t *>(from)[at]) : static_cast<const float *>(from)[at];
}

ON_GPU void put(void *to, int64_t at, bool half, float x) {
    if (half)
        static_cast<uint16_t *>(to)[at] = to_bf16(x);
    else
        static_cast<float *>(to)[at] = x;
}

// What is read or written in one step: 32 bits, twice or four times. Such stores are told to the compiler in words of
// its own, since it makes many of one where it does not see places beside each other.
#ifdef __CUDACC__
using Two = uint2;
using Four = uint4;

ON_GPU void store(void *to, Two x) {
    asm volatile("st.global.v2.b32 [%0], {%1, %2};" ::"l"(to), "r"(x.x), "r"(x.y) : "memory");
}

ON_GPU void store(void *to, Four x) {
    asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};"
                 :
                 : "l"(to), "r"(x.x), "r"(x.y), "r"(x.z), "r"(x.w)
                 : "memory");
}
#else
struct alignas(8) Two {
    uint32_t x, y;
} __attribute__((may_alias));
struct alignas(16) Four {
    uint32_t x, y, z, w;
} __attribute__((may_alias));

template <class Some>
void store(void *to, Some x) {
    *static_cast<Some *>(to) = x;
}
#endif

// The same of WIDE numbers beside each other, 1 or a multiple of 4, in as few steps as there can be: `at` is a multiple
// of WIDE, and the tensor begins where `wide` says.
template <int WIDE>
ON_GPU void fetch(float *x, const void *from, int64_t at, bool half) {
    using Half = std::conditional_t<WIDE % 8 == 0, Four, Two>;
    constexpr int EACH = sizeof(Half) / 2;
    if constexpr (WIDE == 1) {
        x[0] = get(from, at, half);
    } else if (half) {
#pragma unroll
        for (int i = 0; i < WIDE; i += EACH) {
            const Half found = *reinterpret_cast<const Half *>(static_cast<const uint16_t *>(from) + at + i);
            uint32_t pairs[EACH / 2];
            memcpy(pairs, &found, sizeof(Half));
#pragma unroll
            for (int n = 0; n < EACH; n += 2) {
                const uint32_t two[] = {pairs[n / 2] << 16, pairs[n / 2] & 0xffff0000u};
                memcpy(x + i + n, two, 8);
            }
        }
    } else {
#pragma unroll
        for (int i = 0; i < WIDE; i += 4) {
            const Four found = *reinterpret_cast<const Four *>(static_cast<const float *>(from) + at + i);
            memcpy(x + i, &found, 16);
        }
    }
}

template <int WIDE>
ON_GPU void lay_down(void *to, int64_t at, bool half, const float *x) {
    using Half = std::conditional_t<WIDE % 8 == 0, Four, Two>;
    constexpr int EACH = sizeof(Half) / 2;
    if constexpr (WIDE == 1) {
        put(to, at, half, x[0]);
    } else if (half) {
#pragma unroll
        for (int i = 0; i < WIDE; i += EACH) {
            uint32_t pairs[EACH / 2];
            Half found;
#pragma unroll
            for (int n = 0; n < EACH; n += 2) pairs[n / 2] = to_bf16s(x[i + n], x[i + n + 1]);
            memcpy(&found, pairs, sizeof(Half));
            store(static_cast<uint16_t *>(to) + at + i, found);
        }
    } else {
#pragma unroll
        for (int i = 0; i < WIDE; i += 4) {
            Four found;
            memcpy(&found, x + i, 16);
            store(static_cast<float *>(to) + at + i, found);
        }
    }
}

// whether tensors begin where 16 bytes can be had at once; a view may begin anywhere
template <class... X>
bool wide(X... tensors) {
    return ((reinterpret_cast<uintptr_t>(tensors) | ...) & 15) == 0;
}

// What a kernel is compiled for: which tensors are in bf16, ANY if that is seen as it runs, and how many numbers a
// thread takes at once.
constexpr int64_t ANY = -1;

template <int64_t HALVES_, int WIDE_>
struct Way {
    static constexpr int64_t HALVES = HALVES_;
    static constexpr int WIDE = WIDE_;
};

// f(the way): one of the KNOWN ones where tensors are `wide` and such, else the one for any tensors
template <int WIDE, int64_t... KNOWN, class F>
int by_way(int64_t halves, bool wide, F f) {
    int status = 0;
    const bool known = wide && ((halves == KNOWN && (status = f(Way<KNOWN, WIDE>()), true)) || ...);
    return known ? status : f(Way<ANY, 1>());
}

// Of (tokens, channels), four channels a thread: how many tokens it takes one after the other. Few if all are few, but
// SUMMED at least where each run leaves a sum behind.
constexpr int64_t SUMMED = 8;

inline int64_t run_of(int64_t tokens, int64_t channels, int64_t least) {
    constexpr int64_t MOST = 32;
#ifdef __CUDACC__
    constexpr int64_t BUSY = 1 << 18;  // threads that keep a large card busy
#else
    constexpr int64_t BUSY = 8;
#endif
    const int64_t run = tokens * channels / 4 / BUSY;
    return run < least ? least : run < MOST ? run : MOST;
}

constexpr float LOG2E = 1.44269504f;  // log2(e)

// 2 to the power of x
ON_GPU float power(float x) {
#ifdef __CUDACC__
    float found;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(found) : "f"(x));
    return found;
#else
    return exp2f(x);
#endif
}

// 1 / x of an x of at least 1, to a unit in the last place
ON_GPU float inverse(float x) {
#ifdef __CUDA_ARCH__
    float found;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(found) : "f"(x));
    return found;
#else
    return 1.0f / x;
#endif
}

ON_GPU float sigmoid(float x) { return inverse(1.0f + expf(-x)); }

// what is no number stays none
ON_GPU float positive(float x) { return x < 0.0f ? 0.0f : x; }

constexpr float LEAST = 1e-12f;  // a norm below this counts as this
constexpr int LINE = 128;        // bytes of a line of memory

// Asks for a line that is to be read soon.
ON_GPU void soon(const void *line) {
#ifdef __CUDACC__
    asm volatile("prefetch.global.L2 [%0];" ::"l"(line));
#else
    (void)line;
#endif
}

// Asks for 16 bytes of memory that go to shared memory while other things are done, or for zeros if `none`; both begin
// at a multiple of 16 bytes. They are there when those who asked for them have `arrived` and all met.
ON_GPU void bring(void *to, const void *from, bool none) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
    const unsigned at = static_cast<unsigned>(__cvta_generic_to_shared(to));
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(at), "l"(from), "r"(none ? 0 : 16) : "memory");
#else
    if (none)
        memset(to, 0, 16);
    else
        memcpy(to, from, 16);
#endif
}

ON_GPU void arrived() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
    asm volatile("cp.async.wait_all;" ::: "memory");
#endif
}

// Where the tokens of a head lie: channel 0 of token t. A division takes as long as 30 additions, so a head is looked
// for once and not at each of its numbers.
struct Head {
    int64_t first, step;
    ON_GPU int64_t at(int64_t t) const { return first + t * step; }
};

struct Sizes {
    int64_t B, T, H, N, halves;

    EITHER int64_t segments(int64_t tokens) const { return (T + tokens - 1) / tokens; }
    ON_GPU bool half(int tensor) const { return halves >> tensor & 1; }
    // heads of all rows are numbered through
    ON_GPU Head head(int64_t number) const { return {(number / H * T * H + number % H) * N, H * N}; }
};

// x, but at most `most`; what is no number stays none
ON_GPU float at_most(float x, float most) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
    asm("min.NaN.f32 %0, %0, %1;" : "+f"(x) : "f"(most));
    return x;
#else
    return x > most ? most : x;
#endif
}

// exp(w), but at most what leaves nothing of a state either way: its products with a decay of 0 are then 0, not NaN
ON_GPU float rate_of(float w) { return at_most(expf(w), 1e4f); }

constexpr int KEEP = 64;  // tokens for which the forward keeps one state
constexpr int SOME = 8;   // tokens that lie in shared memory together

template <int N_>
struct Shape {
    static constexpr int N = N_, EACH = N_ < 32 ? N_ : 32, PARTS = N_ / EACH, THREADS = N_ * PARTS;
};

// the least of our sizes that a head of n channels fits in, given to `f` as a type; -1 if there is none
template <class F>
int sized(int64_t n, F f) {
    if (n <= 16) return f(Shape<16>());
    if (n <= 32) return f(Shape<32>());
    if (n <= 64) return f(Shape<64>());
    if (n <= 128) return f(Shape<128>());
    return -1;
}
