// The memory of the card, and copies to it and from it.
#include <sys/mman.h>

#include "card.h"

static auto& device_memory = *new std::map<char*, size_t>;  // address -> bytes
static auto& pinned_memory = *new std::map<char*, size_t>;
static size_t used = 0;

static bool within(const std::map<char*, size_t>& memory, const void* address) {
  auto after = memory.upper_bound((char*)address);
  if (after == memory.begin()) return false;
  --after;
  return (char*)address < after->first + after->second;
}
Place place_of(const void* address) {
  Guard guard(lock);
  return within(device_memory, address) ? Place::card : within(pinned_memory, address) ? Place::pinned : Place::host;
}

API cudaError_t cudaMalloc(void** made, size_t bytes) {
  if (auto error = unsafe("cudaMalloc")) return error;
  Guard guard(lock);
  size_t rounded = (std::max<size_t>(bytes, 1) + (2 << 20) - 1) >> 21 << 21;  // to pages of 2 MiB, as on a card
  *made = nullptr;
  if (used + rounded > total) return fail(cudaErrorMemoryAllocation);
  int allowed = zeros ? PROT_NONE : PROT_READ | PROT_WRITE;
  void* address = mmap(nullptr, rounded, allowed, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (address == MAP_FAILED) return fail(cudaErrorMemoryAllocation);
  device_memory[(char*)address] = rounded;
  used += rounded;
  note("malloc", nullptr, "%zu", rounded);
  *made = address;
  return cudaSuccess;
}
API cudaError_t cudaFree(void* address) {
  if (!address) return cudaSuccess;
  if (auto error = unsafe("cudaFree")) return error;
  Guard guard(lock);
  auto found = device_memory.find((char*)address);
  if (found == device_memory.end()) return fail(cudaErrorInvalidValue);
  munmap(address, found->second);
  used -= found->second;
  note("free", nullptr, "%zu", found->second);
  device_memory.erase(found);
  return cudaSuccess;
}
API cudaError_t cudaHostAlloc(void** made, size_t bytes, unsigned) {
  if (auto error = unsafe("cudaHostAlloc")) return error;
  Guard guard(lock);
  if (posix_memalign(made, 4096, std::max<size_t>(bytes, 1))) return fail(cudaErrorMemoryAllocation);
  pinned_memory[(char*)*made] = bytes;
  return cudaSuccess;
}
API cudaError_t cudaMallocHost(void** made, size_t bytes) { return cudaHostAlloc(made, bytes, 0); }
API cudaError_t cudaFreeHost(void* address) {
  if (auto error = unsafe("cudaFreeHost")) return error;
  Guard guard(lock);
  pinned_memory.erase((char*)address);
  free(address);
  return cudaSuccess;
}
API cudaError_t cudaHostRegister(void* address, size_t bytes, unsigned) {
  Guard guard(lock);
  pinned_memory[(char*)address] = bytes;
  return cudaSuccess;
}
API cudaError_t cudaHostUnregister(void* address) {
  Guard guard(lock);
  pinned_memory.erase((char*)address);
  return cudaSuccess;
}
API cudaError_t cudaMemGetInfo(size_t* unused, size_t* all) {
  Guard guard(lock);
  *unused = total - used;
  *all = total;
  return cudaSuccess;
}
API cudaError_t cudaPointerGetAttributes(cudaPointerAttributes* found, const void* address) {
  memset(found, 0, sizeof *found);
  Place place = place_of(address);
  bool known = place != Place::host, pinned = place == Place::pinned;
  found->type = !known ? cudaMemoryTypeUnregistered : pinned ? cudaMemoryTypeHost : cudaMemoryTypeDevice;
  found->device = known ? 0 : -1;
  found->devicePointer = known ? (void*)address : nullptr;
  found->hostPointer = pinned ? (void*)address : nullptr;
  return cudaSuccess;
}

static cudaError_t copy(void* to, size_t to_step, const void* from, size_t from_step, size_t width, size_t rows,
                        cudaStream_t stream, const char* what) {
  Place target_place = place_of(to), source_place = place_of(from);
  bool to_card = target_place == Place::card, from_card = source_place == Place::card;
  bool pageable = target_place == Place::host || source_place == Place::host;
  const char* kind = to_card ? (from_card ? "on-card" : "to-card") : from_card ? "from-card" : "on-host";
  note("copy", stream, "%s%s %zu", kind, to_card == from_card ? "" : pageable ? "-pageable" : "-pinned", width * rows);
  // torch itself refuses to capture these: CUDA first copies pageable memory to memory of its own
  if (captured(stream) && to_card != from_card && pageable) return look_at(stream, "a copy of pageable memory");
  if (auto error = enqueue(stream, what)) return error;
  if (captured(stream)) return cudaSuccess;
  for (size_t row = 0; row < rows; row++) {
    char* target = (char*)to + row * to_step;
    if (!zeros || (!to_card && !from_card)) memmove(target, (char*)from + row * from_step, width);
    else if (!to_card) memset(target, 0, width);
  }
  return cudaSuccess;
}
API cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, cudaMemcpyKind) {
  note("wait", nullptr, "cudaMemcpy");
  if (auto error = unsafe("cudaMemcpy")) return error;
  return copy(to, 0, from, 0, bytes, 1, nullptr, "cudaMemcpy");
}
API cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind, cudaStream_t stream) {
  return copy(to, 0, from, 0, bytes, 1, stream, "cudaMemcpyAsync");
}
API cudaError_t cudaMemcpyPeerAsync(void* to, int, const void* from, int, size_t bytes, cudaStream_t stream) {
  return copy(to, 0, from, 0, bytes, 1, stream, "cudaMemcpyPeerAsync");
}
API cudaError_t cudaMemcpy2DAsync(void* to, size_t to_step, const void* from, size_t from_step, size_t width,
                                  size_t rows, cudaMemcpyKind, cudaStream_t stream) {
  return copy(to, to_step, from, from_step, width, rows, stream, "cudaMemcpy2DAsync");
}
API cudaError_t cudaMemsetAsync(void* address, int value, size_t bytes, cudaStream_t stream) {
  note("kernel", stream, "memset");
  if (auto error = enqueue(stream, "cudaMemsetAsync")) return error;
  if (!zeros && !captured(stream)) memset(address, value, bytes);
  return cudaSuccess;
}
API int cuMemsetD32Async(char* to, unsigned value, size_t count, cudaStream_t stream) {
  note("kernel", stream, "memset");
  if (auto error = enqueue(stream, "cuMemsetD32Async")) return error;
  for (size_t i = 0; i < count && !zeros && !captured(stream); i++) memcpy(to + 4 * i, &value, 4);
  return 0;
}
API cudaError_t cudaMemset(void* to, int value, size_t bytes) { return cudaMemsetAsync(to, value, bytes, nullptr); }
API int cuMemGetAddressRange(char** start, size_t* bytes, char* address) {
  Guard guard(lock);
  if (!within(device_memory, address)) return 1;  // CUDA_ERROR_INVALID_VALUE
  auto& [first, length] = *--device_memory.upper_bound(address);
  if (start) *start = first;
  if (bytes) *bytes = length;
  return 0;
}
// Only torch's other allocator uses these two (backend:cudaMallocAsync). In a capture they would be nodes of the graph.
API cudaError_t cudaMallocAsync(void** made, size_t bytes, cudaStream_t) { return cudaMalloc(made, bytes); }
API cudaError_t cudaFreeAsync(void* address, cudaStream_t) { return cudaFree(address); }
API cudaError_t cudaGetSymbolAddress(void** address, const void*) {  // a variable of a kernel, which nothing reads
  static void* room = calloc(1, 1 << 20);
  *address = room;
  return cudaSuccess;
}
STUB(cudaMemcpyToSymbol) STUB(cudaMemPoolSetAttribute) STUB(cudaMemPoolSetAccess) STUB(cudaMemPoolTrimTo)
