// Conversations and where they are kept: in this browser's localStorage, one entry each, so that two tabs do not
// overwrite each other's.
//
// A conversation is a tree. Each message has `replies`, and `shown` says which of them is on the page. An edited
// question or a second answer is one more reply to the same message; nothing is lost.

const PREFIX = 'sparrow.conversation.';
const DEEPEST = 2000; // messages of a conversation that is read from a file

export function message(role, content, more = {}) {
  return { role, content, reasoning: '', ...more, replies: [], shown: 0 };
}

export function conversation() {
  const id = Date.now().toString(36) + Math.random().toString(36).slice(2, 8);
  return { id, changed: Date.now(), system: '', replies: [], shown: 0 };
}

// Tool calls as the API writes them, with nothing else in them.
export function calls(list) {
  return (Array.isArray(list) ? list.slice(0, 64) : []).map((call) => ({
    id: string(call?.id),
    type: 'function',
    function: { name: string(call?.function?.name), arguments: string(call?.function?.arguments) },
  }));
}

export function add(parent, reply) {
  parent.shown = parent.replies.push(reply) - 1;
  return reply;
}

// The messages on the page: [{message, parent}], from the first on.
export function path(root) {
  const out = [];
  for (let parent = root; parent.replies.length; parent = out.at(-1).message) {
    out.push({ message: parent.replies[parent.shown], parent });
  }
  return out;
}

export function title(root) {
  return (root.replies[0]?.content ?? '').trim().split('\n')[0].slice(0, 60);
}

// ---- kept in the browser

export function saved() {
  const found = Object.keys(localStorage).filter((key) => key.startsWith(PREFIX)).map((key) => {
    try {
      return clean(JSON.parse(localStorage.getItem(key)));
    } catch {
      return null; // not ours, or of another version: left alone
    }
  });
  return found.filter(Boolean).sort((a, b) => b.changed - a.changed);
}

// Throws where the browser has no room left.
export function save(root) {
  root.changed = Date.now();
  localStorage.setItem(PREFIX + root.id, JSON.stringify(root));
}

export const remove = (root) => localStorage.removeItem(PREFIX + root.id);

// ---- files

export const toFile = (list) => JSON.stringify({ format: 'sparrow conversations', version: 1, conversations: list }, null, 1);

// The conversations of an exported file. They get new names, so that none replaces one that is there.
export function fromFile(text) {
  const { format, conversations } = JSON.parse(text);
  if (format !== 'sparrow conversations') throw new Error('format');
  return conversations.map(clean).filter(Boolean).map((root) => ({ ...root, id: conversation().id }));
}

// A conversation made of the known fields only, with the types they must have: the file may be anyone's.
function clean(root) {
  if (!root || typeof root !== 'object' || !Array.isArray(root.replies)) return null;
  const made = conversation();
  made.id = typeof root.id === 'string' && /^\w{1,40}$/.test(root.id) ? root.id : made.id;
  made.changed = number(root.changed) || made.changed;
  made.system = string(root.system);
  const waiting = [[root, made, 0]];
  while (waiting.length) {
    const [from, to, depth] = waiting.pop();
    for (const reply of Array.isArray(from.replies) && depth < DEEPEST ? from.replies : []) {
      if (!['user', 'assistant', 'tool'].includes(reply?.role)) continue;
      const kept = message(reply.role, string(reply.content), { reasoning: string(reply.reasoning) });
      for (const key of ['model', 'ending', 'error', 'call']) if (reply[key]) kept[key] = string(reply[key]);
      for (const key of ['tokens', 'rate', 'first']) if (reply[key]) kept[key] = number(reply[key]);
      if (reply.calls) kept.calls = calls(reply.calls);
      to.replies.push(kept);
      waiting.push([reply, kept, depth + 1]);
    }
    to.shown = Math.min(Math.max(Math.trunc(number(from.shown)), 0), Math.max(to.replies.length - 1, 0));
  }
  return made;
}

const string = (value) => (typeof value === 'string' ? value : '');
const number = (value) => (Number.isFinite(value) ? value : 0);
