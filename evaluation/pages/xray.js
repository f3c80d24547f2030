// The page of scripts/xray.py. evaluation/xray.py says what the data is.

const ids = data.ids;
const last = ids.length - 1;
let at = Math.max(0, data.prompt_tokens - 1); // the position that all panels show
let head = [Math.min(data.attention.layers - 1, Math.floor(data.attention.layers / 2)), 0];
const follow = []; // what has to be drawn anew when `at` or `head` changes

const text = (id) => data.vocabulary[id] ?? `#${id}`;
const shown = (id) => text(id).replaceAll('\n', '⏎').replaceAll('\t', '⇥').replaceAll(' ', '␣') || '∅';
const isControl = (id) => /^<[|/]?\w.*>$/.test(text(id));

// A panel's content that depends on the position: `draw` gives its children.
function live(attributes, draw) {
  const node = el('div', attributes);
  const again = () => node.replaceChildren(...[draw()].flat(Infinity).filter(Boolean));
  follow.push(again);
  again();
  return node;
}

function go(position) {
  at = Math.max(0, Math.min(last, position));
  follow.forEach((again) => again());
}

// A strip of tokens. heat(i), 0 to 1, colours token i; chosen tokens can be clicked and reached with the arrow keys.
function strip(heat, {tint, under = () => null, title = () => null, over = null} = {}) {
  return live({class: 'tokens', role: 'listbox', 'aria-label': T('tokens', '词元')}, () => ids.map((id, i) => el('span', {
    class: ['token', isControl(id) && 'control', i >= data.prompt_tokens && 'said', i === at && 'chosen'].filter(Boolean).join(' '),
    role: 'option', 'aria-selected': i === at ? 'true' : 'false', title: title(i),
    style: {'--heat': Math.min(1, heat(i) || 0), ...(tint ? {'--tint': tint} : {})},
    on: {click: () => go(i), ...(over ? {mouseenter: () => over(i)} : {})},
  }, shown(id), under(i) === null ? null : el('i', {}, under(i)))));
}

function tokensPanel() {
  const surprise = (i) => (i === 0 ? 0 : data.next.surprise[i - 1] / 12);
  return el('section', {class: 'sticky'},
    el('h2', {}, T('Tokens', '词元')),
    el('p', {class: 'explain'}, T(
      `The model reads ${ids.length} pieces, each with its number. The warmer a token, the more it surprised the model; green underlines are what the model wrote itself. Click one, or use ← and →.`,
      `模型读到的是 ${ids.length} 个词元，下面是它们的编号。颜色越暖，模型越意外；绿色下划线的是模型自己写的。点一个，或用 ← → 移动。`)),
    strip(surprise, {tint: 'var(--warm)', under: (i) => ids[i],
      title: (i) => (i ? `${number(data.next.surprise[i - 1])} bits, ${T('rank', '名次')} ${count(data.next.rank[i - 1])}` : null)}));
}

function guesses(next) {
  const actual = ids[at + 1];
  const rows = next.top[at].map(([id, p]) => bar(shown(id), p, percent(p), {actual: id === actual, title: `${text(id)} (${id})`}));
  if (actual !== undefined && !next.top[at].some(([id]) => id === actual)) {
    rows.push(bar(shown(actual), next.probability[at], percent(next.probability[at]), {actual: true}));
  }
  const after = actual === undefined ? '' : T(
    ` What follows is “${shown(actual)}”, number ${count(next.rank[at])} of its guesses (${number(next.surprise[at])} bits).`,
    ` 实际的下一个是“${shown(actual)}”，排第 ${count(next.rank[at])}（${number(next.surprise[at])} 比特）。`);
  return [rows, el('p', {class: 'small dim'}, T(
    `Uncertainty: ${number(next.entropy[at])} bits, as if it chose among ${number(2 ** next.entropy[at])} equally likely tokens.`,
    `不确定性：${number(next.entropy[at])} 比特，相当于在 ${number(2 ** next.entropy[at])} 个同样可能的词元里选。`) + after)];
}

function nextPanel() {
  return panel(T('The next token', '下一个词元'), T(
    'At every position the model gives each token of its vocabulary a probability of coming next. These are the likeliest after the chosen token; the one that really follows is bold.',
    '在每个位置上，模型给词表里的每个词元一个“接下来是它”的概率。这里是所选词元之后最可能的几个，真正出现的那个是粗体。'),
  live({}, () => [
    el('h3', {}, `… ${ids.slice(Math.max(0, at - 7), at + 1).map(shown).join('')} →`),
    data.lora ? el('div', {class: 'columns'},
      el('div', {}, el('h3', {}, T('with the adapter', '带适配器')), guesses(data.next)),
      el('div', {}, el('h3', {}, T('without it', '不带适配器')), guesses(data.lora.without))) : el('div', {}, guesses(data.next)),
  ]));
}

