// Products of small matrices by the tensor cores, for a GPU since Ampere and, lane by lane, for the host.
//
// mma.sync m16n8k8 with tf32 factors (eleven bits, read from fp32) and fp32 sums: a 16 x 8 `Sum` += 16 x 8 times 8 x 8,
// each divided among the 32 lanes of a warp. What a lane holds of a Sum, with g = lane / 4 and t = lane % 4, is
// (g, 2t) (g, 2t+1) (g+8, 2t) (g+8, 2t+1). Of a factor it holds, along the inner index, places t and t + 4; all loads
// here put the numbers 2t and 2t + 1 there, which is the same product, reads neighbours, and makes a Sum that was
// found a left factor as it stands.
//
// On the host a fragment holds what all 32 lanes do, and `multiply` spells the hardware's layout out on its own.

#pragma once

#include "grid.cuh"

#ifdef __CUDACC__
constexpr int LANES = 1;
#else
constexpr int LANES = 32;
#endif

// Numbers that are loaded and stored together: where they lie is a multiple of their bytes.
struct alignas(8) Pair {
    float x[2];
};
struct alignas(16) Quad {
    float x[4];
};

ON_GPU Pair &pair(float *at) { return *reinterpret_cast<Pair *>(at); }
ON_GPU const Pair &pair(const float *at) { return *reinterpret_cast<const Pair *>(at); }
ON_GPU Quad &quad(float *at) { return *reinterpret_cast<Quad *>(at); }
ON_GPU const Quad &quad(const float *at) { return *reinterpret_cast<const Quad *>(at); }

// two bf16 in a word, the first one below
ON_GPU Pair wide_of(uint32_t word) {
    const uint32_t bits[2] = {word << 16, word & 0xffff0000u};
    Pair found;
    memcpy(&found, bits, 8);
    return found;
}

ON_GPU Pair wide_of(Pair x) { return x; }

ON_GPU uint32_t word_of(Pair x) { return to_bf16s(x.x[0], x.x[1]); }

template <int COUNT>
struct Fragment {
    float x[LANES][COUNT];
};
using Sum = Fragment<4>;
using Left = Fragment<4>;
using Right = Fragment<2>;

// f(g, t, index into Fragment::x) for this lane; on the host, for all
template <class F>
ON_GPU void lanes(F f) {
#ifdef __CUDACC__
    const int lane = threadIdx.x % 32;
    f(lane / 4, lane % 4, 0);
#else
    for (int lane = 0; lane < 32; lane++) f(lane / 4, lane % 4, lane);
#endif
}

// f(row, column, number) of a Sum
template <class F>
ON_GPU void cells(Sum &sum, F f) {
    lanes([&](int g, int t, int l) {
#pragma unroll
        for (int i = 0; i < 4; i++) f(g + i / 2 * 8, 2 * t + i % 2, sum.x[l][i]);
    });
}

ON_GPU void clear(Sum &sum) {
    cells(sum, [](int, int, float &x) { x = 0.0f; });
}

// To the nearest number of eleven bits, half away from zero: tensor cores ignore the bits behind, and so cut. What is no
// number stays none: a card's has all bits set, and would become one.
ON_GPU float tf32(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    bits += 0x1000u;
    float found;
    memcpy(&found, &bits, 4);
    return x == x ? found : x;
}

// The same in one instruction, for errors that are larger by a twentieth: what is cut after this product is on average
// the nearer of the two next numbers. One of eleven bits stays what it is.
ON_GPU float nearly(float x) { return x * (1.0f + 0.7213f / 2048); }

// a number as tensor cores see it
ON_GPU float cut(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    bits &= 0xffffe000u;
    memcpy(&x, &bits, 4);
    return x;
}

ON_GPU void multiply(Sum &sum, const Left &a, const Right &b) {
#ifndef __CUDACC__
    float left[16][8], right[8][8];
    for (int lane = 0; lane < 32; lane++) {
        for (int i = 0; i < 4; i++) left[lane / 4 + i % 2 * 8][lane % 4 + i / 2 * 4] = cut(a.x[lane][i]);
        for (int i = 0; i < 2; i++) right[lane % 4 + i * 4][lane / 4] = cut(b.x[lane][i]);
    }
    for (int lane = 0; lane < 32; lane++)
        for (int i = 0; i < 4; i++) {
            float found = sum.x[lane][i];
            for (int k = 0; k < 8; k++) found += left[lane / 4 + i / 2 * 8][k] * right[k][lane % 4 * 2 + i % 2];
            sum.x[lane][i] = found;
        }
#elif __CUDA_ARCH__ >= 800
    float *d = sum.x[0];
    const float *f = a.x[0], *s = b.x[0];
    asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, "
        "%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(__float_as_uint(f[0])), "r"(__float_as_uint(f[1])), "r"(__float_as_uint(f[2])),
          "r"(__float_as_uint(f[3])), "r"(__float_as_uint(s[0])), "r"(__float_as_uint(s[1])));
#else
    __trap();
#endif
}

// The same number, of which the compiler knows nothing: what is made of it is not kept through a loop, where registers
// are few.
ON_GPU int fresh(int x) {
#ifdef __CUDACC__
    asm volatile("" : "+r"(x));
#endif
    return x;
}

// All lanes have read what one of them is to overwrite.
ON_GPU void lanes_meet() {
#ifdef __CUDACC__
    __syncwarp();
#endif
}

