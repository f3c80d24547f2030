// The page's words, in English and Chinese. The browser's first language decides.

export const WORDS = {
  en: {
    new: 'New conversation', export: 'Export', import: 'Import', conversations: 'Conversations', model: 'Model',
    settings: 'Settings', ask: 'Ask something', send: 'Send', stop: 'Stop', system: 'System prompt of this conversation',
    api_key: 'API key (kept until this tab is closed)', temperature: 'Temperature', top_p: 'Top p', top_k: 'Top k',
    min_p: 'Min p', repetition_penalty: 'Repetition penalty', max_tokens: 'Longest answer, in tokens', seed: 'Seed',
    as_model: 'as the model likes', think: 'think first', no_think: 'no thoughts',
    as_system: 'as the system', light: 'light', dark: 'dark',
    empty_means: 'An empty field leaves the choice to the server.',
    keys: 'Enter sends, Shift+Enter begins a new line, Esc stops an answer, ↑ in an empty box edits the last question.',
    done: 'Done', thought: 'Thoughts', thinking: 'Thinking …', again: 'Again', edit: 'Edit', copy: 'Copy', remove: 'Delete',
    cancel: 'Cancel', previous: 'Previous version', next: 'Next version', untitled: 'New conversation', on: 'adapter on',
    tokens: 'tokens', per_second: 'tokens/s', first: 's to the first', stopped: 'stopped', length: 'ended at the length limit',
    empty: 'The answer is empty.', need_key: 'This server asks for an API key. Enter it under Settings.',
    no_server: 'The server does not answer', full: 'The browser has no room left for conversations. Export and delete some.',
    bad_file: 'This file holds no conversations', broken: 'The connection broke off', sure: 'Delete this conversation?',
    hello: 'Ask the model something. Conversations stay in this browser.',
    compare: 'Side by side', first_model: 'First model', second_model: 'Second model', blind: 'blind', left: 'Left', right: 'Right',
    better: 'Which answer is better?', left_better: '← Left is better', right_better: 'Right is better →', as_good: '= As good',
    ask_both: 'Ask both', pair_hello: 'Both models answer at the same time. Vote with the buttons, or with 1, 2 and =. Blind, you see which was which after the vote, and the next question begins a new conversation.',
    same_model: 'Choose two different models.', two_models: 'This needs two models. Start the server with several: --weight, --lora_name.',
    votes: 'Votes', models: 'Models', preferred: 'preferred', ties: 'ties', of_these_blind: 'of these blind',
    votes_hint: 'Whether one model is preferred beyond chance: python scripts/compare_models.py --votes votes.json',
    save_votes: 'Save votes', save_pairs: 'Save as pairs for DPO', forget_votes: 'Delete all', sure_votes: 'Delete all votes?',
    pages: 'Pages', chat: 'Chat', runs: 'Runs', theme: 'Colours', enable_thinking: 'Thoughts',
    no_model: 'No model is served: there were no weights yet. What is being trained is shown under Runs.',
    newer: 'Trained again since the server loaded it:', load: 'Load',
    tools: 'Tools', no_tools: 'none', demo_tools: 'calculator and date', called: 'calls a tool',
    rounds: 'No further round of tool calls: the limit is reached.',
    training: 'training', finished: 'done', ended: 'stopped', no_runs: 'No runs yet. Training writes them to out/runs.',
    step: 'step', smooth: 'smooth', logarithmic: 'logarithmic loss',
    second: 's ago', minute: 'min ago', hour: 'h ago', day: 'd ago', reading: 'Reading …', remaining: 'left',
    loss: 'Loss', validation: 'validation', lr: 'Learning rate', tokens_per_second: 'Tokens per second',
    more_figures: 'More figures', differ: 'Settings that differ', pick_runs: 'Choose runs to draw.',
  },
  zh: {
    new: '新对话', export: '导出', import: '导入', conversations: '对话列表', model: '模型',
    settings: '设置', ask: '输入问题', send: '发送', stop: '停止', system: '本对话的系统提示词',
    api_key: 'API 密钥（关闭此标签页后清除）', temperature: '温度', top_p: 'Top p', top_k: 'Top k',
    min_p: 'Min p', repetition_penalty: '重复惩罚', max_tokens: '回答的最大 token 数', seed: '随机种子',
    as_model: '由模型决定', think: '先思考', no_think: '不思考',
    as_system: '跟随系统', light: '浅色', dark: '深色',
    empty_means: '留空则使用服务器的默认值。',
    keys: 'Enter 发送，Shift+Enter 换行，Esc 停止回答；输入框为空时按 ↑ 修改上一个问题。',
    done: '完成', thought: '思考过程', thinking: '思考中……', again: '重新回答', edit: '修改', copy: '复制', remove: '删除',
    cancel: '取消', previous: '上一个版本', next: '下一个版本', untitled: '新对话', on: '适配器，基座',
    tokens: 'token', per_second: 'token/秒', first: '秒后开始', stopped: '已停止', length: '达到长度上限',
    empty: '回答为空。', need_key: '服务器需要 API 密钥，请在“设置”中填写。',
    no_server: '服务器没有响应', full: '浏览器的存储空间已满，请导出并删除部分对话。',
    bad_file: '文件中没有对话', broken: '连接中断', sure: '删除这个对话？',
    hello: '向模型提问吧。对话只保存在这个浏览器里。',
    compare: '并排对比', first_model: '第一个模型', second_model: '第二个模型', blind: '盲评', left: '左', right: '右',
    better: '哪个回答更好？', left_better: '← 左边更好', right_better: '右边更好 →', as_good: '= 一样好',
    ask_both: '同时提问', pair_hello: '两个模型同时回答。用按钮或 1、2、= 键投票。盲评时，投票后才显示模型名称，下一个问题开始新的对话。',
    same_model: '请选择两个不同的模型。', two_models: '需要两个模型：启动服务器时用 --weight、--lora_name 指定多个。',
    votes: '投票', models: '模型', preferred: '胜出次数', ties: '平局', of_these_blind: '其中盲评',
    votes_hint: '偏好是否超出偶然：python scripts/compare_models.py --votes votes.json',
    save_votes: '保存投票', save_pairs: '保存为 DPO 数据', forget_votes: '全部删除', sure_votes: '删除所有投票？',
    pages: '页面', chat: '对话', runs: '训练记录', theme: '配色', enable_thinking: '思考',
    no_model: '还没有权重，所以没有可用的模型。正在训练的内容见“训练记录”。',
    newer: '以下模型在加载后又重新训练过：', load: '加载',
    tools: '工具', no_tools: '不使用', demo_tools: '计算器和日期', called: '调用工具',
    rounds: '已达到工具调用的轮数上限。',
    training: '训练中', finished: '已完成', ended: '已停止', no_runs: '还没有训练记录。训练时会写入 out/runs。',
    step: '步', smooth: '平滑', logarithmic: '损失用对数坐标',
    second: '秒前', minute: '分钟前', hour: '小时前', day: '天前', reading: '读取中……', remaining: '剩余',
    loss: '损失', validation: '验证', lr: '学习率', tokens_per_second: '每秒 token 数',
    more_figures: '更多指标', differ: '不同的设置', pick_runs: '请选择要画的训练。',
  },
};

export const language = (navigator.language || 'en').toLowerCase().startsWith('zh') ? 'zh' : 'en';

export const word = (key) => WORDS[language][key];

// Puts the words where the page's HTML names them.
export function translate() {
  document.documentElement.lang = language === 'zh' ? 'zh-CN' : 'en';
  for (const part of document.querySelectorAll('[data-word]')) part.textContent = word(part.dataset.word);
  for (const part of document.querySelectorAll('[data-label]')) part.setAttribute('aria-label', word(part.dataset.label));
  for (const part of document.querySelectorAll('[data-placeholder]')) part.placeholder = word(part.dataset.placeholder);
}