function lensPanel() {
  const table = el('table', {class: 'lens'});
  const rows = data.lens.map((layer, l) => {
    const cells = layer.map((top, i) => el('td', {
      class: top[0][0] === ids[i + 1] ? 'right' : null, style: {'--heat': top[0][1]},
      title: top.map(([id, p]) => `${text(id)} ${percent(p)}`).join('\n'), on: {click: () => go(i)},
    }, shown(top[0][0])));
    table.append(el('tr', {}, el('th', {}, l === 0 ? T('embedding', '嵌入') : T(`layer ${l}`, `第 ${l} 层`)), cells));
    return cells;
  });
  table.prepend(el('tr', {}, el('th', {}, T('read', '读到')), ids.map((id, i) => el('th', {on: {click: () => go(i)}}, shown(id)))));
  const box = el('div', {class: 'wide'}, table);
  let before = null;
  const again = () => {
    for (const cells of rows) {
      if (before !== null) cells[before].classList.remove('chosen');
      cells[at].classList.add('chosen');
    }
    before = at;
    const cell = rows[0][at];
    if (box.clientWidth) box.scrollLeft = cell.offsetLeft - box.clientWidth / 2;
  };
  follow.push(again);
  again();
  return panel(T('Logit lens: the guess after each layer', 'Logit lens：每一层之后的猜测'), T(
    'If the model had to answer after this layer, it would say this; the stronger the colour, the surer it is. Read a column downwards to see where the answer is made; green marks a guess that comes true.',
    '如果模型在这一层之后就要回答，它会这么说；颜色越深越有把握。从上往下看一列，就能看到答案在哪一层形成；绿线表示猜对了。'), box);
}

const packed = Uint8Array.from(atob(data.attention.data), (c) => c.charCodeAt(0));
const triangle = (ids.length * (ids.length + 1)) / 2;
const weight = (l, h, q, k) => (k > q ? 0 : (packed[(l * data.attention.heads + h) * triangle + (q * (q + 1)) / 2 + k] / 255) ** 2);

function colour(name) {
  const probe = el('span', {style: {color: `var(${name})`}});
  document.body.append(probe);
  const found = getComputedStyle(probe).color.match(/\d+(\.\d+)?/g).map(Number);
  probe.remove();
  return found;
}

function paint(canvas, l, h) {
  const n = ids.length;
  canvas.width = canvas.height = n;
  const [r, g, b] = colour('--accent');
  const image = new ImageData(n, n);
  for (let q = 0; q < n; q++) {
    for (let k = 0; k <= q; k++) {
      image.data.set([r, g, b, 255 * Math.sqrt(weight(l, h, q, k))], 4 * (q * n + k));
    }
  }
  canvas.getContext('2d').putImageData(image, 0, 0);
  return canvas;
}

function attentionPanel() {
  const {layers, heads} = data.attention;
  const buttons = [];
  const choose = (l, h) => {
    head = [l, h];
    follow.forEach((again) => again());
  };
  const grid = el('div', {class: 'heads', style: {'grid-template-columns': `auto repeat(${heads}, auto)`}});
  grid.append(el('span', {class: 'label'}), ...Array.from({length: heads}, (_, h) => el('span', {class: 'label', style: {'text-align': 'center'}}, `${T('head', '头')} ${h + 1}`)));
  for (let l = 0; l < layers; l++) {
    grid.append(el('span', {class: 'label'}, T(`layer ${l + 1}`, `第 ${l + 1} 层`)));
    for (let h = 0; h < heads; h++) {
      const button = el('button', {'aria-label': T(`layer ${l + 1}, head ${h + 1}`, `第 ${l + 1} 层第 ${h + 1} 头`), on: {mouseenter: () => choose(l, h), focus: () => choose(l, h), click: () => choose(l, h)}}, paint(el('canvas', {class: 'thumb'}), l, h));
      buttons.push([l, h, button]);
      grid.append(button);
    }
  }
  follow.push(() => buttons.forEach(([l, h, button]) => button.classList.toggle('chosen', l === head[0] && h === head[1])));
  const large = el('canvas', {class: 'large'});
  follow.push(() => paint(large, ...head));
  large.addEventListener('mousemove', (event) => go(Math.floor((event.offsetY / large.clientHeight) * ids.length)));
  paint(large, ...head);
  return panel(T('Attention: whom each token looks at', '注意力：每个词元在看谁'), T(
    'Every head of every layer decides, for each token (a row), how much it takes over from the tokens before it (the columns). Hover or focus a head; the coloured tokens below are what the chosen token looks at.',
    '每一层的每个头都为每个词元（一行）决定从前面的词元（各列）取多少。把鼠标移到一个头上，或用 Tab 选中；下面有颜色的词元就是所选词元在看的。'),
  el('div', {class: 'columns'}, el('div', {class: 'wide'}, grid), el('div', {}, large)),
  live({}, () => el('h3', {}, T(
    `layer ${head[0] + 1}, head ${head[1] + 1}: “${shown(ids[at])}” looks at`, `第 ${head[0] + 1} 层第 ${head[1] + 1} 头：“${shown(ids[at])}”在看`))),
  strip((i) => weight(...head, at, i), {under: (i) => (i <= at && weight(...head, at, i) >= 0.01 ? percent(weight(...head, at, i)) : '')}));
}