// A Sum as left factor.
ON_GPU Left left(const Sum &sum) {
    Left a;
    lanes([&](int, int, int l) {
        a.x[l][0] = tf32(sum.x[l][0]), a.x[l][1] = tf32(sum.x[l][2]);
        a.x[l][2] = tf32(sum.x[l][1]), a.x[l][3] = tf32(sum.x[l][3]);
    });
    return a;
}

// The same, `nearly`.
ON_GPU Left left_nearly(const Sum &sum) {
    Left a;
    lanes([&](int, int, int l) {
        a.x[l][0] = nearly(sum.x[l][0]), a.x[l][1] = nearly(sum.x[l][2]);
        a.x[l][2] = nearly(sum.x[l][1]), a.x[l][3] = nearly(sum.x[l][3]);
    });
    return a;
}

// Four times eight rows of four numbers, of eleven bits: a lane gets number t of row g of each. f(which, row) is where
// a row lies, at a multiple of 16 bytes. They are a left factor: rows 0 to 7, then 8 to 15, of four places along the
// inner index, and again of four more. Or two right ones.
template <class F>
ON_GPU Left fours(F f) {
    Left a;
#ifndef __CUDACC__
    lanes([&](int g, int t, int l) {
        for (int i = 0; i < 4; i++) a.x[l][i] = f(i, g)[t];
    });
#elif __CUDA_ARCH__ >= 750
    const int lane = threadIdx.x % 32;
    const unsigned at = static_cast<unsigned>(__cvta_generic_to_shared(f(lane / 8, lane % 8)));
    float *x = a.x[0];
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=f"(x[0]), "=f"(x[1]), "=f"(x[2]), "=f"(x[3])
                 : "r"(at)
                 : "memory");
#else
    __trap();
#endif
    return a;
}

// one of two right factors
ON_GPU Right half_of(const Left &both, int n) {
    Right b;
    lanes([&](int, int, int l) { b.x[l][0] = both.x[l][2 * n], b.x[l][1] = both.x[l][2 * n + 1]; });
    return b;
}

// 16 rows from m on, 8 columns; its numbers must be of eleven bits already, as those of all that follow.
ON_GPU Left left(const float *m, int wide) {
    Left a;
    lanes([&](int g, int t, int l) {
        const float *at = m + g * wide + 2 * t;
        a.x[l][0] = at[0], a.x[l][1] = at[8 * wide], a.x[l][2] = at[1], a.x[l][3] = at[8 * wide + 1];
    });
    return a;
}

// the transpose of 8 rows from m on, 8 columns
ON_GPU Right right_turned(const float *m, int wide) {
    Right b;
    lanes([&](int g, int t, int l) { b.x[l][0] = m[g * wide + 2 * t], b.x[l][1] = m[g * wide + 2 * t + 1]; });
    return b;
}

// The sums of the columns of eight Sums, two in each lane: f(column, both).
template <class F>
ON_GPU void all_columns(const Sum *sums, F f) {
#ifdef __CUDACC__
    const int lane = threadIdx.x % 32;
    float found[16];
#pragma unroll
    for (int i = 0; i < 16; i++) found[i] = sums[i / 2].x[0][i % 2] + sums[i / 2].x[0][2 + i % 2];
#pragma unroll
    for (int step = 0; step < 3; step++) {  // a lane keeps half of them, and adds what another lane has of these
        const int half = 8 >> step;
        const bool second = lane & 2 * half;
#pragma unroll
        for (int i = 0; i < 8; i++) {
            if (i >= half) break;
            const float kept = second ? found[i + half] : found[i], given = second ? found[i] : found[i + half];
            found[i] = kept + __shfl_xor_sync(0xffffffffu, given, 2 * half);
        }
    }
    f(2 * lane, Pair{{found[0], found[1]}});
#else
    for (int column = 0; column < 64; column += 2) {
        Pair found = {};
        for (int row = 0; row < 16; row++)
            for (int e = 0; e < 2; e++)
                found.x[e] += sums[column / 8].x[row % 8 * 4 + column % 8 / 2][row / 8 * 2 + e];
        f(column, found);
    }
#endif
}

// A block as warps: f(warp, what it keeps in fragments) between two barriers, or f(thread); `any` tells whether f was
// true of a thread of a warp, and `alone` goes without a barrier.
template <class Own, int WARPS>
struct Team {
#ifdef __CUDACC__
    Own own;

    template <class Phase>
    ON_GPU void alone(Phase phase) {
        phase(static_cast<int>(threadIdx.x / 32), own);
    }

    template <class Phase>
    ON_GPU void warps(Phase phase) {
        alone(phase);
        __syncthreads();
    }

    template <class Phase>
    ON_GPU void each(Phase phase) {
        phase(static_cast<int>(threadIdx.x));
        __syncthreads();
    }

    template <class Phase>
    ON_GPU bool any(Phase phase) {
        return __syncthreads_or(phase(static_cast<int>(threadIdx.x / 32), own));
    }
#else
    Own own[WARPS];

    Team() { std::memset(static_cast<void *>(own), 0xff, sizeof own); }

    template <class Phase>
    void warps(Phase phase) {
        for (int n = 0; n < WARPS; n++) {
            const int warp = grid_way ? WARPS - 1 - n : n;
            phase(warp, own[warp]);
        }
    }

    template <class Phase>
    void alone(Phase phase) {
        warps(phase);
    }

    template <class Phase>
    void each(Phase phase) {
        for (int n = 0; n < 32 * WARPS; n++) phase(grid_way ? 32 * WARPS - 1 - n : n);
    }

    template <class Phase>
    bool any(Phase phase) {
        bool found = false;
        warps([&](int warp, Own &own) { found |= phase(warp, own); });
        return found;
    }
#endif
};
