// The wgmma instructions, one for each N, and what orders them. What they multiply, and where operands lie: wgmma.cuh.
//
// The assembly of an instruction names every accumulator, so that each N has a text of its own; the macros below put it
// together, and one line at the end of the file makes a shape.
#pragma once
#include "common/float8.cuh"
#include "hopper/ptx_sm90.cuh"

// Orders register accesses before the wgmma that follow.
__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

// Ends the group of the wgmma issued since the last commit.
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Waits until at most NUM_PENDING of the latest groups are still under way.
template <int NUM_PENDING>
__device__ __forceinline__ void wgmma_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(NUM_PENDING) : "memory");
}

// acc = a * b, plus acc where `accumulate` is not 0. TRANSPOSED: b is MN-major, keys by rows as they lie in memory.
template <int N>
struct Wgmma;

// Operands: four accumulators of tile i, of 2, 4, ... tiles from i on; and how the assembly names them.
#define WGMMA_ACC1(i) "+f"(acc[i][0]), "+f"(acc[i][1]), "+f"(acc[i][2]), "+f"(acc[i][3])
#define WGMMA_ACC2(i) WGMMA_ACC1(i), WGMMA_ACC1(i + 1)
#define WGMMA_ACC4(i) WGMMA_ACC2(i), WGMMA_ACC2(i + 2)
#define WGMMA_ACC8(i) WGMMA_ACC4(i), WGMMA_ACC4(i + 4)
#define WGMMA_ACC16(i) WGMMA_ACC8(i), WGMMA_ACC8(i + 8)
#define WGMMA_NAMES6 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
                     "%16, %17, %18, %19, %20, %21, %22, %23"
#define WGMMA_NAMES8 WGMMA_NAMES6 ", %24, %25, %26, %27, %28, %29, %30, %31"
#define WGMMA_NAMES10 WGMMA_NAMES8 ", %32, %33, %34, %35, %36, %37, %38, %39"
#define WGMMA_NAMES12 WGMMA_NAMES10 ", %40, %41, %42, %43, %44, %45, %46, %47"
#define WGMMA_NAMES14 WGMMA_NAMES12 ", %48, %49, %50, %51, %52, %53, %54, %55"
#define WGMMA_NAMES16 WGMMA_NAMES14 ", %56, %57, %58, %59, %60, %61, %62, %63"
#define WGMMA_NAMES18 WGMMA_NAMES16 ", %64, %65, %66, %67, %68, %69, %70, %71"
#define WGMMA_NAMES20 WGMMA_NAMES18 ", %72, %73, %74, %75, %76, %77, %78, %79"
#define WGMMA_NAMES22 WGMMA_NAMES20 ", %80, %81, %82, %83, %84, %85, %86, %87"
#define WGMMA_NAMES24 WGMMA_NAMES22 ", %88, %89, %90, %91, %92, %93, %94, %95"
#define WGMMA_NAMES28 WGMMA_NAMES24 ", %96, %97, %98, %99, %100, %101, %102, %103, " \
                                    "%104, %105, %106, %107, %108, %109, %110, %111"
#define WGMMA_NAMES32 WGMMA_NAMES28 ", %112, %113, %114, %115, %116, %117, %118, %119, " \
                                    "%120, %121, %122, %123, %124, %125, %126, %127"

#define WGMMA_SS(N, TYPE, NAMES, ACC, I0, I1, I2, I3)                                                     \
    asm volatile("{\n.reg .pred accumulate;\nsetp.ne.b32 accumulate, %" #I2 ", 0;\n"                      \
                 "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE " {" NAMES "}, %" #I0    \
                 ", %" #I1 ", accumulate, 1, 1, 0, %" #I3 ";\n}\n"                                        \
                 : ACC                                                                                    \
                 : "l"(desc_a), "l"(desc_b), "r"(accumulate), "n"(static_cast<int>(TRANSPOSED)))
#define WGMMA_RS(N, TYPE, NAMES, ACC, I0, I1, I2, I3, I4, I5, I6)                                         \
    asm volatile("{\n.reg .pred accumulate;\nsetp.ne.b32 accumulate, %" #I5 ", 0;\n"                      \
                 "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE " {" NAMES "}, {%" #I0   \
                 ", %" #I1 ", %" #I2 ", %" #I3 "}, %" #I4 ", accumulate, 1, 1, %" #I6 ";\n}\n"            \
                 : ACC                                                                                    \
                 : "r"(frag_a[0]), "r"(frag_a[1]), "r"(frag_a[2]), "r"(frag_a[3]), "l"(desc_b),           \
                   "r"(accumulate), "n"(static_cast<int>(TRANSPOSED)))

// Of 8 bits: 32 of them a step, and b is K-major, the summed index side by side.
#define WGMMA_SS8(N, TYPE, NAMES, ACC, I0, I1, I2)                                                        \
    asm volatile("{\n.reg .pred accumulate;\nsetp.ne.b32 accumulate, %" #I2 ", 0;\n"                      \
                 "wgmma.mma_async.sync.aligned.m64n" #N "k32.f32." TYPE "." TYPE " {" NAMES "}, %" #I0    \
                 ", %" #I1 ", accumulate, 1, 1;\n}\n"                                                     \
                 : ACC                                                                                    \
                 : "l"(desc_a), "l"(desc_b), "r"(accumulate))
