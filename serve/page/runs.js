// The page of the runs: which there are, which is training, and their curves over each other.

import { explain, run, runs } from './api.js';
import { chart, short, smoothed } from './chart.js';
import { element } from './markdown.js';
import { apiKey, set, settings, settingsDialog } from './settings.js';
import { translate, word } from './words.js';

const $ = (id) => document.getElementById(id);
const SECONDS = 3; // between two looks at what is new
const MAIN = ['loss', 'val_loss', 'lr', 'tokens_per_second']; // figures with a chart of their own
const NEVER = ['tokens', 'seconds']; // grow by themselves

const state = {
  list: [],
  chosen: null, // the names that are drawn; a place is a colour, and null a free one. Before anybody chose: null
  data: new Map(), // name -> what the server has read of the run
  versions: new Map(), // name -> of which length of the log that is
  busy: false,
};
const openSettings = settingsDialog({ onKey: look });

// ---- what the server knows

async function look() {
  if (state.busy) return;
  state.busy = true;
  try {
    state.list = await runs(apiKey());
    state.chosen ??= first(state.list);
    showList();
    let changed = false;
    for (const { name, version } of state.list.filter((one) => state.chosen.includes(one.name))) {
      while (state.versions.get(name) !== version && state.chosen.includes(name)) {
        const found = await run(name, apiKey());
        state.data.set(name, found);
        if (!found.more) state.versions.set(name, version);
        changed = true;
        if (found.more) showCharts(); // a long log comes piece by piece
      }
    }
    if (changed) showCharts();
    notice(state.list.length ? '' : word('no_runs'));
  } catch (error) {
    notice(explain(error));
    if (error.status === 401 && !$('settings').open) openSettings(true);
  }
  state.busy = false;
}

// What is training now; where nothing is, the newest.
function first(list) {
  const training = list.filter(({ state: now }) => now === 'training');
  return (training.length ? training : list.slice(0, 1)).slice(0, 8).map(({ name }) => name);
}

function notice(text) {
  $('notice').textContent = text;
  $('notice').hidden = !text;
}

// ---- the list

function ago(seconds) {
  const [size, unit] = [[86400, 'day'], [3600, 'hour'], [60, 'minute'], [1, 'second']].find(([one]) => seconds >= one) ?? [1, 'second'];
  return `${Math.floor(seconds / size)} ${word(unit)}`;
}

function clock(seconds) {
  const parts = [Math.floor(seconds / 3600), Math.floor(seconds / 60) % 60, Math.floor(seconds) % 60];
  return parts.map((part, i) => (i ? String(part).padStart(2, '0') : part)).join(':');
}

function progress({ state: now, last, total_steps: total }) {
  const parts = [`${word('step')} ${(last.step ?? 0).toLocaleString('en')}${total ? `/${total.toLocaleString('en')}` : ''}`];
  if (now === 'training' && total && last.step && last.seconds) parts.push(`${word('remaining')} ${clock((last.seconds / last.step) * (total - last.step))}`);
  return parts.join(' · ');
}

function showList() {
  const words = { training: 'training', done: 'finished', stopped: 'ended' };
  const focused = document.activeElement?.dataset?.run;
  $('runs').tBodies[0].replaceChildren(...state.list.map((one) => {
    const at = state.chosen.indexOf(one.name);
    const row = element('tr', '', { className: one.state });
    const box = element('input', '', { type: 'checkbox', checked: at >= 0, onchange: () => choose(one.name) });
    box.dataset.run = one.name;
    const name = element('label', '', { className: at >= 0 ? `c${at % 8}` : '' });
    name.append(box, element('i', ''), element('span', one.name));
    const figures = [
      one.last.loss !== undefined && `${word('loss')} ${short(one.last.loss)}`,
      one.last.val_loss !== undefined && `${word('validation')} ${short(one.last.val_loss)}`,
      one.last.tokens_per_second !== undefined && `${short(one.last.tokens_per_second)} ${word('per_second')}`,
    ].filter(Boolean).join(' · ');
    const bar = element('progress', '', { max: one.total_steps || 1, value: one.last.step ?? 0, hidden: !one.total_steps });
    bar.setAttribute('aria-hidden', 'true');
    const cells = [name, element('span', word(words[one.state]), { className: 'badge' }), progress(one), figures, ago(one.ago)].map((content) => {
      const cell = element('td');
      cell.append(content);
      return cell;
    });
    cells[2].append(bar);
    row.append(...cells);
    return row;
  }));
  if (focused) document.querySelector(`[data-run="${CSS.escape(focused)}"]`)?.focus();
}

