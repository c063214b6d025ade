// What every kernel shares: types, bf16, 16-byte copies, mma.sync, programmatic launch. No headers:
// NVRTC compiles this with nothing else in reach. bf16 values travel as their 16 bits.
#pragma once
typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef int i32;
typedef long long i64;

#define DEV __device__ __forceinline__

DEV float bf16_to_float(u16 v) { return __uint_as_float((u32)v << 16); }
DEV float lo_to_float(u32 v) { return __uint_as_float(v << 16); }
DEV float hi_to_float(u32 v) { return __uint_as_float(v & 0xffff0000u); }

// Round to nearest even; `lo` goes to the low half.
DEV u32 pack_bf16(float lo, float hi) {
    u32 v;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(v) : "f"(hi), "f"(lo));
    return v;
}
DEV u16 float_to_bf16(float v) { return (u16)pack_bf16(v, 0.0f); }

DEV u32 smem_addr(const void* p) { return (u32)__cvta_generic_to_shared(p); }

// 16 bytes past L1: read once, or written by another block of this launch.
DEV uint4 ld_cg16(const void* p) {
    uint4 v;
    asm volatile("ld.global.cg.v4.u32 {%0,%1,%2,%3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p) : "memory");
    return v;
}

DEV float2 ld_cg8(const void* p) {
    float2 v;
    asm volatile("ld.global.cg.v2.f32 {%0,%1}, [%2];" : "=f"(v.x), "=f"(v.y) : "l"(p) : "memory");
    return v;
}

// 16 bytes of a tensor that nobody writes, kept out of L1.
DEV uint4 ld_once(const void* p) {
    uint4 v;
    asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p));
    return v;
}
DEV uint4 ld_once_or_zero(const u16* p, bool real) {
    uint4 v = make_uint4(0, 0, 0, 0);
    if (real)
        asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];"
                     : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p));
    return v;
}

// Of shared memory, in order with barriers, but not with plain stores and loads between them.
DEV u32 ld_shared(u32 addr) {
    u32 v;
    asm volatile("ld.shared.u32 %0, [%1];" : "=r"(v) : "r"(addr));
    return v;
}
DEV uint4 ld_shared16(u32 addr) {
    uint4 v;
    asm volatile("ld.shared.v4.u32 {%0,%1,%2,%3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "r"(addr));
    return v;
}

DEV void cp_async16(u32 dst, const void* src) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(dst), "l"(src) : "memory");
}
// 16 bytes, or zeros: then `src` is not read.
DEV void cp_async16_or_zero(u32 dst, const void* src, bool real) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(dst), "l"(src), "r"(real ? 16 : 0) : "memory");
}
DEV void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int N> DEV void cp_async_wait() { asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory"); }

// c += A B for a 16x8 tile over 16 of k. A row-major, B column-major (PTX ISA, mma.m16n8k16).
DEV void mma_bf16(float* c, u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
        "{%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
DEV void ldmatrix_x4(u32& a, u32& b, u32& c, u32& d, u32 addr) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(a), "=r"(b), "=r"(c), "=r"(d) : "r"(addr) : "memory");
}
DEV void ldmatrix_x4_trans(u32& a, u32& b, u32& c, u32& d, u32 addr) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(a), "=r"(b), "=r"(c), "=r"(d) : "r"(addr) : "memory");
}

// Of 8 x 8 values, two in a lane.
DEV u32 transposed(u32 v) {
    u32 r;
    asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(r) : "r"(v));
    return r;
}

// 2^x, to 2 ulp; 0 below the smallest normal number.
DEV float exp2_fast(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// a / b, 0 <= a < 2^21, b >= 1: exact, as (a + 1/2) / b is 1 / 2b from every whole number at least.
DEV i32 quotient(i32 a, i32 b) {
#if __CUDA_ARCH_FEAT_SM90_ALL
    float inverse;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(inverse) : "f"((float)b));
    return (i32)(((float)a + 0.5f) * inverse);
#else
    return a / b;  // takes fewer registers there
#endif
}

// a / b, a >= 0, b >= 1, where the quotient is below 2^20.
DEV i32 divided(i32 a, i32 b) {
    float inverse;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(inverse) : "f"((float)b));
    const i32 near = (i32)((float)a * inverse), rest = a - near * b;  // one off at most
    return near + (rest >= b) - (rest < 0);
}

DEV float silu(float v) { return __fdividef(v, 1.0f + __expf(-v)); }
DEV float gelu(float v) { return 0.5f * v * (1.0f + tanhf(0.7978845608028654f * (v + 0.044715f * v * v * v))); }
DEV float activate(float v, bool is_gelu) { return is_gelu ? gelu(v) : silu(v); }

DEV float warp_sum(float v) {
#pragma unroll
    for (int i = 16; i; i >>= 1) v += __shfl_xor_sync(0xffffffffu, v, i);
    return v;
}

// Programmatic dependent launch: the next kernel may start its prologue, and must call grid_wait()
// before it reads or writes global memory that an earlier kernel touches.
DEV void grid_launch() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
DEV void grid_wait() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// A value that another block of this launch writes, or one that it reads.
DEV u64 ld_relaxed(const u64* p) {
    u64 v;
    asm volatile("ld.relaxed.gpu.global.u64 %0, [%1];" : "=l"(v) : "l"(p) : "memory");
    return v;
}
DEV void st_relaxed(u64* p, u64 v) { asm volatile("st.relaxed.gpu.global.u64 [%0], %1;" ::"l"(p), "l"(v) : "memory"); }

// Clusters: blocks of one cluster read each other's shared memory.
DEV u32 cluster_rank() {
    u32 r;
    asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(r));
    return r;
}
DEV void cluster_arrive() { asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory"); }
// That this thread has come so far; what it wrote need not be seen.
DEV void cluster_arrive_relaxed() { asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory"); }
DEV void cluster_wait() { asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory"); }
DEV void cluster_sync() {
    cluster_arrive();
    cluster_wait();
}
DEV u32 cluster_map(u32 addr, u32 rank) {
    u32 out;
    asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(out) : "r"(addr), "r"(rank));
    return out;
}
