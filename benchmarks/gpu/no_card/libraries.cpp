// cuBLAS, cuDNN's version, and the driver.
#include <dlfcn.h>

#include "card.h"

// ---- cuBLAS: products are logged, none is computed

struct Blas {
  cudaStream_t stream;
};
static int product(const char* name, cudaStream_t stream) {
  note("kernel", stream, "%s", name);
  return enqueue(stream, name) ? 13 : 0;  // CUBLAS_STATUS_EXECUTION_FAILED
}
#define PRODUCT(name) \
  API int name(Blas* handle) { return product(#name, handle->stream); }
PRODUCT(cublasGemmEx) PRODUCT(cublasGemmStridedBatchedEx) PRODUCT(cublasSgemm_v2) PRODUCT(cublasSgemmStridedBatched)
PRODUCT(cublasSgemmEx) PRODUCT(cublasSgemmBatched) PRODUCT(cublasSgemv_v2) PRODUCT(cublasSdot_v2) PRODUCT(cublasDotEx)
PRODUCT(cublasDgemm_v2) PRODUCT(cublasDgemmStridedBatched)
API int cublasLtMatmul(void*, void*, const void*, const void*, void*, const void*, void*, const void*, const void*,
                       void*, void*, void*, const void*, void*, size_t, cudaStream_t stream) {
  return product("cublasLtMatmul", stream);
}
API int cublasLtMatmulAlgoGetHeuristic(void*, void*, void*, void*, void*, void*, void*, int, void* results,
                                       int* count) {
  memset(results, 0, 96);  // one algorithm, without a workspace
  *count = 1;
  return 0;
}
API int cublasCreate_v2(Blas** made) { return *made = new Blas{nullptr}, 0; }
API int cublasDestroy_v2(Blas* handle) { return delete handle, 0; }
API int cublasSetStream_v2(Blas* handle, cudaStream_t stream) { return handle->stream = stream, 0; }
API int cublasGetMathMode(Blas*, int* mode) { return *mode = 0; }
API int cublasGetPointerMode_v2(Blas*, int* mode) { return *mode = 0; }
API size_t cublasLtGetVersion() { return 130000; }
API size_t cudnnGetVersion() { return 80900; }  // too old for torch's attention, see above
STUB(cublasSetWorkspace_v2) STUB(cublasSetMathMode) STUB(cublasSetPointerMode_v2)
ANSWER(cublasLtMatmulDescCreate, void*, 8) STUB(cublasLtMatmulDescDestroy) STUB(cublasLtMatmulDescSetAttribute)
ANSWER(cublasLtMatmulPreferenceCreate, void*, 8) STUB(cublasLtMatmulPreferenceDestroy)
ANSWER(cublasLtMatrixLayoutCreate, void*, 8) STUB(cublasLtMatrixLayoutDestroy)
STUB(cublasLtMatmulPreferenceSetAttribute) STUB(cublasLtMatrixLayoutSetAttribute)

// ---- driver, for Triton and the launcher of torch's compiler

struct Apart {  // the driver's errors are only returned: the runtime's last error stays what it was
  cudaError_t before = last_error;
  ~Apart() { last_error = before; }
};
API int cuDeviceGet(int* device, int index) { return *device = index, 0; }
API int cuDeviceGetAttribute(int* value, int attribute, int device) {  // numbered as the runtime's
  return cudaDeviceGetAttribute(value, (cudaDeviceAttr)attribute, device);
}
API int cuDevicePrimaryCtxGetState(int, unsigned* flags, int* active) { return *active = 1, *flags = 0; }
API int cuModuleGetFunction(Function** made, void*, const char* name) { return *made = new Function{name}, 0; }
API int cuFuncGetAttribute(int* value, int attribute, Function*) {
  return *value = attribute == 0 ? 1024 : attribute == 4 ? 64 : 0, 0;  // threads of a block, registers; no spills
}
API int cuFuncSetAttribute(Function* function, int attribute, int value) {
  Apart apart;
  return attribute == 8 ? allow_shared(*function, value) : 0;  // CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
}
struct LaunchConfig {  // CUlaunchConfig
  unsigned grid[3], block[3], shared;
  cudaStream_t stream;
};
API int cuLaunchKernelEx(const LaunchConfig* with, Function* function, void**, void**) {
  Apart apart;
  auto [g, b] = std::pair(with->grid, with->block);
  return launch(*function, dim3{g[0], g[1], g[2]}, dim3{b[0], b[1], b[2]}, with->shared, with->stream);
}
API int cuLaunchKernel(Function* function, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz,
                       unsigned shared, cudaStream_t stream, void** values, void** extra) {
  LaunchConfig with{{gx, gy, gz}, {bx, by, bz}, shared, stream};
  return cuLaunchKernelEx(&with, function, values, extra);
}
API int cuLaunchCooperativeKernel(Function* function, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by,
                                  unsigned bz, unsigned shared, cudaStream_t stream, void** values) {
  return cuLaunchKernel(function, gx, gy, gz, bx, by, bz, shared, stream, values, nullptr);
}
API int cuPointerGetAttribute(void* value, int attribute, size_t address) {
  if (place_of((void*)address) == Place::host) return 1;  // Triton asks, to refuse such tensors
  if (attribute == 3) return *(size_t*)value = address, 0;  // CU_POINTER_ATTRIBUTE_DEVICE_POINTER
  return *(int*)value = attribute == 2 ? 2 : 0, 0;          // ..._MEMORY_TYPE: the device's; ..._ORDINAL
}
API int cuGetProcAddress_v2(const char* name, void** function, int, unsigned long, void*) {
  return (*function = dlsym(RTLD_DEFAULT, name)) ? 0 : 500;  // CUDA_ERROR_NOT_FOUND
}
API int cuGetErrorString(int, const char** text) { return *text = "an error of benchmarks/gpu/no_card", 0; }
API int cuGetErrorName(int error, const char** text) { return cuGetErrorString(error, text); }
ANSWER(cuDeviceGetCount, int, cards) ANSWER(cuDriverGetVersion, int, CUDART_VERSION) ANSWER(cuCtxGetDevice, int, 0)
ANSWER(cuCtxGetCurrent, void*, 8) ANSWER(cuDevicePrimaryCtxRetain, void*, 8) ANSWER(cuModuleLoadData, void*, 8)
ANSWER(cuModuleLoad, void*, 8) ANSWER(cuModuleLoadDataEx, void*, 8)
ANSWER(cuOccupancyMaxActiveBlocksPerMultiprocessor, int, 1) ANSWER(cuOccupancyMaxActiveClusters, int, 1)
STUB(cuInit) STUB(cuCtxSetCurrent) STUB(cuCtxGetLimit) STUB(cuCtxSetLimit) STUB(cuModuleUnload)
STUB(cuFuncSetCacheConfig) STUB(cuTensorMapEncodeTiled) STUB(cuTensorMapEncodeIm2col)

// torch asks for these by name and needs to find them, but calls them only for memory that grows (expandable_segments)
// or that processes share, which the card does not have.
#define NOT_SUPPORTED(name) \
  API int name() { return note("missing", nullptr, #name), 801; }  // CUDA_ERROR_NOT_SUPPORTED
NOT_SUPPORTED(cuMemAddressReserve) NOT_SUPPORTED(cuMemAddressFree) NOT_SUPPORTED(cuMemCreate)
NOT_SUPPORTED(cuMemRelease) NOT_SUPPORTED(cuMemMap) NOT_SUPPORTED(cuMemUnmap) NOT_SUPPORTED(cuMemSetAccess)
NOT_SUPPORTED(cuMemGetAllocationGranularity) NOT_SUPPORTED(cuMemExportToShareableHandle)
NOT_SUPPORTED(cuMemImportFromShareableHandle) NOT_SUPPORTED(cuMemRetainAllocationHandle)
NOT_SUPPORTED(cuMemGetAllocationPropertiesFromHandle) NOT_SUPPORTED(cuStreamWriteValue32)
