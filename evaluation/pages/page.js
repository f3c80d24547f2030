// What all pages use. Text from models and files reaches the page only as text nodes: nothing here reads it as HTML.

const data = JSON.parse(document.getElementById('data').textContent);
let chinese = (navigator.language || '').toLowerCase().startsWith('zh');
const T = (english, inChinese) => (chinese ? inChinese : english);

// el('p', {class: 'dim', style: {'--heat': .5}, on: {click: f}}, 'text', another element, null, ...)
function el(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    if (name === 'on') for (const [event, act] of Object.entries(value)) node.addEventListener(event, act);
    else if (name === 'style') for (const [key, to] of Object.entries(value)) node.style.setProperty(key, to);
    else if (name === 'class') node.className = value;
    else node.setAttribute(name, value === true ? '' : value);
  }
  node.append(...children.flat(Infinity).filter((child) => child !== null && child !== undefined && child !== false));
  return node;
}

const percent = (p) => (p === 0 ? '0%' : p >= 0.9995 ? '100%' : p >= 0.1 ? `${(100 * p).toFixed(0)}%` : p >= 0.001 ? `${(100 * p).toFixed(1)}%` : '<0.1%');
const count = (n) => Number(n).toLocaleString('en-US');
const number = (x, digits = 3) => (x === null || x === undefined ? '–' : String(Number(Number(x).toPrecision(digits))));
const bytes = (n) => (n >= 1e9 ? `${(n / 1e9).toFixed(2)} GB` : n >= 1e6 ? `${(n / 1e6).toFixed(1)} MB` : `${(n / 1e3).toFixed(0)} kB`);

// A panel: a heading, what one sees in it in two sentences, and its content.
function panel(title, text, ...children) {
  return el('section', {}, el('h2', {}, title), el('p', {class: 'explain'}, text), ...children);
}

function table(head, rows, numbers = []) {
  const cell = (tag, value, i) => el(tag, numbers.includes(i) ? {class: 'number'} : {}, value);
  return el('div', {class: 'wide'}, el('table', {},
    el('thead', {}, el('tr', {}, head.map((value, i) => cell('th', value, i)))),
    el('tbody', {}, rows.map((row) => el('tr', {}, row.map((value, i) => cell('td', value, i)))))));
}

function bar(name, share, value, {tint, actual, title} = {}) {
  return el('div', {class: actual ? 'bar actual' : 'bar', title},
    el('span', {class: 'name'}, name),
    el('span', {class: 'track'}, el('span', {class: 'fill', style: {display: 'block', '--share': Math.min(1, Math.max(0, share || 0)), ...(tint ? {'--tint': tint} : {})}})),
    el('span', {class: 'value'}, value));
}

// A file that the reader saves: made here, sent nowhere.
function download(name, content) {
  const link = el('a', {href: URL.createObjectURL(new Blob([JSON.stringify(content, null, 1)], {type: 'application/json'})), download: name});
  document.body.append(link);
  link.click();
  link.remove();
}

// What is known of how weights came about: scripts/lineage.py
function lineage(stages) {
  if (!stages.length) return el('p', {class: 'dim'}, T('No stages are recorded in the file.', '文件里没有训练阶段的记录。'));
  return el('ol', {class: 'small'}, stages.map((entry) => el('li', {}, el('b', {}, entry.stage), `: ${entry.facts.join(', ')}`)));
}

// Draws the page now, and again when the language or the colour scheme changes.
function start(draw) {
  const page = document.getElementById('page');
  const again = () => {
    document.documentElement.lang = chinese ? 'zh' : 'en';
    const other = el('button', {class: 'small', style: {float: 'right'}, on: {click: () => { chinese = !chinese; again(); }}}, T('中文', 'English'));
    page.replaceChildren(other, ...draw());
  };
  again();
  matchMedia('(prefers-color-scheme: dark)').addEventListener('change', again);
}
