// An answer of a model as it comes: its text, what it took, and what went wrong.

import { explain, reload, stream } from './api.js';
import { calls } from './conversations.js';
import { element, render, visible } from './markdown.js';
import { word } from './words.js';

// Streams an answer into `message`; draw() is called as it grows, at most once a frame.
// -> the status of an error of the server's, or undefined
export async function answerInto(message, body, key, signal, draw) {
  const begun = performance.now();
  let first = 0;
  let due = false;
  const frame = () => { due = false; draw(); };
  const onDelta = (delta) => {
    first ||= performance.now();
    message.content += delta.content ?? '';
    message.reasoning += delta.reasoning_content ?? '';
    if (delta.tool_calls) message.calls = [...(message.calls ?? []), ...calls(delta.tool_calls)];
    if (!due) requestAnimationFrame(frame);
    due = true;
  };
  try {
    const { finish, tokens } = await stream(body, key, signal, onDelta);
    message.ending = finish ?? '';
    message.tokens = tokens;
    if (first) message.first = (first - begun) / 1000;
    const seconds = (performance.now() - first) / 1000;
    if (first && seconds > 0.2) message.rate = tokens / seconds; // several tokens may come together: less time says nothing
    if (finish === null) message.error = word('broken');
    else if (!message.content.trim() && !message.calls) message.error = word('empty');
  } catch (error) {
    if (error.name === 'AbortError') message.ending = 'stopped';
    else message.error = explain(error, Boolean(first));
    return error.status;
  }
}

const unfolded = new WeakSet(); // messages whose thoughts are open

// The thoughts before an answer, folded unless the reader has opened them.
export function thoughts(message, running) {
  const made = element('details', '', { open: unfolded.has(message) });
  const summary = element('summary', word(running && !message.content ? 'thinking' : 'thought'));
  summary.onclick = () => unfolded[made.open ? 'delete' : 'add'](message); // before it opens or closes
  made.append(summary, render(message.reasoning, word('copy')));
  return made;
}

// The line below an answer.
export function figures({ model, tokens, rate, first, ending }) {
  const parts = [model];
  if (tokens) parts.push(`${tokens} ${word('tokens')}`);
  if (rate) parts.push(`${rate.toFixed(rate < 10 ? 1 : 0)} ${word('per_second')}`);
  if (first) parts.push(`${first.toFixed(2)} ${word('first')}`);
  if (ending === 'stopped' || ending === 'length') parts.push(word(ending));
  return parts.filter(Boolean).join(' · ');
}

// Where a model was trained again since the server read it, or there was none yet: says so in `notice`, with a button
// that has it read. done() is called after that.
export function offerReload(notice, found, key, done) {
  const newer = found.filter(({ changed }) => changed).map(({ id }) => id);
  if (found.length && !newer.length) return;
  const text = found.length ? `${word('newer')} ${newer.join(', ')}` : word('no_model');
  const button = element('button', word('load'), { type: 'button' });
  button.onclick = async () => {
    button.disabled = true;
    button.textContent = word('reading');
    try {
      await reload(key());
      await done();
    } catch (error) {
      notice.textContent = visible(explain(error));
    }
  };
  notice.replaceChildren(visible(text), ' ', button);
  notice.hidden = false;
}
