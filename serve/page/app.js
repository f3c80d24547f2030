// The chat page: what is on it, and what its buttons do.

import { answerInto, figures, offerReload, thoughts } from './answers.js';
import { callTool, demoTools, explain, models } from './api.js';
import * as talk from './conversations.js';
import { download, element, fit, render, submitOnEnter, visible } from './markdown.js';
import { apiKey, sampling, set, settings, settingsDialog } from './settings.js';
import { translate, word } from './words.js';

const $ = (id) => document.getElementById(id);

const state = {
  list: talk.saved(),
  open: null, // the conversation on the page
  editing: null, // the question that is being edited
  running: null, // {message, controller} while an answer is made
};
state.open = state.list[0] ?? talk.conversation();

const openSettings = settingsDialog({
  system: { get: () => state.open.system, set: (text) => { state.open.system = text; keep(); } },
  onKey: listModels,
});

// ---- small parts

function button(key, action, more = {}) {
  const made = element('button', more.sign ?? word(key), { type: 'button', title: word(key), className: 'small' });
  made.setAttribute('aria-label', word(key));
  made.disabled = Boolean(more.disabled);
  made.onclick = action;
  return made;
}

function notice(text) {
  $('notice').textContent = visible(text ?? '');
  $('notice').hidden = !text;
}

function keep(root = state.open) {
  if (!root.replies.length) return;
  if (!state.list.includes(root)) state.list.unshift(root);
  try {
    talk.save(root);
  } catch {
    notice(word('full'));
  }
}

// ---- the list of conversations

function showList() {
  $('list').replaceChildren(...state.list.map((root) => {
    const row = element('div', '', { className: 'row' });
    const name = element('button', talk.title(root) || word('untitled'), { className: 'name' });
    name.onclick = () => choose(root);
    if (root === state.open) name.setAttribute('aria-current', 'true');
    row.append(name, button('remove', () => forget(root), { sign: '×' }));
    return row;
  }));
}

function choose(root) {
  state.running?.controller.abort();
  state.open = root;
  state.editing = null;
  $('side').classList.remove('open');
  notice();
  showList();
  showMessages();
  $('question').focus();
}

function forget(root) {
  if (!confirm(word('sure'))) return;
  talk.remove(root);
  root.replies = []; // else an answer that is still being made would bring it back
  state.list = state.list.filter((other) => other !== root);
  if (root === state.open) choose(state.list[0] ?? talk.conversation());
  showList();
}

// ---- messages

function showMessages() {
  const entries = talk.path(state.open);
  const shown = entries.map(({ message, parent }) => {
    const box = element('article', '', { className: message.role });
    box.dataset.role = message.role;
    fill(box, message, parent);
    return box;
  });
  $('messages').replaceChildren(...(shown.length ? shown : [element('p', word('hello'), { className: 'hint' })]));
  $('messages').scrollTop = $('messages').scrollHeight;
  $('messages').setAttribute('aria-busy', Boolean(state.running)); // screen readers wait for the whole answer
  $('stop').hidden = !state.running;
  $('send').hidden = Boolean(state.running);
}

function fill(box, message, parent) {
  if (state.editing === message) return box.replaceChildren(editor(message, parent));
  const running = state.running?.message === message;
  const parts = [];
  if (message.reasoning) parts.push(thoughts(message, running));
  const text = element('div', '', { className: 'text', dir: 'auto' });
  if (message.role === 'assistant') text.append(render(message.content, word('copy')));
  else text.textContent = visible(message.content);
  if (message.content || !message.calls) parts.push(text);
  for (const { function: called } of message.calls ?? []) {
    parts.push(element('p', `${called.name}(${called.arguments})`, { className: 'call', title: word('called') }));
  }
  if (message.error) parts.push(element('p', message.error, { className: 'error' }));
  if (!running && message.role !== 'tool') parts.push(footer(message, parent));
  box.replaceChildren(...parts);
  box.classList.toggle('running', running);
}

function footer(message, parent) {
  const row = element('footer');
  const at = parent.shown;
  const step = (by) => () => { parent.shown += by; keep(); showMessages(); };
  const busy = Boolean(state.running);
  if (parent.replies.length > 1) {
    row.append(
      button('previous', step(-1), { sign: '‹', disabled: busy || at === 0 }),
      element('span', `${at + 1}/${parent.replies.length}`),
      button('next', step(1), { sign: '›', disabled: busy || at === parent.replies.length - 1 }),
    );
  }
  if (message.role === 'user') row.append(button('edit', () => edit(message), { disabled: busy }));
  else row.append(button('again', () => answer(parent), { disabled: busy }));
  if (navigator.clipboard) row.append(button('copy', () => navigator.clipboard.writeText(message.content)));
  if (message.role === 'assistant') row.append(element('span', figures(message), { className: 'figures' }));
  return row;
}

function edit(message) {
  state.editing = message;
  showMessages();
  const box = $('messages').querySelector('textarea');
  box.focus();
  box.scrollIntoView({ block: 'nearest' });
}

