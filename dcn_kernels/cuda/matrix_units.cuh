// The matrix units and the copies that feed them: one warp's instructions, each with two bodies: PTX for NVRTC and
// tests/cuda_host/matrix_host.hpp for the stand-in. Fragments are laid out as the PTX ISA says. mma needs sm_80; the
// copies are plain ones before it.
#ifdef CUDA_HOST
#define SITE , int site = __builtin_LINE()  // which line of a kernel: for errors and the log of accesses
#define SITE_ONLY int site = __builtin_LINE()
#define DYNAMIC_SHARED(name, bytes) SHARED(unsigned char, name, [bytes])
#define TRACED(kind, pointer, bytes) host::trace(host::kind, pointer, bytes, site)
#else
#define SITE
#define SITE_ONLY
#define DYNAMIC_SHARED(name, bytes) extern __shared__ __align__(128) unsigned char name[]
#define TRACED(kind, pointer, bytes)
#endif

// A V in shared or global memory as one access, which the stand-in can count.
template <typename V, typename T>
__device__ __forceinline__ V shared_load(const T* from SITE) {
  CHECK_ALIGNED(from, alignof(V));
  TRACED(SHARED_LOAD, from, sizeof(V));
  return *reinterpret_cast<const V*>(from);
}

template <typename V, typename T>
__device__ __forceinline__ void shared_store(T* to, const V& value SITE) {
  CHECK_ALIGNED(to, alignof(V));
  TRACED(SHARED_STORE, to, sizeof(V));
  *reinterpret_cast<V*>(to) = value;
}

template <typename V, typename T>
__device__ __forceinline__ V global_load(const T* from SITE) {
  CHECK_ALIGNED(from, alignof(V));
  TRACED(GLOBAL_LOAD, from, sizeof(V));
  return *reinterpret_cast<const V*>(from);
}

template <typename V, typename T>
__device__ __forceinline__ void global_store(T* to, const V& value SITE) {
  CHECK_ALIGNED(to, alignof(V));
  TRACED(GLOBAL_STORE, to, sizeof(V));
  *reinterpret_cast<V*>(to) = value;
}

#ifndef CUDA_HOST
__device__ __forceinline__ unsigned shared_address(const void* pointer) {
  return static_cast<unsigned>(__cvta_generic_to_shared(pointer));
}
#endif

// d += a b: 16 x 16 by 16 x 8 of halves, 16 x 8 by 8 x 8 of float32 read as TF32. The null pointer names the type.
__device__ __forceinline__ void mma(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2], const __half* SITE) {
#ifdef CUDA_HOST
  host::mma<host::HALF>(d, a, b, site);
#else
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#endif
}

__device__ __forceinline__ void mma(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2],
                                    const __nv_bfloat16* SITE) {
#ifdef CUDA_HOST
  host::mma<host::BFLOAT>(d, a, b, site);
#else
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#endif
}

__device__ __forceinline__ void mma(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2], const float* SITE) {
#ifdef CUDA_HOST
  host::mma<host::TF32>(d, a, b, site);
#else
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#endif
}

// Four 8 x 8 matrices of 16-bit numbers (or 8 x 4 of 32-bit ones): lane 8i + j gives row j of matrix i.
template <bool TRANSPOSED>
__device__ __forceinline__ void ldmatrix(unsigned (&r)[4], const void* row SITE) {
#ifdef CUDA_HOST
  host::ldmatrix(r, row, TRANSPOSED, site);
#else
  if (TRANSPOSED)
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(row))
                 : "memory");
  else
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(row))
                 : "memory");
#endif
}

// Starts a copy of 16 bytes from global to shared memory; zeros where not `valid` (nothing is read then).
__device__ __forceinline__ void cp_async(void* to, const void* from, bool valid SITE) {
#ifdef CUDA_HOST
  host::cp_async(to, from, valid, site);
#elif __CUDA_ARCH__ < 800
  *static_cast<uint4*>(to) = valid ? *static_cast<const uint4*>(from) : uint4{};
#else
  const int bytes = valid ? 16 : 0;
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from), "r"(bytes)
               : "memory");
#endif
}

__device__ __forceinline__ void cp_async_commit(SITE_ONLY) {  // closes a group of copies
#ifdef CUDA_HOST
  host::cp_async_commit(site);
#elif __CUDA_ARCH__ >= 800
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

template <int LEFT>
__device__ __forceinline__ void cp_async_wait(SITE_ONLY) {  // until at most LEFT of this thread's groups are under way
#ifdef CUDA_HOST
  host::cp_async_wait(LEFT, site);
#elif __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_group %0;" ::"n"(LEFT) : "memory");
#endif
}
