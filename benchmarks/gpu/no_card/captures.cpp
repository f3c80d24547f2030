// The log; CUDA graphs, and with them streams and events, whose rules matter while one is captured.
#include <chrono>
#include <cstdarg>
#include <memory>
#include <set>
#include <thread>

#include "card.h"

void note(const char* kind, const void* stream, const char* text, ...) {
  static const char* path = setting("NO_CARD_LOG", nullptr);
  static FILE* file = path ? fopen(path, "a") : nullptr;
  if (!file) return;
  Guard guard(lock);
  fprintf(file, "%s %zx ", kind, size_t(stream));
  va_list values;
  va_start(values, text);
  vfprintf(file, text, values);
  va_end(values);
  fputc('\n', file);
  fflush(file);  // whole lines, also of a process that is killed or forks
}

// ---- captures

struct Stream;
using Clock = std::map<Stream*, long>;  // how much of each stream's captured work comes before a point

struct Capture {
  unsigned long long id;
  cudaStreamCaptureMode mode;
  std::thread::id thread;
  Stream* origin;
  std::set<Stream*> streams;  // with those that have joined
  long nodes = 0;
  bool broken = false;
};

// Streams and events are never freed: a handle that is used once more must not end the process, and torch keeps pools
// of both, so there are few.
struct Stream {
  int priority;
  bool blocking;  // waits for the default stream; torch's own do not
  std::shared_ptr<Capture> capture = nullptr;
  Clock seen = {};
};

struct Event {
  bool timed;
  bool recorded = false;
  double at = 0;                               // ms
  std::shared_ptr<Capture> capture = nullptr;  // in which it was last recorded, even if that has ended
  Clock seen = {};
};

struct Graph {
  long nodes;
};

static auto& captures = *new std::set<std::shared_ptr<Capture>>;  // those going on
static thread_local cudaStreamCaptureMode thread_mode = cudaStreamCaptureModeGlobal;

// Null is the default ("legacy") stream. That of a thread, 2, counts as it too; torch does not use it.
static Stream* stream_of(cudaStream_t handle) { return size_t(handle) < 3 ? nullptr : (Stream*)handle; }

static cudaError_t spoil(Capture& capture, const char* what, cudaError_t error) {
  fprintf(stderr, "no_card: %s while a stream is captured\n", what);
  note("broken", capture.origin, "%s", what);
  capture.broken = true;
  return fail(error);
}

// Calls that may wait or have side effects are forbidden to a thread that captures, unless relaxed, and to all others
// while one captures in the mode "global", unless they have exchanged their own for another.
cudaError_t unsafe(const char* what) {
  Guard guard(lock);
  cudaError_t error = cudaSuccess;
  for (auto& capture : captures) {
    if (thread_mode == cudaStreamCaptureModeRelaxed || capture->mode == cudaStreamCaptureModeRelaxed) continue;
    bool both_global = thread_mode == cudaStreamCaptureModeGlobal && capture->mode == cudaStreamCaptureModeGlobal;
    if (capture->thread == std::this_thread::get_id() || both_global)
      error = spoil(*capture, what, cudaErrorStreamCaptureUnsupported);
  }
  return error;
}

// The default stream and a blocking stream wait for each other, which a graph cannot hold.
static cudaError_t on_default_stream(const char* what, bool work) {
  cudaError_t error = cudaSuccess;
  for (auto& capture : captures) {
    bool blocking = false;
    for (auto* stream : capture->streams) blocking |= stream->blocking;
    if (blocking && work) error = spoil(*capture, what, cudaErrorStreamCaptureImplicit);
    else if (blocking) error = fail(cudaErrorStreamCaptureImplicit);
    else if (work && capture->thread == std::this_thread::get_id()) note("stray", nullptr, "%s", what);  // allowed
  }
  return error;
}

cudaError_t enqueue(cudaStream_t handle, const char* what, bool node) {
  Guard guard(lock);
  Stream* stream = stream_of(handle);
  if (!stream) return on_default_stream(what, true);
  if (!stream->capture) return cudaSuccess;
  if (stream->capture->broken) return fail(cudaErrorStreamCaptureInvalidated);
  stream->capture->nodes += node;
  stream->seen[stream] += node;
  return cudaSuccess;
}

bool captured(cudaStream_t handle) {
  Guard guard(lock);
  return stream_of(handle) && stream_of(handle)->capture;
}

cudaError_t look_at(cudaStream_t handle, const char* what) {
  Guard guard(lock);
  if (captured(handle)) return spoil(*stream_of(handle)->capture, what, cudaErrorStreamCaptureUnsupported);
  if (!stream_of(handle))
    if (auto error = on_default_stream(what, false)) return error;
  return unsafe(what);
}

static cudaError_t look_at(Event* event, const char* what) {
  Guard guard(lock);
  if (!event->capture) return unsafe(what);
  return captures.count(event->capture) ? spoil(*event->capture, what, cudaErrorCapturedEvent)
                                        : fail(cudaErrorCapturedEvent);
}

