// Every text a person can read, in every language. Plain JSON between the marks, so that a test can read it too.
export const TEXTS = {
  "en": {
    "language_name": "English",
    "language": "Language",
    "new_chat": "New chat",
    "greeting": "What is on your mind?",
    "privacy": "The model runs on this machine. What you write stays here.",
    "suggestion_explain": "Why is the sky blue?",
    "suggestion_write": "Write a short poem about the sea",
    "suggestion_plan": "Give me three ideas for a rainy afternoon",
    "conversation": "Conversation",
    "message": "Message",
    "placeholder": "Write a message",
    "send": "Send",
    "stop": "Stop",
    "note": "Models make mistakes. Check what matters.",
    "you": "You",
    "answering": "Answering",
    "stopped": "stopped",
    "cut": "cut off at the length limit",
    "speed": "{count} tokens · {rate} tokens/s",
    "code": "Code",
    "copy": "Copy",
    "copied": "Copied",
    "error_invalid_request_error": "This request cannot be served.",
    "error_capacity_error": "The server is full at the moment. Try again shortly.",
    "error_engine_error": "The engine has stopped. Start the server again.",
    "error_unreachable": "The server does not answer. Is it still running?",
    "error_other": "Something went wrong on the server. Its log says more."
  },
  "fr": {
    "language_name": "Français",
    "language": "Langue",
    "new_chat": "Nouvelle discussion",
    "greeting": "À quoi pensez-vous ?",
    "privacy": "Le modèle tourne sur cette machine. Ce que vous écrivez y reste.",
    "suggestion_explain": "Pourquoi le ciel est-il bleu ?",
    "suggestion_write": "Écris un court poème sur la mer",
    "suggestion_plan": "Trois idées pour un après-midi de pluie",
    "conversation": "Discussion",
    "message": "Message",
    "placeholder": "Écrivez un message",
    "send": "Envoyer",
    "stop": "Arrêter",
    "note": "Les modèles se trompent. Vérifiez ce qui compte.",
    "you": "Vous",
    "answering": "Réponse en cours",
    "stopped": "arrêté",
    "cut": "coupé à la longueur maximale",
    "speed": "{count} jetons · {rate} jetons/s",
    "code": "Code",
    "copy": "Copier",
    "copied": "Copié",
    "error_invalid_request_error": "Cette demande ne peut pas être traitée.",
    "error_capacity_error": "Le serveur est complet pour l’instant. Réessayez dans un moment.",
    "error_engine_error": "Le moteur s’est arrêté. Relancez le serveur.",
    "error_unreachable": "Le serveur ne répond pas. Tourne-t-il encore ?",
    "error_other": "Un problème est survenu sur le serveur. Son journal en dit plus."
  },
  "zh": {
    "language_name": "中文",
    "language": "语言",
    "new_chat": "新对话",
    "greeting": "您在想什么？",
    "privacy": "模型在这台机器上运行，您写的内容不会离开这里。",
    "suggestion_explain": "天空为什么是蓝色的？",
    "suggestion_write": "写一首关于大海的短诗",
    "suggestion_plan": "下雨的午后可以做什么？给我三个主意",
    "conversation": "对话",
    "message": "消息",
    "placeholder": "写点什么",
    "send": "发送",
    "stop": "停止",
    "note": "模型会出错，重要内容请核实。",
    "you": "您",
    "answering": "正在回答",
    "stopped": "已停止",
    "cut": "已达到长度上限",
    "speed": "{count} 个词元 · {rate} 词元/秒",
    "code": "代码",
    "copy": "复制",
    "copied": "已复制",
    "error_invalid_request_error": "无法处理这个请求。",
    "error_capacity_error": "服务器目前已满，请稍后再试。",
    "error_engine_error": "引擎已停止，请重新启动服务器。",
    "error_unreachable": "服务器没有响应，它还在运行吗？",
    "error_other": "服务器出了问题，详情见其日志。"
  }
};

const STORED = "porcelet.language";
let language = preferred();

/** The text of a key in the current language, with {names} filled in. */
export function text(key, values = {}) {
  return TEXTS[language][key].replace(/\{(\w+)\}/g, (_, name) => values[name]);
}

export function currentLanguage() {
  return language;
}

/** Change the language, remember it, and rewrite the page's fixed texts. */
export function useLanguage(code) {
  language = code;
  localStorage.setItem(STORED, code);
  translatePage();
}

/** Write the texts of all elements that name one: data-text, data-label, data-placeholder. */
export function translatePage() {
  document.documentElement.lang = language;
  for (const element of document.querySelectorAll("[data-text]")) element.textContent = text(element.dataset.text);
  for (const element of document.querySelectorAll("[data-placeholder]")) {
    element.placeholder = text(element.dataset.placeholder);
  }
  for (const element of document.querySelectorAll("[data-label]")) {
    element.setAttribute("aria-label", text(element.dataset.label));
    element.title = element.matches("button, select") ? text(element.dataset.label) : "";
  }
}

function preferred() {
  const wanted = [localStorage.getItem(STORED), ...navigator.languages].filter(Boolean);
  return wanted.map((code) => code.slice(0, 2)).find((code) => code in TEXTS) ?? "en";
}
