// The page of scripts/compare_models.py. evaluation/compare.py says what the data is.

const names = data.models.map((model) => model.name);
const first = 0; // the model that the others are compared with
let view = 'text'; // 'text', or the number of the model that reads: its surprise colours the words
let kind = '';
let voting = null; // {items, at, votes} while somebody votes

// ---- the answers

function split(answer, reference) { // [what both begin with, the word in which they begin to differ, the rest]
  const a = [...answer], b = [...reference];
  let same = 0;
  while (same < a.length && same < b.length && a[same] === b[same]) same++;
  if (same === a.length && same === b.length) return [answer, '', ''];
  let end = same;
  while (end < a.length && end - same < 12 && !/\s/.test(a[end])) end++;
  return [a.slice(0, same).join(''), a.slice(same, Math.max(end, Math.min(same + 1, a.length))).join(''), a.slice(Math.max(end, same + 1)).join('')];
}

function said(question, m) {
  const answer = question.answers[m];
  if (view !== 'text') {
    const reading = question.read[view][m];
    return el('div', {class: 'text'}, reading.pieces.map((piece, i) => el('span', {class: 'word', style: {'--heat': Math.min(1, reading.bits[i] / 12)}, title: `${number(reading.bits[i])} ${T('bits', '比特')}`}, piece)));
  }
  const other = question.answers[m === first ? (names.length > 1 ? 1 : 0) : first].text;
  const [same, differs, rest] = split(answer.text, other);
  if (!answer.text) return el('div', {class: 'text dim'}, T('(nothing)', '（空）'));
  return el('div', {class: 'text'}, same, differs && el('span', {class: 'differs', title: T('here the answers begin to differ', '从这里开始不同')}, differs), rest);
}

const total = (reading) => reading.bits.reduce((a, b) => a + b, 0);

function questionCard(question, q) {
  return el('section', {},
    el('p', {class: 'question'}, `${q + 1}. ${question.prompt}`),
    el('div', {class: 'answers'}, names.map((name, m) => el('div', {class: 'answer'},
      el('div', {class: 'row small dim'}, el('b', {}, name),
        `${count(question.answers[m].tokens)} ${T('tokens', '词元')}`, question.answers[m].ended ? null : el('span', {class: 'bad'}, T('cut off', '没说完'))),
      said(question, m),
      names.length > 1 && question.answers[m].text ? el('div', {class: 'small dim'}, names.map((reader, r) => `${r ? ' · ' : ''}${T('for', '对')} ${reader}: ${number(total(question.read[r][m]))} ${T('bits', '比特')}`).join('')) : null))),
    question.references.length ? el('p', {class: 'small dim'}, `${T('reference', '参考答案')}: ${question.references.join(' | ')}`) : null);
}

function answersPanel() {
  const kinds = [...new Set(data.questions.map((question) => question.kind).filter(Boolean))];
  const list = el('div', {});
  const buttons = el('div', {class: 'row'});
  const again = () => {
    const choice = (label, active, act) => el('button', {class: active ? 'chosen small' : 'small', 'aria-pressed': active ? 'true' : 'false', on: {click: () => { act(); again(); }}}, label);
    buttons.replaceChildren(
      choice(T('where they begin to differ', '从哪里开始不同'), view === 'text', () => { view = 'text'; }),
      ...names.map((name, m) => choice(T(`how surprised ${name} is`, `${name} 有多意外`), view === m, () => { view = m; })),
      ...(kinds.length > 1 ? [el('select', {'aria-label': T('kind of question', '问题种类'), on: {change: (event) => { kind = event.target.value; again(); }}},
        el('option', {value: ''}, T('all kinds', '全部种类')), kinds.map((own) => el('option', {value: own, selected: own === kind}, own)))] : []));
    list.replaceChildren(...data.questions.map((question, q) => (kind && question.kind !== kind ? null : questionCard(question, q))).filter(Boolean));
  };
  again();
  return [el('section', {}, el('h2', {}, T(`The answers to ${data.questions.length} questions`, `${data.questions.length} 个问题的回答`)),
    el('p', {class: 'explain'}, T(
      'Marked is the word in which an answer leaves the other one. Or colour the words by how many bits a model would have needed for them: warm words are those it would not have said itself.',
      '标出的是两个回答开始不同的那个词。也可以按“某个模型要用多少比特才会这么说”上色：颜色越暖，越不是它自己会说的话。')), buttons), list];
}