function normsPanel() {
  const {stream, attention, mlp} = data.norms;
  return panel(T('The residual stream', '残差流'), T(
    'Each layer adds something to a running sum, the residual stream; the bars are the lengths of these vectors at the chosen token. A layer whose additions are short beside the stream hardly changes the prediction.',
    '每一层都往一个累加的向量（残差流）里加东西，条形是所选词元处这些向量的长度。加上去的很短，说明这一层几乎不改变预测。'),
  live({class: 'columns'}, () => {
    const most = Math.max(...stream.map((layer) => layer[at]));
    const added = Math.max(...attention.map((layer) => layer[at]), ...mlp.map((layer) => layer[at]));
    const layer = (l) => T(`layer ${l}`, `第 ${l} 层`);
    return [
      el('div', {}, el('h3', {}, T('the stream', '残差流')), stream.map((values, l) => bar(l ? layer(l) : T('embedding', '嵌入'), values[at] / most, number(values[at])))),
      el('div', {}, el('h3', {}, T('added by attention and by the feed-forward', '注意力与前馈各加了多少')), attention.map((values, l) => [
        bar(`${layer(l + 1)} ${T('attn', '注意力')}`, values[at] / added, number(values[at]), {tint: 'var(--good)'}),
        bar(`${layer(l + 1)} ${T('mlp', '前馈')}`, mlp[l][at] / added, number(mlp[l][at]), {tint: 'var(--warm)'})])),
    ];
  }));
}

function expertsPanel() {
  if (!data.experts.length) return null;
  const total = data.experts.length * data.experts[0].counts.length;
  const dead = data.experts.reduce((sum, layer) => sum + layer.counts.filter((n) => n === 0).length, 0);
  return panel(T('Experts: who computes what', '专家：谁在算'), T(
    'In each layer a router sends every token to a few experts; the numbers say how many tokens of this text each expert got, and the outlined ones got the chosen token. An expert that no token reaches (dashed) learns nothing and is dead weight.',
    '每一层的路由器把每个词元送给几个专家；数字是这段文字里有多少词元到了这个专家，加框的是所选词元去的。没有词元到达的专家（虚线）学不到东西，等于白占地方。'),
  el('p', {class: dead ? 'bad' : 'good'}, dead
    ? T(`${dead} of ${total} experts got no token of this text.`, `${total} 个专家里有 ${dead} 个没有得到这段文字的任何词元。`)
    : T(`All ${total} experts got tokens.`, `${total} 个专家都得到了词元。`)),
  live({class: 'wide'}, () => el('div', {class: 'cells', style: {'grid-template-columns': `auto repeat(${data.experts[0].counts.length}, minmax(3.4em, 1fr))`, 'max-width': '700px'}},
    data.experts.map((layer) => {
      const sum = layer.counts.reduce((a, b) => a + b, 0);
      return [el('span', {class: 'cell head'}, T(`layer ${layer.layer + 1}`, `第 ${layer.layer + 1} 层`)), ...layer.counts.map((n, e) => {
        const place = layer.chosen[at].indexOf(e);
        return el('span', {class: ['cell', n === 0 && 'dead', place >= 0 && 'chosen'].filter(Boolean).join(' '), style: {'--heat': n / sum}, title: T(`expert ${e + 1}, mean probability ${percent(layer.mean[e])}`, `专家 ${e + 1}，平均概率 ${percent(layer.mean[e])}`)},
          n === 0 ? T('dead', '空闲') : count(n), place >= 0 ? ` · ${percent(layer.weights[at][place])}` : null);
      })];
    }))));
}