#define WGMMA_RS8(N, TYPE, NAMES, ACC, I0, I1, I2, I3, I4, I5)                                            \
    asm volatile("{\n.reg .pred accumulate;\nsetp.ne.b32 accumulate, %" #I5 ", 0;\n"                      \
                 "wgmma.mma_async.sync.aligned.m64n" #N "k32.f32." TYPE "." TYPE " {" NAMES "}, {%" #I0   \
                 ", %" #I1 ", %" #I2 ", %" #I3 "}, %" #I4 ", accumulate, 1, 1;\n}\n"                      \
                 : ACC                                                                                    \
                 : "r"(frag_a[0]), "r"(frag_a[1]), "r"(frag_a[2]), "r"(frag_a[3]), "l"(desc_b),           \
                   "r"(accumulate))

// The numbers are those of the operands behind the N / 2 accumulators.
#define WGMMA_SHAPE(N, NAMES, ACC, I0, I1, I2, I3, I4, I5, I6)                                            \
    template <>                                                                                           \
    struct Wgmma<N> {                                                                                     \
        using Acc = float[N / 8][4];                                                                      \
        template <bool TRANSPOSED>                                                                        \
        static __device__ __forceinline__ void issue(__half, Acc& acc, unsigned long long desc_a,         \
                                                     unsigned long long desc_b, int accumulate) {         \
            WGMMA_SS(N, "f16", NAMES, WGMMA_LIST ACC, I0, I1, I2, I3);                                    \
        }                                                                                                 \
        template <bool TRANSPOSED>                                                                        \
        static __device__ __forceinline__ void issue(__nv_bfloat16, Acc& acc, unsigned long long desc_a,  \
                                                     unsigned long long desc_b, int accumulate) {         \
            WGMMA_SS(N, "bf16", NAMES, WGMMA_LIST ACC, I0, I1, I2, I3);                                   \
        }                                                                                                 \
        template <bool TRANSPOSED>                                                                        \
        static __device__ __forceinline__ void issue(__half, Acc& acc, const unsigned (&frag_a)[4],       \
                                                     unsigned long long desc_b, int accumulate) {         \
            WGMMA_RS(N, "f16", NAMES, WGMMA_LIST ACC, I0, I1, I2, I3, I4, I5, I6);                        \
        }                                                                                                 \
        template <bool TRANSPOSED>                                                                        \
        static __device__ __forceinline__ void issue(__nv_bfloat16, Acc& acc, const unsigned (&frag_a)[4], \
                                                     unsigned long long desc_b, int accumulate) {         \
            WGMMA_RS(N, "bf16", NAMES, WGMMA_LIST ACC, I0, I1, I2, I3, I4, I5, I6);                       \
        }                                                                                                 \
        template <bool TRANSPOSED>                                                                        \
        static __device__ __forceinline__ void issue(Float8E4M3, Acc& acc, unsigned long long desc_a,     \
                                                     unsigned long long desc_b, int accumulate) {         \
            WGMMA_SS8(N, "e4m3", NAMES, WGMMA_LIST ACC, I0, I1, I2);                                      \
        }                                                                                                 \
        template <bool TRANSPOSED>                                                                        \
        static __device__ __forceinline__ void issue(Float8E4M3, Acc& acc, const unsigned (&frag_a)[4],   \
                                                     unsigned long long desc_b, int accumulate) {         \
            static_assert(!TRANSPOSED, "8-bit operands are K-major");                                     \
            WGMMA_RS8(N, "e4m3", NAMES, WGMMA_LIST ACC, I0, I1, I2, I3, I4, I5);                          \
        }                                                                                                 \
    };
#define WGMMA_LIST(...) __VA_ARGS__

WGMMA_SHAPE(48, WGMMA_NAMES6, (WGMMA_ACC4(0), WGMMA_ACC2(4)), 24, 25, 26, 27, 28, 29, 30)
WGMMA_SHAPE(64, WGMMA_NAMES8, (WGMMA_ACC8(0)), 32, 33, 34, 35, 36, 37, 38)
WGMMA_SHAPE(80, WGMMA_NAMES10, (WGMMA_ACC8(0), WGMMA_ACC2(8)), 40, 41, 42, 43, 44, 45, 46)
WGMMA_SHAPE(96, WGMMA_NAMES12, (WGMMA_ACC8(0), WGMMA_ACC4(8)), 48, 49, 50, 51, 52, 53, 54)
WGMMA_SHAPE(112, WGMMA_NAMES14, (WGMMA_ACC8(0), WGMMA_ACC4(8), WGMMA_ACC2(12)), 56, 57, 58, 59, 60, 61, 62)
WGMMA_SHAPE(128, WGMMA_NAMES16, (WGMMA_ACC16(0)), 64, 65, 66, 67, 68, 69, 70)
WGMMA_SHAPE(144, WGMMA_NAMES18, (WGMMA_ACC16(0), WGMMA_ACC2(16)), 72, 73, 74, 75, 76, 77, 78)
WGMMA_SHAPE(160, WGMMA_NAMES20, (WGMMA_ACC16(0), WGMMA_ACC4(16)), 80, 81, 82, 83, 84, 85, 86)
WGMMA_SHAPE(176, WGMMA_NAMES22, (WGMMA_ACC16(0), WGMMA_ACC4(16), WGMMA_ACC2(20)), 88, 89, 90, 91, 92, 93, 94)
WGMMA_SHAPE(192, WGMMA_NAMES24, (WGMMA_ACC16(0), WGMMA_ACC8(16)), 96, 97, 98, 99, 100, 101, 102)
WGMMA_SHAPE(224, WGMMA_NAMES28, (WGMMA_ACC16(0), WGMMA_ACC8(16), WGMMA_ACC4(24)), 112, 113, 114, 115, 116, 117, 118)
WGMMA_SHAPE(256, WGMMA_NAMES32, (WGMMA_ACC16(0), WGMMA_ACC16(16)), 128, 129, 130, 131, 132, 133, 134)
#undef WGMMA_SHAPE