// ---- figures

const TITLES = {exact: '答案完全正确', f1: '词的 F1', number: '数字正确', bpb: '每字节比特', ppl: '困惑度', preference: '更偏向好的回答', choice: '选项正确', choice_norm: '选项正确（按字节）', letter: '字母正确', ended: '自己结束', rep_4: '重复（rep-4）', wrong_language: '语言与提问不同', words: '回答的词数'};
const titled = (row) => T(row.title, TITLES[row.name] ?? row.title) + (row.better < 0 ? T(' (less is better)', '（越小越好）') : '');

const shown = (row, value) => (value === null || value === undefined ? '–' : row.form === 'share' ? `${(100 * value).toFixed(1)}%` : number(value, 4));
const signed = (row, value) => (value === null || value === undefined ? '–' : `${value > 0 ? '+' : ''}${row.form === 'share' ? (100 * value).toFixed(1) : number(value, 3)}`);

function interval(row, change) {
  if (!change || change.low === null || change.high === null) return el('span', {class: 'dim'}, '–');
  const reach = Math.max(...row.changes.filter(Boolean).flatMap((own) => [Math.abs(own.low ?? 0), Math.abs(own.high ?? 0)]), 1e-12);
  const at = (value) => `${50 + 48 * (value / reach)}%`;
  const better = row.better * change.value;
  const clear = change.low > 0 || change.high < 0;
  const tint = !clear || row.better === 0 ? 'var(--dim)' : better > 0 ? 'var(--good)' : 'var(--bad)';
  return el('span', {class: 'interval', style: {'--tint': tint}, title: `${signed(row, change.low)} … ${signed(row, change.high)}`},
    el('span', {class: 'axis'}), el('span', {class: 'span', style: {left: at(change.low), width: `${48 * ((change.high - change.low) / reach)}%`}}),
    el('span', {class: 'dot', style: {left: at(change.value)}}));
}

function figures(rows) {
  const head = [T('figure', '指标'), T('rows', '行数'), ...names.flatMap((name, m) => (m === first ? [name] : [name, T('change', '变化'), T('95% interval', '95% 区间')]))];
  const numbers = [1];
  names.forEach((_, m) => numbers.push(m === first ? 2 : 3 * m, ...(m === first ? [] : [3 * m + 1])));
  const cells = (row) => names.flatMap((_, m) => {
    const value = shown(row, row.values[m].value);
    return m === first ? [value] : [value, signed(row, row.changes[m].value), interval(row, row.changes[m])];
  });
  return table(head, rows.map((row) => [titled(row), count(row.rows), ...cells(row)]), numbers);
}

function figuresPanel() {
  if (!data.figures.length || names.length < 2) return null;
  return panel(T('What changed', '变了什么'), T(
    `Every change is against ${names[first]}, over the same questions. A bar that does not touch the middle line is a change that another draw of such questions would show too.`,
    `变化都是相对 ${names[first]}、在同样的问题上算的。不碰中线的横条，换一批这样的问题多半还会出现。`), figures(data.figures));
}

function heldOutPanel() {
  if (!data.held_out.length) return null;
  return panel(T('Forgetting', '遗忘'), T(
    'The loss on texts that nobody trained on, source by source. Where it rises, the model has lost something that it knew before.',
    '在没有训练过的文本上的损失，按来源分开。哪里变大，模型就忘了原来会的东西。'),
  data.held_out.map((file) => [el('h3', {}, `${file.file} (${count(file.rows)} ${T('rows', '行')})`), file.figures.length ? figures(file.figures) : null, file.notes.map((note) => el('p', {class: 'small dim'}, note))]));
}

