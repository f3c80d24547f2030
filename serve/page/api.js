// The server's API, as any other client uses it.

import { word } from './words.js';

export class ApiError extends Error {
  constructor(message, status) {
    super(message);
    this.status = status;
  }
}

async function ask(path, key, options = {}) {
  const headers = { 'Content-Type': 'application/json', ...(key ? { Authorization: `Bearer ${key}` } : {}) };
  const response = await fetch(path, { ...options, headers });
  if (response.ok) return response;
  const body = await response.json().catch(() => ({}));
  throw new ApiError(String(body?.error?.message ?? response.statusText), response.status);
}

export async function models(key) {
  return (await (await ask('v1/models', key)).json()).data;
}

// Has the server read its models again.
export async function reload(key) {
  await ask('reload', key, { method: 'POST' });
}

// The tools that the page offers a model, and in how many rounds of calls (inference/tools.py).
export async function demoTools(key, signal) {
  return (await ask('tools/demo', key, { signal })).json();
}

export async function callTool(call, key, signal) {
  return (await (await ask('tools/demo', key, { method: 'POST', body: JSON.stringify(call), signal })).json()).content;
}

export async function runs(key) {
  return (await (await ask('runs/data', key)).json()).data;
}

export async function run(name, key) {
  return (await ask(`runs/data/${encodeURIComponent(name)}`, key)).json();
}

// What went wrong, in words. begun: an answer had begun to come.
export function explain(error, begun = false) {
  if (!(error instanceof ApiError)) return `${word(begun ? 'broken' : 'no_server')} (${error.message})`;
  return error.status === 401 ? word('need_key') : error.message;
}

// Asks for an answer and calls onDelta({content}, {reasoning_content} or {tool_calls}) for each piece of it.
// -> {finish: OpenAI's finish_reason or null if the stream broke off, tokens: their number}
export async function stream(body, key, signal, onDelta) {
  body = { ...body, stream: true, stream_options: { include_usage: true } };
  const response = await ask('v1/chat/completions', key, { method: 'POST', body: JSON.stringify(body), signal });
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  const result = { finish: null, tokens: 0 };
  let held = '';
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return result;
    const events = (held + value).split('\n\n');
    held = events.pop();
    for (const event of events) {
      const data = event.replace(/^data: /, '');
      if (data === '[DONE]') continue;
      const chunk = JSON.parse(data);
      if (chunk.error) throw new ApiError(String(chunk.error.message), 500);
      if (chunk.usage) result.tokens = chunk.usage.completion_tokens;
      const [choice] = chunk.choices;
      if (choice?.delta.content || choice?.delta.reasoning_content || choice?.delta.tool_calls) onDelta(choice.delta);
      result.finish = choice?.finish_reason ?? result.finish;
    }
  }
}
