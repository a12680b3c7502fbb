// Files on their way into a message: picked, dropped or pasted; each a chip with its name and tokens or what is wrong.

import { uploadFile } from "./api.js";
import { announce } from "./announcer.js";
import { byId, h, icon } from "./dom.js";
import { setLabel, setText } from "./language.js";
import { detailOf, problemText } from "./problem.js";

const LONGEST_NAME = 200; // characters, as the server keeps at most
const PASSING = ["unreachable", "rate_limit_exceeded", "overloaded", "engine_unavailable", "other"]; // worth a retry

/** {files(), tokens(), busy(), clear(), putBack(files)} over the composer's list of files. A file is what the server
 * made of it: {id, name, tokens}. As long as one is being read or was refused, the message waits: `busy()`. */
export function createUploads(onChange) {
  const list = byId("files");
  const input = byId("file-input");
  let uploads = []; // {chip, state: where it says what is going on, name, file: once it is read, controller}

  function create(name) {
    const chip = h("li", { class: "file" });
    const upload = { chip, state: h("span", { class: "size" }), name, file: null, controller: null };
    const remove = h("button", { type: "button", class: "plain", onclick: () => drop(upload) }, icon("close"));
    setLabel(remove, "remove_file", { name });
    chip.append(icon("file"), h("span", { class: "name", dir: "auto", title: name }, name), upload.state, remove);
    return upload;
  }

  function add(source) {
    const name = shortened(source.name);
    const upload = create(name);
    uploads.push(upload);
    read(upload, new File([source], name));
  }

  async function read(upload, source) {
    const { chip, state } = upload;
    const { signal } = (upload.controller = new AbortController());
    chip.classList.add("waiting-file");
    chip.classList.remove("refused");
    setText(state, "reading");
    show();
    try {
      upload.file = await uploadFile(source, byId("model").value, signal);
      setText(state, "tokens", { count: upload.file.tokens });
    } catch (problem) {
      if (signal.aborted) return;
      refuse(upload, problem, () => read(upload, source));
    }
    upload.controller = null;
    chip.classList.remove("waiting-file");
    show();
  }

  function refuse({ chip, state, name }, problem, again) {
    chip.classList.add("refused");
    delete state.dataset.text; // its parts have texts of their own
    const detail = detailOf(problem);
    const retry = setText(h("button", { type: "button", class: "quiet", onclick: again }), "retry");
    state.replaceChildren(setText(h("strong"), problemText(problem)));
    if (detail) state.append(h("span", { class: "detail" }, detail));
    if (PASSING.includes(problem.code)) state.append(retry);
    announce("file_refused", { name });
  }

  function drop(upload) {
    upload.controller?.abort();
    uploads = uploads.filter((other) => other !== upload);
    show();
    byId("prompt").focus();
  }

  function show() {
    list.replaceChildren(...uploads.map(({ chip }) => chip));
    list.hidden = !uploads.length;
    onChange();
  }

  function addAll(files) {
    for (const file of files) add(file);
  }

  byId("attach").addEventListener("click", () => input.click());
  input.addEventListener("change", () => {
    addAll(input.files);
    input.value = "";
  });
  byId("prompt").addEventListener("paste", (event) => {
    if (!event.clipboardData.files.length) return;
    event.preventDefault();
    addAll(event.clipboardData.files);
  });
  acceptDrops(addAll);

  const files = () => uploads.filter(({ file }) => file).map(({ file }) => file);
  return {
    files,
    tokens: () => files().reduce((sum, { tokens }) => sum + tokens, 0),
    busy: () => uploads.some(({ file }) => !file),
    clear() {
      uploads = [];
      show();
    },
    /** Show files that were read before, in front of those here. */
    putBack(earlier) {
      uploads.unshift(...earlier.map((file) => {
        const upload = Object.assign(create(file.name), { file });
        setText(upload.state, "tokens", { count: file.tokens });
        return upload;
      }));
      show();
    },
  };
}

/** A name that is not longer than the server takes, with its ending. */
function shortened(name) {
  const letters = [...name];
  if (letters.length <= LONGEST_NAME) return name;
  const ending = /\.\w{1,10}$/.exec(name)?.[0] ?? "";
  return letters.slice(0, LONGEST_NAME - ending.length).join("") + ending;
}

function acceptDrops(onFiles) {
  const target = byId("drop");
  const carriesFiles = (event) => event.dataTransfer?.types.includes("Files");
  addEventListener("dragover", (event) => {
    if (!carriesFiles(event)) return;
    event.preventDefault();
    target.hidden = false;
  });
  addEventListener("dragleave", (event) => {
    if (!event.relatedTarget) target.hidden = true;
  });
  addEventListener("drop", (event) => {
    if (!carriesFiles(event)) return;
    event.preventDefault();
    target.hidden = true;
    onFiles(event.dataTransfer.files);
  });
}