function surprisePanel() {
  if (names.length < 2) return null;
  return panel(T('How surprised each is by the other', '彼此有多意外'), T(
    'Bits per byte that the model of a row needs for the answers of the model in a column. Small numbers outside the diagonal mean that the two say much the same.',
    '每一行的模型为每一列模型的回答每字节要用多少比特。对角线以外的数字小，说明两者说的差不多。'),
  table([T('reads ↓ / said by →', '读 ↓ / 说 →'), ...names], data.surprise.map((row, r) => [names[r], ...row.map((bits) => number(bits))]), names.map((_, i) => i + 1)));
}

// A path that may go on in the next line after a slash.
const breakable = (path) => path.split('/').map((part, i) => (i ? ['/', el('wbr'), part] : part));

function modelsPanel() {
  const title = {ended: T('end by themselves', '自己结束'), empty: T('empty', '空回答'), rep_4: T('repetition (rep-4)', '重复（rep-4）'), distinct_1: 'distinct-1', distinct_2: 'distinct-2', wrong_language: T('another language', '语言不对'), tags_closed: T('tags closed', '标签闭合'), length_ratio: T('length / reference', '长度/参考')};
  const health = Object.keys(title).filter((name) => data.models.some((model) => name in model.health));
  const rows = [
    [T('file', '文件'), (m) => [breakable(m.path), m.base ? [T(' on ', '，底座 '), breakable(m.base)] : null]],
    [T('parameters', '参数'), (m) => `${(m.parameters / 1e6).toFixed(2)}M` + (m.adapter_parameters ? T(`, ${(m.adapter_parameters / 1e6).toFixed(2)}M of them the adapter`, `，其中适配器 ${(m.adapter_parameters / 1e6).toFixed(2)}M`) : '')],
    [T('size on disk', '文件大小'), (m) => bytes(m.bytes)],
    [T('speed', '速度'), (m) => `${number(m.tokens_per_second)} ${T('tokens/s', '词元/秒')} (${count(m.tokens)} ${T('tokens', '词元')}, ${m.dtype}, ${m.device})`],
    ...health.map((name) => [title[name], (m) => (m.health[name] === undefined ? '–' : name === 'length_ratio' ? number(m.health[name]) : percent(m.health[name]))]),
    [T('training', '训练'), (m) => lineage(m.stages)],
  ];
  return panel(T('The models', '模型'), T(
    'Size, speed (many questions at once) and the health of the answers: figures that a loss does not show. The stages are what the files record; scripts/lineage.py shows their data.',
    '大小、速度（多个问题一起算）和回答的健康状况：损失里看不到的东西。训练阶段是文件自己记下的，数据见 scripts/lineage.py。'),
  table(['', ...names], rows.map(([name, of]) => [name, ...data.models.map(of)])));
}

// ---- blind voting

const key = `sparrow-votes-${data.id}`;

function shuffled(list) {
  for (let i = list.length - 1; i > 0; i--) {
    const j = Math.floor(Math.random() * (i + 1));
    [list[i], list[j]] = [list[j], list[i]];
  }
  return list;
}

function begin() {
  const items = [];
  data.questions.forEach((question, q) => names.forEach((_, a) => names.forEach((__, b) => {
    if (a < b && question.answers[a].text !== question.answers[b].text) items.push(Math.random() < 0.5 ? {question: q, left: a, right: b} : {question: q, left: b, right: a});
  })));
  voting = {items: shuffled(items), at: 0, votes: []};
}

function keep() {
  try { localStorage.setItem(key, JSON.stringify(voting)); } catch { /* not allowed for this file: the page still works */ }
}

function restore() {
  try { return JSON.parse(localStorage.getItem(key)); } catch { return null; }
}

const saved = () => ({format: 'sparrow-votes-1', report: data.id, models: names, votes: voting.votes});

function verdict({a, b, wins_a, wins_b, ties, p}) {
  return el('p', {}, el('b', {}, names[a]), T(` preferred ${wins_a} times, `, ` 胜 ${wins_a} 次，`), el('b', {}, names[b]), T(` ${wins_b} times, ${ties} ties.`, ` 胜 ${wins_b} 次，平 ${ties} 次。`),
    wins_a + wins_b ? el('span', {class: p < 0.05 ? '' : 'dim'}, T(` Sign test: p = ${number(p, 2)}.`, ` 符号检验 p = ${number(p, 2)}。`)) : null);
}

