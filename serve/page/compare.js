// Two models side by side: both answer each question, left and right at once, and the reader votes.
//
// Each model sees its own answers. Blind, nobody sees which model is left until the vote; the next question then begins
// a new conversation, with the sides drawn anew.

import { answerInto, figures, offerReload, thoughts } from './answers.js';
import { explain, models } from './api.js';
import { download, element, fit, render, submitOnEnter, visible } from './markdown.js';
import { apiKey, sampling, set, settings, settingsDialog } from './settings.js';
import * as votes from './votes.js';
import { translate, word } from './words.js';

const $ = (id) => document.getElementById(id);
const SIDES = ['left', 'right'];

const state = { sides: [], turns: [], blind: false, revealed: false, running: null };
const openSettings = settingsDialog({
  system: { get: () => settings.pair_system ?? '', set: (text) => set('pair_system', text) },
  onKey: listModels,
});

// ---- what is on the page

function begin() {
  state.running?.abort();
  const names = [$('first').value, $('second').value];
  state.blind = $('blind').checked;
  state.sides = state.blind && Math.random() < 0.5 ? names.reverse() : names;
  state.turns = [];
  state.revealed = !state.blind;
  notice(names[0] && names[0] === names[1] ? word('same_model') : '');
  show();
}

function notice(text) {
  $('notice').textContent = visible(text);
  $('notice').hidden = !text;
}

const title = (side) => (state.revealed ? state.sides[side] : word(SIDES[side]));

function show() {
  const parts = state.turns.map((turn) => {
    const row = element('article', '', { className: 'turn' });
    const asked = element('div', '', { className: 'user' });
    asked.append(element('div', turn.question, { className: 'text', dir: 'auto' }));
    row.append(asked);
    const columns = row.appendChild(element('div', '', { className: 'columns' }));
    turn.boxes = turn.answers.map((answer, side) => columns.appendChild(box(turn, answer, side)));
    return row;
  });
  $('messages').replaceChildren(...(parts.length ? parts : [element('p', word('pair_hello'), { className: 'hint' })]));
  $('messages').setAttribute('aria-busy', Boolean(state.running));
  $('messages').lastElementChild.scrollIntoView({ block: 'end' });
  $('stop').hidden = !state.running;
  $('send').hidden = Boolean(state.running);
  $('vote').hidden = !votable();
  showVotes();
}

function box(turn, answer, side) {
  const made = element('section', '', { className: 'assistant side' });
  made.dataset.side = SIDES[side];
  const running = state.running && answer.ending === undefined && !answer.error;
  const head = element('h2', title(side));
  if (turn.vote) head.append(element('span', turn.vote === SIDES[side] ? ' ★' : turn.vote === 'tie' ? ' =' : ''));
  made.append(head);
  if (answer.reasoning) made.append(thoughts(answer, running));
  const text = made.appendChild(element('div', '', { className: 'text', dir: 'auto' }));
  text.append(render(answer.content, word('copy')));
  if (answer.error) made.append(element('p', answer.error, { className: 'error' }));
  const about = figures({ ...answer, model: '' });
  if (!running && state.revealed) made.append(element('p', about, { className: 'figures' })); // speed would tell the model
  made.classList.toggle('running', Boolean(running));
  return made;
}

// ---- questions

async function ask(question) {
  if (state.running) return;
  if (state.blind && state.revealed) begin();
  if (state.sides[0] === state.sides[1]) return notice(word('same_model'));
  notice('');
  const controller = new AbortController();
  const turn = { question, answers: SIDES.map(() => ({ content: '', reasoning: '' })), vote: null };
  state.turns.push(turn);
  state.running = controller;
  show();
  const system = settings.pair_system ? [{ role: 'system', content: settings.pair_system }] : [];
  const turns = [...state.turns];
  const statuses = await Promise.all(turn.answers.map((answer, side) => {
    const history = turns.flatMap((one) => {
      const said = one === turn ? [] : [{ role: 'assistant', content: one.answers[side].content }];
      return [{ role: 'user', content: one.question }, ...said];
    });
    const messages = [...system, ...history.filter(({ content }) => content.trim())];
    const draw = () => {
      if (state.running !== controller) return;
      const fresh = box(turn, answer, side);
      turn.boxes[side].replaceWith(fresh);
      turn.boxes[side] = fresh;
    };
    const done = answerInto(answer, { model: state.sides[side], messages, ...sampling() }, apiKey(), controller.signal, draw);
    return done.finally(draw);
  }));
  if (state.running !== controller) return;
  state.running = null;
  show();
  if (statuses.includes(401)) openSettings(true);
  if (votable() && !$('question').value) $('vote').focus();
}