function loraPanel() {
  if (!data.lora) return null;
  const {weights, divergence, moved} = data.lora;
  const names = Object.keys(weights);
  const kinds = [...new Set(names.map((name) => name.split('.').pop()))];
  const layers = [...new Set(names.map((name) => Number((name.match(/layers\.(\d+)/) || [0, 0])[1])))];
  const most = Math.max(...names.map((name) => weights[name].ratio)) || 1;
  const find = (layer, kind) => names.find((name) => name.includes(`layers.${layer}.`) && name.endsWith(`.${kind}`));
  const top = Math.max(...divergence) || 1;
  return panel(T('What the adapter (LoRA) changed', '适配器（LoRA）改了什么'), T(
    'For each adapted matrix: the length of the change B·A in per cent of the length of W; a change far above the others is where the new behaviour sits. Below, the tokens after which the prediction moved most, in bits, compared with the model without the adapter.',
    '每个被适配的矩阵：改变量 B·A 的长度占 W 长度的百分之几；明显比别处大的地方，就是新行为所在。下面的颜色表示在哪些词元之后预测变得最多（比特，与不带适配器相比）。'),
  el('div', {class: 'wide'}, el('div', {class: 'cells', style: {'grid-template-columns': `auto repeat(${kinds.length}, minmax(4.6em, 1fr))`}},
    el('span', {class: 'cell head'}), ...kinds.map((kind) => el('span', {class: 'cell head'}, kind)),
    layers.map((layer) => [el('span', {class: 'cell head'}, T(`layer ${layer + 1}`, `第 ${layer + 1} 层`)), ...kinds.map((kind) => {
      const name = find(layer, kind);
      if (!name) return el('span', {class: 'cell head'}, '–');
      const {change, weight: size, ratio, rank} = weights[name];
      return el('span', {class: 'cell', style: {'--heat': ratio / most}, title: `${name}: |BA| ${number(change)}, |W| ${number(size)}, ${T('directions used', '用到的方向数')} ${number(rank, 2)}`}, `${number(100 * ratio, 2)}%`);
    })]))),
  el('h3', {}, T('how far the prediction moved after each token', '每个词元之后预测变化多少')),
  strip((i) => divergence[i] / top, {tint: 'var(--warm)', under: (i) => number(divergence[i], 2)}),
  live({}, () => el('p', {class: 'small dim'}, T(
    `At the chosen token the adapter has moved the last layer's vector by ${percent(moved[moved.length - 1][at])} of its length.`,
    `在所选词元处，适配器把最后一层的向量移动了其长度的 ${percent(moved[moved.length - 1][at])}。`))));
}

function draw() {
  follow.length = 0;
  requestAnimationFrame(() => go(at)); // once it is on the page: the lens scrolls to its column
  const m = data.model;
  return [
    el('h1', {}, T(`Inside ${m.name}`, `${m.name} 的内部`)),
    el('p', {class: 'dim'}, [
      `${(m.parameters / 1e6).toFixed(1)}M ${T('parameters', '参数')}`, T(`${m.layers} layers of ${m.hidden_size}`, `${m.layers} 层，宽 ${m.hidden_size}`),
      T(`${m.heads} heads`, `${m.heads} 个头`), m.experts ? T(`${m.experts} experts`, `${m.experts} 个专家`) : null,
      m.base ? T(`adapter on ${m.base}`, `适配器，底座 ${m.base}`) : null].filter(Boolean).join(' · ')),
    tokensPanel(), nextPanel(), lensPanel(), attentionPanel(), normsPanel(), expertsPanel(), loraPanel(),
    panel(T('Where these weights come from', '这些权重的来历'), T('The stages of training, as the file itself records them. scripts/lineage.py shows the data, the parents and the commands.', '文件自己记下的训练阶段。scripts/lineage.py 会列出数据、父权重和命令。'), lineage(data.stages)),
  ].filter(Boolean);
}

document.addEventListener('keydown', (event) => {
  if (event.altKey || event.ctrlKey || event.metaKey) return;
  if (event.key === 'ArrowLeft') go(at - 1);
  else if (event.key === 'ArrowRight') go(at + 1);
  else return;
  event.preventDefault();
});
start(draw);
