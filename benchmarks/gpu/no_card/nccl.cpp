// NCCL, for one process a card: no process asks another. Each takes what the others hold to be what it holds itself.
#include <vector>

#include "card.h"

struct Group {
  int ranks, rank;
};
static const int WIDTHS[] = {1, 1, 4, 4, 8, 8, 2, 4, 8, 2, 1, 1};  // bytes of a number, by ncclDataType_t

static int exchange(const char* what, void* to, const void* from, size_t bytes, cudaStream_t stream) {
  note("nccl", stream, "%s %zu", what, bytes);
  if (enqueue(stream, what)) return 1;  // ncclUnhandledCudaError
  if (!zeros && !captured(stream)) memmove(to, from, bytes);
  return 0;
}
API int ncclAllReduce(const void* from, void* to, size_t count, int type, int, Group*, cudaStream_t stream) {
  return exchange("all-reduce", to, from, count * WIDTHS[type], stream);
}
API int ncclReduce(const void* from, void* to, size_t count, int type, int, int root, Group* g, cudaStream_t stream) {
  return exchange("reduce", g->rank == root ? to : (void*)from, from, count * WIDTHS[type], stream);
}

// From torch 2.15 on, a group of broadcasts, one from each process, may stand for an all-gather.
struct Sent {
  const void* from;
  void* to;
  size_t bytes;
};
static thread_local int depth = 0;
static thread_local Sent own = {};
static thread_local std::vector<Sent> others;

API int ncclBroadcast(const void* from, void* to, size_t count, int type, int root, Group* g, cudaStream_t stream) {
  bool mine = g->rank == root;
  Sent sent = {from, to, count * WIDTHS[type]};
  if (depth && !captured(stream)) mine ? void(own = sent) : others.push_back(sent);
  return exchange("broadcast", to, mine ? from : to, sent.bytes, stream);
}
API int ncclGroupStart() { return depth++, 0; }
API int ncclGroupEnd() {
  if (--depth) return 0;
  for (auto& sent : others)
    if (!zeros && own.from && own.bytes == sent.bytes) memmove(sent.to, own.from, sent.bytes);
  return others.clear(), own = {}, 0;
}
API int ncclBcast(void* at, size_t count, int type, int, Group*, cudaStream_t stream) {
  return exchange("broadcast", at, at, count * WIDTHS[type], stream);
}
API int ncclAllGather(const void* from, void* to, size_t count, int type, Group* group, cudaStream_t stream) {
  size_t bytes = count * WIDTHS[type];
  int error = 0;
  for (int rank = 0; rank < group->ranks; rank++)
    error |= exchange("all-gather", (char*)to + rank * bytes, from, bytes, stream);
  return error;
}
API int ncclReduceScatter(const void* from, void* to, size_t count, int type, int, Group* group, cudaStream_t stream) {
  size_t bytes = count * WIDTHS[type];
  return exchange("reduce-scatter", to, (const char*)from + group->rank * bytes, bytes, stream);
}

struct Id {  // ncclUniqueId
  char text[128];
};
API int ncclGetUniqueId(Id* id) { return memset(id, 1, sizeof *id), 0; }
API int ncclCommInitRank(Group** made, int ranks, Id, int rank) { return *made = new Group{ranks, rank}, 0; }
API int ncclCommInitRankConfig(Group** made, int ranks, Id id, int rank, void*) {
  return ncclCommInitRank(made, ranks, id, rank);
}
// A group of all ranks again is what DeepSpeed asks for; how many share a colour is not known here.
API int ncclCommSplit(Group* group, int colour, int, Group** made, void*) {
  return *made = colour < 0 ? nullptr : new Group{group->ranks, group->rank}, 0;
}
API int ncclCommCount(Group* group, int* ranks) { return *ranks = group->ranks, 0; }
API int ncclCommUserRank(Group* group, int* rank) { return *rank = group->rank, 0; }
API int ncclCommGetAsyncError(Group*, int* error) { return *error = 0; }
API int ncclCommRegister(Group*, void*, size_t, void** made) { return *made = (void*)8, 0; }
API const char* ncclGetErrorString(int) { return "an error of benchmarks/gpu/no_card"; }
API const char* ncclGetLastError(Group*) { return ncclGetErrorString(0); }
API int ncclRedOpCreatePreMulSum(int* made, void*, int, int, Group*) { return *made = 5, 0; }
ANSWER(ncclGetVersion, int, 22800)
STUB(ncclCommDestroy) STUB(ncclCommAbort) STUB(ncclCommFinalize)
STUB(ncclCommDeregister) STUB(ncclRedOpDestroy)