API cudaError_t cudaStreamBeginCapture(cudaStream_t handle, cudaStreamCaptureMode mode) {
  Guard guard(lock);
  static unsigned long long id = 0;
  Stream* stream = stream_of(handle);
  if (!stream) return fail(cudaErrorStreamCaptureUnsupported);
  if (stream->capture) return fail(cudaErrorIllegalState);
  stream->capture = std::make_shared<Capture>(Capture{++id, mode, std::this_thread::get_id(), stream, {stream}});
  captures.insert(stream->capture);
  note("capture", handle, "begin");
  return cudaSuccess;
}

API cudaError_t cudaStreamEndCapture(cudaStream_t handle, cudaGraph_t* graph) {
  Guard guard(lock);
  Stream* origin = stream_of(handle);
  *graph = nullptr;
  if (!captured(handle)) return fail(cudaErrorIllegalState);
  auto capture = origin->capture;
  if (capture->origin != origin) return spoil(*capture, "the end in another stream", cudaErrorStreamCaptureUnmatched);
  if (capture->mode != cudaStreamCaptureModeRelaxed && capture->thread != std::this_thread::get_id())
    return fail(cudaErrorStreamCaptureWrongThread);
  bool joined = true;  // the work of each stream comes before the end of the first one
  for (auto* stream : capture->streams) joined &= stream->seen[stream] <= origin->seen[stream];
  for (auto* stream : capture->streams) stream->capture = nullptr;
  for (auto* stream : capture->streams) stream->seen.clear();
  captures.erase(capture);
  note("capture", handle, "end %ld", capture->nodes);
  if (capture->broken) return fail(cudaErrorStreamCaptureInvalidated);
  if (!joined) return spoil(*capture, "another stream was not joined again", cudaErrorStreamCaptureUnjoined);
  *graph = (cudaGraph_t) new Graph{capture->nodes};
  return cudaSuccess;
}

API cudaError_t cudaStreamGetCaptureInfo(cudaStream_t handle, cudaStreamCaptureStatus* status, unsigned long long* id,
                                         cudaGraph_t* graph, const cudaGraphNode_t** nodes,
                                         const cudaGraphEdgeData** edges, size_t* count) {
  Guard guard(lock);
  *status = cudaStreamCaptureStatusNone;
  if (graph) *graph = nullptr;
  if (nodes) *nodes = nullptr;
  if (edges) *edges = nullptr;
  if (count) *count = 0;
  if (!stream_of(handle)) return on_default_stream("a question", false);
  if (!captured(handle)) return cudaSuccess;
  const Capture& capture = *stream_of(handle)->capture;
  *status = capture.broken ? cudaStreamCaptureStatusInvalidated : cudaStreamCaptureStatusActive;
  if (id) *id = capture.id;
  return cudaSuccess;
}
API cudaError_t cudaStreamIsCapturing(cudaStream_t handle, cudaStreamCaptureStatus* status) {
  return cudaStreamGetCaptureInfo(handle, status, nullptr, nullptr, nullptr, nullptr, nullptr);
}
API int cuStreamIsCapturing(cudaStream_t handle, cudaStreamCaptureStatus* status) {  // asked by Triton
  return cudaStreamIsCapturing(handle, status);
}
API cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode* mode) {
  std::swap(*mode, thread_mode);
  return cudaSuccess;
}

API cudaError_t cudaGraphInstantiateWithFlags(cudaGraphExec_t* made, cudaGraph_t graph, unsigned long long) {
  *made = (cudaGraphExec_t) new Graph(*(Graph*)graph);
  return cudaSuccess;
}
API cudaError_t cudaGraphInstantiate(cudaGraphExec_t* made, cudaGraph_t graph, unsigned long long flags) {
  return cudaGraphInstantiateWithFlags(made, graph, flags);
}
API cudaError_t cudaGraphLaunch(cudaGraphExec_t graph, cudaStream_t stream) {
  note("graph", stream, "%ld", ((Graph*)graph)->nodes);
  return enqueue(stream, "a graph");
}
API cudaError_t cudaGraphGetNodes(cudaGraph_t graph, cudaGraphNode_t* nodes, size_t* count) {
  if (nodes) memset(nodes, 0, *count * sizeof *nodes);
  else *count = ((Graph*)graph)->nodes;
  return cudaSuccess;
}
API cudaError_t cudaGraphNodeGetDependencies(cudaGraphNode_t, cudaGraphNode_t*, cudaGraphEdgeData*, size_t* count) {
  *count = 0;
  return cudaSuccess;
}
STUB(cudaGraphDestroy) STUB(cudaGraphExecDestroy) STUB(cudaGraphDebugDotPrint)
// What a graph keeps alive as long as it lives itself: it is never freed here.
ANSWER(cudaUserObjectCreate, void*, 8) STUB(cudaUserObjectRelease) STUB(cudaGraphRetainUserObject)

// ---- streams and events

