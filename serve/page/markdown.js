// What a model said -> elements. Only text nodes are made of it, so nothing in it can be markup, a link or a script.
// Known are paragraphs, headings, lists, code blocks, `code` and **bold**. The rest stays as it was written.

// Control characters and those that turn the direction of text around. On the page they would hide what is there.
const HIDDEN = /[\0-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028\u2029\u202a-\u202e\u2066-\u2069\ufeff]/g;

export function visible(text) {
  return text.replace(/\r\n?/g, '\n').replace(HIDDEN, (c) => '\\u' + c.charCodeAt(0).toString(16).padStart(4, '0'));
}

export function element(name, text, attributes = {}) {
  const made = Object.assign(document.createElement(name), attributes);
  if (text) made.textContent = visible(text);
  return made;
}

// One line or paragraph: `code` and **bold**. A mark without its partner is text.
function inline(parent, text) {
  const marks = [['`', 'code'], ['**', 'strong']];
  let from = 0;
  let at = 0;
  while (at < text.length) {
    const [mark, name] = marks.find(([m]) => text.startsWith(m, at)) ?? [];
    const end = mark ? text.indexOf(mark, at + mark.length) : -1;
    if (end > at + (mark?.length ?? 0)) {
      parent.append(visible(text.slice(from, at)), element(name, text.slice(at + mark.length, end)));
      from = at = end + mark.length;
    } else {
      if (mark && end < 0) marks.splice(marks.findIndex(([m]) => m === mark), 1); // it has no partner from here on
      at += mark?.length ?? 1;
    }
  }
  parent.append(visible(text.slice(from)));
}

export function render(text, copyWord) {
  const out = document.createDocumentFragment();
  const lines = text.replace(/\r\n?/g, '\n').split('\n');
  let paragraph = [];
  let list = null;

  const close = () => {
    if (paragraph.length) inline(out.appendChild(element('p')), paragraph.join('\n'));
    paragraph = [];
  };

  for (let i = 0; i < lines.length; i++) {
    const fence = /^ {0,3}(`{3,}|~{3,})\s*([\w+#.-]*)\s*$/.exec(lines[i]);
    const item = /^\s{0,12}([-*+]|\d{1,9}[.)])\s+(.*)$/.exec(lines[i]);
    const heading = /^(#{1,6})\s+(.*)$/.exec(lines[i]);
    if (!item && lines[i].trim()) list = null;
    if (fence || item || heading || !lines[i].trim()) close();
    if (fence) {
      const code = [];
      while (++i < lines.length && !lines[i].trim().startsWith(fence[1])) code.push(lines[i]);
      const block = out.appendChild(element('pre'));
      block.append(element('code', code.join('\n')));
      if (navigator.clipboard) { // only over https and on this machine
        const copy = block.appendChild(element('button', copyWord, { className: 'small' }));
        copy.onclick = () => navigator.clipboard.writeText(code.join('\n'));
      }
    } else if (item) {
      const kind = /\d/.test(item[1]) ? 'OL' : 'UL';
      if (list?.tagName !== kind) {
        list = out.appendChild(element(kind));
        if (kind === 'OL') list.start = parseInt(item[1], 10);
      }
      inline(list.appendChild(element('li')), item[2]);
    } else if (heading) {
      inline(out.appendChild(element('h3')), heading[2]);
    } else if (lines[i].trim()) {
      paragraph.push(lines[i]);
    }
  }
  close();
  return out;
}

// ---- small parts that pages share

// A file that the reader saves: made here, sent nowhere.
export function download(name, content, type) {
  const link = element('a', '', { href: URL.createObjectURL(new Blob([content], { type })), download: name });
  link.click();
  URL.revokeObjectURL(link.href);
}

export function submitOnEnter(event, form) {
  // while a Chinese or Japanese word is being composed, Enter belongs to the input method
  if (event.key !== 'Enter' || event.shiftKey || event.isComposing || event.keyCode === 229) return;
  event.preventDefault();
  form.requestSubmit();
}

// A text box as high as its text.
export function fit(box) {
  box.style.height = 'auto';
  box.style.height = `${Math.min(box.scrollHeight + 2, innerHeight / 3)}px`;
}
