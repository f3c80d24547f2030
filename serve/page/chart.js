// A chart of several curves over the steps of training, as SVG. The numbers under the pointer, or under the cursor that
// the arrow keys move, are shown above it.

import { element, visible } from './markdown.js';

const NS = 'http://www.w3.org/2000/svg';
const LEFT = 52;
const RIGHT = 8;
const TOP = 6;
const BOTTOM = 22;

function svg(name, attributes = {}, text = '') {
  const made = document.createElementNS(NS, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.textContent = visible(text);
  return made;
}

export function short(x) {
  if (!Number.isFinite(x)) return '';
  const size = Math.abs(x);
  if (size >= 1e6) return `${Number((x / 1e6).toPrecision(3))}M`;
  if (size >= 1e4) return `${Number((x / 1e3).toPrecision(3))}k`;
  return size && size < 1e-3 ? x.toExponential(1).replace('.0e', 'e') : String(Number(x.toPrecision(4)));
}

// Round numbers between two: 1, 2 or 5 times a power of ten apart.
export function ticks(low, high, wanted) {
  const rough = (high - low) / wanted || 1;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = power * ([1, 2, 5].find((m) => m * power >= rough) ?? 10);
  const found = [];
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high + step * 1e-9; i++) found.push(i * step);
  return found;
}

// Means over 7 % of the curve, fewer at its ends, as in loss.png.
export function smoothed(points) {
  const reach = Math.floor(points.length / 30);
  const sums = [0];
  for (const [, mean] of points) sums.push(sums.at(-1) + mean);
  return points.map(([step, , low, high], i) => {
    const from = Math.max(0, i - reach);
    const to = Math.min(points.length, i + reach + 1);
    return [step, (sums[to] - sums[from]) / (to - from), low, high];
  });
}

// curves: [{name, label, colour: 0.., points: [[step, mean, least, most]], dots, faint}]. Those of one colour share a line
// of the legend, and a label tells them apart. dots: the points are drawn too. faint: drawn thin, without a number.
export function chart(title, curves, { width, height = 230, logarithmic = false, stepWord = 'step' }) {
  const box = element('figure', '', { className: 'chart' });
  const head = element('figcaption');
  const heading = head.appendChild(element('b', title));
  const legend = head.appendChild(element('span', '', { className: 'values' }));
  const drawing = svg('svg', { width, height, viewBox: `0 0 ${width} ${height}`, tabindex: 0, role: 'img' });
  box.append(head, drawing);

  const bent = (y) => (logarithmic ? Math.log10(y) : y);
  const shown = curves.map((curve) => ({ ...curve, points: curve.points.filter(([, y]) => !logarithmic || y > 0) })).filter((curve) => curve.points.length);
  const steps = shown.flatMap(({ points }) => [points[0][0], points.at(-1)[0]]);
  const values = shown.flatMap(({ points }) => points.map(([, y]) => bent(y)));
  if (!values.length) return box;
  const least = (list) => list.reduce((a, b) => Math.min(a, b));
  const most = (list) => list.reduce((a, b) => Math.max(a, b));
  const [x0, x1] = [least(steps), Math.max(most(steps), least(steps) + 1)];
  let [y0, y1] = [least(values), most(values)];
  const air = (y1 - y0) * 0.05 || Math.abs(y1) * 0.05 || 1;
  [y0, y1] = [y0 - air, y1 + air];
  const x = (step) => LEFT + ((step - x0) / (x1 - x0)) * (width - LEFT - RIGHT);
  const y = (value) => TOP + ((y1 - bent(value)) / (y1 - y0)) * (height - TOP - BOTTOM);

  const grid = logarithmic && y1 - y0 > 1
    ? ticks(Math.floor(y0), Math.ceil(y1), 6).filter((t) => t >= y0 && t <= y1).map((t) => 10 ** t)
    : ticks(logarithmic ? 10 ** y0 : y0, logarithmic ? 10 ** y1 : y1, 6).filter((t) => !logarithmic || t > 0);
  for (const value of grid) {
    drawing.append(svg('line', { class: 'grid', x1: LEFT, x2: width - RIGHT, y1: y(value), y2: y(value) }));
    drawing.append(svg('text', { x: LEFT - 6, y: y(value) + 4, 'text-anchor': 'end' }, short(value)));
  }
  for (const step of ticks(x0, x1, Math.max(2, width / 130))) {
    const anchor = x(step) > width - 30 ? 'end' : 'middle';
    drawing.append(svg('text', { x: x(step), y: height - 5, 'text-anchor': anchor }, short(step)));
  }
  for (const { colour, points, dots, faint } of shown) {
    const place = ([step, mean]) => `${x(step).toFixed(1)},${y(mean).toFixed(1)}`;
    drawing.append(svg('polyline', { class: `curve c${colour % 8}${faint ? ' faint' : ''}${dots ? ' dashed' : ''}`, points: points.map(place).join(' ') }));
    if (dots || points.length === 1) {
      for (const point of points) drawing.append(svg('circle', { class: `dot c${colour % 8}`, cx: x(point[0]), cy: y(point[1]), r: 2.5 }));
    }
  }
  const cursor = drawing.appendChild(svg('line', { class: 'cursor', y1: TOP, y2: height - BOTTOM, visibility: 'hidden' }));

  const named = shown.filter(({ faint }) => !faint);
  const nearest = (points, step) => points.reduce((a, b) => (Math.abs(b[0] - step) < Math.abs(a[0] - step) ? b : a));
  const write = (at) => {
    const step = at === null ? '' : ` · ${stepWord} ${Math.round(at).toLocaleString('en')}`;
    heading.textContent = visible(title) + step;
    legend.replaceChildren(...[...new Set(named.map(({ colour }) => colour))].map((colour) => {
      const own = named.filter((curve) => curve.colour === colour);
      const numbers = own.map(({ label, points }) => {
        const [, mean] = at === null ? points.at(-1) : nearest(points, at);
        return `${label ?? ''} ${short(mean)}`.trim();
      });
      const entry = element('span', '', { className: `c${colour % 8}` });
      entry.append(element('i', ''), visible(`${own[0].name}: ${numbers.join(' · ')}`));
      return entry;
    }));
    drawing.setAttribute('aria-label', `${heading.textContent}: ${[...legend.children].map((e) => e.textContent).join(', ')}`);
  };
  let at = null;
  const point = (step) => {
    at = step;
    cursor.setAttribute('visibility', step === null ? 'hidden' : 'visible');
    if (step !== null) for (const end of ['x1', 'x2']) cursor.setAttribute(end, x(step));
    write(step);
  };
  write(null);
  drawing.onpointermove = (event) => {
    const share = (event.clientX - drawing.getBoundingClientRect().left - LEFT) / (width - LEFT - RIGHT);
    point(x0 + Math.min(1, Math.max(0, share)) * (x1 - x0));
  };
  drawing.onpointerleave = () => point(null);
  drawing.onkeydown = (event) => {
    const by = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (event.key === 'Escape') point(null);
    if (!by) return;
    event.preventDefault();
    point(Math.min(x1, Math.max(x0, (at ?? x1) + (by * (x1 - x0)) / 50)));
  };
  return box;
}
