// Votes about two answers to the same question: where they are kept (this browser's localStorage, one entry each), and
// the files that are made of them.
//
// A vote: {id, at, blind, left, right: names of the models, choice: left | right | tie, system,
//          turns: [{question, answers: [left, right]}]}, of which the last is the one that was voted about.

const PREFIX = 'sparrow.vote.';
const CHOICES = ['left', 'right', 'tie'];

// Throws where the browser has no room left.
export function keep(vote) {
  const id = Date.now().toString(36) + Math.random().toString(36).slice(2, 8);
  localStorage.setItem(PREFIX + id, JSON.stringify({ id, at: Date.now(), ...vote }));
}

export function saved() {
  const found = Object.keys(localStorage).filter((key) => key.startsWith(PREFIX)).map((key) => {
    try {
      return JSON.parse(localStorage.getItem(key));
    } catch {
      return null;
    }
  });
  return found.filter((vote) => CHOICES.includes(vote?.choice) && vote.turns?.length).sort((a, b) => a.at - b.at);
}

export function forget() {
  for (const key of Object.keys(localStorage)) if (key.startsWith(PREFIX)) localStorage.removeItem(key);
}

// Of each two models, in the order of their names: {a, b, wins_a, wins_b, ties, blind}.
export function tally(votes) {
  const rows = new Map();
  for (const { left, right, choice, blind } of votes) {
    const [a, b] = [left, right].sort();
    const key = JSON.stringify([a, b]);
    const row = rows.get(key) ?? { a, b, wins_a: 0, wins_b: 0, ties: 0, blind: 0 };
    rows.set(key, row);
    if (choice === 'tie') row.ties += 1;
    else row[(choice === 'left' ? left : right) === a ? 'wins_a' : 'wins_b'] += 1;
    row.blind += Number(Boolean(blind));
  }
  return [...rows.values()];
}

// What evaluation/votes.py reads: python scripts/compare_models.py --votes votes.json
export function toFile(votes) {
  const models = [...new Set(votes.flatMap(({ left, right }) => [left, right]))];
  return JSON.stringify({
    format: 'sparrow-votes-1',
    report: 'page',
    models,
    questions: votes.map(({ turns, system, blind, left, right }) => ({
      prompt: turns.at(-1).question, answers: { [left]: turns.at(-1).answers[0], [right]: turns.at(-1).answers[1] }, earlier: turns.slice(0, -1), system, blind,
    })),
    votes: votes.map(({ left, right, choice }, question) => ({ question, left: models.indexOf(left), right: models.indexOf(right), choice })),
  }, null, 1);
}

// Rows for trainer/train_dpo.py. Left out: ties, and answers to later questions, before which the two models had said
// different things.
export function toPairs(votes) {
  return votes.filter(({ choice, turns }) => choice !== 'tie' && turns.length === 1).map(({ choice, turns, system }) => {
    const [{ question, answers }] = turns;
    const before = [...(system ? [{ role: 'system', content: system }] : []), { role: 'user', content: question }];
    const [chosen, rejected] = choice === 'left' ? answers : [...answers].reverse();
    const said = (content) => [...before, { role: 'assistant', content }];
    return `${JSON.stringify({ chosen: said(chosen), rejected: said(rejected) })}\n`;
  }).join('');
}
