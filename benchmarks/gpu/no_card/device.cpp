// What the card says about itself, and kernels.
#include <dlfcn.h>
#include <unistd.h>

#include <vector>

#include "card.h"

// ---- device

static const struct Model { int major, minor, processors, threads, blocks, shared, cache, bus; } MODELS[] = {
    // multiprocessors; threads, blocks and KiB of shared memory of each; MiB of cache; bits of the bus
    {7, 5, 40, 1024, 16, 64, 4, 256},       // T4
    {8, 0, 108, 2048, 32, 164, 40, 5120},   // A100
    {8, 6, 72, 1536, 16, 100, 6, 384},      // A10
    {8, 9, 128, 1536, 24, 100, 72, 384},    // RTX 4090
    {9, 0, 132, 2048, 32, 228, 50, 5120},   // H100
    {10, 0, 148, 2048, 32, 228, 126, 8192}, // B200
    {12, 0, 170, 1536, 24, 100, 96, 512},   // RTX 5090
};
static const Model& model = []() -> const Model& {
  std::string wanted = setting("NO_CARD_CAPABILITY", "9.0");
  for (auto& each : MODELS)
    if (std::to_string(each.major) + "." + std::to_string(each.minor) == wanted) return each;
  fprintf(stderr, "no_card: NO_CARD_CAPABILITY=%s is not known\n", wanted.c_str());
  _exit(2);
}();
// What one block may have. Turing's 64 KiB are all for one; later cards keep 1 KiB of each block for themselves.
static const int most_shared = (model.shared - (model.major > 7)) << 10, usual_shared = 48 << 10;

API cudaError_t cudaGetDeviceProperties(cudaDeviceProp* found, int) {
  memset(found, 0, sizeof *found);
  snprintf(found->name, sizeof found->name, "no card (%d.%d)", model.major, model.minor);
  found->totalGlobalMem = total;
  found->major = model.major, found->minor = model.minor;
  found->multiProcessorCount = model.processors;
  found->maxThreadsPerMultiProcessor = model.threads, found->maxBlocksPerMultiProcessor = model.blocks;
  found->sharedMemPerBlock = usual_shared, found->sharedMemPerBlockOptin = most_shared;
  found->sharedMemPerMultiprocessor = model.shared << 10;
  found->l2CacheSize = model.cache << 20, found->memoryBusWidth = model.bus;
  found->warpSize = 32, found->regsPerBlock = found->regsPerMultiprocessor = 65536;
  found->maxThreadsPerBlock = found->maxThreadsDim[0] = found->maxThreadsDim[1] = 1024, found->maxThreadsDim[2] = 64;
  found->maxGridSize[0] = 2147483647, found->maxGridSize[1] = found->maxGridSize[2] = 65535;
  found->unifiedAddressing = found->concurrentKernels = found->canMapHostMemory = found->cooperativeLaunch = 1;
  found->asyncEngineCount = 3, found->textureAlignment = 512, found->pciBusID = 1;
  return cudaSuccess;
}
API cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  static const std::map<int, int> known = {
      {cudaDevAttrMaxThreadsPerBlock, 1024}, {cudaDevAttrMaxBlockDimX, 1024}, {cudaDevAttrMaxBlockDimY, 1024},
      {cudaDevAttrMaxBlockDimZ, 64}, {cudaDevAttrMaxGridDimX, 2147483647}, {cudaDevAttrMaxGridDimY, 65535},
      {cudaDevAttrMaxGridDimZ, 65535}, {cudaDevAttrMaxSharedMemoryPerBlock, usual_shared},
      {cudaDevAttrMaxSharedMemoryPerBlockOptin, most_shared}, {cudaDevAttrWarpSize, 32},
      {cudaDevAttrMaxSharedMemoryPerMultiprocessor, model.shared << 10}, {cudaDevAttrMaxRegistersPerBlock, 65536},
      {cudaDevAttrMaxRegistersPerMultiprocessor, 65536}, {cudaDevAttrMultiProcessorCount, model.processors},
      {cudaDevAttrMaxThreadsPerMultiProcessor, model.threads}, {cudaDevAttrL2CacheSize, model.cache << 20},
      {cudaDevAttrMaxBlocksPerMultiprocessor, model.blocks}, {cudaDevAttrUnifiedAddressing, 1},
      {cudaDevAttrClockRate, 1500000}, {cudaDevAttrMemoryClockRate, 2600000},  // kHz; Triton reckons with them
      {cudaDevAttrGlobalMemoryBusWidth, model.bus}, {cudaDevAttrCooperativeLaunch, 1},
      {cudaDevAttrComputeCapabilityMajor, model.major}, {cudaDevAttrComputeCapabilityMinor, model.minor}};
  auto found = known.find(attribute);
  *value = found == known.end() ? 0 : found->second;
  return cudaSuccess;
}
static thread_local int current = 0;
API cudaError_t cudaSetDevice(int device) {
  if (device < 0 || device >= cards) return fail(cudaErrorInvalidDevice);
  return current = device, cudaSuccess;
}
API cudaError_t cudaDeviceGetPCIBusId(char* text, int room, int) {
  snprintf(text, room, "0000:01:00.0");
  return cudaSuccess;
}
API cudaError_t cudaMemPoolGetAttribute(cudaMemPool_t, cudaMemPoolAttr, void* value) {
  memset(value, 0, 8);
  return cudaSuccess;
}
API cudaError_t cudaGetLastError() { return std::exchange(last_error, cudaSuccess); }
API cudaError_t cudaPeekAtLastError() { return last_error; }
API cudaError_t cudaGetDriverEntryPointByVersion(const char* name, void** function, unsigned, unsigned long long,
                                                 cudaDriverEntryPointQueryResult* result) {
  *function = dlsym(RTLD_DEFAULT, name);
  if (!*function) *function = dlsym(RTLD_DEFAULT, (std::string(name) + "_v2").c_str());
  if (!*function) note("missing", nullptr, "%s", name);
  if (!*function && !result) return fail(cudaErrorSymbolNotFound);
  if (result) *result = *function ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
  return cudaSuccess;  // the result says what was found; an error would be found by the next kernel's launch
}
ANSWER(cudaGetDeviceCount, int, cards) ANSWER(cudaGetDevice, int, current) ANSWER(cudaDeviceCanAccessPeer, int, 0)
ANSWER(cudaDriverGetVersion, int, CUDART_VERSION) ANSWER(cudaRuntimeGetVersion, int, CUDART_VERSION)
ANSWER(cudaDeviceGetDefaultMemPool, void*, 8)
STUB(cudaDeviceEnablePeerAccess) STUB(cudaProfilerStart) STUB(cudaProfilerStop)

