// The page's words, in English and Chinese. The browser's first language decides.

export const WORDS = {
  en: {
    new: 'New conversation', export: 'Export', import: 'Import', conversations: 'Conversations', model: 'Model',
    settings: 'Settings', ask: 'Ask something', send: 'Send', stop: 'Stop', system: 'System prompt of this conversation',
    api_key: 'API key (kept until this tab is closed)', temperature: 'Temperature', top_p: 'Top p', top_k: 'Top k',
    min_p: 'Min p', repetition_penalty: 'Repetition penalty', max_tokens: 'Longest answer, in tokens', seed: 'Seed',
    thoughts: 'Thoughts', as_model: 'as the model likes', think: 'think first', no_think: 'no thoughts',
    colours: 'Colours', as_system: 'as the system', light: 'light', dark: 'dark',
    empty_means: 'An empty field leaves the choice to the server.',
    keys: 'Enter sends, Shift+Enter begins a new line, Esc stops an answer, ↑ in an empty box edits the last question.',
    done: 'Done', thought: 'Thoughts', thinking: 'Thinking …', again: 'Again', edit: 'Edit', copy: 'Copy', remove: 'Delete',
    cancel: 'Cancel', previous: 'Previous version', next: 'Next version', untitled: 'New conversation', on: 'adapter on',
    tokens: 'tokens', per_second: 'tokens/s', first: 's to the first', stopped: 'stopped', length: 'ended at the length limit',
    empty: 'The answer is empty.', need_key: 'This server asks for an API key. Enter it under Settings.',
    no_server: 'The server does not answer', full: 'The browser has no room left for conversations. Export and delete some.',
    bad_file: 'This file holds no conversations', broken: 'The connection broke off', sure: 'Delete this conversation?',
    hello: 'Ask the model something. Conversations stay in this browser.',
  },
  zh: {
    new: '新对话', export: '导出', import: '导入', conversations: '对话列表', model: '模型',
    settings: '设置', ask: '输入问题', send: '发送', stop: '停止', system: '本对话的系统提示词',
    api_key: 'API 密钥（关闭此标签页后清除）', temperature: '温度', top_p: 'Top p', top_k: 'Top k',
    min_p: 'Min p', repetition_penalty: '重复惩罚', max_tokens: '回答的最大 token 数', seed: '随机种子',
    thoughts: '思考', as_model: '由模型决定', think: '先思考', no_think: '不思考',
    colours: '配色', as_system: '跟随系统', light: '浅色', dark: '深色',
    empty_means: '留空则使用服务器的默认值。',
    keys: 'Enter 发送，Shift+Enter 换行，Esc 停止回答；输入框为空时按 ↑ 修改上一个问题。',
    done: '完成', thought: '思考过程', thinking: '思考中……', again: '重新回答', edit: '修改', copy: '复制', remove: '删除',
    cancel: '取消', previous: '上一个版本', next: '下一个版本', untitled: '新对话', on: '适配器，基座',
    tokens: 'token', per_second: 'token/秒', first: '秒后开始', stopped: '已停止', length: '达到长度上限',
    empty: '回答为空。', need_key: '服务器需要 API 密钥，请在“设置”中填写。',
    no_server: '服务器没有响应', full: '浏览器的存储空间已满，请导出并删除部分对话。',
    bad_file: '文件中没有对话', broken: '连接中断', sure: '删除这个对话？',
    hello: '向模型提问吧。对话只保存在这个浏览器里。',
  },
};

export const language = (navigator.language || 'en').toLowerCase().startsWith('zh') ? 'zh' : 'en';

export const word = (key) => WORDS[language][key];