let paintVotes = () => {};

function vote(choice) {
  if (!voting || voting.at >= voting.items.length) return;
  voting.votes.push({...voting.items[voting.at], choice});
  voting.at += 1;
  keep();
  paintVotes();
}

function undo() {
  if (!voting || !voting.at) return;
  voting.at -= 1;
  voting.votes.pop();
  keep();
  paintVotes();
}

function votesPanel() {
  if (names.length < 2) return null;
  const box = el('div', {});
  paintVotes = () => {
    const button = (label, act) => el('button', {on: {click: act}}, label);
    document.body.classList.toggle('voting', voting !== null); // what would tell who said what is hidden
    if (!voting) {
      const earlier = restore();
      box.replaceChildren(...(data.votes.length ? data.votes.map(verdict) : []), el('div', {class: 'row'},
        button(T('Vote blind', '开始盲评'), () => { begin(); paintVotes(); }),
        earlier && earlier.votes && earlier.votes.length ? button(T(`continue (${earlier.votes.length} votes)`, `继续（已投 ${earlier.votes.length} 票）`), () => { voting = earlier; paintVotes(); }) : null));
      return;
    }
    const done = voting.at >= voting.items.length;
    const item = voting.items[voting.at];
    const side = (m, label, choice) => el('div', {class: 'answer'}, el('div', {class: 'row'}, button(label, () => vote(choice))), el('div', {class: 'text'}, data.questions[item.question].answers[m].text || T('(nothing)', '（空）')));
    box.replaceChildren(
      done ? el('p', {}, T('That was all of them. Save the votes and give the file to --votes.', '全部投完。保存后把文件交给 --votes。')) : el('div', {},
        el('p', {class: 'question'}, data.questions[item.question].prompt),
        el('div', {class: 'answers'}, side(item.left, T('1: this one', '1：这个好'), 'left'), side(item.right, T('2: this one', '2：这个好'), 'right'))),
      el('p', {}),
      el('div', {class: 'row'},
        done ? null : button(T('= as good', '= 一样好'), () => vote('tie')),
        button(T('undo', '撤销'), undo), button(T(`Save ${voting.votes.length} votes`, `保存 ${voting.votes.length} 票`), () => download('votes.json', saved())),
        button(T('stop', '结束'), () => { voting = null; paintVotes(); }),
        el('span', {class: 'dim small', 'aria-live': 'polite'}, `${voting.at} / ${voting.items.length}`)));
  };
  paintVotes();
  const votes = panel(T('Which is better? Vote blind', '哪个更好？盲评'), [T(
    'You see two answers without names, in random places. Keys: ', '两个回答不写名字、左右随机。按键：'), el('kbd', {}, '1'), ' ', el('kbd', {}, '2'), ' ', el('kbd', {}, '='), T(
    ', Backspace takes the last vote back. The votes stay in this page until you save them.', '，退格撤销。保存之前，票只在这个页面里。')], box);
  votes.classList.add('votes');
  return votes;
}

document.addEventListener('keydown', (event) => {
  if (!voting || event.ctrlKey || event.altKey || event.metaKey || event.target.tagName === 'SELECT') return;
  const choice = {1: 'left', 2: 'right', '=': 'tie'}[event.key];
  if (choice) vote(choice);
  else if (event.key === 'Backspace') undo();
  else return;
  event.preventDefault();
});

start(() => [
  el('h1', {}, [...(names.length > 1 ? [names.slice(0, -1).join(', ')] : []), names.at(-1)].join(T(' and ', ' 与 '))),
  el('p', {class: 'dim'}, T(`${data.questions.length} questions, the same for all.`, `${data.questions.length} 个问题，所有模型一样。`)),
  modelsPanel(), figuresPanel(), heldOutPanel(), surprisePanel(), votesPanel(), ...answersPanel(),
].filter(Boolean));
