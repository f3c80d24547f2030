// What the pages keep of their user's choices, and the dialog in which they are made.

import { element } from './markdown.js';
import { word } from './words.js';

const NUMBERS = [ // name in the API, least, most, step
  ['temperature', 0, 100, 'any'], ['top_p', 0, 1, 'any'], ['top_k', 0, '', 1], ['min_p', 0, 0.999, 'any'],
  ['repetition_penalty', 0.01, 100, 'any'], ['max_tokens', 1, '', 1], ['seed', 0, '', 1],
];
const CHOICES = [ // name, and what it may be: [value, word]
  ['enable_thinking', [['', 'as_model'], ['true', 'think'], ['false', 'no_think']]],
  ['tools', [['', 'no_tools'], ['demo', 'demo_tools']]],
  ['theme', [['', 'as_system'], ['light', 'light'], ['dark', 'dark']]],
];

export const settings = read('sparrow.settings');

export function read(name) {
  try {
    return JSON.parse(localStorage.getItem(name)) ?? {};
  } catch {
    return {};
  }
}

export function set(name, value) {
  settings[name] = value;
  localStorage.setItem('sparrow.settings', JSON.stringify(settings));
}

export const apiKey = () => sessionStorage.getItem('sparrow.api_key') ?? '';

// The fields of a request that the user has set.
export function sampling() {
  const numbers = NUMBERS.map(([name]) => [name, settings[name]]).filter(([, value]) => value);
  const thinks = settings.enable_thinking ? { enable_thinking: settings.enable_thinking === 'true' } : {};
  return { ...Object.fromEntries(numbers.map(([name, value]) => [name, Number(value)])), ...thinks };
}

function theme() {
  document.documentElement.dataset.theme = settings.theme ?? '';
}

function row(name, field, wide = false) {
  const label = element('label', '', { className: wide ? 'wide' : '' });
  label.append(element('span', word(name)), Object.assign(field, { name }));
  return label;
}

function choice(options) {
  const field = element('select');
  field.append(...options.map(([value, name]) => element('option', word(name), { value })));
  return field;
}

// Builds the dialog, once a page. system: {get, set} of the system prompt. onKey: called when the key has changed.
// -> open(askForKey), which shows it.
export function settingsDialog({ system, onKey }) {
  const dialog = element('dialog', '', { id: 'settings' });
  const form = element('form', '', { method: 'dialog' });
  const prompt = element('textarea', '', { id: 'system', rows: 4 });
  const key = element('input', '', { id: 'api_key', type: 'password', autocomplete: 'off' });
  const keyRow = row('api_key', key, true);
  keyRow.id = 'key_row';
  keyRow.hidden = !apiKey();
  const fields = [
    ...NUMBERS.map(([name, min, max, step]) => [name, element('input', '', { type: 'number', min, max, step })]),
    ...CHOICES.map(([name, options]) => [name, choice(options)]),
  ];
  form.append(
    ...(system ? [row('system', prompt, true)] : []),
    keyRow,
    ...fields.map(([name, field]) => row(name, field)),
    element('p', word('empty_means'), { className: 'wide hint' }),
    element('p', word('keys'), { className: 'wide hint' }),
    element('button', word('done'), { className: 'wide' }),
  );
  dialog.append(form);
  document.body.append(dialog);
  dialog.onclose = () => {
    for (const [name, field] of fields) if (field.checkValidity()) set(name, field.value);
    system?.set(prompt.value);
    theme();
    const changed = key.value !== apiKey();
    sessionStorage.setItem('sparrow.api_key', key.value);
    if (changed) onKey();
  };
  theme();
  return (askForKey = false) => {
    if (askForKey) keyRow.hidden = false;
    for (const [name, field] of fields) field.value = settings[name] ?? '';
    prompt.value = system?.get() ?? '';
    key.value = apiKey();
    if (!dialog.open) dialog.showModal();
  };
}