API cudaError_t cudaStreamCreateWithPriority(cudaStream_t* made, unsigned flags, int priority) {
  *made = (cudaStream_t) new Stream{priority, !(flags & cudaStreamNonBlocking)};
  return cudaSuccess;
}
API cudaError_t cudaStreamCreate(cudaStream_t* made) { return cudaStreamCreateWithPriority(made, 0, 0); }
API cudaError_t cudaStreamGetPriority(cudaStream_t stream, int* priority) {
  *priority = stream_of(stream) ? stream_of(stream)->priority : 0;
  return cudaSuccess;
}
API cudaError_t cudaDeviceGetStreamPriorityRange(int* least, int* greatest) {
  if (least) *least = 0;
  if (greatest) *greatest = -5;
  return cudaSuccess;
}
API cudaError_t cudaStreamQuery(cudaStream_t stream) { return look_at(stream, "cudaStreamQuery"); }
API cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
  note("wait", stream, "cudaStreamSynchronize");
  return look_at(stream, "cudaStreamSynchronize");
}
API cudaError_t cudaDeviceSynchronize() {  // forbidden in every mode and thread: the device has the captured stream
  Guard guard(lock);
  note("wait", nullptr, "cudaDeviceSynchronize");
  cudaError_t error = cudaSuccess;
  for (auto& capture : captures) error = spoil(*capture, "cudaDeviceSynchronize", cudaErrorStreamCaptureUnsupported);
  return error;
}

API cudaError_t cudaEventCreateWithFlags(cudaEvent_t* made, unsigned flags) {
  *made = (cudaEvent_t) new Event{!(flags & cudaEventDisableTiming)};
  return cudaSuccess;
}
API cudaError_t cudaEventCreate(cudaEvent_t* made) { return cudaEventCreateWithFlags(made, 0); }
API cudaError_t cudaEventRecordWithFlags(cudaEvent_t handle, cudaStream_t stream, unsigned flags) {
  Guard guard(lock);
  bool external = flags & cudaEventRecordExternal;  // a node of the graph, which records when the graph is launched
  if (auto error = enqueue(stream, "cudaEventRecord", external)) return error;
  auto& event = *(Event*)handle;
  event.recorded = true;
  event.at = std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now().time_since_epoch()).count();
  event.capture = captured(stream) && !external ? stream_of(stream)->capture : nullptr;
  event.seen = event.capture ? stream_of(stream)->seen : Clock();
  return cudaSuccess;
}
API cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t s) { return cudaEventRecordWithFlags(event, s, 0); }
API cudaError_t cudaEventQuery(cudaEvent_t event) { return look_at((Event*)event, "cudaEventQuery"); }
API cudaError_t cudaEventSynchronize(cudaEvent_t event) {
  note("wait", nullptr, "cudaEventSynchronize");
  return look_at((Event*)event, "cudaEventSynchronize");
}
API cudaError_t cudaEventElapsedTime(float* ms, cudaEvent_t from, cudaEvent_t to) {
  Guard guard(lock);
  auto &start = *(Event*)from, &end = *(Event*)to;
  if (start.capture || end.capture) return fail(cudaErrorCapturedEvent);
  if (!start.recorded || !end.recorded || !start.timed || !end.timed) return fail(cudaErrorInvalidResourceHandle);
  *ms = float(end.at - start.at) + 1e-3f;  // of the host, which launched; never zero, as it is divided by
  return cudaSuccess;
}
API cudaError_t cudaStreamWaitEvent(cudaStream_t handle, cudaEvent_t waited, unsigned flags) {
  Guard guard(lock);
  auto& event = *(Event*)waited;
  Stream* stream = stream_of(handle);
  bool external = flags & cudaEventWaitExternal;
  if (auto error = enqueue(handle, "cudaStreamWaitEvent", external)) return error;
  if (external || !event.recorded) return cudaSuccess;
  if (!event.capture) {
    if (!captured(handle)) return cudaSuccess;
    return spoil(*stream->capture, "waiting for an event from outside", cudaErrorStreamCaptureIsolation);
  }
  if (!captures.count(event.capture)) return fail(cudaErrorCapturedEvent);
  if (!stream) return spoil(*event.capture, "the default stream's waiting for it", cudaErrorStreamCaptureImplicit);
  if (stream->capture && stream->capture != event.capture) {
    spoil(*stream->capture, "waiting for another capture's event", cudaErrorStreamCaptureMerge);
    return spoil(*event.capture, "another capture's waiting", cudaErrorStreamCaptureMerge);
  }
  stream->capture = event.capture;  // joins
  event.capture->streams.insert(stream);
  for (auto& [other, count] : event.seen) stream->seen[other] = std::max(stream->seen[other], count);
  return cudaSuccess;
}
API cudaError_t cudaLaunchHostFunc(cudaStream_t stream, cudaHostFn_t function, void* data) {
  if (auto error = enqueue(stream, "cudaLaunchHostFunc")) return error;
  if (!captured(stream)) function(data);
  return cudaSuccess;
}
API cudaError_t cudaStreamAddCallback(cudaStream_t stream, cudaStreamCallback_t function, void* data, unsigned) {
  if (captured(stream)) return look_at(stream, "cudaStreamAddCallback");
  function(stream, cudaSuccess, data);
  return cudaSuccess;
}
STUB(cudaStreamDestroy) STUB(cudaEventDestroy)