function choose(name) {
  const at = state.chosen.indexOf(name);
  const free = state.chosen.indexOf(null);
  if (at >= 0) state.chosen[at] = null;
  else state.chosen[free < 0 ? state.chosen.length : free] = name;
  showList();
  showCharts();
  look();
}

// ---- the charts

function curves(names, figure, { dots = false, plain = false, label } = {}) {
  return names.flatMap((name, colour) => {
    const points = state.data.get(name)?.series[figure];
    if (!points) return [];
    const curve = { name, label, colour, points, dots };
    const smooth = settings.smooth !== false && !dots && !plain && points.length > 30;
    return smooth ? [{ ...curve, faint: true }, { ...curve, points: smoothed(points) }] : [curve];
  });
}

function showCharts() {
  const names = state.chosen;
  const known = names.filter((name) => state.data.has(name));
  const inside = $('page').clientWidth - 2 * parseFloat(getComputedStyle($('page')).paddingLeft);
  const size = (columns) => ({ width: Math.max(240, Math.floor((inside - (columns - 1) * 16) / columns) - 28), stepWord: word('step') });
  const two = $('page').clientWidth > 900 ? 2 : 1;
  const loss = [...curves(names, 'loss'), ...curves(names, 'val_loss', { dots: true, label: word('validation') })];
  const log = settings.logarithmic === true;
  $('charts').replaceChildren(...(known.length ? [
    chart(word('loss'), loss, { ...size(1), height: 320, logarithmic: log }),
    chart(word('lr'), curves(names, 'lr', { plain: true }), size(two)),
    chart(word('tokens_per_second'), curves(names, 'tokens_per_second'), size(two)),
  ] : [element('p', word(names.some(Boolean) ? 'reading' : 'pick_runs'), { className: 'hint' })]));

  const others = new Set(known.flatMap((name) => Object.keys(state.data.get(name).series)));
  const left = [...others].filter((figure) => !MAIN.includes(figure) && !NEVER.includes(figure)).sort();
  $('more').hidden = !left.length;
  $('others').replaceChildren(...left.map((figure) => chart(figure, curves(names, figure, { dots: figure.startsWith('val_') }), size(two))));
  showDifferences(known);
}

function showDifferences(names) {
  const all = names.map((name) => state.data.get(name).settings);
  const keys = [...new Set(all.flatMap(Object.keys))].filter((key) => new Set(all.map((one) => one[key] ?? '')).size > 1);
  $('differences').hidden = !keys.length;
  const row = (kind, cells) => {
    const made = element('tr');
    made.append(...cells.map((text) => element(kind, text)));
    return made;
  };
  $('differences').querySelector('table').replaceChildren(row('th', ['', ...names]), ...keys.map((key) => row('td', [key, ...all.map((one) => one[key] ?? '')])));
}

// ---- begin

translate();
for (const [name, usual] of [['smooth', true], ['logarithmic', false]]) {
  $(name).checked = settings[name] ?? usual;
  $(name).onchange = () => { set(name, $(name).checked); showCharts(); };
}
$('open').onclick = () => openSettings();
addEventListener('resize', showCharts);
$('more').ontoggle = showCharts;
document.addEventListener('visibilitychange', () => { if (!document.hidden) look(); });
setInterval(() => { if (!document.hidden) look(); }, SECONDS * 1000);
look();