function editor(message, parent) {
  const form = element('form', '', { className: 'edit' });
  const box = element('textarea', '', { value: message.content, rows: 3 });
  box.setAttribute('aria-label', word('edit'));
  const stop = () => { state.editing = null; showMessages(); $('question').focus(); };
  const send = button('send', null);
  send.type = 'submit';
  form.onsubmit = (event) => {
    event.preventDefault();
    state.editing = null;
    if (box.value.trim()) question(parent, box.value);
    else showMessages();
  };
  box.onkeydown = (event) => {
    if (event.key === 'Escape') stop();
    submitOnEnter(event, form);
  };
  form.append(box, send, button('cancel', stop));
  return form;
}

// ---- questions and answers

function question(parent, text) {
  answer(talk.add(parent, talk.message('user', text)));
}

// What the model is shown of the messages.
function sent({ role, content, calls, call }) {
  if (role === 'tool') return { role, content, tool_call_id: call };
  return { role, content, ...(calls ? { tool_calls: calls } : {}) };
}

// Asks for a new answer to `asked`, beside those it may have. If the answer calls tools, it gets their results and is
// asked again.
async function answer(asked) {
  if (state.running) return;
  notice();
  const root = state.open;
  const running = { message: null, controller: new AbortController() };
  state.running = running;
  keep(root);
  showList();
  showMessages();
  try {
    const demo = settings.tools === 'demo' ? await demoTools(apiKey(), running.controller.signal) : null;
    for (let round = 1; ; round++) {
      const message = await reply(root, asked, running, demo?.tools);
      if (!message.calls || message.ending !== 'tool_calls') break;
      if (round > demo.rounds) {
        message.error = word('rounds');
        break;
      }
      asked = message;
      for (const { id, function: called } of message.calls) {
        const result = await callTool(called, apiKey(), running.controller.signal);
        asked = talk.add(asked, talk.message('tool', result, { call: id }));
      }
    }
  } catch (error) {
    if (error.name !== 'AbortError') notice(explain(error));
    if (error.status === 401) openSettings(true);
  }
  state.running = null;
  keep(root);
  showMessages();
}

// Streams one message of the model's -> the message, with what became of it.
async function reply(root, asked, running, tools) {
  const said = talk.path(root).map((entry) => entry.message);
  const history = said.slice(0, said.indexOf(asked) + 1).filter((m) => m.content.trim() || m.calls).map(sent);
  const system = root.system ? [{ role: 'system', content: root.system }] : [];
  const model = $('model').value;
  const message = talk.add(asked, talk.message('assistant', '', { model }));
  running.message = message;
  keep(root);
  showMessages();

  const box = $('messages').lastElementChild;
  const draw = () => {
    if (running.message !== message || state.running !== running) return;
    const log = $('messages');
    const atEnd = log.scrollHeight - log.scrollTop - log.clientHeight < 60;
    fill(box, message, asked);
    if (atEnd) log.scrollTop = log.scrollHeight;
  };
  const body = { ...(model ? { model } : {}), messages: [...system, ...history], ...sampling(), ...(tools ? { tools } : {}) };
  if (await answerInto(message, body, apiKey(), running.controller.signal, draw) === 401) openSettings(true);
  return message;
}

// ---- models

async function listModels() {
  try {
    const found = await models(apiKey());
    $('model').replaceChildren(...found.map(({ id, parent }) => element('option', parent ? `${id} (${word('on')} ${parent})` : id, { value: id })));
    if (found.some(({ id }) => id === settings.model)) $('model').value = settings.model;
    notice();
    offerReload($('notice'), found, apiKey, listModels);
  } catch (error) {
    notice(explain(error));
    if (error.status === 401) openSettings(true);
  }
}

// ---- files

function save() {
  download('sparrow-conversations.json', talk.toFile(state.list), 'application/json');
}

async function load(file) {
  try {
    const found = talk.fromFile(await file.text());
    if (!found.length) throw new Error('empty');
    choose(found[0]);
    for (const root of found.reverse()) keep(root); // after choose, which takes the last notice away
    showList();
  } catch {
    notice(`${word('bad_file')}: ${file.name}`);
  }
}

function begin() {
  translate();
  $('new').onclick = () => choose(talk.conversation());
  $('export').onclick = save;
  $('import').onclick = () => $('file').click();
  $('file').onchange = async () => { await load($('file').files[0]); $('file').value = ''; };
  $('menu').onclick = () => $('side').classList.toggle('open');
  $('open').onclick = () => openSettings();
  $('model').onchange = () => set('model', $('model').value);
  $('stop').onclick = () => state.running?.controller.abort();
  $('ask').onsubmit = (event) => {
    event.preventDefault();
    const text = $('question').value;
    if (!text.trim() || state.running) return;
    $('question').value = '';
    fit($('question'));
    state.editing = null;
    question(talk.path(state.open).at(-1)?.message ?? state.open, text);
  };
  $('question').oninput = () => fit($('question'));
  $('question').onkeydown = (event) => {
    submitOnEnter(event, $('ask'));
    const last = talk.path(state.open).filter(({ message }) => message.role === 'user').at(-1);
    if (event.key === 'ArrowUp' && !$('question').value && last && !state.running) {
      event.preventDefault();
      edit(last.message);
    }
  };
  document.addEventListener('keydown', (event) => {
    if (event.key === 'Escape' && !$('settings').open) state.running?.controller.abort();
  });
  showList();
  showMessages();
  listModels();
}

begin();
