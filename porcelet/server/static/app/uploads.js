// Files on their way into a message: picked, dropped or pasted; each a chip with its name and tokens or what is wrong.

import { uploadFile } from "./api.js";
import { announce } from "./announcer.js";
import { byId, h, icon } from "./dom.js";
import { setLabel, setText } from "./language.js";
import { problemText } from "./problem.js";

/** {ids(), tokens(), busy(), clear()} over the composer's list of files. */
export function createUploads(onChange) {
  const list = byId("files");
  const input = byId("file-input");
  let uploads = []; // {chip, file: what the server made of it, controller}

  async function add(file) {
    const upload = { chip: h("li", { class: "file waiting-file" }), file: null, controller: new AbortController() };
    const state = setText(h("span", { class: "size" }), "reading");
    const remove = h("button", { type: "button", class: "plain", onclick: () => drop(upload) }, icon("close"));
    setLabel(remove, "remove_file", { name: file.name });
    upload.chip.append(icon("file"), h("span", { class: "name" }, file.name), state, remove);
    uploads.push(upload);
    show();
    try {
      upload.file = await uploadFile(file, byId("model").value, upload.controller.signal);
      setText(state, "tokens", { count: upload.file.tokens });
    } catch (problem) {
      if (upload.controller.signal.aborted) return;
      upload.chip.classList.add("refused");
      setText(state, problemText(problem));
      state.title = problem.message; // the server's own words, with the numbers
      announce("file_refused", { name: file.name });
    }
    upload.controller = null;
    upload.chip.classList.remove("waiting-file");
    show();
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

  const read = () => uploads.filter(({ file }) => file);
  return {
    ids: () => read().map(({ file }) => file.id),
    tokens: () => read().reduce((sum, { file }) => sum + file.tokens, 0),
    busy: () => uploads.some(({ controller }) => controller),
    clear() {
      uploads.forEach(({ controller }) => controller?.abort());
      uploads = [];
      show();
    },
  };
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