// ---- kernels

static auto& functions = *new std::map<const void*, Function>;  // by the address that stands for it in the program

cudaError_t launch(Function& function, dim3 grid, dim3 block, size_t shared, cudaStream_t stream) {
  note("kernel", stream, "%.160s", function.name.c_str());  // C++ names have 1,000 letters; what matters stands first
  unsigned long threads = (unsigned long)block.x * block.y * block.z;
  bool fits = grid.x && grid.y && grid.z && grid.x <= 2147483647u && grid.y <= 65535 && grid.z <= 65535;
  if (!fits || !threads || threads > 1024 || block.z > 64) return fail(cudaErrorInvalidConfiguration);
  if (shared > (size_t)function.dynamic_shared) return fail(cudaErrorInvalidValue);
  return enqueue(stream, function.name.c_str());
}
cudaError_t allow_shared(Function& function, int bytes) {
  if (bytes > most_shared) return fail(cudaErrorInvalidValue);
  function.dynamic_shared = std::max(bytes, usual_shared);
  return cudaSuccess;
}
static Function* function_of(const void* address) {
  Guard guard(lock);
  auto found = functions.find(address);
  return found == functions.end() ? nullptr : &found->second;
}

API cudaError_t cudaLaunchKernel(const void* f, dim3 grid, dim3 block, void**, size_t shared, cudaStream_t stream) {
  Function* function = function_of(f);
  return function ? launch(*function, grid, block, shared, stream) : fail(cudaErrorInvalidDeviceFunction);
}
API cudaError_t cudaLaunchCooperativeKernel(const void* f, dim3 grid, dim3 block, void** arguments, size_t shared,
                                            cudaStream_t stream) {
  return cudaLaunchKernel(f, grid, block, arguments, shared, stream);
}
API cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* with, const void* f, void** arguments) {
  return cudaLaunchKernel(f, with->gridDim, with->blockDim, arguments, with->dynamicSmemBytes, with->stream);
}
API cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* found, const void* f) {
  Function* function = function_of(f);
  if (!function) return fail(cudaErrorInvalidDeviceFunction);
  memset(found, 0, sizeof *found);
  found->maxThreadsPerBlock = 1024, found->numRegs = 64;  // 1,024 threads of 64 fill a multiprocessor's registers
  int minor = model.major == 8 && model.minor == 9 ? 6 : model.minor;  // torch has none for 8.9, which runs that of 8.6
  found->binaryVersion = found->ptxVersion = model.major * 10 + minor;
  found->maxDynamicSharedSizeBytes = function->dynamic_shared;
  return cudaSuccess;
}
API cudaError_t cudaFuncSetAttribute(const void* f, cudaFuncAttribute attribute, int value) {
  Function* function = function_of(f);
  if (!function) return fail(cudaErrorInvalidDeviceFunction);
  return attribute == cudaFuncAttributeMaxDynamicSharedMemorySize ? allow_shared(*function, value) : cudaSuccess;
}
ANSWER(cudaOccupancyMaxActiveBlocksPerMultiprocessor, int, 1)
ANSWER(cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags, int, 1)

// What the compiler puts into programs with kernels: they say which there are, and `kernel<<<grid, block>>>(...)`.
API void __cudaRegisterFunction(void**, const void* f, char*, const char* name, int, uint3*, uint3*, dim3*, dim3*,
                                int*) {
  Guard guard(lock);
  functions[f] = {name};
}
API void** __cudaRegisterFatBinary(void*) {
  static void* handle;
  return &handle;
}
struct Configuration {
  dim3 grid, block;
  size_t shared;
  void* stream;
};
static thread_local std::vector<Configuration> configurations;
API unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, void* stream) {
  configurations.push_back({grid, block, shared, stream});
  return 0;
}
API cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared, void** stream) {
  auto& last = configurations.back();
  *grid = last.grid, *block = last.block, *shared = last.shared, *stream = last.stream;
  configurations.pop_back();
  return cudaSuccess;
}
API cudaError_t __cudaGetKernel(const void** kernel, const void* f) {
  *kernel = f;
  return cudaSuccess;
}
API cudaError_t __cudaLaunchKernel(const void* f, dim3 grid, dim3 block, void** arguments, size_t shared,
                                   cudaStream_t stream) {
  return cudaLaunchKernel(f, grid, block, arguments, shared, stream);
}
API char __cudaInitModule(void**) { return 1; }
STUB(__cudaRegisterFatBinaryEnd) STUB(__cudaUnregisterFatBinary) STUB(__cudaRegisterVar)