// ---- votes

function votable() {
  const turn = state.turns.at(-1);
  return Boolean(turn) && !state.running && !turn.vote && turn.answers.every((answer) => answer.content.trim() && !answer.error);
}

function vote(choice) {
  if (!votable()) return;
  const turns = state.turns.map(({ question, answers }) => ({ question, answers: answers.map(({ content }) => content) }));
  const [left, right] = state.sides;
  try {
    votes.keep({ blind: state.blind && !state.revealed, left, right, choice, system: settings.pair_system ?? '', turns });
  } catch {
    return notice(word('full'));
  }
  state.turns.at(-1).vote = choice;
  state.revealed = true;
  show();
  $('question').focus();
}

function showVotes() {
  const all = votes.saved();
  $('votes').hidden = !all.length;
  $('votes').querySelector('summary').textContent = `${word('votes')} (${all.length})`;
  const row = (kind, cells) => {
    const made = element('tr');
    made.append(...cells.map((text) => element(kind, String(text))));
    return made;
  };
  const rows = votes.tally(all).map(({ a, b, wins_a: winsA, wins_b: winsB, ties, blind }) => row('td', [`${a} : ${b}`, `${winsA} : ${winsB}`, ties, blind]));
  $('votes').querySelector('table').replaceChildren(row('th', [word('models'), word('preferred'), word('ties'), word('of_these_blind')]), ...rows);
}

// ---- begin

async function listModels() {
  try {
    const found = await models(apiKey());
    for (const [at, id] of ['first', 'second'].entries()) {
      $(id).replaceChildren(...found.map(({ id: name }) => element('option', name, { value: name })));
      const kept = settings[`pair_${id}`];
      if (found.length) $(id).value = found.some((one) => one.id === kept) ? kept : found[Math.min(at, found.length - 1)].id;
    }
    begin();
    if (found.length < 2) notice(word('two_models'));
    offerReload($('notice'), found, apiKey, listModels);
  } catch (error) {
    notice(explain(error));
    if (error.status === 401) openSettings(true);
  }
}

translate();
$('blind').checked = settings.blind ?? true;
for (const id of ['first', 'second']) $(id).onchange = () => { set(`pair_${id}`, $(id).value); begin(); };
$('blind').onchange = () => { set('blind', $('blind').checked); begin(); };
$('open').onclick = () => openSettings();
$('new').onclick = () => { begin(); $('question').focus(); };
$('stop').onclick = () => state.running?.abort();
for (const button of $('vote').children) button.onclick = () => vote(button.dataset.choice);
$('save').onclick = () => download('votes.json', votes.toFile(votes.saved()), 'application/json');
$('pairs').onclick = () => download('pairs.jsonl', votes.toPairs(votes.saved()), 'application/jsonl');
$('forget').onclick = () => { if (confirm(word('sure_votes'))) { votes.forget(); show(); } };
$('ask').onsubmit = (event) => {
  event.preventDefault();
  const text = $('question').value;
  if (!text.trim() || state.running) return;
  $('question').value = '';
  fit($('question'));
  ask(text);
};
$('question').oninput = () => fit($('question'));
$('question').onkeydown = (event) => submitOnEnter(event, $('ask'));
document.addEventListener('keydown', (event) => {
  if ($('settings').open || event.ctrlKey || event.altKey || event.metaKey) return;
  if (event.key === 'Escape') state.running?.abort();
  const choice = { 1: 'left', ArrowLeft: 'left', 2: 'right', ArrowRight: 'right', '=': 'tie', ArrowDown: 'tie' }[event.key];
  if (choice && !event.target.closest('textarea, input, select')) {
    event.preventDefault();
    vote(choice);
  }
});
show();
listModels();
